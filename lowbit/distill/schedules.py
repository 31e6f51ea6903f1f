"""Values that change over a run, as data: {"kind": "annealed", "tau_max": 7}. And objectives whose fields follow them.

Each kind is a pure function of progress, the fraction of steps that is done, in [0, 1): a run that is resumed needs to
know nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .objectives.base import Batch, Objective


def constant(progress: float, value: Any) -> Any:
    return value


def linear(progress: float, start: float, end: float) -> float:
    """From `start` at 0 to `end` at 1."""
    return start + (end - start) * progress


def cubic(progress: float, start: float, end: float) -> float:
    """From `start` to `end`, fast at first: end + (start - end) (1 - progress)^3 (Zhu and Gupta 2017, eq. 1)."""
    return end + (start - end) * (1 - progress) ** 3


def steps(progress: float, table: Sequence[tuple[float, Any]]) -> Any:
    """The value of the last row [from, value] whose `from` is reached; the first row is from 0."""
    return [table[0][1], *(value for begin, value in table if begin <= progress)][-1]


def annealed(progress: float, tau_max: int) -> float:
    """1/tau_max, 2/tau_max, .. 1, each for an equal share of the run (Annealing KD: phi of T = tau_max .. 1).

    Training steps see the progress before them, so the first has 0: it is ceil(tau_max (s + 1)/n)/tau_max of step s of
    n, as the phases are counted from their first step.
    """
    return min(_phase(progress, tau_max) + 1, tau_max) / tau_max


def gate(progress: float, layer: int, layers: int) -> float:
    """1 in phase `layer` of `layers` equal ones, else 0 (MobileBERT, progressive knowledge transfer)."""
    if not 1 <= layer <= layers:
        raise ValueError(f"layer {layer} of {layers}")
    return float(min(_phase(progress, layers), layers - 1) == layer - 1)


def gates(progress: float, layers: int) -> tuple[float, ...]:
    """`gate` of every layer, for `layer_weights`."""
    return tuple(gate(progress, layer, layers) for layer in range(1, layers + 1))


def _phase(progress: float, phases: int) -> int:
    if phases < 1:
        raise ValueError(f"{phases} phases")
    return math.floor(progress * phases + 1e-9)  # 0.29 * 100 is less than 29


KINDS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (constant, linear, cubic, steps, annealed, gate, gates)
}


@dataclass(frozen=True)
class Schedule:
    """A kind with its fields, called with the progress.

    Args:
        kind: a name in `KINDS`.
        fields: the function's arguments besides progress.
        begin, until: the part of the run over which it goes from its start to its end; it stays so before and after.

    Raises:
        ValueError: another kind or other fields, a part that is none.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule {self.kind!r}; accepted: {', '.join(KINDS)}")
        names = [*inspect.signature(KINDS[self.kind]).parameters][1:]
        if sorted(self.fields) != sorted(names):
            raise ValueError(
                f"schedule {self.kind!r} with {', '.join(self.fields) or 'nothing'}; needs {', '.join(names)}"
            )
        if not 0 <= self.begin < self.until <= 1:
            raise ValueError(f"schedule from {self.begin} until {self.until}; accepted: fractions, ascending")
        try:
            self(0.0)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"schedule {self.kind!r} with {dict(self.fields)}: {error}") from error

    def __call__(self, progress: float) -> Any:
        inside = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return KINDS[self.kind](inside, **self.fields)


def make(given: Any) -> Callable[[float], Any]:
    """A schedule from data: {"kind": .., its fields, and `begin` and `until` if it takes a part of the run}.

    A callable is one already; anything else is a constant.
    """
    if callable(given):
        return given
    if not isinstance(given, Mapping) or "kind" not in given:
        return Schedule("constant", {"value": given})
    part = {name: given[name] for name in ("begin", "until") if name in given}
    fields = {name: value for name, value in given.items() if name != "kind" and name not in part}
    return Schedule(given["kind"], fields, **part)


class Scheduled(nn.Module):
    """An objective whose fields follow schedules; all else is the objective's own.

    Args:
        objective: any objective.
        **schedules: for fields of it a schedule each: a table for `make`, or a function of progress.

    Raises:
        ValueError: a field that the objective does not have, or no schedule.
    """

    def __init__(self, objective: Objective, **schedules: Any) -> None:
        super().__init__()
        self.objective = objective
        lacking = [name for name in schedules if not hasattr(objective, name)]
        if lacking or not schedules:
            raise ValueError(f"Scheduled: {type(objective).__name__} has no field {', '.join(lacking) or 'to set'}")
        self.schedules = {name: make(given) for name, given in schedules.items()}
        self._set(0.0)

    def __getattr__(self, name: str) -> Any:
        """Name, needs, check, build, view, ...: what the objective has, and no more."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or name == "objective" or "_modules" not in vars(self):
                raise
            return getattr(self.objective, name)

    def _set(self, progress: float) -> None:
        target = self.objective
        while isinstance(target, Scheduled):  # whose fields are its objective's
            target = target.objective
        for name, schedule in self.schedules.items():
            setattr(target, name, schedule(progress))

    def advance(self, progress: float) -> None:
        """Set the fields for a step."""
        self._set(progress)
        if (inner := getattr(self.objective, "advance", None)) is not None:
            inner(progress)

    def forward(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        return self.objective(student, teacher, batch)
