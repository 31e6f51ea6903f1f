"""The loss of a sequence classifier's logits against labels, as transformers' heads compute it, for any exit."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def kind_of(logits: torch.Tensor, labels: torch.Tensor | None, problem_type: str | None) -> str:
    """transformers' `problem_type`; where none is given, as its heads guess it from the labels."""
    if problem_type is not None:
        return problem_type
    if logits.shape[-1] == 1:
        return "regression"
    several = labels is not None and labels.is_floating_point()
    return "multi_label_classification" if several else "single_label_classification"


def task_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None = None) -> torch.Tensor:
    """Mean over the batch (and over labels, for regression and several labels a text): a float scalar.

    Args:
        logits: [B, C].
        labels: int64 [B]; float [B] or [B, 1] for regression; float [B, C] for several labels a text.
        problem_type: of the model's configuration, None: guessed (`kind_of`).
    """
    logits, kind = logits.float(), kind_of(logits, labels, problem_type)
    if kind == "regression":
        return F.mse_loss(logits, labels.reshape(logits.shape).float())
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.reshape(-1))
