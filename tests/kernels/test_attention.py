"""Attention without padding equals its definition, and no sequence sees another."""

from __future__ import annotations

import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from attention_cases import moved
from lowbit.nn.attention import attention_forward
from lowbit.quantizers import ActivationQuantizer
from lowbit_kernels import attention, attention_cpu, attention_eager, reference, varlen_attention

PROBS, ALL = ("attention_probs",), attention_cpu.SITES
MODES = [(None, ()), (8, PROBS), (8, ()), (8, ALL), (4, PROBS), (4, ("key", "value"))]
LENGTHS = [[7, 0, 1, 33, 0, 12], [16, 16, 16], [1], [0, 40]]
# Of results that lie between the extremes of the values: float32 sums and exponentials; one rounding of the output.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def joint(lengths: list[int], H: int, D: int, dtype: torch.dtype = torch.float32) -> tuple:
    """query, key, value as slices of one projection, cu_seqlens, max_seqlen."""
    x = torch.randn(sum(lengths), 3, H, D).to(dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return *x.unbind(1), cu_seqlens, max(lengths, default=0)


def assert_attends(got: torch.Tensor, arguments: tuple, bits: int | None, asymmetric: tuple, rounding: float) -> None:
    """Equal to the definition but for rounding, and for the few probabilities that rounding takes to the next code."""
    expected = reference.attention(
        *(x.double() for x in arguments[:3]), *arguments[3:], bits=bits, asymmetric=asymmetric
    )
    assert got.dtype == arguments[0].dtype and got.is_contiguous()
    size = arguments[2].double().abs().amax() if got.numel() else 1.0
    error = (got.double() - expected).abs() / size
    if bits is not None:
        step = 1 / (2 ** (bits - 1) - 1)
        assert (error <= 2 * step + rounding).all()
        error = error[(error <= rounding).all(-1)]
        assert error.numel() >= 0.95 * got.numel()
    assert (error <= rounding).all()


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("D", [1, 5, 64])
def test_equals_definition(D: int, lengths: list[int], dtype: torch.dtype, bits: int | None, asymmetric: tuple) -> None:
    arguments = joint(lengths, 3, D, dtype)
    got = attention(*arguments, bits=bits, asymmetric=asymmetric)
    assert_attends(got, arguments, bits, asymmetric, ROUNDING[dtype])


@pytest.mark.parametrize("bits", [None, 8])
def test_scaling_is_applied(bits: int | None) -> None:
    arguments = joint([9, 4], 2, 8)
    for scaling in (0.0, 0.3, -1.0):
        expected = reference.attention(*arguments, scaling=scaling, bits=bits)
        torch.testing.assert_close(attention(*arguments, scaling=scaling, bits=bits), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
def test_groups_of_sequences_change_nothing(
    bits: int | None, asymmetric: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lengths in ([5, 9, 2, 2, 30, 0, 17, 9, 9], [8] * 7):
        arguments = joint(lengths, 2, 16)
        for scores in (1, 500, 2000):
            monkeypatch.setattr(attention_cpu, "CPU_SCORES", scores)
            assert_attends(attention(*arguments, bits=bits, asymmetric=asymmetric), arguments, bits, asymmetric, 1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_any_strides(bits: int | None) -> None:
    query, key, value, *rest = joint([3, 11, 6], 4, 8)
    expected = attention(query.contiguous(), key.contiguous(), value.contiguous(), *rest, bits=bits)
    columns = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (query, key, value)]
    assert columns[0].stride(2) != 1
    for given in ((query, key, value), columns):
        torch.testing.assert_close(attention(*given, *rest, bits=bits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
def test_agrees_with_the_attention_of_the_modules(bits: int | None, asymmetric: tuple) -> None:
    B, S, H, D = 3, 21, 2, 32
    query, key, value, cu_seqlens, max_seqlen = joint([S] * B, H, D)
    owner = nn.Module()
    if bits is not None:
        owner.quantizers = nn.ModuleDict({site: ActivationQuantizer(bits, site not in asymmetric) for site in ALL})
    heads = [x.unflatten(0, (B, S)).transpose(1, 2) for x in (query, key, value)]
    expected = attention_forward(owner.eval(), *heads, None)[0].flatten(0, 1)
    got = attention(query, key, value, cu_seqlens, max_seqlen, bits=bits, asymmetric=asymmetric)
    close = (got - expected).abs().amax(-1) <= 1e-5
    assert close.float().mean() >= 0.95 and (got - expected).abs().amax() < 2 / 7 * value.abs().amax()


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
def test_a_sequence_does_not_depend_on_its_batch(bits: int | None, asymmetric: tuple) -> None:
    lengths = [6, 50, 3, 6]
    query, key, value, cu_seqlens, max_seqlen = joint(lengths, 2, 16)
    key = key * 0.01  # probabilities far from 0, where that of a masked key would move the range
    together = attention(query, key, value, cu_seqlens, max_seqlen, bits=bits, asymmetric=asymmetric)
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        cu_alone = torch.tensor([0, length], dtype=torch.int32)
        alone = attention(query[rows], key[rows], value[rows], cu_alone, length, bits=bits, asymmetric=asymmetric)
        # where the range is small against the probabilities, a code more or less is little
        torch.testing.assert_close(together[rows], alone, rtol=0, atol=1e-5 if bits is None else 0.03)


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", range(3))
@pytest.mark.parametrize("lengths", [[5, 3, 8, 0, 8], [6, 6, 6]], ids=str)
def test_nan_stays_in_its_sequence_and_head(
    lengths: list[int], operand: int, bad: float, bits: int | None, asymmetric: tuple
) -> None:
    arguments = joint(lengths, 2, 16)
    clean = attention(*arguments, bits=bits, asymmetric=asymmetric)
    first = lengths[0]
    arguments[operand][first, 1, 3] = bad
    got = attention(*arguments, bits=bits, asymmetric=asymmetric)
    expected = reference.attention(*arguments, bits=bits, asymmetric=asymmetric)
    assert torch.equal(got.isfinite(), expected.isfinite())
    assert bad == float("inf") or got[first, 1].isnan().any()
    untouched = torch.ones(got.shape[:2], dtype=torch.bool)
    untouched[first : first + lengths[1], 1] = False
    torch.testing.assert_close(got[untouched], clean[untouched], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_large_values(dtype: torch.dtype, bits: int | None) -> None:
    query, key, value, *rest = joint([19, 30], 2, 64, dtype)
    arguments = (query * 100, key * 100, value * 1000, *rest)
    got = attention(*arguments, bits=bits)
    # scores of some 10^5 in float32 leave exponentials with 2 digits; most rows have one probability of 1
    assert got.isfinite().all()
    expected = reference.attention(*(x.double() for x in arguments[:3]), *rest, bits=bits)
    close = (got - expected).abs().amax(-1) <= ROUNDING[dtype] * 4000
    assert close.float().mean() > 0.95


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_empty(lengths: list[int], bits: int | None) -> None:
    assert attention(*joint(lengths, 2, 8), bits=bits).shape == (0, 2, 8)
    assert attention(*joint([3], 0, 8), bits=bits).shape == (3, 0, 8)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", [[4, 4], [3, 0, 5]], ids=str)
def test_op_satisfies_torch_library(lengths: list[int], bits: int | None) -> None:
    arguments = (*joint(lengths, 2, 8), 0.5, bits, ["key", "attention_probs"])
    for extras in ((), (bias_of(2, 6), True, "cls")):
        torch.library.opcheck(torch.ops.lowbit_kernels.attention.default, (*arguments, *extras))


@pytest.mark.parametrize("bits", [None, 8])
def test_compiled_without_native_kernels_it_is_traced(bits: int | None, torch_products: None) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: list) -> torch.fx.GraphModule:
        graphs.append(str(graph.code))
        return graph

    for lengths in ([9, 9], [9], [9, 4], [1, 0, 30, 7, 0]):
        torch._dynamo.reset()
        arguments = joint(lengths, 2, 16)
        compiled = torch.compile(attention, backend=keep, fullgraph=True)
        got = compiled(*arguments, bits=bits)
        assert "lowbit_kernels.attention" not in graphs[-1]
        assert_attends(got, arguments, bits, PROBS, 1e-5)


@pytest.mark.parametrize("lengths", [[12] * 4, [12, 0, 30, 1, 7]])
def test_inductor_gives_the_same(lengths: list[int]) -> None:
    torch._dynamo.reset()
    arguments = joint(lengths, 2, 16)
    assert_attends(torch.compile(attention, fullgraph=True)(*arguments, bits=8), arguments, 8, PROBS, 1e-5)


def bias_of(H: int, S: int, *, hidden: float = 0.0) -> torch.Tensor:
    """[H, S, S] with strides of no order, from -inf at a share of `hidden` places."""
    bias = torch.randn(S + 3, H, S + 3).transpose(0, 1).transpose(1, 2)
    return bias.masked_fill(torch.rand(bias.shape) < hidden, -math.inf)


@pytest.mark.parametrize("kind", ["all", "cls"])
@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lse_and_importance_equal_their_definition(
    lengths: list[int], dtype: torch.dtype, bits: int | None, asymmetric: tuple, kind: str
) -> None:
    arguments = joint(lengths, 3, 16, dtype)
    options = {"bits": bits, "asymmetric": asymmetric, "importance": kind}
    for bias in (None, bias_of(1, max(lengths)), bias_of(3, max(lengths), hidden=0.2)):
        got = attention(*arguments, **options, bias=bias, return_lse=True)
        out, lse, importance = reference.attention(*arguments, **options, bias=bias, return_lse=True)
        assert got.lse.dtype == got.importance.dtype == torch.float32 and got.lse.is_contiguous()
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-6, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(got.importance.double(), importance, rtol=2e-5, atol=1e-5, equal_nan=True)
        size = arguments[2].abs().amax().double()
        close = (got.output.double() - out.double()).abs().amax(-1) <= 2 * ROUNDING[dtype] * size
        hidden = out.isnan().all(-1)  # rows without a key
        assert torch.equal(got.output.isnan().all(-1), hidden)
        assert (close | hidden).float().mean() >= (1.0 if bits is None else 0.9)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_asking_for_more_changes_no_output(lengths: list[int], bits: int | None) -> None:
    arguments = joint(lengths, 3, 8)
    plain = attention(*arguments, bits=bits)
    for options in ({"return_lse": True}, {"importance": "cls"}, {"importance": "all", "return_lse": True}):
        got = attention(*arguments, bits=bits, **options)
        assert torch.equal(got.output, plain)
        assert (got.lse is not None) == options.get("return_lse", False)
        assert (got.importance is not None) == ("importance" in options)


@pytest.mark.parametrize("kind", ["all", "cls"])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_importance_of_a_sequence_sums_to_its_queries(lengths: list[int], bits: int | None, kind: str) -> None:
    query, *rest = joint(lengths, 3, 8)
    for size in (0.0, 1.0, 1e4):  # from ties to one probability of 1
        for function in (attention, attention_eager):
            importance = function(query * size, *rest, bits=bits, importance=kind).importance
            sums = [part.sum().item() for part in importance.split(lengths)]
            assert sums == pytest.approx([3.0 * (n if kind == "all" else min(n, 1)) for n in lengths], rel=1e-5)


@pytest.mark.parametrize("kind", ["all", "cls"])
@pytest.mark.parametrize("operand", range(3))
@pytest.mark.parametrize("lengths", [[5, 3, 8, 0, 8], [6, 6, 6]], ids=str)
def test_nan_stays_out_of_the_importance_of_others(lengths: list[int], operand: int, kind: str) -> None:
    arguments = joint(lengths, 2, 16)
    clean = attention(*arguments, importance=kind, return_lse=True)
    start, end = lengths[0], lengths[0] + lengths[1]
    arguments[operand][start + 1, 1, 3] = float("nan")
    for gradients in (False, True):
        query, *rest = arguments
        got = attention(query.requires_grad_(gradients), *rest, importance=kind, return_lse=True)
        _, lse, importance = reference.attention(*arguments, importance=kind, return_lse=True)
        assert torch.equal(got.importance.isnan(), importance.isnan())
        assert torch.equal(got.lse.isnan(), lse.isnan())
        others = torch.ones(sum(lengths), dtype=torch.bool)
        others[start:end] = False
        torch.testing.assert_close(got.importance[others], clean.importance[others], rtol=0, atol=1e-5)
        torch.testing.assert_close(got.lse[0], clean.lse[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_compiled_it_gives_lse_and_importance_too(bits: int | None) -> None:
    for lengths in ([9, 9], [1, 0, 30, 7, 0]):
        arguments = joint(lengths, 2, 16)
        options = {"bits": bits, "bias": bias_of(1, max(lengths)), "return_lse": True, "importance": "all"}
        torch._dynamo.reset()
        got = torch.compile(attention, backend="aot_eager", fullgraph=True)(*arguments, **options)
        expected = attention(*arguments, **options)
        for a, b in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def wanting_gradients(arguments: tuple, dtype: torch.dtype = torch.float32) -> tuple:
    """Leaves, contiguous, and the same offsets."""
    leaves = (x.detach().to(dtype, copy=True).contiguous().requires_grad_() for x in arguments[:3])
    return *leaves, *arguments[3:]


@pytest.mark.parametrize("kind", ["all", "cls"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 4], [4, 4]], ids=str)
def test_the_eager_form_is_differentiable_throughout(lengths: list[int], heads: int, kind: str) -> None:
    query, key, value, *rest = wanting_gradients(joint(lengths, 2, 3), torch.float64)
    bias = torch.randn(heads, 5, 5, dtype=torch.float64, requires_grad=True)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> tuple:
        result = attention_eager(query, key, value, *rest, bias=bias, importance=kind)
        return result.output, result.importance

    assert [x.dtype for x in run(query, key, value, bias)] == [torch.float64] * 2
    assert torch.autograd.gradcheck(run, (query, key, value, bias))


@pytest.mark.parametrize(("bits", "asymmetric"), MODES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients_are_those_of_the_definition_past_the_quantizers(
    lengths: list[int], dtype: torch.dtype, bits: int | None, asymmetric: tuple
) -> None:
    """With g the gradient of the output and p the probabilities: dv = q(p)^T g, ds = p (g v^T - sum p g v^T)."""
    arguments = wanting_gradients(joint(lengths, 2, 8, dtype), dtype)
    got = attention(*arguments, bits=bits, asymmetric=asymmetric)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected = [torch.zeros(got.shape, dtype=torch.float64) for _ in range(3)]
    offsets = arguments[3].tolist()
    for (start, end), head in itertools.product(itertools.pairwise(offsets), range(2)):
        rows = slice(start, end), head
        q, k, v = (
            reference._dequantized(x.detach()[rows].float(), bits, site not in asymmetric)
            for site, x in zip(("query", "key", "value"), arguments, strict=False)
        )
        probs = torch.softmax(8**-0.5 * q @ k.T, 1)
        seen = (
            probs if bits is None else reference._dequantized(probs.float(), bits, "attention_probs" not in asymmetric)
        )
        g = upstream[rows].double()
        scores = probs * (g @ v.T - (probs * (g @ v.T)).sum(1, keepdim=True)) * 8**-0.5
        for total, part in zip(expected, (scores @ k, scores.T @ q, seen.T @ g), strict=True):
            total[rows] = part
    for x, gradient in zip(arguments, expected, strict=False):
        assert x.grad.dtype == dtype
        error = (x.grad.double() - gradient).abs() / gradient.abs().amax().clamp(min=1.0)
        # a probability that float32 takes to the next code moves the values' gradients
        assert (error <= 4 * ROUNDING[dtype]).float().mean() >= (1.0 if bits is None else 0.9)
        assert error.amax() <= (4 * ROUNDING[dtype] if bits is None else 2 / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("lengths", [[4, 0, 2], [5, 5]], ids=str)
def test_output_alone_carries_gradients_and_only_where_they_are_wanted(lengths: list[int], bits: int | None) -> None:
    query, *rest = joint(lengths, 2, 8)
    query.requires_grad_()
    got = attention(query, *rest, bits=bits, return_lse=True, importance="all")
    assert [x.requires_grad for x in got] == [True, False, False]
    with torch.no_grad():
        plain = attention(query, *rest, bits=bits, return_lse=True, importance="all")
    assert not plain.output.requires_grad
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if bits is None else 0.03)
    empty = attention(query[:0], *(x[:0] for x in rest[:2]), rest[2][:1], 0)
    assert empty.requires_grad and empty.shape == (0, 2, 8)


@pytest.mark.parametrize("lengths", [[4, 0, 2], [5, 5]], ids=str)
def test_gradients_through_the_op_are_handed_what_the_kernel_needs(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA tensors take: the op forward, the op `attention_backward` for the gradients."""
    given: list = []

    def backward(*arguments: object) -> torch.Tensor:
        given.extend(arguments)
        return torch.stack([arguments[0] * scale for scale in (1, 2, 3)])

    module = ModuleType("attention_backward")
    module.attention_backward_op = backward
    monkeypatch.setitem(sys.modules, "lowbit_kernels.attention_backward", module)
    query, key, value, cu_seqlens, max_seqlen = wanting_gradients(joint(lengths, 2, 8))
    bias = bias_of(2, 5)
    out, lse, importance = varlen_attention._Attention.apply(
        query, key, value, cu_seqlens, max_seqlen, 0.3, 8, ["key"], bias, "all"
    )
    assert [x.requires_grad for x in (out, lse, importance)] == [True, False, False]
    upstream = torch.randn_like(out)
    out.backward(upstream)
    for x, scale in ((query, 1), (key, 2), (value, 3)):
        assert torch.equal(x.grad, upstream * scale)
    for a, b in zip(given[:7], (upstream, query, key, value, out, lse, cu_seqlens), strict=True):
        assert torch.equal(a, b)
    assert given[7:-1] == [max_seqlen, 0.3, 8, ["key"]]
    assert torch.equal(given[-1], bias)


def test_dropout_leaves_importance_alone_and_the_output_right_on_average() -> None:
    query, key, value, *rest = joint([12, 0, 7], 2, 4)
    exact = attention(query, key, value, *rest, importance="all")
    torch.manual_seed(0)
    runs = [attention_eager(query, key, value, *rest, dropout_p=0.5, importance="all") for _ in range(400)]
    assert not torch.equal(runs[0].output, runs[1].output)
    torch.testing.assert_close(runs[0].importance, exact.importance, rtol=0, atol=1e-5)
    mean = torch.stack([run.output for run in runs]).mean(0)
    assert (mean - exact.output).abs().amax() < 0.5
    assert (mean - exact.output).abs().mean() < 0.05
    with pytest.raises(ValueError, match=r"dropout_p=1.5, accepted: 0 to 1"):
        attention_eager(query, key, value, *rest, dropout_p=1.5)


def test_bad_input_is_refused() -> None:
    query, key, value, cu_seqlens, max_seqlen = joint([3, 5], 2, 8)
    with pytest.raises(TypeError, match="float64"):
        attention(query.double(), key, value, cu_seqlens, max_seqlen)
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        attention(query.flatten(1), key, value, cu_seqlens, max_seqlen)
    with pytest.raises(ValueError, match=r"key is torch.float32 \(7, 2, 8\), expected the same as query"):
        attention(query, key[1:], value, cu_seqlens, max_seqlen)
    with pytest.raises(ValueError, match=r"value is torch.float16"):
        attention(query, key, value.half(), cu_seqlens, max_seqlen)
    with pytest.raises(TypeError, match=r"cu_seqlens has dtype torch.int64"):
        attention(query, key, value, cu_seqlens.long(), max_seqlen)
    with pytest.raises(ValueError, match="bits=2, accepted: None, 8, 4"):
        attention(query, key, value, cu_seqlens, max_seqlen, bits=2)
    with pytest.raises(ValueError, match=r"asymmetric=\['probs'\], accepted: query, key, attention_probs, value"):
        attention(query, key, value, cu_seqlens, max_seqlen, bits=8, asymmetric=("probs",))
    with pytest.raises(ValueError, match="D=0"):
        attention(query[..., :0], key[..., :0], value[..., :0], cu_seqlens, max_seqlen)
    with pytest.raises(ValueError, match="max_seqlen=-1"):
        attention(query, key, value, cu_seqlens, -1)
    with pytest.raises(ValueError, match="0 entries"):
        attention(query, key, value, cu_seqlens[:0], max_seqlen)
    with pytest.raises(ValueError, match="importance='sum', accepted: None, 'all', 'cls'"):
        attention(query, key, value, cu_seqlens, max_seqlen, importance="sum")
    for shape in ((3, 5, 5), (2, 4, 4), (2, 5, 6)):
        with pytest.raises(ValueError, match=r"expected \[H or 1, S, S\] with H=2 and S at least max_seqlen=5"):
            attention(query, key, value, cu_seqlens, max_seqlen, bias=torch.zeros(shape))
    with pytest.raises(TypeError, match=r"bias has dtype torch.int64"):
        attention(query, key, value, cu_seqlens, max_seqlen, bias=torch.zeros(2, 5, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="use attention_eager"):
        attention(query, key, value, cu_seqlens, max_seqlen, bias=torch.zeros(2, 5, 5, requires_grad=True))


@pytest.mark.parametrize("offsets", [[0, 8, 3, 8], [0, 3, 7], [1, 3, 8], [0, 3, 9], [0, 8], [0]], ids=str)
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    query, key, value, _, max_seqlen = joint([3, 5], 2, 8)
    for function in (attention, attention_eager):
        with pytest.raises(ValueError, match="expected 0 to T=8 in steps of 0 to max_seqlen=5"):
            function(query, key, value, torch.tensor(offsets, dtype=torch.int32), max_seqlen)


def test_what_the_kernels_are_tested_with_keeps_its_strides_on_a_device() -> None:
    """`.to` makes slices dense, and kernels tested on a device would never see other strides."""
    query, key, _, *_ = joint([3, 5], 2, 8)
    for x in (query, key, key[:0], query.transpose(0, 1), query[:1, :1].expand_as(query)):
        on_device = moved(x, "meta")
        assert (on_device.shape, on_device.stride()) == (x.shape, x.stride())
    assert torch.equal(moved(key, "cpu"), key)
