"""Token selection follows the rank rule exactly, whatever the importance: ties, NaN, infinities, empty sequences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_kernels import gather_tokens, kept_cu_seqlens, reference, select_tokens

FEW = [0.0, -0.0, 1.0, 0.5, 1e-40, -2.0, math.nan, math.inf, -math.inf]  # so that most are tied
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """(importance, cu_seqlens, protected or None)."""
    lengths = draw(st.lists(st.integers(0, 12), max_size=5))
    if draw(st.booleans()):
        lengths = lengths[:1] * len(lengths)  # all of one length: no padding
    T = sum(lengths) + draw(st.integers(0, 2))  # and tokens of no sequence
    values = st.sampled_from(FEW) if draw(st.booleans()) else st.floats(width=32)
    importance = torch.tensor(draw(st.lists(values, min_size=T, max_size=T)), dtype=draw(st.sampled_from(DTYPES)))
    flags = draw(st.none() | st.lists(st.booleans(), min_size=T, max_size=T))
    return importance, cu(*lengths), None if flags is None else torch.tensor(flags, dtype=torch.bool)


def policies() -> st.SearchStrategy[tuple[str, float]]:
    ratio = st.tuples(st.just("ratio"), st.floats(0, 1, exclude_min=True))
    tokens = st.tuples(st.just("tokens"), st.integers(1, 14))
    return ratio | tokens | st.tuples(st.just("threshold"), st.sampled_from([v for v in FEW if v == v] + [0.3]))


@settings(max_examples=300, deadline=None)
@given(batches(), policies(), st.integers(1, 4), st.integers(0, 3))
def test_equals_definition(
    batch: tuple[Tensor, Tensor, Tensor | None], policy: tuple[str, float], min_tokens: int, surplus: int
) -> None:
    importance, cu_seqlens, protected = batch
    unit, keep = policy
    options = {"unit": unit, "min_tokens": min_tokens, "protected": protected}
    index, new = reference.select_tokens(importance, cu_seqlens, keep, **options)
    got_index, got_new = select_tokens(importance, cu_seqlens, keep, **options)
    assert got_new.dtype == torch.int32 and got_new.tolist() == new.tolist()
    assert got_index.dtype == torch.int64 and got_index.tolist() == index.tolist()
    padded, same = select_tokens(
        importance, cu_seqlens, new, protected=protected, max_seqlen=15, num_tokens=len(index) + surplus
    )
    assert same is new and padded.tolist() == index.tolist() + [0] * surplus


@settings(max_examples=200, deadline=None)
@given(batches(), st.data())
def test_properties_of_any_selection(batch: tuple[Tensor, Tensor, Tensor | None], data: st.DataObject) -> None:
    importance, cu_seqlens, protected = batch
    room = [data.draw(st.integers(0, n)) for n in cu_seqlens.diff().tolist()]
    index, _ = select_tokens(importance, cu_seqlens, cu(*room), protected=protected)
    assert (index.diff() > 0).all()
    forced = torch.zeros(len(importance), dtype=torch.bool) if protected is None else protected
    for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        own = set(range(start, end))
        kept = own & set(index.tolist())
        assert len(kept) == room[b]
        if room[b]:
            assert start in kept
        guarded = {j for j in own - {start} if forced[j]}
        assert guarded <= kept or kept <= guarded | {start}
        for a, d in itertools.product(kept - guarded - {start}, own - kept - guarded):
            high, low = importance[a], importance[d]
            assert high > low or (high == low and a < d) or (low.isnan() and (not high.isnan() or a < d))


@settings(max_examples=100, deadline=None)
@given(batches(), policies(), st.data())
def test_a_sequence_does_not_depend_on_its_batch(
    batch: tuple[Tensor, Tensor, Tensor | None], policy: tuple[str, float], data: st.DataObject
) -> None:
    importance, cu_seqlens, protected = batch
    unit, keep = policy
    ends = cu_seqlens.tolist()
    order = data.draw(st.permutations(range(len(ends) - 1)))
    rows = [torch.arange(ends[b], ends[b + 1]) for b in order]
    moved = torch.cat([torch.arange(0), *rows])
    index, new = select_tokens(importance, cu_seqlens, keep, unit=unit, protected=protected)
    got, got_new = select_tokens(
        importance[moved],
        cu(*map(len, rows)),
        keep,
        unit=unit,
        protected=None if protected is None else protected[moved],
    )
    assert sorted(moved[got].tolist()) == index.tolist()
    assert got_new.diff().tolist() == new.diff()[order].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_of_fresh_numbers(dtype: torch.dtype) -> None:
    lengths = [130, 0, 257, 1, 64]
    importance = torch.randn(sum(lengths)).to(dtype)
    protected = torch.rand(sum(lengths)) < 0.2
    for keep in (0.9, 0.37, 0.1):
        for flags in (None, protected):
            got = select_tokens(importance, cu(*lengths), keep, protected=flags)
            expected = reference.select_tokens(importance, cu(*lengths), keep, protected=flags)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("value", FEW)
def test_equals_stay_from_the_front(value: float) -> None:
    index, new = select_tokens(torch.full((9,), value), cu(5, 4), 3, unit="tokens")
    assert index.tolist() == [0, 1, 2, 5, 6, 7] and new.tolist() == [0, 3, 6]


def test_keeping_all_is_the_identity_and_keeping_one_the_first() -> None:
    importance, cu_seqlens = torch.randn(20), cu(7, 0, 13)
    index, new = select_tokens(importance, cu_seqlens, 1.0)
    assert torch.equal(index, torch.arange(20)) and torch.equal(new, cu_seqlens)
    index, new = select_tokens(importance, cu_seqlens, 1, unit="tokens", protected=torch.ones(20, dtype=torch.bool))
    assert index.tolist() == [0, 7] and new.tolist() == [0, 1, 1, 2]


def test_threshold_keeps_who_reaches_it_and_fills_up_to_min_tokens() -> None:
    importance = torch.tensor([0.0, 0.1, 0.5, 0.3, math.nan, 0.0, 0.2, 0.1])
    protected = torch.tensor([0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    index, new = select_tokens(importance, cu(5, 3), 0.25, unit="threshold", protected=protected)
    assert index.tolist() == [0, 1, 2, 3, 5] and new.tolist() == [0, 4, 5]
    index, new = select_tokens(importance, cu(5, 3), 0.25, unit="threshold", min_tokens=2)
    assert index.tolist() == [0, 2, 3, 5, 6] and new.tolist() == [0, 3, 5]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 600), max_size=6),
    st.lists(st.floats(0, 1, exclude_min=True), min_size=1, max_size=4),
    st.lists(st.integers(1, 700), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_kept_cu_seqlens_equals_definition(
    lengths: list[int], ratios: list[float], tokens: list[int], min_tokens: int
) -> None:
    cu_seqlens = cu(*lengths)
    for unit, values, dtype in (("ratio", ratios, torch.float64), ("tokens", tokens, torch.int32)):
        expected = [reference.kept_cu_seqlens(cu_seqlens, value, unit, min_tokens) for value in values]
        each = [kept_cu_seqlens(cu_seqlens, value, unit, min_tokens) for value in values]
        assert all(map(torch.equal, each, expected))
        keep = torch.tensor(values, dtype=dtype)
        got = kept_cu_seqlens(cu_seqlens, keep, unit, min_tokens)
        assert got.dtype == torch.int32 and torch.equal(got, torch.stack(expected))
        rows = torch.stack([cu_seqlens] * len(values))
        assert torch.equal(kept_cu_seqlens(rows, keep, unit, min_tokens), torch.stack(expected))


def test_gather_takes_rows_and_hands_gradients_back() -> None:
    index = torch.tensor([0, 2, 3])
    for x in (torch.randn(5, 3, 2), torch.randint(-128, 128, (5, 4), dtype=torch.int8), torch.arange(5)):
        assert torch.equal(gather_tokens(x, index), torch.stack([x[i] for i in (0, 2, 3)]))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, index), x)
    assert gather_tokens(x, index[:0]).shape == (0, 3)


def test_the_selection_carries_no_gradient() -> None:
    index, _ = select_tokens(torch.rand(6, requires_grad=True), cu(6), 0.5)
    assert not index.requires_grad


# -------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("unit", ["ratio", "threshold"])
def test_one_graph_where_the_number_of_tokens_is_given(unit: str) -> None:
    def run(importance: Tensor, cu_seqlens: Tensor, x: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        index, new = select_tokens(importance, cu_seqlens, 0.6, unit=unit, num_tokens=num_tokens, max_seqlen=9)
        return gather_tokens(x, index), new

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([5, 4], [9, 1, 3]):
        importance, x = torch.rand(sum(lengths)), torch.randn(sum(lengths), 3)
        _, new = reference.select_tokens(importance, cu(*lengths), 0.6, unit=unit)
        arguments = importance, cu(*lengths), x, int(new[-1]) + 2
        got, expected = compiled(*arguments), run(*arguments)
        assert all(map(torch.equal, got, expected)) and len(got[0]) == arguments[3]


def test_the_number_of_tokens_may_depend_on_data() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda s, c: select_tokens(s, c, 0.5)[0] + 1, fullgraph=True, backend="aot_eager")
        importance = torch.rand(9)
        assert torch.equal(compiled(importance, cu(5, 4)), select_tokens(importance, cu(5, 4), 0.5)[0] + 1)


def test_kept_cu_seqlens_is_one_graph() -> None:
    ratios = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    compiled = torch.compile(kept_cu_seqlens, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cu(10, 0, 3), ratios), kept_cu_seqlens(cu(10, 0, 3), ratios))


def test_op_satisfies_torch_library() -> None:
    op = torch.ops.lowbit_kernels.select_tokens.default
    torch.library.opcheck(op, (torch.rand(9), cu(5, 4), cu(2, 3), torch.rand(9) > 0.5, 5, 7))
    torch.library.opcheck(op, (torch.rand(9), cu(5, 4), cu(2, 3), None, None, None))


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [[1, 3, 6], [0, 4, 3], [0, 3, 7], [0, -1, 6]])
@pytest.mark.parametrize("unit", ["ratio", "threshold"])
def test_cu_seqlens_that_do_not_fit_are_refused(unit: str, bad: list[int]) -> None:
    with pytest.raises(ValueError, match="expected to start at 0, never to fall, to end within T=6"):
        select_tokens(torch.rand(6), torch.tensor(bad, dtype=torch.int32), 0.5, unit=unit)


@pytest.mark.parametrize("bad", [[1, 2, 3], [0, 2, 1], [0, 4, 5], [0, 1, 5]])
def test_new_cu_seqlens_that_do_not_fit_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"keep=\[.*\] as new cu_seqlens"):
        select_tokens(torch.rand(6), cu(3, 3), torch.tensor(bad, dtype=torch.int32))


@pytest.mark.parametrize(
    ("unit", "keep"),
    [("ratio", 0.0), ("ratio", 1.5), ("ratio", math.nan), ("tokens", 0), ("tokens", 1.5), ("tokens", math.inf),
     ("threshold", math.nan), ("ratio", "half"), ("threshold", None)],
)  # fmt: skip
def test_keep_outside_its_range_is_refused(unit: str, keep: float) -> None:
    with pytest.raises(ValueError, match=f"keep={keep!r} with unit={unit!r}, accepted: "):
        select_tokens(torch.rand(6), cu(6), keep, unit=unit)
    if unit != "threshold" and not isinstance(keep, str):
        with pytest.raises(ValueError, match="accepted: "):
            kept_cu_seqlens(cu(6), torch.tensor([1.0, keep], dtype=torch.float64), unit)


def test_bad_input_is_refused() -> None:
    s, c = torch.rand(6), cu(6)
    for arguments, options, error, message in (
        ((s.long(), c, 0.5), {}, TypeError, "importance has dtype torch.int64"),
        ((s.reshape(2, 3), c, 0.5), {}, ValueError, "importance has shape"),
        ((s, c.long(), 0.5), {}, TypeError, "cu_seqlens has dtype torch.int64"),
        ((s, c[:0], 0.5), {}, ValueError, "expected B . 1 entries"),
        ((s, c, c.long()), {}, TypeError, "keep has dtype"),
        ((s, c, cu(3, 3)), {}, ValueError, "keep has 3 entries"),
        ((s, c, 0.5), {"unit": "percent"}, ValueError, "unit='percent', accepted: 'ratio', 'tokens', 'threshold'"),
        ((s, c, 0.5), {"min_tokens": 0}, ValueError, "min_tokens=0"),
        ((s, c, 0.5), {"min_tokens": 0, "unit": "threshold"}, ValueError, "min_tokens=0"),
        ((s, c, 0.5), {"protected": s}, TypeError, "protected has dtype"),
        ((s, c, 0.5), {"protected": s[1:] > 0}, ValueError, "protected has shape"),
        ((s, c, 0.5), {"max_seqlen": 5}, ValueError, "max_seqlen=5, but cu_seqlens has a sequence of 6"),
        ((s, c, 0.5), {"num_tokens": 2}, ValueError, "num_tokens=2, but 3 tokens are kept"),
        ((s, c, 0.5), {"num_tokens": -1}, ValueError, "num_tokens=-1, but 3"),
        ((s, c.to("meta"), 0.5), {}, ValueError, "share one device"),
        ((s, c, c.to("meta")), {}, ValueError, "share one device"),
    ):
        with pytest.raises(error, match=message):
            select_tokens(*arguments, **options)
    with pytest.raises(ValueError, match="unit='threshold', accepted: 'ratio', 'tokens'"):
        kept_cu_seqlens(c, 0.5, "threshold")
    with pytest.raises(TypeError, match="keep has dtype"):
        kept_cu_seqlens(c, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="keep has 3 entries"):
        kept_cu_seqlens(torch.stack([c, c]), torch.ones(3, dtype=torch.int64), "tokens")
    with pytest.raises(TypeError, match="index has dtype"):
        gather_tokens(s, s)
    with pytest.raises(TypeError, match="at least 1 dimension"):
        gather_tokens(torch.tensor(1.0), torch.tensor([0]))
    with pytest.raises(IndexError):
        gather_tokens(s, torch.tensor([6]))
