"""The Triton attention kernels equal the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch

from attention_cases import moved
from launches import work_of
from lowbit_kernels import reference
from lowbit_kernels.varlen_attention import cpu as varlen_attention_cpu
from lowbit_kernels.varlen_attention import gpu as varlen_attention_gpu
from lowbit_kernels.varlen_attention import shared_gpu as varlen_attention_shared_gpu

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBS, ALL = ("attention_probs",), varlen_attention_cpu.SITES
MODES = [(None, ()), (8, PROBS), (8, ()), (8, ALL), (4, PROBS), (4, ("key",)), (8, ("query", "value"))]
SOME = [(None, ()), (8, PROBS), (8, ALL)]
REST = [mode for mode in MODES if mode not in SOME]
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
    return varlen_attention_gpu.launch(*(moved(x, DEVICE) for x in tensors), max_seqlen, scaling, bits, asymmetric)[
        0
    ].cpu()


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


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("D", varlen_attention_shared_gpu.HEAD_DIMS)
def test_equals_definition(D: int, dtype: torch.dtype, bits: int | None, asymmetric: tuple) -> None:
    for lengths in ([150, 3], [0, 1, 33]) if D == 64 else ([70, 0, 1, 0],):
        arguments = joint(lengths, 2, D, dtype)
        assert_attends(launch(arguments, bits, asymmetric), arguments, bits, asymmetric, ROUNDING[dtype])


@pytest.mark.parametrize(("bits", "asymmetric"), REST)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_every_site_may_be_asymmetric(dtype: torch.dtype, bits: int, asymmetric: tuple) -> None:
    arguments = joint([33, 0, 2], 2, 32, dtype)
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


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
def test_a_sequence_gives_the_same_bytes_in_every_batch(bits: int | None, asymmetric: tuple) -> None:
    query, key, value, *rest = joint([6, 50, 3], 2, 16)
    together = launch((query, key, value, *rest), bits, asymmetric)
    middle = slice(6, 56)
    alone = (query[middle], key[middle], value[middle], torch.tensor([0, 50], dtype=torch.int32), 50)
    assert torch.equal(launch(alone, bits, asymmetric), together[middle])


@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_sequence_and_head(bad: float, bits: int | None, asymmetric: tuple) -> None:
    *tensors, cu_seqlens, max_seqlen = joint([5, 3, 40, 8], 2, 16)
    clean = launch((*tensors, cu_seqlens, max_seqlen), bits, asymmetric)
    untouched = torch.ones(clean.shape[:2], dtype=torch.bool)
    untouched[8:48, 1] = False
    for operand in range(3):
        given = [x.clone() for x in tensors]
        given[operand][8, 1, 3] = bad
        arguments = (*given, cu_seqlens, max_seqlen)
        got = launch(arguments, bits, asymmetric)
        expected = reference.attention(*arguments, bits=bits, asymmetric=asymmetric)
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert bad == float("inf") or got[8, 1].isnan().any()
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


def extras(
    arguments: tuple, bits: int | None, asymmetric: tuple = PROBS, bias: torch.Tensor | None = None, kind: str = "all"
) -> tuple:
    """(out, lse, importance) of the kernels."""
    *tensors, max_seqlen = arguments
    given = (moved(x, DEVICE) for x in tensors)
    bias = None if bias is None else moved(bias, DEVICE)
    D = tensors[0].shape[2]
    return tuple(
        x.cpu() for x in varlen_attention_gpu.launch(*given, max_seqlen, D**-0.5, bits, asymmetric, bias, True, kind)
    )


def bias_of(H: int, S: int, *, hidden: float = 0.0) -> torch.Tensor:
    """[H, S, S] with strides of no order, -inf at a share of `hidden` places."""
    bias = torch.randn(S + 3, H, S + 3).transpose(0, 1).transpose(1, 2)
    return bias.masked_fill(torch.rand(bias.shape) < hidden, -math.inf)


@pytest.mark.parametrize(("bits", "asymmetric"), [*SOME, (4, ("key",))])
@pytest.mark.parametrize(("D", "dtype"), [(16, torch.float32), *((128, dtype) for dtype in ROUNDING)])
def test_lse_and_importance_equal_their_definition(
    D: int, dtype: torch.dtype, bits: int | None, asymmetric: tuple
) -> None:
    for lengths, kind, bias in (
        ([70, 3], "all", None),
        ([0, 1, 33], "all", bias_of(1, 33).half()),
        ([40, 0, 1], "all", bias_of(2, 40, hidden=0.3)),
        ([0, 9, 1], "cls", bias_of(2, 9)),
    ):
        arguments = joint(lengths, 2, D, dtype)
        out, lse, importance = extras(arguments, bits, asymmetric, bias, kind)
        wide = (x.double() for x in arguments[:3])
        expected = reference.attention(
            *wide, *arguments[3:], bits=bits, asymmetric=asymmetric, bias=bias, return_lse=True, importance=kind
        )
        assert lse.dtype == importance.dtype == torch.float32
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=2e-5, equal_nan=True)
        torch.testing.assert_close(importance.double(), expected[2], rtol=5e-5, atol=2e-5, equal_nan=True)
        error = (out.double() - expected[0]).abs().amax(-1) / arguments[2].abs().amax().double()
        hidden = expected[0].isnan().all(-1)  # rows without a key
        assert torch.equal(out.isnan().all(-1), hidden)
        close = (error <= 2 * ROUNDING[dtype]) | hidden
        assert close.float().mean() >= (1.0 if bits is None else 0.9)


def test_a_bias_that_hides_whole_blocks_of_keys() -> None:
    """A block without a visible key must leave the row as it was, first or last."""
    arguments = joint([100], 2, 16)
    for bits in (None, 8):
        for seen in (slice(0, 20), slice(80, 100)):
            bias = torch.full((1, 100, 100), -math.inf)
            bias[:, :, seen] = 0.5
            out, lse, importance = extras(arguments, bits, PROBS, bias)
            expected = reference.attention(*arguments, bits=bits, bias=bias, return_lse=True, importance="all")
            torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-5 if bits is None else 0.05)
            torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(importance.double(), expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["all", "cls"])
@pytest.mark.parametrize(("bits", "asymmetric"), SOME)
def test_importance_is_the_same_bytes_in_every_batch_and_each_time(
    bits: int | None, asymmetric: tuple, kind: str
) -> None:
    query, key, value, *rest = joint([6, 50, 3], 3, 16)
    together = extras((query, key, value, *rest), bits, asymmetric, kind=kind)
    again = extras((query, key, value, *rest), bits, asymmetric, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    middle = slice(6, 56)
    alone = (query[middle], key[middle], value[middle], torch.tensor([0, 50], dtype=torch.int32), 50)
    _, lse, importance = extras(alone, bits, asymmetric, kind=kind)
    assert torch.equal(lse, together[1][:, middle]) and torch.equal(importance, together[2][middle])


@pytest.mark.parametrize("kind", ["all", "cls"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_importance_of_a_sequence_sums_to_its_queries(bits: int | None, kind: str) -> None:
    lengths = [1, 0, 41, 7]
    query, key, value, *rest = joint(lengths, 3, 16)
    key[:, 0, 0] = 1.0
    # From ties to one probability of 1; scores of 10^4 have a last place of 10^-3, which is that of their exponentials.
    for size, tolerance in ((0.0, 1e-5), (1.0, 1e-5), (1e4, 5e-3)):
        _, _, importance = extras((query * size, key, value, *rest), bits, kind=kind)
        sums = [part.sum().item() for part in importance.split(lengths)]
        assert sums == pytest.approx([3.0 * (n if kind == "all" else min(n, 1)) for n in lengths], rel=tolerance)
        if size == 0.0:
            for part, n in zip(importance.split(lengths), lengths, strict=True):
                assert (part == part[:1]).all() and (n == 0 or part[0] == pytest.approx(3 if kind == "all" else 3 / n))


def test_importance_of_a_long_sequence() -> None:
    """Sums of float32 over many blocks; 2000 stands for 8192, which takes the interpreter a minute."""
    arguments = joint([2000], 1, 16, torch.float16)
    _, lse, importance = extras(arguments, None)
    query, key = (x[:, 0].double() for x in arguments[:2])
    scores = query @ key.T / 4
    assert importance.double().sum().item() == pytest.approx(2000, rel=1e-6)
    torch.testing.assert_close(importance.double(), scores.softmax(1).sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("operand", range(3))
def test_nan_stays_out_of_the_importance_of_others(operand: int, bits: int | None) -> None:
    arguments = joint([5, 3, 40, 8], 2, 16)
    clean = extras(arguments, bits)
    arguments[operand][8, 1, 3] = float("nan")
    _, lse, importance = extras(arguments, bits)
    _, expected_lse, expected = reference.attention(*arguments, bits=bits, return_lse=True, importance="all")
    assert torch.equal(importance.isnan(), expected.isnan()) and torch.equal(lse.isnan(), expected_lse.isnan())
    assert torch.equal(lse[0], clean[1][0])
    others = torch.ones(56, dtype=torch.bool)
    others[8:48] = False
    assert torch.equal(importance[others], clean[2][others])


def test_importance_after_the_last_sequence_is_0() -> None:
    query, key, value, _, _ = joint([20], 2, 16)
    end = torch.tensor([0, 5, 13], dtype=torch.int32)
    for kind in ("all", "cls"):
        *_, importance = extras((query, key, value, end, 16), None, kind=kind)
        *_, alone = extras((query[:13], key[:13], value[:13], end, 16), None, kind=kind)
        assert torch.equal(importance[:13], alone) and not importance[13:].any()


def test_only_what_is_asked_for_is_returned_and_changes_no_output() -> None:
    tensors = [moved(x, DEVICE) for x in joint([9, 20], 2, 16)[:4]]
    for bits in (None, 8):
        plain, *nothing = varlen_attention_gpu.launch(*tensors, 20, 0.25, bits, PROBS)
        assert [x.numel() for x in nothing] == [0, 0]
        for return_lse, kind in ((True, None), (False, "all"), (True, "cls")):
            out, lse, importance = varlen_attention_gpu.launch(*tensors, 20, 0.25, bits, PROBS, None, return_lse, kind)
            assert torch.equal(out, plain)
            assert lse.shape == ((2, 29) if return_lse else (0,)) and importance.shape == ((29,) if kind else (0,))


@pytest.mark.parametrize("lengths", [[], [0, 0], [3]], ids=str)
def test_extras_of_empty(lengths: list[int]) -> None:
    arguments = joint(lengths, 0 if lengths == [3] else 2, 16)
    _, lse, importance = extras(arguments, None)
    assert lse.numel() == 0 and importance.shape == (sum(lengths),) and not importance.any()


def test_extras_cost_launches_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = joint([9, 20], 2, 16)
    for bits, kernel in ((None, "_attention_kernel"), (8, "_quantized_attention_kernel")):
        assert work_of(lambda: launch(arguments, bits), [varlen_attention_gpu], monkeypatch)[0] == [kernel]  # noqa: B023
        importance = work_of(lambda: extras(arguments, bits), [varlen_attention_gpu], monkeypatch)[0]  # noqa: B023
        assert importance == [kernel, "_importance_kernel", "_sum_heads_kernel"]
