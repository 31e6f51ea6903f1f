"""Training ramps: losses against plain loops in float64, what is frozen stays, resuming ends in the same bits."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import lowbit
from helpers import batch, tiny, tiny_config, training_arguments
from lowbit.nn import PackedEncoder

LAYERS = 4
RAMPS, B = 3, 5


def outputs(labels: int, scale: float = 2.0) -> dict[str, torch.Tensor]:
    return {
        "logits": (torch.randn(B, labels, dtype=torch.float64) * scale).requires_grad_(),
        "exit_logits": (torch.randn(RAMPS, B, labels, dtype=torch.float64) * scale).requires_grad_(),
    }


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]


def plain_task_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    total, count = 0.0, 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if isinstance(label, int):
            total, count = total - log_softmax(row)[label], count + 1
        elif isinstance(label, float):
            total, count = total + (row[0] - label) ** 2, count + 1
        else:
            for x, y in zip(row, label, strict=True):
                p = 1 / (1 + math.exp(-x))
                total, count = total - y * math.log(p) - (1 - y) * math.log(1 - p), count + 1
    return total / count


LABELS = {
    "classes": (3, torch.tensor([0, 2, 1, 1, 0])),
    "regression": (1, torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5], dtype=torch.float64)),
    "several": (3, torch.randint(2, (B, 3)).double()),
}


@pytest.mark.parametrize("kind", LABELS)
def test_exit_task_loss_is_its_formula(kind: str) -> None:
    count, labels = LABELS[kind]
    student, given = outputs(count), {"labels": labels}
    each = [plain_task_loss(logits, labels) for logits in student["exit_logits"]]
    last = plain_task_loss(student["logits"], labels)
    assert float(lowbit.ExitTaskLoss("sum")(student, None, given)) == pytest.approx(sum(each), rel=1e-5)
    expected = (sum(i * value for i, value in enumerate(each, 1)) + (RAMPS + 1) * last) / 10
    assert float(lowbit.ExitTaskLoss("linear", 0.5)(student, None, given)) == pytest.approx(expected / 2, rel=1e-5)
    alternate = lowbit.ExitTaskLoss("alternate")
    found = []
    for step in range(4):
        alternate.advance(step / 4)
        found.append(float(alternate(student, None, given)))
    assert found == pytest.approx([last, sum(each) + last] * 2, rel=1e-5)


def test_alternation_goes_on_where_it_was() -> None:
    first, second = lowbit.ExitTaskLoss("alternate"), lowbit.ExitTaskLoss("alternate")
    for step in range(4):
        first.advance(step / 10)
    second.load_state_dict(first.state_dict())
    second.advance(4 / 10)
    second.advance(4 / 10)  # a second batch of the same step
    assert int(second.steps) == 4
    first.advance(0.0)  # another run
    assert int(first.steps) == 0


def plain_divergence(p: list[float], q: list[float], temperature: float) -> float:
    """KL(p || q) of two rows of logits."""
    a, b = (log_softmax([x / temperature for x in row]) for row in (p, q))
    return sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("target", ["final", "teacher"])
def test_exit_logits_loss_is_its_formula(target: str, reverse: bool) -> None:
    student, teacher = outputs(3), outputs(3)
    wanted = (teacher if target == "teacher" else student)["logits"].tolist()
    expected = 0.0
    for ramp in student["exit_logits"].tolist():
        for own, goal in zip(ramp, wanted, strict=True):
            expected += plain_divergence(*((own, goal) if reverse else (goal, own)), 2.0) / B
    loss = lowbit.ExitLogitsLoss(3.0, temperature=2.0, target=target, reverse=reverse)(student, teacher, {})
    assert float(loss) == pytest.approx(3 * expected, rel=1e-5)
    loss.backward()
    assert student["logits"].grad is None and teacher["logits"].grad is None
    assert student["exit_logits"].grad is not None


def test_exit_logits_loss_of_its_own_target_is_nothing_and_saturated_is_finite() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    ramps = torch.stack([logits, logits]).requires_grad_()
    loss = lowbit.ExitLogitsLoss()({"logits": logits, "exit_logits": ramps}, None, {})
    loss.backward()
    assert float(loss) == 0 and ramps.grad is not None and not bool(ramps.grad.any())
    opposite = lowbit.ExitLogitsLoss()({"logits": -logits, "exit_logits": ramps}, None, {})
    assert float(opposite) == pytest.approx(2 * 400, rel=1e-5)


@pytest.mark.parametrize("kind", ["classes", "regression"])
def test_exit_certainty_loss_is_its_formula(kind: str) -> None:
    count, labels = LABELS[kind]
    student = {**outputs(count), "exit_wrong": torch.randn(RAMPS, B, dtype=torch.float64).requires_grad_()}
    expected = []
    for number in range(RAMPS):
        for row in range(B):
            logits = student["exit_logits"][number, row].tolist()
            if kind == "classes":
                wrong = float(logits.index(max(logits)) != int(labels[row]))
            else:
                wrong = math.tanh(abs(float(labels[row]) - logits[0]))
            said = 1 / (1 + math.exp(-float(student["exit_wrong"][number, row])))
            expected.append((said - wrong) ** 2)
    loss = lowbit.ExitCertaintyLoss()(student, None, {"labels": labels})
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    loss.backward()
    assert student["exit_logits"].grad is None


# ------------------------------------------------------------------------------------------------------------- trainer


def dataset(count: int = 24) -> list[dict[str, Any]]:
    """The label is in the first words."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for row in range(count):
        ids = torch.randint(10, 90, (5 + row % 4,), generator=generator)
        ids[0], ids[1] = 1, 2 + row % 3
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(row % 3)})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    columns = {name: pad([row[name] for row in rows], batch_first=True) for name in ("input_ids", "attention_mask")}
    return {**columns, "labels": torch.stack([row["labels"] for row in rows])}


def trainer(folder: Path, model: Any, teacher: Any, objectives: Any, **changes: Any) -> Any:
    return lowbit.DistillationTrainer(
        model=model,
        teacher=teacher,
        objectives=objectives,
        args=training_arguments(folder, **{"learning_rate": 1e-2, "max_steps": 6, **changes}),
        train_dataset=dataset(),
        data_collator=collate,
    )


def classifier(stage: str, **options: Any) -> Any:
    model = tiny(num_hidden_layers=LAYERS)
    if stage != "float":
        lowbit.prepare(model, lowbit.TernaryConfig())
    if stage == "packed":
        lowbit.convert(model)
    return lowbit.add_exits(model, **options)


@pytest.mark.parametrize("stage", ["float", "prepared", "packed"])
@pytest.mark.parametrize("kind", ["linear", "mean", "pooler", "shared", "attention"])
def test_only_ramps_are_trained_where_the_rest_is_frozen(tmp_path: Path, kind: str, stage: str) -> None:
    torch.manual_seed(0)
    model = lowbit.freeze_backbone(classifier(stage, kind=kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objectives = [lowbit.ExitTaskLoss("sum"), lowbit.ExitLogitsLoss()]
    found = trainer(tmp_path, model, tiny(num_hidden_layers=LAYERS), objectives, max_steps=30)
    found.train()
    for name, tensor in model.state_dict().items():
        if not name.startswith("exits."):
            assert torch.equal(tensor, before[name]), name
    moved = [n for n, tensor in model.exits.state_dict().items() if not torch.equal(tensor, before[f"exits.{n}"])]
    unused = {"attention.in_proj_bias"} & {*moved}  # its key third gets no gradient
    assert len({*moved} | unused) == len(model.exits.state_dict())
    losses = [entry["loss_exit_task"] for entry in found.state.log_history if "loss_exit_task" in entry]
    assert sum(losses[-8:]) < sum(losses[:8])


@pytest.mark.parametrize("stage", ["float", "packed"])
def test_a_frozen_backbone_runs_without_dropout_gradients_or_padding(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = lowbit.freeze_backbone(classifier(stage)), batch()
    runs: list[int] = []
    if stage == "packed":
        run = PackedEncoder._run
        monkeypatch.setattr(PackedEncoder, "_run", lambda self, *a: (runs.append(1), run(self, *a))[1])
    model.train()
    for module in model.exits.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    states: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda m, a, out: states.append(out.last_hidden_state))
    first, second = model(**inputs), model(**inputs)
    hook.remove()
    assert torch.equal(first["exit_logits"], second["exit_logits"])  # no dropout, though model.train()
    assert torch.equal(first.logits, second.logits) and not first.logits.requires_grad
    assert first["exit_logits"].requires_grad and not states[0].requires_grad
    assert model.exits.training and not model.base_model.training
    assert len(runs) == (2 if stage == "packed" else 0)
    first["exit_logits"].sum().backward()
    assert all(parameter.grad is None for parameter in model.base_model.parameters())
    assert all(ramp.classifier.weight.grad is not None for ramp in model.exits.values())


@dataclass
class Scored(SequenceClassifierOutput):
    """Of a head of one's own."""

    score: torch.Tensor | None = None


class ScoringForSequenceClassification(BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return Scored(**output, score=output.logits.max(-1).values)


@pytest.mark.parametrize("certainty", [False, True])
@pytest.mark.parametrize("kind", [BertForSequenceClassification, ScoringForSequenceClassification])
def test_outputs_with_ramps_are_the_head_s_and_can_be_built_again(kind: type, certainty: bool) -> None:
    """As DistributedDataParallel takes them apart and builds them, also of a head with keys of its own."""
    model = lowbit.add_exits(kind(tiny_config(num_labels=3)), certainty=certainty).train()
    output = model(**batch())
    values, structure = tree_flatten(output)
    again = tree_unflatten(values, structure)
    scored = ["score"] if kind is ScoringForSequenceClassification else []
    wrong = ["exit_wrong"] if certainty else []
    assert [*again] == [*output] == ["logits", *scored, "exit_logits", *wrong]
    assert type(again) is type(output) and isinstance(output, Scored if scored else SequenceClassifierOutput)
    assert all(again[key] is output[key] for key in output)


@pytest.mark.parametrize("stage", ["float", "prepared"])
def test_joint_training_reaches_the_layers_below_every_exit(stage: str) -> None:
    """Gradients of all exits' losses equal those by transformers' own hidden states."""
    model, inputs = classifier(stage), batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    labels = torch.randint(3, (3,))
    model.train()
    lowbit.ExitTaskLoss("linear")(model(**inputs), None, {"labels": labels}).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    output = model(**inputs, output_hidden_states=True)
    losses = []
    for layer in model.exits.layers:
        ramp = model.exits[str(layer)]
        logits = ramp.classifier(torch.tanh(ramp.dense(output.hidden_states[layer][:, 0])))
        losses.append(torch.nn.functional.cross_entropy(logits, labels))
    losses.append(torch.nn.functional.cross_entropy(output.logits, labels))
    (sum(i * loss for i, loss in enumerate(losses, 1)) / 10).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close = torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-3)
        assert close or stage == "prepared", name  # codes of attention flip where padding widens their range
    total = [torch.cat([g.flatten() for g in grads.values()]) for grads in (found, expected)]
    assert torch.nn.functional.cosine_similarity(*total, dim=0) > 0.99


def test_losses_of_hidden_states_and_scores_go_with_those_of_exits(tmp_path: Path) -> None:
    """TernaryBERT's objectives ask for all layers' states; the ramps look on."""
    teacher = tiny(num_hidden_layers=LAYERS)
    student = lowbit.add_exits(lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig()), certainty=True)
    objectives = [
        lowbit.HiddenStateLoss(), lowbit.AttentionScoreLoss(), lowbit.LogitsLoss(), lowbit.ExitTaskLoss("linear"),
        lowbit.ExitLogitsLoss(target="teacher"), lowbit.ExitCertaintyLoss(),
    ]  # fmt: skip
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    found = trainer(tmp_path, student, teacher, objectives)
    found.train()
    assert all(not torch.equal(p, before[name]) for name, p in student.exits.named_parameters(prefix="exits"))
    logged = {key for entry in found.state.log_history for key in entry}
    assert {f"loss_{objective.name}" for objective in objectives} <= logged
    packed = lowbit.set_exit(lowbit.convert(student.eval()), lowbit.Certainty(0.9))
    assert packed(**batch()).exit_layer.shape == (3,)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_checkpointed_layers_get_the_same_gradients_or_say_why_not(states: bool, reentrant: bool) -> None:
    model, inputs, labels = classifier("float").train(), batch(), torch.randint(3, (3,))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        output = model(**inputs, output_hidden_states=states)
        lowbit.ExitTaskLoss("sum")(output, None, {"labels": labels}).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        found = gradients()
    except ValueError as error:  # transformers before it kept hooks out of what is checkpointed
        assert reentrant and states and "use_reentrant" in str(error)
        return
    assert len(found) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("stage", ["float", "prepared", "packed"])
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(tmp_path: Path, stage: str) -> None:
    torch.manual_seed(0)
    start, teacher = classifier(stage), tiny(num_hidden_layers=LAYERS)
    if stage == "packed":
        lowbit.freeze_backbone(start)
    changes = {
        "lr_scheduler_type": "linear", "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 3,
        "learning_rate": 1e-3,
    }  # fmt: skip

    def objectives() -> Any:  # the interruption is before an odd step
        return [lowbit.ExitTaskLoss("linear" if stage == "packed" else "alternate"), lowbit.ExitLogitsLoss()]

    whole = trainer(tmp_path, copy.deepcopy(start), teacher, objectives(), **changes)
    whole.train()
    other = classifier(stage)
    if stage == "packed":
        lowbit.freeze_backbone(other)
    resumed = trainer(tmp_path / "again", other, teacher, objectives(), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())
    assert not torch.equal(expected["exits.1.dense.weight"], start.state_dict()["exits.1.dense.weight"])
