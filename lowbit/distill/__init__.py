"""Training a student with a teacher: the trainer, and the objectives that it sums."""

from .objectives import AttentionScoreLoss, HiddenStateLoss, LogitsLoss, Objective, TaskLoss
from .trainer import DistillationTrainer

__all__ = ["AttentionScoreLoss", "DistillationTrainer", "HiddenStateLoss", "LogitsLoss", "Objective", "TaskLoss"]
