"""Importance by its definitions, rewiring that keeps the function, sub-networks and pruned models that load."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from helpers import SIZES, batch, identical, outputs, outputs_by_module, tiny
from lowbit import models
from lowbit.elastic import layout
from lowbit.elastic.depth import STRATEGIES, kept_layers, layer_similarity
from lowbit.elastic.importance import DEFINITIONS, Importance, magnitude
from lowbit.nn import PackedEncoder

DISTILBERT = {"vocab_size": 101, "dim": 60, "n_layers": 4, "n_heads": 3, "hidden_dim": 50}
ODD = {**SIZES, "hidden_size": 60, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 50}
# Class prefix -> configuration, with an odd number of heads: all of ARCHITECTURES whose heads are their layers' own.
CLASSES: dict[str, dict[str, Any]] = {
    "Bert": ODD,
    "Roberta": {**ODD, "pad_token_id": 1},
    "XLMRoberta": {**ODD, "pad_token_id": 1},
    "Camembert": {**ODD, "pad_token_id": 1},
    "Electra": {**ODD, "embedding_size": 32},
    "DistilBert": {**DISTILBERT, "max_position_embeddings": 40},
}
FEW = {**SIZES, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


def of_class(prefix: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{prefix}Config")(**{**CLASSES[prefix], "num_labels": 3, **changes})
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def four(**changes: Any) -> Any:
    """A BERT of four layers of four heads."""
    return tiny(**{**FEW, **changes})


def labelled(batches: int = 2, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    return [{**batch(rows=rows), "labels": torch.randint(0, 3, (rows,))} for _ in range(batches)]


def layers_of(model: Any) -> list[Any]:
    return [layer for _, layer in models.layers(model)]


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 1e-5) -> bool:
    return len(a) == len(b) > 0 and all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(a, b, strict=True))


def near(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Codes flip where an activation lies on a tie between two, hence a norm."""
    return all(float((x - y).norm()) <= 0.02 * float(y.norm()) for x, y in zip(a, b, strict=True))


def test_every_architecture_with_heads_of_its_layers_is_tested() -> None:
    tested = {getattr(transformers, f"{prefix}Config").model_type for prefix in CLASSES}
    assert tested == {name for name, each in models.ARCHITECTURES.items() if not each.own_attention}


# ---------------------------------------------------------------------------------------------------------- importance


def contributions(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """ctx * dL/dctx [B, S, features] of each layer, from tensors that autograd keeps: no gates."""
    seen: dict[str, list[torch.Tensor]] = {"head": [], "before": [], "behind": []}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any = None) -> None:
            x = args[0] if output is None else output
            x.retain_grad()
            seen[name].append(x)

        return hook

    hooks = []
    for layer in layers_of(model):
        hooks += [
            layer.attention.output.dense.register_forward_pre_hook(keep("head")),
            layer.intermediate.dense.register_forward_hook(keep("before")),
            layer.output.dense.register_forward_pre_hook(keep("behind")),
        ]
    model(**inputs).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return {name: [(x * x.grad).detach() for x in found] for name, found in seen.items()}


def explicit(definition: str, batches: list[torch.Tensor]) -> float:
    """The importance of one unit from its contributions [B, S] in each batch, loop by loop."""
    total, tokens, rows, so_far = 0.0, 0, 0, 0.0
    for c in batches:
        mean = len(c)  # the loss is a mean over rows
        if definition == "per_token":
            total += sum(abs(float(value)) * mean for row in c for value in row)
        elif definition == "per_example":
            total += sum(abs(float(row.sum())) * mean for row in c)
        else:
            so_far = float(c.sum()) + (so_far if definition == "cumulative" else 0.0)
            total += abs(so_far)
        rows += len(c)
    tokens = sum(c.numel() for c in batches)
    return total / {"per_token": tokens, "per_example": rows}.get(definition, 1)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_importance_is_the_sum_that_its_definition_says(definition: str) -> None:
    model = tiny(intermediate_size=6, num_hidden_layers=2).double()
    data = [{key: value for key, value in each.items() if key != "attention_mask"} for each in labelled(3, 2)]
    data.append({key: value[:1] for key, value in data[0].items()})  # a last batch that is smaller
    found = lowbit.importance(model, data, definition)
    seen = [contributions(model, inputs) for inputs in data]
    for number in range(2):
        heads = [each["head"][number].unflatten(-1, (4, 16)).sum(-1) for each in seen]
        for head in range(4):
            expected = explicit(definition, [c[..., head] for c in heads])
            assert float(found.heads[number][head]) == pytest.approx(expected, rel=1e-9)
        for neuron in range(6):
            gates = ([e[k][number][..., neuron] for e in seen] for k in ("before", "behind"))
            expected = sum(explicit(definition, each) for each in gates)
            assert float(found.neurons[number][neuron]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("definition", ["per_batch", "cumulative"])
def test_neurons_have_dynaberts_importance(definition: str) -> None:
    """|sum w dL/dw| of weights in and bias, and of weights out; released code never clears the gradients."""
    model, data = tiny(intermediate_size=10).double(), labelled()
    expected = torch.zeros(10, dtype=torch.float64)
    for inputs in data:
        if definition == "per_batch":
            model.zero_grad()
        model(**inputs).loss.backward()
        first, second = layers_of(model)[1].intermediate.dense, layers_of(model)[1].output.dense
        into = (first.weight * first.weight.grad).sum(1) + first.bias * first.bias.grad
        expected += into.detach().abs() + (second.weight * second.weight.grad).sum(0).detach().abs()
    model.zero_grad()
    assert torch.allclose(lowbit.importance(model, data, definition).neurons[1], expected, rtol=1e-9)


def test_padding_is_no_token() -> None:
    model, (inputs,) = tiny().double(), labelled(1)
    tokens, rows = int(inputs["attention_mask"].sum()), inputs["attention_mask"].numel()
    without = {key: value for key, value in inputs.items() if key != "attention_mask"}
    found = lowbit.importance(model, [inputs], "per_token")
    longer = {key: torch.nn.functional.pad(x, (0, 5)) if x.dim() == 2 else x for key, x in inputs.items()}
    again = lowbit.importance(model, [longer], "per_token")
    assert tokens < rows and without.keys() < inputs.keys()
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found.heads, again.heads, strict=True))


def test_the_head_that_matters_to_the_loss_ranks_first() -> None:
    """Against the loss with each head's output taken away: a dead one is last, a loud one first."""
    model, data = four(num_hidden_layers=1), labelled(4)
    out, value = layers_of(model)[0].attention.output.dense, layers_of(model)[0].attention.self.value
    with torch.no_grad():
        value.weight[16:32], value.bias[16:32] = 0.0, 0.0
        out.weight[:, 32:48] *= 8
    ranks = {name: lowbit.importance(model, data, name).heads[0] for name in DEFINITIONS}
    full = [model(**inputs).loss.item() for inputs in data]
    changes = []
    for head in range(4):
        changed, part = copy.deepcopy(model), slice(16 * head, 16 * head + 16)
        with torch.no_grad():
            layers_of(changed)[0].attention.output.dense.weight[:, part] = 0.0
            changes.append(sum(abs(changed(**i).loss.item() - f) for i, f in zip(data, full, strict=True)))
    assert max(range(4), key=lambda h: changes[h]) == 2 and min(range(4), key=lambda h: changes[h]) == 1
    for name, found in ranks.items():
        assert int(found.argmax()) == 2 and float(found[1]) == pytest.approx(0, abs=1e-9), name


@pytest.mark.parametrize("prefix", CLASSES)
def test_importance_of_every_architecture_changes_nothing(prefix: str) -> None:
    model = of_class(prefix).train()
    before = copy.deepcopy(model.state_dict())
    found = magnitude(model)
    assert [len(each) for each in found.heads] == [3] * 4 and [len(each) for each in found.neurons] == [50] * 4
    assert all(bool((each > 0).all()) for each in (*found.heads, *found.neurons))
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(x, y) for x, y in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_importance_cannot_be_taken_of_is_said() -> None:
    for model, state in (
        (lowbit.prepare(four(), lowbit.TernaryConfig()), "prepared"),
        (lowbit.quantize(four(), lowbit.TernaryConfig()), "packed"),
    ):
        with pytest.raises(ValueError, match=f"already {state}"):
            magnitude(model)
        with pytest.raises(ValueError, match=f"already {state}"):
            lowbit.rewire(model, Importance([], []))
        with pytest.raises(ValueError, match=f"already {state}"):
            lowbit.prune_heads(model, labelled(), 0.5)
    with pytest.raises(ValueError, match="definition='taylor'; accepted: 'per_token'"):
        lowbit.importance(four(), labelled(), "taylor")
    with pytest.raises(ValueError, match="mpnet"):
        config = transformers.MPNetConfig(**{**SIZES, "num_labels": 3})
        lowbit.importance(transformers.MPNetForSequenceClassification(config), labelled())
    shorter = lowbit.set_length(four(), lowbit.LengthConfig((1.0, 0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="set_length\\(model, None\\)"):
        lowbit.importance(shorter, labelled())


# -------------------------------------------------------------------------------------------------------------- rewire


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("prefix", CLASSES)
def test_rewiring_keeps_the_function(prefix: str, bias: bool) -> None:
    model = of_class(prefix)
    if not bias:
        for layer in layers_of(model):
            for path in models.describe(model).layer_linears():
                layer.get_submodule(path).bias = None
    inputs = labelled(1)[0]
    ranks = lowbit.importance(model, [inputs])
    before, weights = outputs(model, inputs), copy.deepcopy(model.state_dict())
    assert lowbit.rewire(model, ranks) is model
    assert close(outputs(model, inputs), before)
    moved = sum(not torch.equal(x, y) for x, y in zip(weights.values(), model.state_dict().values(), strict=True))
    assert moved >= 4 * (5 if bias else 4)
    again = lowbit.importance(model, [inputs])
    for each in (*again.heads, *again.neurons):  # sorted, but for the order of sums
        assert bool((each[1:] <= each[:-1] * 1.001 + 1e-7).all())


def test_importance_of_another_model_is_refused() -> None:
    model = four()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="of other sizes"):
        lowbit.rewire(model, lowbit.importance(four(intermediate_size=20), labelled()))
    with pytest.raises(ValueError, match="full width"):
        lowbit.rewire(lowbit.slim(four(), 0.5), lowbit.importance(four(), labelled()))
    assert all(torch.equal(x, y) for x, y in zip(weights.values(), model.state_dict().values(), strict=True))


def test_what_is_left_of_a_rewired_model_is_what_slim_keeps() -> None:
    model, data, inputs = four(), labelled(), batch()
    slimmed = lowbit.slim(copy.deepcopy(model), 0.5, data)
    half = lowbit.extract(lowbit.rewire(model, lowbit.importance(model, data)), 0.5)
    assert close(outputs(half, inputs), outputs(slimmed, inputs))


# --------------------------------------------------------------------------------------------------------- sub-networks


@pytest.mark.parametrize(
    ("strategy", "layers", "depth", "kept"),
    [
        ("dynabert", 12, 0.75, (0, 1, 2, 4, 5, 6, 8, 9, 10)),
        ("dynabert", 12, 0.5, (0, 2, 4, 6, 8, 10)),
        ("dynabert", 6, 0.5, (0, 2, 4)),
        ("dynabert", 10, 0.3, (0, 3, 6)),
        ("top", 12, 0.5, (0, 1, 2, 3, 4, 5)),
        ("bottom", 6, 0.5, (3, 4, 5)),
        ("alternate", 12, 8 / 12, (0, 1, 2, 3, 4, 6, 8, 10)),
        ("alternate", 6, 0.5, (0, 2, 4)),
        ("symmetric", 12, 8 / 12, (0, 1, 2, 3, 8, 9, 10, 11)),
        ("symmetric", 6, 0.5, (0, 1, 5)),
    ],
)
def test_layers_are_kept_by_the_rule_of_their_name(strategy: str, layers: int, depth: float, kept: Any) -> None:
    assert kept_layers(strategy, layers, depth) == kept


@pytest.mark.parametrize("layers", range(1, 13))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rule_keeps_as_many_layers_as_it_is_asked_to(strategy: str, layers: int) -> None:
    similar = [0.1 * index for index in range(layers)]
    for kept in range(1, layers + 1):
        if strategy == "alternate" and 2 * kept < layers:
            continue
        found = kept_layers(strategy, layers, kept / layers, similar)
        assert len(found) == kept and [*found] == sorted(set(found)) and found[0] >= 0 and found[-1] < layers


def test_contribution_drops_the_layers_that_change_least() -> None:
    model, data = four(), labelled()
    with torch.no_grad():
        for number in (1, 2):  # residual and LayerNorm are left of them
            layer = layers_of(model)[number]
            for linear in (layer.attention.output.dense, layer.output.dense):
                linear.weight.zero_(), linear.bias.zero_()
    similar = layer_similarity(model, data)
    assert min(similar[1:3]) > max(similar[0], similar[3])
    taken = lowbit.extract(model, depth=0.5, layers="contribution", data=data)
    assert torch.equal(layers_of(taken)[1].output.dense.weight, layers_of(model)[3].output.dense.weight)


@pytest.mark.parametrize("prefix", CLASSES)
def test_a_sub_network_is_the_leading_part_of_the_model(prefix: str) -> None:
    model = of_class(prefix)
    whole = copy.deepcopy(model.state_dict())
    taken = lowbit.extract(model, width=0.67, depth=0.5)
    architecture, kept = models.describe(model), [layers_of(model)[index] for index in (0, 2)]
    assert taken.config.num_hidden_layers == 2 and layout.sizes(taken) == [(2, 33)] * 2
    for before, after in zip(kept, layers_of(taken), strict=True):
        for path in architecture.projections:
            assert torch.equal(after.get_submodule(path).weight, before.get_submodule(path).weight[:40])
            assert torch.equal(after.get_submodule(path).bias, before.get_submodule(path).bias[:40])
        output = architecture.attention_output
        assert torch.equal(after.get_submodule(output).weight, before.get_submodule(output).weight[:, :40])
        assert torch.equal(after.get_submodule(output).bias, before.get_submodule(output).bias)
        first, second = architecture.ffn_input, architecture.ffn_output
        assert torch.equal(after.get_submodule(first).weight, before.get_submodule(first).weight[:33])
        assert torch.equal(after.get_submodule(second).weight, before.get_submodule(second).weight[:, :33])
    assert all(torch.equal(x, y) for x, y in zip(whole.values(), model.state_dict().values(), strict=True))
    ours = {id(parameter) for parameter in taken.parameters()}
    assert ours.isdisjoint(map(id, model.parameters()))


def test_full_width_and_depth_is_the_same_model_and_a_shallower_one_a_plain_one(tmp_path: Path) -> None:
    model, inputs = four(), batch()
    assert identical(outputs(lowbit.extract(model), inputs), outputs(model, inputs))
    taken = lowbit.extract(model, depth=0.5)
    taken.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert identical(outputs(type(model).from_pretrained(tmp_path).eval(), inputs), outputs(taken, inputs))


LOADING = """
import sys, torch, lowbit
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    inputs, expected = torch.load(f"{folder}/outputs.pt")
    with torch.no_grad():
        found = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits
    assert torch.equal(found, expected), folder
print("fine")
"""


def test_sub_networks_and_pruned_models_load_in_a_new_process(tmp_path: Path) -> None:
    """Plain `from_pretrained`, of every architecture, float, ternary and binary."""
    folders = []

    def save(model: Any, name: str) -> None:
        inputs = batch()
        model.save_pretrained(tmp_path / name)
        lowbit.verify(tmp_path / name)
        torch.save((inputs, outputs(model, inputs)[0]), tmp_path / name / "outputs.pt")
        folders.append(str(tmp_path / name))

    for prefix in CLASSES:
        save(lowbit.extract(of_class(prefix), 0.67, 0.5), f"{prefix}-extracted")
        save(lowbit.prune_heads(of_class(prefix), labelled(), 0.4), f"{prefix}-pruned")
    for name, config in (("ternary", lowbit.TernaryConfig()), ("binary", lowbit.BinaryConfig())):
        save(lowbit.quantize(lowbit.extract(four(), 0.5, 0.75), config), f"{name}-extracted")
        save(lowbit.quantize(lowbit.prune_heads(four(), labelled(), 0.4), config), f"{name}-pruned")
        save(lowbit.extract(lowbit.prepare(four(), config), 0.5, 0.75), f"{name}-prepared")
    done = subprocess.run([sys.executable, "-c", LOADING, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("fine"), done.stderr[-2000:]


@pytest.mark.parametrize("bits", [2, 1])
def test_a_low_bit_sub_network_runs_fused(bits: int) -> None:
    config = lowbit.TernaryConfig() if bits == 2 else lowbit.BinaryConfig()
    packed, inputs = lowbit.quantize(lowbit.extract(four(), 0.5, 0.75), config), batch()
    encoder = packed.bert.encoder
    assert isinstance(encoder, PackedEncoder) and encoder.problem() is None
    assert near(outputs(packed, inputs), outputs_by_module(packed, inputs))


def test_layers_of_different_widths_run_one_by_one_with_the_same_results() -> None:
    pruned = lowbit.prune_heads(four(), labelled(), 0.4)
    assert len({heads for heads, _ in layout.sizes(pruned)}) > 1
    packed, inputs = lowbit.quantize(pruned, lowbit.TernaryConfig()), batch()
    assert packed.bert.encoder.problem() is not None
    assert near(outputs(packed, inputs), outputs_by_module(packed, inputs))  # embeddings are fused, and round otherwise
    with pytest.raises(ValueError, match=r"differs from layer\.0 in heads"):
        lowbit.fuse(packed)
    back = packed.dequantize()
    assert back.config.quantization_config.kept_heads == pruned.config.quantization_config.kept_heads


def test_neurons_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    model = four()
    layout.lead(model, [4, 3, 2, 1], [48, 7, 20, 1])
    from lowbit.files import saving

    widths = {"num_attention_heads": [4, 3, 2, 1], "intermediate_sizes": [48, 7, 20, 1]}
    saving.attach(model, lowbit.LowbitConfig(stage="float", **widths))
    for name, stage in (("float", model), ("packed", lowbit.quantize(copy.deepcopy(model), lowbit.TernaryConfig()))):
        stage.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name).eval()
        assert layout.sizes(loaded) == [(4, 48), (3, 7), (2, 20), (1, 1)], name
        inputs = batch()
        assert identical(outputs(loaded, inputs), outputs(stage, inputs)), name
    fewer = type(model).from_pretrained(tmp_path / "float", num_hidden_layers=2)
    assert layout.sizes(fewer) == [(4, 48), (3, 7)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0}, "width=0; accepted: a number greater than 0"),
        ({"width": 1.5}, "at most 1"),
        ({"width": True}, "width=True"),
        ({"width": "0.5"}, "width='0.5'"),
        ({"width": 0.3}, "width=0.3 of 4 heads is 1.2 heads; accepted: 0.25, 0.5, 0.75, 1"),
        ({"width": 0.01}, "is 0.04 heads"),
        ({"depth": 0}, "depth=0; accepted"),
        ({"depth": 0.1}, "depth=0.1 keeps none of 4 layers; accepted: from 0.25"),
        ({"depth": 0.25, "layers": "alternate"}, "drops at most half"),
        ({"depth": 0.5, "layers": "middle"}, "layers='middle'; accepted: 'dynabert', 'top'"),
        ({"depth": 0.5, "layers": "contribution"}, "needs data"),
        ({"layers": [0, 4]}, "ascending numbers of the layers 0 to 3"),
        ({"layers": []}, "ascending numbers"),
    ],
)
def test_a_sub_network_that_is_none_is_one_error_and_nothing_is_lost(given: dict[str, Any], message: str) -> None:
    model, inputs = four(), batch()
    before = outputs(model, inputs)
    with pytest.raises(ValueError) as caught:
        lowbit.extract(model, **given)
    assert message in str(caught.value)
    assert identical(outputs(model, inputs), before)


def test_models_without_sub_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="extract takes a float or prepared model, this one is already packed"):
        lowbit.extract(lowbit.quantize(four(), lowbit.TernaryConfig()), 0.5)
    with pytest.raises(ValueError, match="already slimmed"):
        lowbit.extract(lowbit.slim(four(), 0.5), 0.5)
    with pytest.raises(ValueError, match="length_config"):
        lowbit.extract(lowbit.set_length(four(), lowbit.LengthConfig((0.5,) * 4)), depth=0.5)
    with pytest.raises(ValueError, match="exit_config"):
        lowbit.extract(lowbit.add_exits(four(), "linear"), depth=0.5)
    with pytest.raises(ValueError, match="names layers by their numbers"):
        config = lowbit.TernaryConfig(modules_to_not_convert=["layer.0"])
        lowbit.extract(lowbit.prepare(four(), config), depth=0.5)
    with pytest.raises(ValueError, match="expected a linear with its weight in it"):
        model = four()
        torch.nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].output.dense)
        lowbit.extract(model, 0.5)


def test_a_pruned_model_goes_on_without_layers_and_through_every_stage() -> None:
    pruned = lowbit.prune_heads(four(), labelled(), 0.4)
    kept = pruned.config.quantization_config.kept_heads
    taken = lowbit.extract(pruned, depth=0.5)
    assert taken.config.quantization_config.kept_heads == [kept[0], kept[2]]
    split = lowbit.split(lowbit.prepare(taken, lowbit.TernaryConfig()))
    assert split.config.quantization_config.kept_heads == [kept[0], kept[2]]
    assert lowbit.convert(split)(**batch()).logits.isfinite().all()


def test_a_split_pair_has_sub_networks() -> None:
    pair, inputs = lowbit.split(lowbit.prepare(four(), lowbit.TernaryConfig())), batch()
    half = lowbit.extract(pair, 0.5)
    assert half.bert.encoder.layer[0].attention.self.query.weight.shape == (2, 32, 64)
    prepared = outputs(half, inputs)
    assert identical(outputs_by_module(lowbit.convert(half), inputs), prepared)


# ------------------------------------------------------------------------------------------------------------- pruning


def test_pruning_removes_the_least_important_heads_wherever_they_are() -> None:
    model, data, inputs = four(), labelled(), batch()
    found = lowbit.importance(model, data).normalized().heads
    order = sorted((float(found[i][h]), i, h) for i in range(4) for h in range(4))
    kept: list[list[int]] = [[*range(4)] for _ in range(4)]
    for _, i, h in order:
        if sum(map(len, kept)) > 10 and len(kept[i]) > 1:
            kept[i].remove(h)
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for i, own in enumerate(kept):
            for h in {0, 1, 2, 3} - {*own}:
                layers_of(silenced)[i].attention.output.dense.weight[:, 16 * h : 16 * h + 16] = 0.0
    assert lowbit.prune_heads(model, data, 6 / 16) is model
    assert model.config.quantization_config.kept_heads == kept
    assert close(outputs(model, inputs), outputs(silenced, inputs))


def test_exact_pruning_takes_importance_anew() -> None:
    model, data = four(), labelled()
    kept = [[*range(4)] for _ in range(4)]
    trial = copy.deepcopy(model)
    for _ in range(5):  # heads that are gone are silenced here, not cut out
        found = [
            [float(v) if h in own else float("inf") for h, v in enumerate(each)]
            for own, each in zip(kept, lowbit.importance(trial, data).normalized().heads, strict=True)
        ]
        _, i, h = min((v, i, h) for i, each in enumerate(found) for h, v in enumerate(each) if len(kept[i]) > 1)
        kept[i].remove(h)
        with torch.no_grad():
            layers_of(trial)[i].attention.output.dense.weight[:, 16 * h : 16 * h + 16] = 0.0
    lowbit.prune_heads(model, data, 5 / 16, exact=True)
    assert model.config.quantization_config.kept_heads == kept


def test_every_layer_keeps_a_head_and_pruning_goes_on() -> None:
    model, data = four(), labelled()
    assert lowbit.prune_heads(copy.deepcopy(model), data, 0).config.to_dict() == model.config.to_dict()
    with pytest.raises(ValueError, match=r"removes 14 of 16 heads, and at_least=1 a layer leaves 12 to remove"):
        lowbit.prune_heads(model, data, 0.9)
    with pytest.raises(ValueError, match="ratio=1; accepted"):
        lowbit.prune_heads(model, data, 1)
    with pytest.raises(ValueError, match="at_least=0; accepted"):
        lowbit.prune_heads(model, data, 0.5, at_least=0)
    with pytest.raises(ValueError, match="needs labels"):
        lowbit.prune_heads(model, [batch()], 0.5)
    assert layout.sizes(model) == [(4, 48)] * 4
    first = copy.deepcopy(lowbit.prune_heads(model, data, 0.25).config.quantization_config.kept_heads)
    lowbit.prune_heads(model, data, 8 / 12)
    second = model.config.quantization_config.kept_heads
    assert [len(each) for each in second] == [1] * 4 and model.config.quantization_config.num_attention_heads == 1
    assert all({*b} <= {*a} for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "widths",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": [2, 0]},
        {"num_attention_heads": []},
        {"num_attention_heads": True},
        {"num_attention_heads": [2, 3], "kept_heads": [[0, 1], [0, 1]]},
        {"num_attention_heads": [2, 3], "intermediate_sizes": [4]},
        {"intermediate_sizes": [4, 4]},
        {"num_attention_heads": 2, "intermediate_sizes": [4, 0]},
    ],
)
def test_widths_that_are_none_are_refused(widths: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="LowbitConfig: "):
        lowbit.LowbitConfig(**widths)


def test_more_heads_than_a_model_has_are_refused(tmp_path: Path) -> None:
    model = lowbit.slim(four(), 0.5)
    model.config.quantization_config = lowbit.LowbitConfig(stage="float", num_attention_heads=[2, 2, 5, 2])
    model.save_pretrained(tmp_path)
    with pytest.raises(lowbit.CheckpointError, match="5 heads and 24 neurons of layer 2, which has 4 and 24"):
        type(model).from_pretrained(tmp_path)


def test_a_linear_in_several_places_loses_what_each_place_does() -> None:
    model, inputs = tiny(), batch()
    layers = model.base_model.encoder.layer
    layers[1].attention.self.key = layers[0].attention.self.query
    layers[1].attention.output.dense = layers[0].attention.output.dense
    before, ranks = outputs(model, inputs), magnitude(model)
    with pytest.raises(ValueError, match=r"importance: .*query stands in several places"):
        lowbit.importance(model, labelled())
    with pytest.raises(ValueError, match=r"Elastic: .*query stands in several places"):
        lowbit.Elastic().check(model, None)
    lowbit.rewire(model, ranks)
    for one, other in zip(outputs(model, inputs), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert layers[1].attention.output.dense is not layers[0].attention.output.dense
    lowbit.importance(model, labelled())


def test_a_layer_in_several_places_stays_one() -> None:
    model, inputs = tiny(), batch()
    layers = model.base_model.encoder.layer
    layers[1] = layers[0]
    apart = copy.deepcopy(model)
    apart.base_model.encoder.layer[1] = copy.deepcopy(apart.base_model.encoder.layer[0])
    small, expected = (lowbit.slim(each, 0.5) for each in (model, apart))
    assert small.base_model.encoder.layer[1] is small.base_model.encoder.layer[0]
    for one, other in zip(outputs(small, inputs), outputs(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)
    taken = lowbit.extract(apart, depth=0.5)
    assert len(taken.base_model.encoder.layer) == 1
    for verb in (lowbit.importance, lambda model, data: lowbit.prune_heads(model, data, 0.3)):
        with pytest.raises(ValueError, match="stands in several places"):
            verb(model.float(), labelled())
