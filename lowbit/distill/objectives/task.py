"""The student's own loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .base import Batch


@dataclass
class TaskLoss:
    """The student's own loss against the labels (not part of the published recipes)."""

    weight: float = 1.0
    name: str = "task"
    needs: tuple[str, ...] = ()

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        if student.loss is None:
            raise ValueError("TaskLoss: the batch has no labels")
        return self.weight * student.loss
