"""Other batches than the loader's, that student and teacher are run on for an objective."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from .objectives import Batch, Objective


class View(Protocol):
    """Makes another batch of a batch: text that a generator writes, the neighbours that are hardest.

    Any callable will do. One that is an `nn.Module` has parameters of its own, trained where `On` says so.
    """

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> tuple[Batch, Batch]:
        """Columns of the new batch for the student, which the objective gets as its batch, and for the teacher.

        Args:
            student, teacher: the models; the student in train mode, as the step has it.
            batch: what the loader gave.
        """
        ...


class On(nn.Module):
    """An objective on another batch: both models are run once a step on each view, for all objectives that share it.

    Args:
        view: makes the batch.
        objective: what is compared there.
        alternate: (N, M): of N + M steps in turn the first N train the view alone, to maximise the objective, through
            student and teacher, which stay as they are; the next M train the student (MATE-KD: (10, 100)). None: the
            view is not trained.
        learning_rate: of the view's parameters; None: the trainer's.

    Raises:
        ValueError: `alternate` with numbers below 1, or a view without parameters.
    """

    def __init__(
        self,
        view: View,
        objective: Objective,
        alternate: tuple[int, int] | None = None,
        learning_rate: float | None = None,
    ) -> None:
        super().__init__()
        if alternate is not None:
            trained = isinstance(view, nn.Module) and next(view.parameters(), None) is not None
            if len(alternate) != 2 or min(alternate) < 1 or not trained:
                raise ValueError(
                    f"alternate={alternate} with a {type(view).__name__}; accepted: two numbers of steps from 1, with "
                    "a view that has parameters to train"
                )
        self.view, self.objective = view, objective
        self.alternate, self.learning_rate = alternate, learning_rate
        self.name, self.needs = objective.name, objective.needs

    def ascends(self, step: int) -> bool:
        """Whether a global step trains the view."""
        return self.alternate is not None and step % sum(self.alternate) < self.alternate[0]

    def check(self, student: Any, teacher: Any) -> None:
        self._ask("check", student, teacher)

    def build(self, student: Any, teacher: Any) -> None:
        self._ask("build", student, teacher)

    def advance(self, progress: float) -> None:
        self._ask("advance", progress)

    def _ask(self, method: str, *args: Any) -> None:
        for part in (self.view, self.objective):
            if (asked := getattr(part, method, None)) is not None:
                asked(*args)

    def forward(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        return self.objective(student, teacher, batch)
