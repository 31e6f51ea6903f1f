"""The CPU path of the gradient of attention equals the definition; the op and its checks."""

from __future__ import annotations

import pytest
import torch

from attention_cases import ALL, MODES, PROBS, assert_gradients, joint, kept
from lowbit_kernels.varlen_attention.backward import attention_backward

ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_equals_definition(dtype: torch.dtype, bits: int | None, asymmetric: tuple) -> None:
    bias = torch.randn(2, 33, 40)
    for lengths, shift in (([7, 0, 1, 33, 0, 12], bias), ([16, 16], bias[:1]), ([1], None), ([0, 25], None)):
        arguments = joint(lengths, 2, 10, dtype)
        assert_gradients(
            attention_backward, arguments, ROUNDING[dtype], shift, scaling=0.3, bits=bits, asymmetric=asymmetric
        )


@pytest.mark.parametrize(("bits", "asymmetric"), [(None, ()), (8, PROBS), (4, ALL)])
@pytest.mark.parametrize("operand", range(4))
def test_nan_stays_in_its_sequence_and_head(operand: int, bits: int | None, asymmetric: tuple) -> None:
    arguments = joint([5, 3, 20], 2, 8)
    arguments[operand][8, 1, 3] = float("nan")
    options = {"scaling": 0.25, "bits": bits, "asymmetric": asymmetric}
    *tensors, cu_seqlens, max_seqlen = arguments
    grads = attention_backward(*tensors, *kept(arguments, **options), cu_seqlens, max_seqlen, **options)
    untouched = torch.ones(28, 2, dtype=torch.bool)
    untouched[8:, 1] = False
    assert any(gradient[8:, 1].isnan().any() for gradient in grads)
    assert all(gradient[untouched].isfinite().all() for gradient in grads)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", [[4, 4], [3, 0, 5]], ids=str)
def test_op_satisfies_torch_library(lengths: list[int], bits: int | None) -> None:
    *tensors, cu_seqlens, max_seqlen = joint(lengths, 2, 8)
    saved = kept((*tensors, cu_seqlens, max_seqlen), scaling=0.5, bits=bits)
    arguments = (*tensors, *saved, cu_seqlens, max_seqlen, 0.5, bits, ["key"], torch.randn(1, 5, 5))
    torch.library.opcheck(torch.ops.lowbit_kernels.attention_backward.default, arguments)


def test_bad_input_is_refused() -> None:
    *tensors, cu_seqlens, max_seqlen = joint([3, 5], 2, 8)
    out, lse = kept((*tensors, cu_seqlens, max_seqlen), scaling=0.5)

    def run(grad_out=tensors[0], lse=lse, cu_seqlens=cu_seqlens, **options):
        attention_backward(grad_out, *tensors[1:], out, lse, cu_seqlens, max_seqlen, scaling=0.5, **options)

    with pytest.raises(ValueError, match=r"grad_out is torch.float32 \(7, 2, 8\), expected the same as query"):
        run(grad_out=tensors[0][1:])
    with pytest.raises(ValueError, match=r"lse has shape \(8, 2\), expected \[H, T\] = \(2, 8\)"):
        run(lse=lse.T)
    with pytest.raises(TypeError, match=r"lse has dtype torch\.float64"):
        run(lse=lse.double())
    with pytest.raises(ValueError, match=r"bias has shape \(2, 4, 5\), expected \[1 or H=2, S, S\], S at least"):
        run(bias=torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="bits=2, accepted: None, 8, 4"):
        run(bits=2)
    with pytest.raises(ValueError, match=r"asymmetric=\['probs'\], accepted: query, key, attention_probs, value"):
        run(bits=8, asymmetric=("probs",))
    with pytest.raises(ValueError, match="0 entries"):
        run(cu_seqlens=cu_seqlens[:0])
    with pytest.raises(ValueError, match="expected 0 to T=8 in steps of 0 to max_seqlen=5"):
        run(cu_seqlens=cu_seqlens[:-1])
