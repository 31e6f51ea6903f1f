"""Early exit: criteria against plain loops, batches that shrink against each sentence alone, losses, files, errors."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertForTokenClassification, BertModel
from transformers.models.distilbert import DistilBertConfig, DistilBertForSequenceClassification
from transformers.models.roberta import RobertaConfig, RobertaForSequenceClassification

import lowbit
from helpers import SIZES, batch, tiny, training_arguments
from lowbit.exits import ExitFront, exit_front, exit_scores
from lowbit.exits.criteria import entropy, from_dict, to_dict
from lowbit.exits.front import leave
from lowbit.exits.passage import Passage
from lowbit.exits.ramps import first_states, mean_states
from lowbit.nn import PackedEncoder, PackedLinear
from lowbit.nn.unpadded.sequences import Sequences

LAYERS = 5
KINDS = ("linear", "mean", "pooler", "shared", "attention")
STAGES = ("float", "prepared", "packed")


def classifier(
    stage: str = "float", kind: str = "pooler", certainty: bool = False, layers: Any = None, **changes: Any
) -> Any:
    model = tiny(num_hidden_layers=LAYERS, **changes)
    if stage != "float":
        lowbit.prepare(model, lowbit.TernaryConfig())
    if stage == "packed":
        lowbit.convert(model)
    lowbit.add_exits(model, kind, layers, certainty)
    with torch.no_grad():
        for parameter in model.exits.parameters():  # answers that differ
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def call(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model(**inputs, **options)


@torch.no_grad()
def all_answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[exits, B, C] by transformers' own hidden states, one sentence at a time without padding."""
    rows = []
    for row in range(len(inputs["input_ids"])):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        output = model.base_model(ids, output_hidden_states=True)
        answers = []
        for layer in model.exits.layers:
            ramp, state = model.exits[str(layer)], output.hidden_states[layer]
            if model.exits.kind == "pooler":
                features = torch.tanh(ramp.dense(state[:, 0]))
            elif model.exits.kind == "mean":
                features = state.mean(1)
            elif model.exits.kind == "shared":
                features = model.base_model.pooler(state)
            elif model.exits.kind == "attention":
                small = torch.tanh(ramp.down(state))
                heads = small.shape[-1] // 2
                weights, biases = ramp.attention.in_proj_weight.chunk(3), ramp.attention.in_proj_bias.chunk(3)
                q, k, v = (small @ w.T + b for w, b in zip(weights, biases, strict=True))
                parts = []
                for head in range(2):
                    part = slice(head * heads, (head + 1) * heads)
                    scores = q[0, 0, part] @ k[0, :, part].T / heads**0.5
                    parts.append(scores.softmax(-1) @ v[0, :, part])
                features = torch.tanh(ramp.dense(ramp.attention.out_proj(torch.cat(parts))))[None]
            else:
                features = state[:, 0]
            answers.append(ramp.classifier(features))
        answers.append(model(ids).logits if model.exits.criterion is None else None)
        rows.append(torch.stack(answers)[:, 0])
    return torch.stack(rows, 1)


def shannon(logits: list[float]) -> float:
    top = max(logits)
    shares = [math.exp(x - top) for x in logits]
    p = [share / sum(shares) for share in shares]
    return -sum(x * math.log(x) for x in p if x > 0)


def plain_exit(criterion: Any, answers: list[list[float]]) -> int:
    """By which ramp (from 0) one sentence leaves; their number where by none. Written out, for one sentence."""
    same, before = 0, None
    for number, logits in enumerate(answers):
        if isinstance(criterion, lowbit.Entropy) and shannon(logits) < criterion.threshold:
            return number
        if isinstance(criterion, lowbit.NormalizedEntropy) and shannon(logits) <= criterion.speed * math.log(
            len(logits)
        ):
            return number
        if isinstance(criterion, lowbit.Patience):
            if criterion.threshold is None:
                now: Any = logits.index(max(logits))
                agrees = now == before
            else:
                now = logits[0]
                agrees = before is not None and abs(now - before) < criterion.threshold
            same, before = (same + 1 if agrees else 0), now
            if same == criterion.times:
                return number
    return len(answers)


CRITERIA = [lowbit.Entropy(0.5), lowbit.NormalizedEntropy(0.6), lowbit.Patience(1), lowbit.Patience(2)]


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("labels", [2, 3])
def test_a_criterion_is_its_plain_loop(criterion: Any, labels: int) -> None:
    logits = torch.randn(6, 50, labels, generator=torch.Generator().manual_seed(1)) * 2
    expected = [plain_exit(criterion, logits[:, row].tolist()) for row in range(50)]
    memory, left = None, [6] * 50
    for number, own in enumerate(logits):
        leaves, memory = criterion(own, None, memory)
        left = [number if gone and before == 6 else before for gone, before in zip(leaves, left, strict=True)]
    assert left == expected
    assert len(set(expected)) > 2


def test_patience_of_regression_compares_values() -> None:
    values = torch.tensor([[0.0, 0.3, 0.35, 0.9], [1.0, 1.01, 1.02, 1.03], [0.0, 1.0, 2.0, 3.0]]).T[:, :, None]
    criterion, memory, left = lowbit.Patience(1, threshold=0.1), None, [4, 4, 4]
    for number, own in enumerate(values):
        leaves, memory = criterion(own, None, memory)
        left = [number if gone and before == 4 else before for gone, before in zip(leaves, left, strict=True)]
    assert left == [2, 1, 4] == [plain_exit(criterion, values[:, row].tolist()) for row in range(3)]


def test_entropy_of_saturated_logits_is_finite_and_right() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0], [1e4, -1e4]])
    found = entropy(logits)
    assert torch.allclose(found, torch.tensor([0.0, 0.0, math.log(2), 0.0]), atol=1e-6)
    assert lowbit.Entropy(0.1)(logits, None, None)[0].tolist() == [True, True, False, True]
    x = torch.randn(40, 3, dtype=torch.float64) * 5
    assert torch.allclose(entropy(x), torch.distributions.Categorical(logits=x).entropy())
    assert bool(lowbit.NormalizedEntropy(1.0)(torch.zeros(4, 3), None, None)[0].all())


@pytest.mark.parametrize("kind", KINDS)
def test_ramps_read_what_is_behind_their_layers(kind: str) -> None:
    model, inputs = classifier(kind=kind, layers=[0, 1, 3]), batch(rows=4)
    expected = all_answers(model, inputs)
    scores = exit_scores(model, [{**inputs, "labels": torch.zeros(4, dtype=torch.long)}])
    assert torch.allclose(scores.logits, expected, atol=1e-4)
    assert scores.layers == (0, 1, 3, 5)
    noted = call(model.train(False), inputs, exits=Passage(model, None), output_hidden_states=True)
    assert torch.allclose(noted["exit_logits"], expected[:-1], atol=1e-4)


@pytest.mark.parametrize("lengths", [(2, 0), (0, 2), (1,), (3, 1, 0, 0), (1, 1)], ids=str)
def test_states_of_sequences_of_any_lengths(lengths: tuple[int, ...]) -> None:
    tokens, starts = torch.randn(sum(lengths), 4), torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    sequences = Sequences(starts.int(), max(lengths), starts.int())
    parts, nothing = tokens.split(lengths), torch.zeros(4)
    assert torch.equal(first_states(tokens, sequences), torch.stack([p[0] if len(p) else nothing for p in parts]))
    means = torch.stack([p.mean(0) if len(p) else nothing for p in parts])
    assert torch.allclose(mean_states(tokens, sequences), means, atol=1e-6)


@pytest.mark.parametrize("criterion", [lowbit.Entropy(0.9), lowbit.Patience(1)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shrinking_batch_gives_what_each_sentence_gives_alone(kind: str, stage: str, criterion: Any) -> None:
    model, inputs = classifier(stage, kind, layers=[0, 1, 2, 4]), batch(rows=7)
    lowbit.set_exit(model, criterion)
    together = call(model, inputs)
    places = inputs["attention_mask"].bool()
    alone = [call(model, {"input_ids": inputs["input_ids"][row][places[row]][None]}) for row in range(7)]
    assert torch.equal(together.exit_layer, torch.cat([each.exit_layer for each in alone]))
    assert torch.allclose(together.logits, torch.cat([each.logits for each in alone]), atol=1e-4)
    # and what the plain loop over the answers of all layers says
    scores = exit_scores(model, [{**inputs, "labels": torch.zeros(7, dtype=torch.long)}])
    for row in range(7):
        answers = scores.logits[:, row].tolist()
        number = plain_exit(criterion, answers[:-1])
        assert together.exit_layer[row] == scores.layers[number]
        assert together.logits[row].tolist() == pytest.approx(answers[number], abs=1e-4)
    logits, layers = leave(scores, criterion)
    assert torch.equal(layers, together.exit_layer) and torch.allclose(logits, together.logits, atol=1e-4)


def test_some_sentences_do_leave_and_layers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed model in groups of layers between exits, of tokens of those that stay."""
    torch.manual_seed(3)
    model, inputs = classifier("packed"), batch(rows=8)
    scores = exit_scores(model, [{**inputs, "labels": torch.zeros(8, dtype=torch.long)}])
    middle = float(entropy(scores.logits[:-1]).quantile(0.3))
    lowbit.set_exit(model, lowbit.Entropy(middle))
    encoder, seen = model.base_model.encoder, []
    assert isinstance(encoder, PackedEncoder)
    run = PackedEncoder._run_layers

    def noted(self: Any, weights: Any, tokens: torch.Tensor, *others: Any) -> Any:
        seen.append((len(weights), len(tokens)))
        return run(self, weights, tokens, *others)

    monkeypatch.setattr(PackedEncoder, "_run_layers", noted)
    layers = call(model, inputs).exit_layer
    assert len(layers.unique()) > 1
    if seen:  # where there are native kernels
        lengths = inputs["attention_mask"].sum(1)
        assert [number for number, _ in seen] == [1] * int(layers.max())
        assert [count for _, count in seen] == [int(lengths[layers > done].sum()) for done in range(int(layers.max()))]


def test_exits_behind_few_layers_run_the_others_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(num_hidden_layers=LAYERS), batch()
    lowbit.add_exits(lowbit.quantize(model, lowbit.TernaryConfig()), layers=[3])
    run, seen = PackedEncoder._run_layers, []
    call(model, inputs)  # tried, layer by layer

    def noted(self: Any, weights: Any, *others: Any) -> Any:
        seen.append(len(weights))
        return run(self, weights, *others)

    monkeypatch.setattr(PackedEncoder, "_run_layers", noted)
    lowbit.set_exit(model, lowbit.Entropy(0.0))
    assert call(model, inputs).exit_layer.tolist() == [LAYERS] * 3
    assert seen in ([3, 2], [])
    lowbit.set_exit(model, lowbit.NormalizedEntropy(1.0))
    assert call(model, inputs).exit_layer.tolist() == [3] * 3
    assert seen in ([3, 2, 3], [])


@pytest.mark.parametrize("stage", STAGES)
def test_where_all_layers_are_asked_for_answers_stay_the_same(stage: str) -> None:
    model, inputs = classifier(stage), batch(rows=6)
    lowbit.set_exit(model, lowbit.Patience(1))
    expected = call(model, inputs)
    states = call(model, inputs, output_hidden_states=True)
    assert len(states.hidden_states) == LAYERS + 1
    seen: list[Any] = []
    hook = model.base_model.encoder.layer[LAYERS - 1].register_forward_hook(lambda *a: seen.append(1))
    hooked = call(model, inputs)
    hook.remove()
    plain = call(model, inputs, return_dict=False)
    for logits in (states.logits, hooked.logits, plain[0]):
        # A few codes of quantized attention depend on padding, where layers run with it.
        assert torch.allclose(logits, expected.logits, atol=1e-4 if stage == "float" else 0.2)
    assert seen == [1]
    if stage == "float":
        assert torch.equal(states.exit_layer, expected.exit_layer)


@pytest.mark.parametrize("stage", ["float", "packed"])
@pytest.mark.parametrize("hooked", [False, True])
def test_the_head_reads_the_rows_that_stayed(stage: str, hooked: bool) -> None:
    """All tokens of them where someone else than the head reads them, the first one otherwise."""
    model, inputs = classifier(stage), batch(rows=9)
    full = call(model, inputs)
    scores = exit_scores(model, [{**inputs, "labels": torch.zeros(9)}])
    least = entropy(scores.logits[:-1]).amin(0).sort().values
    lowbit.set_exit(model, lowbit.Entropy(float(least[4:6].mean())))  # five leave
    found: list[torch.Tensor] = []
    pooler = model.base_model.pooler.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    hooks = [pooler, *([model.classifier.register_forward_hook(lambda *a: None)] if hooked else [])]
    output = call(model, inputs)
    for hook in hooks:
        hook.remove()
    stayed = output.exit_layer == LAYERS
    assert 0 < int(stayed.sum()) < 9 and found[0].shape == (int(stayed.sum()), 11, 64)
    assert torch.allclose(output.logits[stayed], full.logits[stayed], atol=1e-4)
    if stage == "float":
        with torch.no_grad():
            states = model.base_model(**inputs).last_hidden_state[stayed]
        real = inputs["attention_mask"][stayed].bool()
        assert torch.allclose(found[0][real], states[real], atol=1e-4)


def test_nobody_may_be_left_and_labels_may_be_anywhere() -> None:
    for stage in STAGES:
        model, inputs, labels = classifier(stage), batch(rows=4), torch.tensor([0, 1, 2, 1])
        lowbit.set_exit(model, lowbit.NormalizedEntropy(1.0))
        output = call(model, inputs)
        assert output.exit_layer.tolist() == [1] * 4 and "loss" not in output
        with torch.no_grad():
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            positional = model(ids, mask, None, None, None, labels)
        for found in (positional, call(model, inputs, labels=labels)):
            assert [*found] == ["loss", "logits"]
            assert torch.equal(found.logits, output.logits)
            assert torch.allclose(found.loss, F.cross_entropy(output.logits, labels))


def test_labels_are_compared_with_the_answers_that_were_given() -> None:
    model, inputs = classifier(), batch(rows=6)
    lowbit.set_exit(model, lowbit.Patience(1))
    labels = torch.randint(3, (6,))
    output = call(model, inputs, labels=labels)
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, labels))
    assert len(output.exit_layer.unique()) > 1
    loss, logits = call(model, inputs, labels=labels, return_dict=False)
    assert torch.allclose(loss, output.loss) and torch.allclose(logits, output.logits)
    assert "exit_layer" not in output  # Trainer would take it for logits


def test_regression_leaves_by_patience() -> None:
    model = tiny(num_hidden_layers=LAYERS, num_labels=1)
    lowbit.add_exits(model)
    lowbit.set_exit(model, lowbit.Patience(1, threshold=100.0))
    inputs = batch()
    assert call(model, inputs).exit_layer.tolist() == [2, 2, 2]
    output = call(model, inputs, labels=torch.randn(3))
    assert output.logits.shape == (3, 1) and bool(output.loss.isfinite())


@pytest.mark.parametrize(
    ("kind", "config"),
    [(RobertaForSequenceClassification, RobertaConfig), (DistilBertForSequenceClassification, DistilBertConfig)],
    ids=["roberta", "distilbert"],
)
def test_other_architectures(kind: Any, config: Any) -> None:
    names = {"num_hidden_layers": "n_layers", "hidden_size": "dim", "num_attention_heads": "n_heads"}
    sizes = {**SIZES, "num_hidden_layers": LAYERS}
    if config is DistilBertConfig:
        sizes = {names.get(name, name): value for name, value in sizes.items() if name != "intermediate_size"}
        sizes["hidden_dim"] = 150
    model, inputs = kind(config(**sizes, num_labels=3)).eval(), batch(rows=6)
    lowbit.quantize(model, lowbit.TernaryConfig())
    lowbit.add_exits(model)
    lowbit.set_exit(model, lowbit.Patience(1))
    together = call(model, inputs)
    places = inputs["attention_mask"].bool()
    for row in range(6):
        alone = call(model, {"input_ids": inputs["input_ids"][row][places[row]][None]})
        assert together.exit_layer[row] == alone.exit_layer
        assert torch.allclose(together.logits[row], alone.logits[0], atol=1e-4)
    with pytest.raises(ValueError, match="has no pooler to share"):
        lowbit.add_exits(model, "shared")


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_models_with_exits_are_loaded_as_they_were_saved(tmp_path: Path, kind: str, stage: str) -> None:
    model, inputs = classifier(stage, kind, certainty=True), batch(rows=5)
    lowbit.set_exit(model, lowbit.Certainty(0.5))
    expected = call(model, inputs)
    model.save_pretrained(tmp_path)
    lowbit.verify(tmp_path)
    for load in (AutoModelForSequenceClassification.from_pretrained, lowbit.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is type(model)
        assert loaded.exits.criterion == lowbit.Certainty(0.5)
        found = call(loaded, inputs)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.exit_layer, expected.exit_layer)
        assert {*loaded.state_dict()} == {*model.state_dict()}


def test_ramps_go_with_a_model_through_its_stages() -> None:
    model, inputs = classifier(), batch(rows=5)
    names = {name: tensor.clone() for name, tensor in model.exits.state_dict().items()}
    lowbit.set_exit(model, lowbit.Patience(1))
    lowbit.prepare(model, lowbit.TernaryConfig())
    lowbit.convert(model, fused=True)
    packed = call(model, inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(call(copied, inputs).logits, packed.logits)
    model.dequantize()
    assert call(model, inputs).exit_layer.shape == (5,)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(torch.equal(tensor, names[name]) for name, tensor in model.exits.state_dict().items())
    assert type(model.exits["1"].dense) is torch.nn.Linear


def test_other_classes_load_the_file_without_exits(tmp_path: Path) -> None:
    classifier("packed").save_pretrained(tmp_path)
    for kind in (BertForTokenClassification, BertModel):
        loaded = kind.from_pretrained(tmp_path)
        assert not hasattr(loaded, "exits") and not hasattr(loaded.config, "exit_config")
        call(loaded, batch())
        loaded.save_pretrained(tmp_path / kind.__name__)
        kind.from_pretrained(tmp_path / kind.__name__)
    fewer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_hidden_layers=2)
    assert fewer.exits.layers == [1]


def test_a_new_model_of_the_configuration_has_none(tmp_path: Path) -> None:
    model = classifier()
    other = type(model)(model.config)
    other.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not hasattr(loaded, "exits") and not hasattr(loaded.config, "exit_config")
    assert model.config.exit_config["layers"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "wide"},
        {"layers": [5]},
        {"layers": []},
        {"criterion": {"name": "age"}},
        {"criterion": {"name": "entropy"}},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_a_checkpoint_error(tmp_path: Path, change: dict[str, Any]) -> None:
    model = classifier()
    model.config.exit_config = {**model.config.exit_config, **change}
    model.save_pretrained(tmp_path)
    with pytest.raises(lowbit.CheckpointError, match=r"accepted|missing"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_an_edited_configuration_is_noticed(tmp_path: Path) -> None:
    classifier("packed").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    assert '"kind": "pooler"' in text
    path.write_text(text.replace('"kind": "pooler"', '"kind": "linear"'))
    with pytest.raises(lowbit.CheckpointError, match="exit_config"):
        lowbit.verify(tmp_path)


@pytest.mark.parametrize("criterion", [*CRITERIA, lowbit.Patience(3, 0.5), lowbit.Certainty(0.2)], ids=str)
def test_criteria_are_read_as_they_are_written(criterion: Any) -> None:
    assert from_dict(to_dict(criterion)) == criterion


# -------------------------------------------------------------------------------------------------------------- errors


def with_lengths() -> Any:
    model = classifier()
    return lowbit.set_length(model, lowbit.LengthConfig(keep=(1.0, 0.8, 0.8, 0.5, 0.5)))


REFUSED: dict[str, tuple[Any, str]] = {
    "no exits": (lambda: lowbit.set_exit(tiny(), lowbit.Entropy(0.3)), "has no exits"),
    "token head": (lambda: lowbit.add_exits(tiny("BertForTokenClassification")), "BertForTokenClassification gives no"),
    "word head": (lambda: lowbit.add_exits(tiny("BertForMaskedLM")), "BertForMaskedLM gives no"),
    "no head": (lambda: lowbit.add_exits(tiny("BertModel")), "BertModel gives no"),
    "token head without exits": (
        lambda: lowbit.set_exit(tiny("BertForTokenClassification"), lowbit.Entropy(0.3)),
        "which takes sequence classifiers",
    ),
    "kind": (lambda: lowbit.add_exits(tiny(), "wide"), "accepted: 'linear', 'mean', 'pooler', 'shared', 'attention'"),
    "last layer": (lambda: lowbit.add_exits(tiny(), layers=[2]), "out of 0 to 1"),
    "layer -1": (lambda: lowbit.add_exits(tiny(), layers=[-1]), "out of 0 to 1"),
    "no layers": (lambda: lowbit.add_exits(tiny(num_hidden_layers=1)), "accepted: ascending numbers"),
    "negative": (lambda: lowbit.Entropy(-0.1), "threshold=-0.1; accepted: nats"),
    "NaN": (lambda: lowbit.Entropy(math.nan), "threshold=nan"),
    "speed": (lambda: lowbit.NormalizedEntropy(1.5), "speed=1.5; accepted: a number from 0 to 1"),
    "patience 0": (lambda: lowbit.Patience(0), "times=0; accepted: a whole number from 1"),
    "half patience": (lambda: lowbit.Patience(1.5), "times=1.5"),  # type: ignore[arg-type]
    "certainty": (lambda: lowbit.set_exit(classifier(), lowbit.Certainty(0.3)), "certainty=True"),
    "entropy of a number": (
        lambda: lowbit.set_exit(lowbit.add_exits(tiny(num_labels=1)), lowbit.Entropy(0.3)),
        "Accepted for regression: Patience",
    ),
    "patience of a number": (
        lambda: lowbit.set_exit(lowbit.add_exits(tiny(num_labels=1)), lowbit.Patience(2)),
        "a number for regression",
    ),
    "lengths, then exit": (lambda: lowbit.set_exit(with_lengths(), lowbit.Entropy(0.3)), "drops tokens"),
    "exit, then lengths": (
        lambda: lowbit.set_length(
            lowbit.set_exit(classifier(), lowbit.Entropy(0.3)), lowbit.LengthConfig(keep=(0.5,) * LAYERS)
        ),
        r"set_exit\(model, None\)",
    ),
    "export": (
        lambda: lowbit.export(lowbit.set_exit(classifier("packed"), lowbit.Entropy(0.3)), "x.pt2"),
        "leave this model early",
    ),
    "freeze": (lambda: lowbit.freeze_backbone(tiny()), "has no exits"),
    "front": (lambda: exit_front(tiny(), []), "has no exits"),
    "no batches": (lambda: exit_front(classifier(), []), "no batches"),
    "weights": (lambda: lowbit.ExitTaskLoss("even"), "accepted: 'sum', 'linear', 'alternate'"),
    "target": (lambda: lowbit.ExitLogitsLoss(target="best"), "accepted: 'final', 'teacher'"),
    "loss of no exits": (lambda: lowbit.ExitTaskLoss().check(tiny(), None), "has none"),
    "loss of no certainty": (lambda: lowbit.ExitCertaintyLoss().check(classifier(), None), "certainty=True"),
    "no teacher": (lambda: lowbit.ExitLogitsLoss(target="teacher").check(classifier(), None), "teacher of None"),
    "no exit logits": (
        lambda: lowbit.ExitTaskLoss()({"logits": torch.zeros(1, 2)}, None, {"labels": torch.zeros(1)}),
        "no exit_logits",
    ),
    "no labels": (lambda: lowbit.ExitTaskLoss()({"exit_logits": torch.zeros(1, 1, 2)}, None, {}), "no labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_said(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_no_criterion_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="criterion must be Entropy"):
        lowbit.set_exit(classifier(), 0.3)  # type: ignore[arg-type]


def test_padding_on_the_left_is_refused_and_empty_rows_are_not() -> None:
    model, inputs = classifier(), batch(rows=4)
    lowbit.set_exit(model, lowbit.Patience(1))
    left = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(ValueError, match="pad on the right"):
        call(model, left)
    with pytest.raises(ValueError, match="padding on the right"):
        call(model, left, output_hidden_states=True)
    expected = call(model, inputs)
    empty = {name: torch.cat([tensor, torch.zeros_like(tensor[:1])]) for name, tensor in inputs.items()}
    found = call(model, empty)
    assert torch.allclose(found.logits[:4], expected.logits, atol=1e-5)
    assert bool(found.logits.isfinite().all())


# --------------------------------------------------------------------------------------------------------------- front


def test_a_front_is_what_no_other_criterion_beats_and_survives_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = classifier("packed")
    data = [{**batch(rows=8), "labels": torch.randint(3, (8,))} for _ in range(6)]
    front = exit_front(model, data)
    layers, scores = ([getattr(p, name) for p in front.points] for name in ("layers", "score"))
    assert layers == sorted(layers) and scores == sorted(scores) and len(front.points) > 1
    for point in front.points:
        lowbit.set_exit(model, point.criterion)
        right, run = [], []
        for rows in data:
            output = call(model, {name: tensor for name, tensor in rows.items() if name != "labels"})
            right += (output.logits.argmax(-1) == rows["labels"]).tolist()
            run += output.exit_layer.tolist()
        assert point.layers == pytest.approx(sum(run) / len(run))
        assert point.score == pytest.approx(sum(right) / len(right))
    front.save(tmp_path / "front.json")
    assert ExitFront.load(tmp_path / "front.json") == front
    assert front.for_loss(1.0) == front.points[0]
    with pytest.raises(ValueError, match="no criterion loses at most"):
        front.for_loss(-1.0)
    (tmp_path / "front.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a front"):
        ExitFront.load(tmp_path / "front.json")
    pytest.importorskip("matplotlib")
    front.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_trainers_evaluation_takes_the_answers_that_were_given(tmp_path: Path) -> None:
    from transformers import Trainer

    model = classifier("packed")
    lowbit.set_exit(model, lowbit.Patience(1))
    rows = [{"input_ids": torch.randint(1, 101, (9,)), "labels": torch.tensor(i % 3)} for i in range(10)]
    found = Trainer(model, training_arguments(tmp_path)).predict(rows)
    expected = torch.cat([call(model, {"input_ids": row["input_ids"][None]}).logits for row in rows])
    assert torch.allclose(torch.as_tensor(found.predictions), expected, atol=1e-4)


@pytest.mark.parametrize("states", [False, True])
def test_threads_may_share_a_model(states: bool) -> None:
    model = classifier("packed")
    lowbit.set_exit(model, lowbit.Patience(1))
    batches = [batch(rows=rows) for rows in (1, 4, 7, 2)] * 4
    expected = [call(model, each, output_hidden_states=states) for each in batches]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda each: call(model, each, output_hidden_states=states), batches)]
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.exit_layer, b.exit_layer)
