"""What a student learns: objectives, small objects called with (student outputs, teacher outputs, batch)."""

from .base import Batch, Objective, Parametrised, sizes_of
from .hidden import HiddenStateLoss
from .logits import LOGITS, LogitsLoss, logits_of
from .scores import AttentionScoreLoss
from .task import TaskLoss

__all__ = [
    "LOGITS",
    "AttentionScoreLoss",
    "Batch",
    "HiddenStateLoss",
    "LogitsLoss",
    "Objective",
    "Parametrised",
    "TaskLoss",
    "logits_of",
    "sizes_of",
]
