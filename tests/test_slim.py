"""slim keeps the most important heads and FFN neurons, and nothing else changes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import lowbit
from helpers import HEADS, batch, identical, outputs, tiny
from lowbit.elastic.layout import lead

LINEARS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def labelled(batches: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{**batch(rows=4), "labels": torch.randint(0, 3, (4,))} for _ in range(batches)]


def layers(model: Any) -> list[Any]:
    return list(model.base_model.encoder.layer)


@torch.no_grad()
def kill(model: Any, heads: list[list[int]], neurons: list[list[int]]) -> None:
    """Make some heads and neurons of each layer compute exactly zero."""
    size = model.config.hidden_size // model.config.num_attention_heads
    for layer, dead_heads, dead_neurons in zip(layers(model), heads, neurons, strict=True):
        for head in dead_heads:
            rows = slice(head * size, (head + 1) * size)
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                linear.weight[rows], linear.bias[rows] = 0.0, 0.0
        layer.intermediate.dense.weight[dead_neurons] = 0.0
        layer.intermediate.dense.bias[dead_neurons] = 0.0  # gelu(0) = 0


@pytest.mark.parametrize("ranking", ["first order", "magnitude"])
def test_dropping_dead_heads_and_neurons_changes_nothing(ranking: str) -> None:
    model = tiny().double()
    kill(model, [[0, 2], [1, 2]], [torch.randperm(150)[:75].tolist() for _ in range(2)])
    inputs = batch()
    before = outputs(model, inputs)
    lowbit.slim(model, 0.5, labelled() if ranking == "first order" else None)
    for x, y in zip(outputs(model, inputs), before, strict=True):
        assert torch.allclose(x, y, rtol=0, atol=1e-12)


def test_dropping_live_ones_does_change_the_output() -> None:
    model, inputs = tiny().double(), batch()
    before = outputs(model, inputs)[0]
    assert not torch.allclose(outputs(lowbit.slim(model, 0.5), inputs)[0], before, atol=1e-4)


def derivative(model: Any, parts: list[torch.Tensor], inputs: dict[str, torch.Tensor]) -> float:
    """|dL/dgate| by central difference; scaling weights into or out of a head or neuron is gating it."""
    originals, step = [part.clone() for part in parts], 1e-4
    values = []
    for factor in (1 + step, 1 - step):
        for part, original in zip(parts, originals, strict=True):
            part.copy_(original * factor)
        values.append(model(**inputs).loss.item())
    for part, original in zip(parts, originals, strict=True):
        part.copy_(original)
    return abs(values[0] - values[1]) / (2 * step)


@torch.no_grad()
def test_the_kept_ones_have_the_largest_numerical_derivative() -> None:
    """Of the loss of one example after the other; of neurons before and behind the activation."""
    model = tiny(intermediate_size=20).double()
    batches, size = labelled(), model.config.hidden_size // model.config.num_attention_heads
    examples = [{key: value[i : i + 1] for key, value in each.items()} for each in batches for i in range(4)]
    expected = []
    for layer in layers(model):
        context, first, second = layer.attention.output.dense, layer.intermediate.dense, layer.output.dense
        gated = {
            "head": [[[context.weight[:, h * size : (h + 1) * size]]] for h in range(4)],
            "neuron": [[[first.weight[j], first.bias[j : j + 1]], [second.weight[:, j]]] for j in range(20)],
        }
        ranked = {}
        for what, units in gated.items():
            importance = [sum(derivative(model, parts, one) for one in examples for parts in gates) for gates in units]
            ranked[what] = sorted(sorted(range(len(units)), key=lambda i: -importance[i])[: len(units) // 2])
        expected.append(ranked)
    original = copy.deepcopy(model)
    with torch.enable_grad():
        lowbit.slim(model, 0.5, batches)
    assert model.config.quantization_config.kept_heads == [kept["head"] for kept in expected]
    for before, after, kept in zip(layers(original), layers(model), expected, strict=True):
        rows = torch.tensor([h * size + i for h in kept["head"] for i in range(size)])
        for path in LINEARS[:3]:
            assert torch.equal(after.get_submodule(path).weight, before.get_submodule(path).weight[rows])
            assert torch.equal(after.get_submodule(path).bias, before.get_submodule(path).bias[rows])
        output = "attention.output.dense"
        assert torch.equal(after.get_submodule(output).weight, before.get_submodule(output).weight[:, rows])
        assert torch.equal(after.intermediate.dense.weight, before.intermediate.dense.weight[kept["neuron"]])
        assert torch.equal(after.intermediate.dense.bias, before.intermediate.dense.bias[kept["neuron"]])
        assert torch.equal(after.output.dense.weight, before.output.dense.weight[:, kept["neuron"]])
        assert torch.equal(after.output.dense.bias, before.output.dense.bias)


@pytest.mark.parametrize(
    ("width", "heads", "neurons"),
    [(1.0, 4, 150), (0.75, 3, 112), (0.5, 2, 75), (0.3, 1, 45), (1e-3, 1, 1)],
)
def test_sizes_are_rounded_and_never_zero(width: float, heads: int, neurons: int) -> None:
    model = lowbit.slim(tiny(), width)
    for layer in layers(model):
        attention = layer.attention.self
        assert (attention.num_attention_heads, attention.all_head_size) == (heads, heads * 16)
        assert attention.query.weight.shape == attention.key.weight.shape == attention.value.weight.shape
        assert attention.query.weight.shape == (heads * 16, 64)
        assert layer.attention.output.dense.weight.shape == (64, heads * 16)
        assert layer.intermediate.dense.weight.shape == (neurons, 64)
        assert layer.output.dense.weight.shape == (64, neurons)
    assert model.config.num_attention_heads == 4
    assert model.config.quantization_config.num_attention_heads == heads
    assert model(**batch()).logits.shape == (3, 3)


def test_full_width_is_the_same_model() -> None:
    model, inputs = tiny(), batch()
    before = outputs(model, inputs)
    assert all(torch.equal(x, y) for x, y in zip(outputs(lowbit.slim(model, 1.0), inputs), before, strict=True))


@pytest.mark.parametrize("head", HEADS)
def test_every_head_slims_copies_and_survives_saving(head: str, tmp_path: Path) -> None:
    inputs = batch(head)
    model = lowbit.slim(tiny(head), 0.5)
    expected = outputs(model, inputs)
    assert identical(outputs(copy.deepcopy(model), inputs), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert identical(outputs(loaded, inputs), expected)
    assert layers(loaded)[0].attention.self.num_attention_heads == 2


def test_leading_heads_and_neurons_need_no_data() -> None:
    with torch.device("meta"):
        model = type(tiny())(tiny().config)
    lead(model, 3, 10)
    shapes = {name: parameter.shape for name, parameter in model.bert.encoder.layer[1].named_parameters()}
    assert shapes["attention.self.value.weight"] == (48, 64)
    assert shapes["attention.output.dense.weight"] == (64, 48)
    assert shapes["output.dense.weight"] == (64, 10)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_ranking_leaves_mode_and_gradients_alone_and_ignores_dropout() -> None:
    model = tiny().train()
    model(**labelled(1)[0]).loss.backward()
    embedding = model.bert.embeddings.word_embeddings.weight
    gradient, twin, batches = embedding.grad.clone(), copy.deepcopy(model), labelled()
    lowbit.slim(model, 0.5, batches)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(embedding.grad, gradient)
    lowbit.slim(twin, 0.5, batches)
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_half_precision_models_can_be_ranked() -> None:
    model = lowbit.slim(tiny().to(torch.bfloat16), 0.5, labelled())
    assert model.bert.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
    assert model(**batch()).logits.isfinite().all()


def test_a_slim_model_trains_and_goes_on_to_ternary_and_split() -> None:
    model = lowbit.slim(tiny(), 0.5, labelled())
    model.train()(**labelled(1)[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    inputs = batch()
    prepared = lowbit.prepare(model.eval(), lowbit.TernaryConfig())
    packed = lowbit.convert(lowbit.split(prepared))
    assert packed(**inputs).logits.isfinite().all()


def test_which_heads_were_kept_is_known_in_every_stage_and_file(tmp_path: Path) -> None:
    model, others = tiny(), [[0, 1], [0, 1]]
    kill(model, others, [[], []])
    lowbit.slim(model, 0.5)
    kept = [[2, 3], [2, 3]]
    ternary = lowbit.TernaryConfig(num_attention_heads=2, kept_heads=others)
    stages = {
        "float": lambda model: model,
        "prepared": lambda model: lowbit.prepare(model, ternary),
        "split": lowbit.split,
        "packed": lowbit.convert,
        "float again": lambda model: model.dequantize(),
    }
    for name, stage in stages.items():
        model = stage(model)
        model.save_pretrained(tmp_path / name)
        model = type(model).from_pretrained(tmp_path / name).eval()
        assert model.config.quantization_config.kept_heads == kept, name


def test_kept_heads_that_a_model_has_not_are_refused(tmp_path: Path) -> None:
    model = lowbit.slim(tiny(), 0.5)
    model.config.quantization_config.kept_heads = [[0, 1], [2, 4]]
    model.save_pretrained(tmp_path)
    with pytest.raises(lowbit.CheckpointError, match=r"\[2, 4\]\] of a model that had 4 heads: 0 to 3"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kept", [[], [[0, 1], [1]], [[1, 0], [0, 1]], [[0, 0], [0, 1]], [[-1, 0], [0, 1]], [[0, True], [0, 1]], 2, "01"]
)
def test_kept_heads_that_are_none_are_refused(kept: object) -> None:
    with pytest.raises(ValueError, match="for each layer a list of num_attention_heads=2 ascending numbers"):
        lowbit.LowbitConfig(num_attention_heads=2, kept_heads=kept)


@pytest.mark.parametrize("width", [0, -0.5, 1.5, math.nan, "0.5", None, True])
def test_a_width_outside_its_range_is_refused(width: object) -> None:
    with pytest.raises(ValueError, match="greater than 0, at most 1"):
        lowbit.slim(tiny(), width)


def test_models_that_cannot_be_slimmed_are_refused() -> None:
    with pytest.raises(ValueError, match="already slimmed"):
        lowbit.slim(lowbit.slim(tiny(), 0.5), 0.5)
    with pytest.raises(ValueError, match="already prepared"):
        lowbit.slim(lowbit.prepare(tiny(), lowbit.TernaryConfig()), 0.5)
    with pytest.raises(ValueError, match="already packed"):
        lowbit.slim(lowbit.quantize(tiny(), lowbit.TernaryConfig()), 0.5)
    with pytest.raises(ValueError, match="gpt2"):
        lowbit.slim(GPT2Model(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)), 0.5)
    with pytest.raises(TypeError, match="transformers model"):
        lowbit.slim(torch.nn.Linear(2, 2), 0.5)


def test_data_without_labels_is_refused_and_the_model_stays_whole() -> None:
    model, inputs = tiny().train(), batch()
    before = outputs(copy.deepcopy(model).eval(), inputs)
    with pytest.raises(ValueError, match="needs labels"):
        lowbit.slim(model, 0.5, [inputs])
    with pytest.raises(ValueError, match="empty"):
        lowbit.slim(model, 0.5, [])
    with pytest.raises(TypeError, match="the data give Tensor, expected batches that are mappings"):
        lowbit.slim(model, 0.5, [inputs["input_ids"]])
    assert model.training
    assert all(torch.equal(x, y) for x, y in zip(outputs(model.eval(), inputs), before, strict=True))
