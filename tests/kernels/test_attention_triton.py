"""The Triton attention kernels equal the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from lowbit_kernels import reference

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lowbit_kernels import varlen_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBS, ALL = ("attention_probs",), varlen_attention.SITES
MODES = [(None, ()), (8, PROBS), (8, ()), (8, ALL), (4, PROBS), (4, ("key",)), (8, ("query", "value"))]
# Of results that lie between the extremes of the values. The kernel rounds values and probabilities to the input's type
# before they are multiplied.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-9}
if DEVICE == "cuda":  # the interpreter multiplies the bytes of bfloat16 as integers
    ROUNDING[torch.bfloat16] = 2**-6
# The interpreter warns where NaN or infinity arises, which is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def joint(lengths: list[int], H: int, D: int, dtype: torch.dtype = torch.float32) -> tuple:
    """query, key, value as slices of one projection, cu_seqlens, max_seqlen."""
    x = torch.randn(sum(lengths), 3, H, D).to(dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return *x.unbind(1), cu_seqlens, max(lengths, default=0)


def launch(arguments: tuple, bits: int | None, asymmetric: tuple = PROBS, scaling: float | None = None) -> torch.Tensor:
    *tensors, max_seqlen = arguments
    scaling = tensors[0].shape[2] ** -0.5 if scaling is None else scaling
    return varlen_attention.launch(*(x.to(DEVICE) for x in tensors), max_seqlen, scaling, bits, asymmetric)[0].cpu()


def assert_attends(
    got: torch.Tensor,
    arguments: tuple,
    bits: int | None,
    asymmetric: tuple,
    rounding: float,
    scaling: float | None = None,
) -> None:
    """Equal to the definition but for rounding, and for the few probabilities that rounding takes to the next code."""
    wide = (x.double() for x in arguments[:3])
    expected = reference.attention(*wide, *arguments[3:], scaling=scaling, bits=bits, asymmetric=asymmetric)
    assert got.dtype == arguments[0].dtype and got.is_contiguous()
    error = (got.double() - expected).abs() / arguments[2].double().abs().amax()
    if bits is not None:
        assert (error <= 2 / (2 ** (bits - 1) - 1) + rounding).all()
        error = error[(error <= rounding).all(-1)]
        assert error.numel() >= 0.95 * got.numel()
    assert (error <= rounding).all()


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("D", varlen_attention.HEAD_DIMS)
def test_equals_definition(D: int, dtype: torch.dtype, bits: int | None, asymmetric: tuple) -> None:
    for lengths in ([150, 3], [0, 1, 33]) if D == 64 else ([70, 0, 1, 0], [0, 31]):
        arguments = joint(lengths, 2, D, dtype)
        assert_attends(launch(arguments, bits, asymmetric), arguments, bits, asymmetric, ROUNDING[dtype])


@pytest.mark.parametrize("asymmetric", [("query",), ("key",), ALL])
def test_rows_far_from_zero(asymmetric: tuple) -> None:
    """Large zero points, of both signs; scores of a size that float32 resolves."""
    query, key, value, *rest = joint([40, 25], 2, 32)
    shift = torch.tensor([300.0, -20.0]).unsqueeze(1)
    arguments = (query + shift / 300, key + shift, value + shift, *rest)
    got = launch(arguments, 8, asymmetric, scaling=1e-3)
    assert_attends(got, arguments, 8, asymmetric, 5e-5, scaling=1e-3)


@pytest.mark.parametrize("bits", [None, 8])
def test_scaling_is_applied(bits: int | None) -> None:
    arguments = joint([9, 40], 2, 16)
    for scaling in (0.0, 0.3, -1.0):
        expected = reference.attention(*arguments, scaling=scaling, bits=bits)
        torch.testing.assert_close(launch(arguments, bits, scaling=scaling), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("bits", [None, 8])
def test_any_strides(bits: int | None) -> None:
    query, key, value, *rest = joint([3, 11, 6], 3, 16)
    expected = launch((query.contiguous(), key.contiguous(), value.contiguous(), *rest), bits)
    columns = value.transpose(0, 2).contiguous().transpose(0, 2)
    by_head = key.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(launch((query, by_head, columns, *rest), bits), expected)


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
def test_a_sequence_gives_the_same_bytes_in_every_batch(bits: int | None, asymmetric: tuple) -> None:
    query, key, value, *rest = joint([6, 50, 3], 2, 16)
    together = launch((query, key, value, *rest), bits, asymmetric)
    middle = slice(6, 56)
    alone = (query[middle], key[middle], value[middle], torch.tensor([0, 50], dtype=torch.int32), 50)
    assert torch.equal(launch(alone, bits, asymmetric), together[middle])


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", range(3))
def test_nan_stays_in_its_sequence_and_head(operand: int, bad: float, bits: int | None, asymmetric: tuple) -> None:
    arguments = joint([5, 3, 40, 8], 2, 16)
    clean = launch(arguments, bits, asymmetric)
    arguments[operand][8, 1, 3] = bad
    got = launch(arguments, bits, asymmetric)
    expected = reference.attention(*arguments, bits=bits, asymmetric=asymmetric)
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert bad == float("inf") or got[8, 1].isnan().any()
    untouched = torch.ones(got.shape[:2], dtype=torch.bool)
    untouched[8:48, 1] = False
    assert torch.equal(got[untouched], clean[untouched])


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_large_values_and_even_probabilities(dtype: torch.dtype, bits: int | None) -> None:
    query, key, value, *rest = joint([19, 70], 2, 32, dtype)
    arguments = (query * 100, key * 100, value * 1000, *rest)  # most rows have one probability of 1
    error = launch(arguments, bits).double() - reference.attention(
        *(x.double() for x in arguments[:3]), *rest, bits=bits
    )
    assert ((error.abs().amax(-1) <= ROUNDING[dtype] * 4000).float().mean()) > 0.95
    for small in (0.0, 1e-4):  # rows of probabilities with a range of nothing, or little
        arguments = (query * small, key, value, *rest)
        expected = reference.attention(*(x.double() for x in arguments[:3]), *rest, bits=bits)
        torch.testing.assert_close(launch(arguments, bits).double(), expected, rtol=0, atol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", [[], [0, 0], [3]], ids=str)
def test_empty(lengths: list[int], bits: int | None) -> None:
    arguments = joint(lengths, 0 if lengths == [3] else 2, 16)
    assert launch(arguments, bits).shape == arguments[0].shape


@pytest.mark.parametrize("bits", [None, 8])
def test_offsets_beyond_the_tensors_read_nothing(bits: int | None) -> None:
    query, key, value, _, _ = joint([20], 2, 16)
    end = torch.tensor([0, 20], dtype=torch.int32)
    expected = launch((query, key, value, end, 40), bits)
    assert torch.equal(launch((query, key, value, end * 2, 40), bits), expected)
