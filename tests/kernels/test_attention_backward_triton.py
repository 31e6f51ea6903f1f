"""The Triton kernels of the gradient of attention equal the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from attention_cases import ALL, MODES, PROBS, assert_gradients, joint, kept, moved
from lowbit_kernels import reference
from lowbit_kernels.varlen_attention import backward_gpu as varlen_attention_backward_gpu
from lowbit_kernels.varlen_attention import shared_gpu as varlen_attention_shared_gpu

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest gradient. Probabilities and gradients of scores are rounded to the input's type before they
# are multiplied, and `out` is in that type.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-8}
if DEVICE == "cuda":  # the interpreter multiplies the bytes of bfloat16 as integers
    ROUNDING[torch.bfloat16] = 2**-5
SOME = [(None, ()), (8, PROBS), (4, ALL)]
REST = [mode for mode in MODES if mode not in SOME]
# The interpreter warns where NaN or infinity arises, which is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def launch(*tensors, scaling=0.25, bits=None, asymmetric=PROBS, bias=None) -> tuple[torch.Tensor, ...]:
    *tensors, max_seqlen = tensors
    tensors = (moved(x, DEVICE) for x in tensors)
    bias = None if bias is None else moved(bias, DEVICE)
    return varlen_attention_backward_gpu.launch(*tensors, max_seqlen, scaling, bits, asymmetric, bias).cpu().unbind(0)


def run(arguments: tuple, bias: torch.Tensor | None = None, **options: object) -> tuple[torch.Tensor, ...]:
    options = {"scaling": 0.25, **options}
    *tensors, cu_seqlens, max_seqlen = arguments
    return launch(*tensors, *kept(arguments, bias, **options), cu_seqlens, max_seqlen, bias=bias, **options)


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("D", varlen_attention_shared_gpu.HEAD_DIMS)
def test_equals_definition(D: int, dtype: torch.dtype, bits: int | None, asymmetric: tuple) -> None:
    """Up to 33 and up to 70 tokens: one block and several, of queries and of keys."""
    lengths = [70, 0, 1] if D in (16, 64) else [0, 1, 33]
    arguments = joint(lengths, 2, D, dtype)
    assert_gradients(launch, arguments, ROUNDING[dtype], scaling=D**-0.5, bits=bits, asymmetric=asymmetric)


@pytest.mark.parametrize(("bits", "asymmetric"), REST)
def test_every_site_may_be_asymmetric(bits: int, asymmetric: tuple) -> None:
    assert_gradients(launch, joint([33, 2], 2, 32), 1e-5, scaling=0.2, bits=bits, asymmetric=asymmetric)


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
@pytest.mark.parametrize(("heads", "dtype"), [(1, torch.float32), (3, torch.float16)])
def test_bias(heads: int, dtype: torch.dtype, bits: int | None, asymmetric: tuple) -> None:
    """One for all heads or one a head, in strides and a type of its own, with keys hidden from some queries."""
    arguments = joint([40, 7], 3, 16)
    bias = (torch.randn(41, heads, 45) * 2).to(dtype).permute(1, 2, 0)[:, :41]
    bias[:, :5, 3:6] = float("-inf")
    assert_gradients(launch, arguments, 1e-5, bias, scaling=-0.3, bits=bits, asymmetric=asymmetric)


@pytest.mark.parametrize("operand", [1, 2, 3])
def test_rows_far_from_zero(operand: int) -> None:
    """Large zero points, of both signs; scores of a size that float32 resolves."""
    arguments = list(joint([33, 7], 2, 32))
    arguments[operand] = arguments[operand] + torch.tensor([300.0, -20.0]).unsqueeze(1)
    assert_gradients(launch, tuple(arguments), 1e-3, scaling=0.01, bits=8, asymmetric=ALL)


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_large_scores_of_either_sign(dtype: torch.dtype, bits: int | None, asymmetric: tuple) -> None:
    """Around 150 and -150: exponentials overflow but for the row's log-sum-exp, which float32 resolves to 1e-5."""
    for sign in (1, -1):
        grad_out, query, key, value, *rest = joint([7, 40], 1, 32, dtype)
        arguments = (grad_out, query.abs() * 6, sign * key.abs() * 6, value, *rest)
        assert_gradients(launch, arguments, max(5e-4, ROUNDING[dtype]), scaling=0.2, bits=bits, asymmetric=asymmetric)


@pytest.mark.parametrize("bits", [None, 8])
def test_any_strides(bits: int | None) -> None:
    *tensors, cu_seqlens, max_seqlen = joint([3, 11, 6], 3, 16)
    expected = run((*(x.contiguous() for x in tensors), cu_seqlens, max_seqlen), bits=bits)
    grad_out, query, key, value = tensors
    columns = value.transpose(0, 2).contiguous().transpose(0, 2)
    by_head = key.transpose(0, 1).contiguous().transpose(0, 1)
    expanded = grad_out[:1, :1, :1].expand_as(query)
    got = run((grad_out, query, by_head, columns, cu_seqlens, max_seqlen), bits=bits)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    got = run((expanded, query, by_head, columns, cu_seqlens, max_seqlen), bits=bits)
    expected = run((expanded.contiguous(), query, key, value, cu_seqlens, max_seqlen), bits=bits)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
def test_a_sequence_gives_the_same_bytes_in_every_batch(bits: int | None, asymmetric: tuple) -> None:
    *tensors, cu_seqlens, max_seqlen = joint([6, 50, 3], 2, 16)
    together = run((*tensors, cu_seqlens, max_seqlen), bits=bits, asymmetric=asymmetric)
    alone = (*(x[6:56] for x in tensors), torch.tensor([0, 50], dtype=torch.int32), 50)
    for got, expected in zip(run(alone, bits=bits, asymmetric=asymmetric), together, strict=True):
        assert torch.equal(got, expected[6:56])


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
def test_nan_stays_in_its_sequence_and_head(bits: int | None, asymmetric: tuple) -> None:
    *tensors, cu_seqlens, max_seqlen = joint([5, 20, 3], 2, 16)
    options = {"scaling": 0.25, "bits": bits, "asymmetric": asymmetric}
    clean = run((*tensors, cu_seqlens, max_seqlen), **options)
    untouched = torch.ones(clean[0].shape[:2], dtype=torch.bool)
    untouched[5:25, 1] = False
    for operand in range(4):
        bad = [x.clone() for x in tensors]
        bad[operand][8, 1, 3] = float("nan")
        arguments = (*bad, cu_seqlens, max_seqlen)
        definition = reference.attention_backward(*arguments, **options)
        for got, before, expected in zip(run(arguments, **options), clean, definition, strict=True):
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got[untouched], before[untouched])


@pytest.mark.parametrize("bits", [None, 8])
def test_no_gradient_gives_none(bits: int | None) -> None:
    grad_out, *rest = joint([9, 40], 2, 16)
    assert not any(gradient.any() for gradient in run((torch.zeros_like(grad_out), *rest), bits=bits))


@pytest.mark.parametrize("bits", [None, 8])
def test_tokens_after_the_last_sequence_get_0(bits: int | None) -> None:
    *tensors, _, _ = joint([20], 2, 16)
    end = torch.tensor([0, 13, 13], dtype=torch.int32)
    expected = run((*(x[:13] for x in tensors), end[:2], 13), bits=bits)
    for x in tensors:
        x[13:] = float("nan")
    for got, own in zip(run((*tensors, end, 20), bits=bits), expected, strict=True):
        assert torch.equal(got[:13], own) and not got[13:].any()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", [[], [0, 0], [3]], ids=str)
def test_empty(lengths: list[int], bits: int | None) -> None:
    arguments = joint(lengths, 0 if lengths == [3] else 2, 16)
    assert all(gradient.shape == arguments[0].shape for gradient in run(arguments, bits=bits))
