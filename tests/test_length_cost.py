"""Multiply-accumulates and the table of measured times."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig
from transformers.models import bert as bert_package

import lowbit
from helpers import HEADS, batch, outputs, tiny
from lowbit import models
from lowbit.length import (
    LatencyTable,
    LengthConfig,
    batch_macs,
    cost,
    kept_lengths,
    macs,
    measure_latency,
    observed_lengths,
)
from lowbit_kernels import kept_cu_seqlens


def outline(head: str = "BertForQuestionAnswering", **sizes: int) -> torch.nn.Module:
    """A model without memory."""
    with torch.device("meta"):
        return getattr(bert_package, head)(BertConfig(**sizes))


MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}


# ------------------------------------------------------------------------------------------------------ kept lengths


def test_kept_lengths_by_hand() -> None:
    lengths = [0, 1, 2, 9, 10]
    assert kept_lengths(lengths, LengthConfig((1, 0.5, 0.25))) == [[0, 1, 2, 9, 10], [0, 1, 1, 5, 5], [0, 1, 1, 3, 3]]
    assert kept_lengths(lengths, LengthConfig((0.1,), min_tokens=3)) == [[0, 1, 2, 3, 3]]
    assert kept_lengths(lengths, LengthConfig((9, 2), unit="tokens")) == [[0, 1, 2, 9, 9], [0, 1, 2, 2, 2]]
    assert kept_lengths(lengths, LengthConfig((2,), unit="tokens", min_tokens=4)) == [[0, 1, 2, 4, 4]]
    assert kept_lengths([], LengthConfig((1, 0.5))) == [[], []]


@pytest.mark.parametrize("unit", ["ratio", "tokens"])
def test_kept_lengths_are_those_of_the_kernels(unit: str) -> None:
    lengths = [0, 1, *random.choices(range(1, 600), k=300)]
    for keep in [*(level / 20 for level in range(1, 21))] if unit == "ratio" else [1, 3, 64, 700]:
        least = random.randint(1, 5)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        expected = kept_cu_seqlens(cu_seqlens, keep, unit, least).diff().tolist()
        assert kept_lengths(lengths, LengthConfig((keep,), unit=unit, min_tokens=least)) == [expected]


def test_thresholds_have_no_lengths() -> None:
    with pytest.raises(ValueError, match=r"'threshold'.*accepted: 'ratio', 'tokens'"):
        kept_lengths([3], LengthConfig((0.1,), unit="threshold"))


STAGES = {
    "float": lambda head: tiny(head),
    "prepared": lambda head: lowbit.prepare(tiny(head), lowbit.TernaryConfig()),
    "fused": lambda head: lowbit.quantize(tiny(head), lowbit.TernaryConfig(), fused=True),
}


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "config", [LengthConfig((0.7, 0.4)), LengthConfig((1, 1)), LengthConfig((9, 2), unit="tokens")]
)
def test_observed_lengths_are_those_of_the_configuration(head: str, stage: str, config: LengthConfig) -> None:
    model = lowbit.set_length(STAGES[stage](head), config).train()
    batches = [batch(head, rows=rows, length=length) for rows, length in ((3, 13), (2, 7), (1, 20))]
    lengths = [n for inputs in batches for n in inputs["attention_mask"].sum(-1).tolist()]
    expected = kept_lengths(lengths, config)
    if head == "BertForSequenceClassification":
        expected[-1] = [1] * len(lengths)  # all that it reads
    assert observed_lengths(model, batches) == expected
    assert observed_lengths(model, []) == [[], []]
    empty = {name: torch.zeros_like(values) for name, values in batches[0].items()}
    with pytest.raises(ValueError, match="layers noted nothing: a batch without tokens"):
        observed_lengths(model, [*batches, empty])
    with pytest.raises(ValueError, match="drops no tokens; set lengths first"):
        observed_lengths(lowbit.set_length(model, None), batches)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_macs_of_thresholds_are_those_of_the_linears_that_run(head: str) -> None:
    model, inputs = tiny(head), batch(head, rows=5, length=16)
    lengths = inputs["attention_mask"].sum(-1).tolist()
    lowbit.set_length(model, LengthConfig((1.0, 0.97), unit="threshold"))
    kept = observed_lengths(model, [inputs])
    assert sum(lengths) > sum(kept[0]) > 5
    counter = Counter(model)
    outputs(model, inputs)
    attention = sum(2 * n**2 * 64 for layer in (lengths, kept[0]) for n in layer)
    assert macs(model, kept, lengths) == counter.total + attention
    with pytest.raises(ValueError, match="lengths are for 1 layers, the model has 2"):
        macs(model, kept[:1], lengths)
    with pytest.raises(ValueError, match=r"tokens of \[5, 5\] sequences; lengths has 4"):
        macs(model, kept, lengths[:4])


# -------------------------------------------------------------------------------------------- multiply-accumulates


@pytest.mark.parametrize(
    ("sizes", "keep", "giga"),
    [
        ({}, None, 35.3),
        (MINILM, None, 4.76),
        (MINILM, (269, 253, 252, 202, 104, 34), 2.49),
        (MINILM, (315, 251, 242, 159, 142, 33), 2.55),
    ],
)
def test_published_numbers(sizes: dict[str, int], keep: tuple[int, ...] | None, giga: float) -> None:
    """Four models at 384 tokens, in 10^9; what is published applies the attention output to dropped tokens too."""
    model = outline(**sizes)
    d, layers = model.config.hidden_size, model.config.num_hidden_layers
    lengths = [384, *(keep or [384] * layers)]
    closed_form = sum(
        4 * before * d**2 + 2 * before**2 * d + 8 * after * d**2 for before, after in itertools.pairwise(lengths)
    )
    assert closed_form / 1e9 == pytest.approx(giga, rel=3e-3)  # embeddings and heads, and three digits
    config = None if keep is None else LengthConfig(keep, unit="tokens")
    assert macs(model, config, (384,)) == closed_form - (384 - lengths[-1]) * d**2


class Counter:
    """Multiply-accumulates of the encoder's linears as they run, by the rows that reach them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.total = 0
        for _, layer in models.layers(model):
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(self.add)

    def add(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        self.total += inputs[0].shape[:-1].numel() * module.weight.numel()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("keep", [None, (1, 1), (0.5, 0.2), (1, 0.3)])
def test_linears_agree_with_what_runs(head: str, keep: tuple[float, ...] | None) -> None:
    """Attention's products are no modules: by the formula, and there are 16 tokens, so ratios are exact enough."""
    model, inputs = tiny(head), batch(head, rows=2, length=16)
    config = None if keep is None else LengthConfig(keep)
    if config is None:
        del inputs["attention_mask"]  # transformers computes padding as well
        lengths = [16] * (inputs["input_ids"].numel() // 16)
    else:
        lengths = inputs["attention_mask"].flatten(0, -2).sum(-1).tolist()
    expected = macs(model, config, lengths)
    lowbit.set_length(model, config)
    counter = Counter(model)
    outputs(model, inputs)
    entering = [lengths, lengths if config is None else kept_lengths(lengths, config)[0]]
    attention = sum(2 * n**2 * 64 for layer in entering for n in layer)
    assert expected == counter.total + attention
    assert macs(model, config, lengths) == expected  # set or not


def test_first_token_only_is_as_the_model_runs() -> None:
    config = LengthConfig((1, 1))
    firsts = {"BertForSequenceClassification", "BertForNextSentencePrediction", "BertForMultipleChoice"}
    saved = 19 * (64 * 64 + 2 * 64 * 150)
    for head in HEADS:
        model = tiny(head)
        everything = macs(model, None, [20])
        assert macs(model, config, [20], first_token_only=False) == everything
        assert macs(model, config, [20], first_token_only=True) == everything - saved
        assert macs(model, config, [20]) == everything - (saved if head in firsts else 0)
    fused = lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=True)
    assert macs(fused, None, [20]) == everything - saved


def test_slimmed_and_packed_models_count_with_their_own_sizes() -> None:
    model = lowbit.slim(tiny("BertModel"), 0.5)  # 2 of 4 heads: width 32; 75 neurons
    keep = LengthConfig((0.5, 0.2))
    layers = [(10, 5), (5, 2)]
    expected = sum(
        3 * before * 64 * 32 + 2 * before**2 * 32 + after * 32 * 64 + 2 * after * 64 * 75 for before, after in layers
    )
    assert macs(model, keep, [10]) == expected
    lowbit.quantize(model, lowbit.TernaryConfig(num_attention_heads=2))
    assert macs(model, keep, [10]) == expected


def test_sequences_add_up_and_empty_ones_cost_nothing() -> None:
    config = LengthConfig((0.9, 0.3))
    for model in (tiny("BertModel"), tiny()):
        lengths = [random.randint(1, 40) for _ in range(5)]
        each = [macs(model, config, [n]) for n in lengths]
        assert macs(model, config, [0, *lengths]) == sum(each)
        assert macs(model, config, torch.tensor(lengths)) == sum(each)
        assert macs(model, config, [0]) == macs(model, config, []) == 0
        assert macs(model) == macs(model, None, [40])


def test_configuration_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths are for 3 layers, the model has 2"):
        macs(tiny(), LengthConfig((1, 1, 1)), [5])


def test_batches_of_a_float_model_count_their_padding() -> None:
    """Beside torch's own count of what the encoder runs."""
    model = tiny("BertForQuestionAnswering")
    model.set_attn_implementation("eager")
    batches, short = [[3, 7, 5], [11, 2]], LengthConfig((0.5, 0.25))
    counted = 0
    for each in batches:
        with FlopCounterMode(display=False) as counter:
            model.bert.encoder(torch.randn(len(each), max(each), model.config.hidden_size))
        counted += counter.get_total_flops() // 2
    configs = {"without": None, "all": LengthConfig((1.0, 1.0)), "short": short}
    padded, costs = batch_macs(model, configs, batches)
    assert padded == costs["without"] == counted
    assert costs["all"] == macs(model, None, [3, 7, 5, 11, 2]) < padded
    assert costs["short"] == macs(model, short, [3, 7, 5, 11, 2]) < costs["all"]
    fused = lowbit.fuse(lowbit.quantize(model, lowbit.TernaryConfig()))
    assert batch_macs(fused, configs, batches) == (padded, {**costs, "without": costs["all"]})


# ------------------------------------------------------------------------------------------------------ latency table


def table(**changes: object) -> LatencyTable:
    values = {
        "batch_size": 2, "seq_len": 100, "layers": 3, "full_ms": 50.0, "drop_ms": 0.5, "tokens": (10, 40),
        "saved_ms": (12.0, 8.0), "last_share": 0.75,
    }  # fmt: skip
    return LatencyTable(**{**values, **changes})


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ((100, 100, 100), 50),
        ((200, 150, 101), 50),
        ((40, 40, 40), 50 + 0.5 - 2.75 * 8),
        ((100, 100, 10), 50 + 0.5 - 0.75 * 12),
        ((70, 25, 1), 50 + 1.5 - 4 - 10 - 0.75 * 12),
        ((91, 40, 40), 50 + 1 - 8 * 9 / 60 - 8 - 0.75 * 8),
    ],
)
def test_latency_is_interpolated(keep: tuple[int, ...], expected: float) -> None:
    assert table().latency(LengthConfig(keep, unit="tokens")) == pytest.approx(expected)
    if max(keep) <= 100:
        assert table().latency(LengthConfig(tuple(n / 100 for n in keep))) == pytest.approx(expected)


def test_table_reads_what_it_wrote_exactly(tmp_path: Path) -> None:
    before = table(full_ms=random.random(), saved_ms=(random.random(), random.random()))
    before.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tokens": 3}'])
def test_file_that_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(ValueError, match=r"table\.json is not a table"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize("tokens", [(40, 10), (10, 100), (0, 10), (10, 10), (10,)])
def test_table_refuses_points_out_of_order(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="LatencyTable: tokens="):
        table(tokens=tokens)


def test_table_refuses_other_models_configurations() -> None:
    with pytest.raises(ValueError, match="lengths are for 2 layers, the model has 3"):
        table().latency(LengthConfig((1, 1)))
    with pytest.raises(ValueError, match="threshold"):
        table().latency(LengthConfig((0, 0, 0), unit="threshold"))


class Simulated:
    """Stands in for a model whose layers take 3 + 5 tenths of a token in their halves, and 2 for each drop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, head: str, layers: int) -> None:
        self.model = tiny(head, num_hidden_layers=layers).train()
        self.configs: list[LengthConfig | None] = []
        self.clock, self.shapes = 0.0, set()
        monkeypatch.setattr(cost, "set_length", lambda _, config: self.configs.append(config))
        monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: self.clock))
        monkeypatch.setattr(self.model, "forward", self.forward)

    def milliseconds(self, config: LengthConfig, tokens: int) -> float:
        kept = [n for (n,) in kept_lengths([tokens], config)]
        before, after = [tokens, *kept[:-1]], kept
        if cost.reads_first_token_only(self.model):
            after = kept[:-1]
        rows = 3 * sum(before) + 5 * sum(after)
        return 7 + rows / 10 + 2 * sum(a < b for a, b in zip(after, before, strict=False))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> None:
        assert not self.model.training
        assert not torch.is_grad_enabled()
        assert attention_mask.all() and not token_type_ids.any()
        assert input_ids.min() >= 0
        assert input_ids.max() < 101
        self.shapes.add(tuple(input_ids.shape))
        noise = 10 * (random.random() < 0.05)  # other programs; the median does not see it
        self.clock += (self.milliseconds(self.configs[-1], input_ids.shape[1]) + noise) / 1000


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForQuestionAnswering"])
@pytest.mark.parametrize("layers", [3, 6])
def test_measured_table_predicts_what_was_not_measured(monkeypatch: pytest.MonkeyPatch, head: str, layers: int) -> None:
    simulated = Simulated(monkeypatch, head, layers)
    monkeypatch.setattr(cost, "_last_share", lambda model: 0.0 if cost.reads_first_token_only(model) else 5 / 8)
    result = measure_latency(simulated.model, 4, 32, repeats=15, score="cls")
    assert simulated.shapes == {(4, 32)}
    assert simulated.model.training
    assert simulated.configs[-1] is None
    assert all(config.score == "cls" for config in simulated.configs[:-1])
    assert result.drop_ms == pytest.approx(2)
    for _ in range(50):
        keep = sorted(random.choices(range(1, 33), k=layers), reverse=True)
        config = LengthConfig(tuple(keep), unit="tokens")
        assert result.latency(config) == pytest.approx(simulated.milliseconds(config, 32), rel=1e-6)


@pytest.mark.parametrize("stage", ["float", "prepared", "fused"])
def test_measures_real_models(stage: str) -> None:
    model = tiny("BertForQuestionAnswering")
    if stage != "float":
        model = (lowbit.prepare if stage == "prepared" else lowbit.quantize)(model, lowbit.TernaryConfig()).eval()
    if stage == "fused":
        lowbit.fuse(model)
    inputs = batch("BertForQuestionAnswering")
    before, state = outputs(model, inputs), torch.get_rng_state()
    result = measure_latency(model, 2, 9, points=[2, 5], repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (result.batch_size, result.seq_len, result.layers, result.tokens) == (2, 9, 2, (2, 5))
    assert result.full_ms == result.latency(LengthConfig((1, 1))) > 0
    assert not hasattr(model.config, "length_config")
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))


def test_last_share_is_the_weights_behind_the_drop() -> None:
    assert cost._last_share(outline(**MINILM)) == pytest.approx(9 / 12)
    assert cost._last_share(tiny()) == 0


def test_measured_model_gets_its_own_configuration_back(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Simulated(monkeypatch, "BertForQuestionAnswering", 2)
    own = LengthConfig((1, 0.5), restore=True)
    lowbit.set_length(simulated.model, own)
    measure_latency(simulated.model, 1, 16, points=[4], repeats=1)
    assert simulated.configs[-1] == own
    monkeypatch.setattr(simulated.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_latency(simulated.model, 1, 16, points=[4], repeats=1)
    assert simulated.configs[-1] == own
    assert simulated.model.training


def test_one_layer_has_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for head in ("BertForSequenceClassification", "BertForQuestionAnswering"):
        simulated = Simulated(monkeypatch, head, 1)
        result = measure_latency(simulated.model, 1, 8, points=[7, 3])
        assert all(map(math.isfinite, (result.full_ms, result.drop_ms, *result.saved_ms)))


@pytest.mark.parametrize(
    "arguments",
    [(0, 8), (1, 1), (1, 8, []), (1, 8, [8]), (1, 8, [0, 3]), (1, 8, [3], 0)],
)
def test_bad_points_are_named(monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]) -> None:
    simulated = Simulated(monkeypatch, "BertModel", 2)
    with pytest.raises(ValueError, match="accepted: at least"):
        measure_latency(simulated.model, *arguments)
    assert not simulated.configs
