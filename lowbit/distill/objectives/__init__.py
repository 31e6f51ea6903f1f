"""What a student learns: objectives, small objects called with (student outputs, teacher outputs, batch)."""

from .base import Batch, Objective, Parametrised, sizes_of
from .context import PairRelationLoss, TripleRelationLoss
from .hidden import HiddenStateLoss
from .logits import LOGITS, LogitsLoss, logits_of
from .relations import RelationLoss
from .scores import AttentionScoreLoss
from .statistics import StatisticsLoss
from .task import TaskLoss

__all__ = [
    "LOGITS",
    "AttentionScoreLoss",
    "Batch",
    "HiddenStateLoss",
    "LogitsLoss",
    "Objective",
    "PairRelationLoss",
    "Parametrised",
    "RelationLoss",
    "StatisticsLoss",
    "TaskLoss",
    "TripleRelationLoss",
    "logits_of",
    "sizes_of",
]
