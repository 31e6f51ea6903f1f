"""Schedules are pure functions of progress, said as data; objectives follow them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import objective_cases as cases
from lowbit.distill.objectives import HiddenStateLoss, LogitsLoss
from lowbit.distill.schedules import KINDS, Scheduled, make

# Data, and what it is after some parts of the run.
EXAMPLES: list[tuple[dict[str, Any], dict[float, Any]]] = [
    ({"kind": "constant", "value": 3}, {0: 3, 0.99: 3}),
    ({"kind": "linear", "start": 1.0, "end": 3.0}, {0: 1.0, 0.25: 1.5, 0.75: 2.5}),
    ({"kind": "cubic", "start": 1.0, "end": 0.2}, {0: 1.0, 0.5: 0.3, 0.75: 0.2125}),
    ({"kind": "steps", "table": [[0.0, 4], [0.5, 2], [0.75, 1]]}, {0: 4, 0.49: 4, 0.5: 2, 0.8: 1}),
    ({"kind": "annealed", "tau_max": 4}, {0: 0.25, 0.24: 0.25, 0.25: 0.5, 0.5: 0.75, 0.99: 1.0}),
    ({"kind": "gate", "layer": 2, "layers": 4}, {0: 0.0, 0.25: 1.0, 0.49: 1.0, 0.5: 0.0}),
    ({"kind": "gates", "layers": 3}, {0: (1.0, 0.0, 0.0), 0.34: (0.0, 1.0, 0.0), 0.99: (0.0, 0.0, 1.0)}),
]


@pytest.mark.parametrize(("data", "values"), EXAMPLES, ids=lambda value: value.get("kind", ""))
def test_schedules_have_the_values_of_their_formulas(data: dict[str, Any], values: dict[float, Any]) -> None:
    schedule = make(data)
    for progress, value in values.items():
        assert schedule(progress) == pytest.approx(value)
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule


def test_every_kind_is_tested() -> None:
    assert {data["kind"] for data, _ in EXAMPLES} == KINDS.keys()


@pytest.mark.parametrize("steps", [7, 10, 100, 333])
@pytest.mark.parametrize("tau_max", [1, 3, 7])
def test_every_temperature_is_reached_and_phases_are_equal(steps: int, tau_max: int) -> None:
    schedule = make({"kind": "annealed", "tau_max": tau_max})
    values = [schedule(step / steps) for step in range(steps)]
    assert sorted(set(values)) == pytest.approx([k / tau_max for k in range(1, tau_max + 1)])
    assert values == sorted(values)
    lengths = [values.count(value) for value in set(values)]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("layers", [3, 7, 24])
def test_one_gate_is_open_at_a_time(layers: int) -> None:
    for step in range(100):
        values = [
            make({"kind": "gate", "layer": layer, "layers": layers})(step / 100) for layer in range(1, layers + 1)
        ]
        assert sum(values) == 1 and tuple(values) == make({"kind": "gates", "layers": layers})(step / 100)


def test_a_schedule_takes_a_part_of_the_run() -> None:
    schedule = make({"kind": "linear", "start": 0, "end": 10, "begin": 0.5, "until": 0.75})
    assert [schedule(p) for p in (0, 0.5, 0.625, 0.75, 0.9)] == [0, 0, 5, 10, 10]
    annealed = make({"kind": "annealed", "tau_max": 7, "until": 0.8})
    assert annealed(0.79) == annealed(0.99) == 1.0


def test_numbers_and_functions_are_schedules() -> None:
    assert make(2.5)(0.3) == 2.5 and make((1, 2))(0.3) == (1, 2)
    assert make(abs) is abs


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "lineal"}, "schedule 'lineal'; accepted: constant, linear,"),
        ({"kind": "linear", "start": 1}, "schedule 'linear' with start; needs start, end"),
        ({"kind": "annealed", "tau_max": 7, "tau": 1}, "with tau_max, tau; needs tau_max"),
        ({"kind": "annealed", "tau_max": 0}, "0 phases"),
        ({"kind": "gate", "layer": 5, "layers": 4}, "layer 5 of 4"),
        ({"kind": "gate", "layer": 0, "layers": 4}, "layer 0 of 4"),
        ({"kind": "steps", "table": []}, "schedule 'steps' with"),
        ({"kind": "linear", "start": "a", "end": 1}, "schedule 'linear' with"),
        ({"kind": "linear", "start": 0, "end": 1, "begin": 0.5, "until": 0.5}, "from 0.5 until 0.5"),
    ],
)
def test_what_is_no_schedule_is_said_at_once(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(data)


# --- objectives that follow them --------------------------------------------------------------------------------------


@dataclass
class Counted:
    """An objective of a user's, with all methods that a trainer asks for."""

    weight: float = 1.0
    name: str = "counted"
    needs: tuple[str, ...] = ("hidden_states",)
    view: Any = abs

    def __post_init__(self) -> None:
        self.calls: list[Any] = []

    def check(self, student: Any, teacher: Any) -> None:
        self.calls.append(("check", student, teacher))

    def build(self, student: Any, teacher: Any) -> None:
        self.calls.append(("build", student, teacher))

    def advance(self, progress: float) -> None:
        self.calls.append(("advance", progress, self.weight))

    def __call__(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        return torch.tensor(self.weight)


def test_a_scheduled_objective_is_the_objective_but_for_its_fields() -> None:
    inner = Counted()
    objective = Scheduled(inner, weight={"kind": "linear", "start": 0.0, "end": 2.0})
    assert (objective.name, objective.needs, objective.view) == ("counted", ("hidden_states",), abs)
    objective.check(1, 2)
    objective.build(3, 4)
    assert objective(None, None, {}).item() == 0.0
    objective.advance(0.25)
    assert objective(None, None, {}).item() == 0.5
    assert inner.calls == [("check", 1, 2), ("build", 3, 4), ("advance", 0.25, 0.5)]
    plain = Scheduled(LogitsLoss(), scale={"kind": "annealed", "tau_max": 4})
    assert not hasattr(plain, "build") and not hasattr(plain, "view")
    assert plain.scale == 0.25


def test_schedules_may_be_nested() -> None:
    objective = Scheduled(
        Scheduled(LogitsLoss(), scale={"kind": "annealed", "tau_max": 2}),
        weight={"kind": "linear", "start": 0, "end": 1},
    )
    objective.advance(0.5)
    assert objective.scale == 1.0
    student, teacher = cases.pair()
    one = LogitsLoss(weight=0.5)(student, teacher, {})
    assert objective(student, teacher, {}).item() == pytest.approx(one.item())


def test_parameters_copies_and_pickles_of_scheduled_objectives() -> None:
    models = [nn.Linear(1, 1) for _ in range(2)]
    for model, width in zip(models, (4, 6), strict=True):
        model.config = SimpleNamespace(hidden_size=width, num_hidden_layers=2)
    objective = Scheduled(HiddenStateLoss(project="shared"), weight={"kind": "linear", "start": 1, "end": 0})
    objective.build(*models)
    assert [name for name, _ in objective.named_parameters()] == ["objective.projections.shared.weight"]
    student, teacher = cases.pair(layers=2)
    objective.double().advance(0.25)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(twin(student, teacher, {}), objective(student, teacher, {}))
        twin.advance(0.5)
        assert objective.objective.weight == 0.75 and twin.objective.weight == 0.5


@pytest.mark.parametrize("fields", [{}, {"wieght": 1.0}])
def test_fields_that_are_not_there_are_refused(fields: Any) -> None:
    with pytest.raises(ValueError, match=r"Scheduled: LogitsLoss has no field (to set|wieght)"):
        Scheduled(LogitsLoss(), **fields)
