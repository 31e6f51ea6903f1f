"""Learned projections: which there are, drawn from the seed, made anew, trained, copied; what is said without them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
import objective_cases as cases
from helpers import tiny, training_arguments
from lowbit.distill.objectives import HiddenStateLoss


def models(**teacher: Any) -> tuple[Any, Any]:
    """A student of width 32 and 2 layers, a teacher of width 64 and 4."""
    return tiny(hidden_size=32, num_hidden_layers=2), tiny(**{"num_hidden_layers": 4, **teacher})


def shapes(objective: HiddenStateLoss) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in objective.named_parameters()}


def test_projections_are_those_of_what_is_compared() -> None:
    objective = HiddenStateLoss(map="skip", project="per_layer", bias=True)
    assert shapes(objective) == {}
    objective.build(*models())
    weight, bias = (64, 32), (64,)
    assert shapes(objective) == {
        "projections.0.weight": weight,
        "projections.0.bias": bias,
        "projections.1.weight": weight,
        "projections.1.bias": bias,
    }
    objective = HiddenStateLoss(map="overlap", embedding=False, project="shared", project_side="teacher")
    objective.build(*models())
    assert shapes(objective) == {"projections.shared.weight": (32, 3 * 64)}


def test_projections_follow_the_seed_and_start_anew() -> None:
    objective, pair = HiddenStateLoss(project="shared"), models()
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        objective.build(*pair)
        weights.append(objective.projections["shared"].weight.detach().clone())
        with torch.no_grad():
            objective.projections["shared"].weight.add_(1.0)  # as training would
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    objective.build(tiny(hidden_size=48), pair[1])
    assert shapes(objective) == {"projections.shared.weight": (64, 48)}


def test_copies_and_pickles_have_projections_of_their_own() -> None:
    objective = HiddenStateLoss(project="per_layer", weight=0.5, learning_rate=1e-3)
    objective.build(*models())
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert repr(twin) == repr(objective) and shapes(twin) == shapes(objective)
        before = {name: value.clone() for name, value in objective.state_dict().items()}
        with torch.no_grad():
            twin.projections["1"].weight.add_(1.0)
        assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_two_objectives_of_equal_fields_are_two() -> None:
    assert HiddenStateLoss() != HiddenStateLoss()
    assert len({HiddenStateLoss(), HiddenStateLoss()}) == 2


def test_what_needs_projections_says_so_before_training() -> None:
    pair = models()
    with pytest.raises(ValueError, match=r'hidden size 32, teacher 64; .* HiddenStateLoss\(project="per_layer"\)'):
        HiddenStateLoss().check(*pair)
    with pytest.raises(ValueError, match=r'concatenated layers are wider than the student; pass project="per_layer"'):
        HiddenStateLoss(map="groups").check(tiny(), tiny(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r'project="shared" is one projection, .*pass project="per_layer", or embed'):
        HiddenStateLoss(map="groups", project="shared").check(*pair)
    HiddenStateLoss(map="groups", project="shared", embedding=False).check(*pair)
    HiddenStateLoss(map="groups").check(tiny(), tiny())  # groups of one layer


def test_what_calls_without_projections_is_told_to_build() -> None:
    student, teacher = cases.pair()
    with pytest.raises(ValueError, match=r"HiddenStateLoss has no projection '0' yet: call build\(student, teacher\)"):
        HiddenStateLoss(project="per_layer")(student, teacher, {})
    objective = HiddenStateLoss(project="shared")
    objective.build(*models())
    with pytest.raises(ValueError, match="states of width 4, and projection 'shared' takes 32"):
        objective(student, teacher, {})
    with pytest.raises(ValueError, match="student hidden size 4, teacher 6; they must be equal"):
        HiddenStateLoss()(student, teacher, {})


@pytest.mark.parametrize(
    "fields",
    [{"tokens": "cls"}, {"distance": "l2"}, {"reduction": "elements"}, {"project": "all"}, {"project_side": "both"}],
)
def test_fields_without_such_a_value_are_refused(fields: dict[str, str]) -> None:
    (name, value), *_ = fields.items()
    with pytest.raises(ValueError, match=f"HiddenStateLoss: {name}='{value}'; accepted: "):
        HiddenStateLoss(**fields)  # type: ignore[arg-type]


PROJECTED: dict[str, dict[str, Any]] = {
    "TinyBERT": {"project": "shared", "bias": True},
    "CKD": {"project": "per_layer", "map": "groups"},
    "CKD, paper": {"project": "per_layer", "map": "overlap", "project_side": "teacher"},
    "ALP-KD": {"project": "per_layer", "map": "all", "tokens": "first", "embedding": False},
}


@pytest.mark.parametrize("bits", ["float", "ternary"])
@pytest.mark.parametrize("system", PROJECTED)
def test_narrower_students_learn_hidden_states(system: str, bits: str, tmp_path: Path) -> None:
    """By the trainer: the loss falls, projections move, and the student's file does not hold them."""
    student, teacher = models()
    if bits == "ternary":
        lowbit.prepare(student, lowbit.TernaryConfig())
    objective = HiddenStateLoss(**PROJECTED[system], learning_rate=1e-2)
    rows = [{"input_ids": torch.randint(1, 101, (7,)), "labels": torch.tensor(0)} for _ in range(4)]
    trainer = lowbit.DistillationTrainer(
        model=student,
        teacher=teacher,
        objectives=[objective],
        args=training_arguments(tmp_path, max_steps=25, learning_rate=2e-3, per_device_train_batch_size=4),
        train_dataset=rows,
    )
    before = copy.deepcopy(objective.state_dict())
    trainer.train()
    losses = [entry["loss_hidden"] for entry in trainer.state.log_history if "loss_hidden" in entry]
    assert losses[-1] < 0.9 * losses[0], losses
    assert before and all(not torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    student.save_pretrained(tmp_path / "student")
    loaded = type(student).from_pretrained(tmp_path / "student")
    assert loaded.state_dict().keys() == student.state_dict().keys()
