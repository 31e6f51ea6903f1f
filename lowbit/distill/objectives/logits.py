"""Distance of logits.

cross entropy   -sum softmax(teacher / T) log softmax(student / T)                     (TernaryBERT eq. 8)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from .base import Batch, mean, need_teacher, sizes_of

# What the heads of transformers call their logits; a head with two kinds gets the mean of both losses.
LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")


def logits_of(outputs: Mapping[str, Any], batch: Batch) -> dict[str, torch.Tensor]:
    """A head's logits; of question answering, where a prediction is over tokens, padding is none of them (-1e30)."""
    found = {name: outputs[name] for name in LOGITS if name in outputs}
    mask = batch.get("attention_mask")
    for name in ("start_logits", "end_logits"):
        if mask is not None and name in found:
            found[name] = found[name].float().masked_fill(~mask.bool(), -1e30)  # -inf times its share, 0, is NaN
    return found


@dataclass
class LogitsLoss:
    """Soft cross-entropy of the logits; MSE for regression, binary cross-entropy where several labels may hold.

    Labels of the logits' own shape [B, S] are one yes or no a token (ELECTRA's discriminator). Start and end logits of
    question answering are over the tokens of a text, without its padding.

    Args:
        weight: factor of the loss.
        temperature: T; the loss is not rescaled by T^2.
        problem_type: as transformers' configurations name it: "regression", "single_label_classification" or
            "multi_label_classification". None: regression where there is one logit, multi-label where the labels are
            float, else single-label.
    """

    weight: float = 1.0
    temperature: float = 1.0
    problem_type: str | None = None
    name: str = "logits"
    needs: tuple[str, ...] = ()

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for another number of labels or words, a teacher without a head, or none."""
        teacher = need_teacher("LogitsLoss", teacher)
        if type(teacher).__name__ in MODEL_MAPPING_NAMES.values():
            raise ValueError(
                f"LogitsLoss: the teacher, a {type(teacher).__name__}, has no head and returns no logits; load it as "
                f"the student's kind ({type(student).__name__}), or pass objectives=[HiddenStateLoss()]"
            )
        labels = getattr(student, "num_labels", None), getattr(teacher, "num_labels", None)  # of heads that have some
        if None not in labels and labels[0] != labels[1]:
            raise ValueError(
                f"LogitsLoss: student of {labels[0]} labels, teacher of {labels[1]}; equal needed. Load the student "
                f"with num_labels={labels[1]}, or take a teacher of the student's task"
            )
        words = sizes_of("vocab_size", student, teacher)
        predict_words = all(model.get_output_embeddings() is not None for model in (student, teacher))
        if words and words[0] != words[1] and predict_words:
            raise ValueError(
                f"LogitsLoss: the student predicts {words[0]} words, the teacher {words[1]}; equal needed. Take models "
                "of one tokenizer, or leave LogitsLoss out"
            )

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        students, teachers = logits_of(student, batch), logits_of(teacher, batch)
        if not students:
            raise ValueError("LogitsLoss: the student returns no logits; use a model with a task head")
        if lacking := students.keys() - teachers.keys():
            raise ValueError(f"LogitsLoss: the teacher returns no {', '.join(sorted(lacking))}; use the student's head")
        loss: Any = sum(self._loss(logits, teachers[name], batch) for name, logits in students.items())
        return self.weight * loss / len(students)

    def _loss(self, student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
        labels, mask = batch.get("labels"), None
        problem_type = self.problem_type
        if problem_type is None and labels is not None and labels.is_floating_point() and student.shape[-1] > 1:
            problem_type = "multi_label_classification"
        if problem_type is None and labels is not None and labels.shape == student.shape[:2] == student.shape:
            student, teacher, mask = student.unsqueeze(-1), teacher.unsqueeze(-1), batch.get("attention_mask")
            return mean(self._distance(student, teacher, "multi_label_classification"), mask)
        if student.dim() == 3:  # one prediction a token: labelled tokens count, or all real ones
            mask = batch.get("attention_mask") if labels is None else labels != -100
        return mean(self._distance(student, teacher, problem_type), mask)

    def _distance(self, student: torch.Tensor, teacher: torch.Tensor, problem_type: str | None) -> torch.Tensor:
        """One loss for each row of logits [..., C] -> [...]."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"LogitsLoss: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; equal needed"
            )
        student, teacher = student.float(), teacher.float()
        if problem_type == "regression" or (problem_type is None and student.shape[-1] == 1):
            return (student - teacher).square().mean(-1)
        if problem_type == "multi_label_classification":
            target = torch.sigmoid(teacher / self.temperature)
            return F.binary_cross_entropy_with_logits(student / self.temperature, target, reduction="none").mean(-1)
        target = F.softmax(teacher / self.temperature, -1)
        return -(target * F.log_softmax(student / self.temperature, -1)).sum(-1)
