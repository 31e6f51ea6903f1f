"""Distance of logits z, one for each example.

cross_entropy   -sum softmax(z_t / T) log softmax(z_s / T)                                    (TernaryBERT eq. 8)
kl              the same without the teacher's entropy: sum p_t (log p_t - log p_s)           (DistilBERT, PKD)
mse             sum (z_s - z_t)^2                                                             (Annealing KD)

Published codes differ by factors: the mean over classes instead of their sum is `reduction="elements"` (TinyBERT, PKD's
kl_div of mean), a factor of T^2 is `rescale` (PKD, DistilBERT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from .base import Batch, full, mean, need_one_of, need_teacher, sizes_of

# What the heads of transformers call their logits; a head with two kinds gets the mean of both losses.
LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")


def logits_of(outputs: Mapping[str, Any], batch: Batch, padding: float = -1e30) -> dict[str, torch.Tensor]:
    """A head's logits; of question answering, where a prediction is over tokens, padding has the given one.

    -1e30 rather than -inf, which times its share, 0, is NaN.
    """
    found = {name: outputs[name] for name in LOGITS if name in outputs}
    mask = batch.get("attention_mask")
    for name in ("start_logits", "end_logits"):
        if mask is not None and name in found:
            found[name] = full(found[name]).masked_fill(~mask.bool(), padding)
    return found


@dataclass
class LogitsLoss:
    """Soft cross-entropy of the logits; MSE for regression, binary cross-entropy where several labels may hold.

    Labels of the logits' own shape [B, S] are one yes or no a token (ELECTRA's discriminator). Start and end logits of
    question answering are over the tokens of a text, without its padding.

    Args:
        weight: factor of the loss.
        temperature: T, of both models' logits; "mse" has none.
        problem_type: as transformers' configurations name it: "regression", "single_label_classification" or
            "multi_label_classification". None: regression where there is one logit, multi-label where the labels are
            float, else single-label. Regression is MSE whatever the distance.
        distance: "cross_entropy", "kl" (the same gradient for the student, and 0 where both agree) or "mse".
        reduction: "examples": sum over classes, mean over examples; "elements": mean over both. (Of regression and of
            several labels the mean over both, as transformers' own losses have it.)
        rescale: multiply by T^2, so that gradients do not shrink as T grows.
        scale: multiplies the teacher's logits (Annealing KD's phi).
        tokens: of heads with a prediction a token: "labelled" compares those with a label, or all real ones in a batch
            without labels; "all" compares all real ones (DistilBERT, whose labels are masked words alone).
    """

    weight: float = 1.0
    temperature: float = 1.0
    problem_type: str | None = None
    distance: str = "cross_entropy"
    reduction: str = "examples"
    rescale: bool = False
    scale: float = 1.0
    tokens: str = "labelled"
    name: str = "logits"
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        need_one_of("LogitsLoss: distance", self.distance, ("cross_entropy", "kl", "mse"))
        need_one_of("LogitsLoss: reduction", self.reduction, ("examples", "elements"))
        need_one_of("LogitsLoss: tokens", self.tokens, ("labelled", "all"))
        if not self.temperature > 0:
            raise ValueError(f"LogitsLoss: temperature={self.temperature}; accepted: a number above 0")

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
        padding = 0.0 if self.distance == "mse" else -1e30  # which squares would overflow
        students, teachers = logits_of(student, batch, padding), logits_of(teacher, batch, padding)
        if not students:
            raise ValueError("LogitsLoss: the student returns no logits; use a model with a task head")
        if lacking := students.keys() - teachers.keys():
            raise ValueError(f"LogitsLoss: the teacher returns no {', '.join(sorted(lacking))}; use the student's head")
        loss: Any = sum(self._loss(name, logits, teachers[name], batch) for name, logits in students.items())
        return self.weight * loss / len(students)

    def _loss(self, name: str, student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
        if student.shape != teacher.shape:
            raise ValueError(
                f"LogitsLoss: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; equal needed"
            )
        student, teacher = full(student), full(teacher) * self.scale
        labels, mask, problem_type = batch.get("labels"), batch.get("attention_mask"), self.problem_type
        if problem_type is None and labels is not None and labels.is_floating_point() and student.shape[-1] > 1:
            problem_type = "multi_label_classification"
        if problem_type is None and labels is not None and labels.shape == student.shape[:2] == student.shape:
            student, teacher = student.unsqueeze(-1), teacher.unsqueeze(-1)
            return mean(self._distance(student, teacher, "multi_label_classification"), mask)
        values = self._distance(student, teacher, problem_type)
        if student.dim() == 3:  # one prediction a token
            return mean(values, mask if labels is None or self.tokens == "all" else labels != -100)
        if self.reduction == "elements" and name in ("start_logits", "end_logits") and mask is not None:
            values = values * student.shape[-1] / mask.sum(-1).clamp(min=1)  # padding is none of the classes
        return mean(values, None)

    def _distance(self, student: torch.Tensor, teacher: torch.Tensor, problem_type: str | None) -> torch.Tensor:
        """One loss for each row of logits [..., C] -> [...]."""
        if problem_type == "regression" or (problem_type is None and student.shape[-1] == 1):
            return (student - teacher).square().mean(-1)
        several = problem_type == "multi_label_classification"
        classes = student.shape[-1] if several or self.reduction == "elements" else 1
        if self.distance == "mse":
            return (student - teacher).square().sum(-1) / classes
        student, teacher = student / self.temperature, teacher / self.temperature
        loss = (_binary if several else _soft)(student, teacher, self.distance == "kl")
        return loss / classes * (self.temperature**2 if self.rescale else 1)


def _soft(student: torch.Tensor, teacher: torch.Tensor, kl: bool) -> torch.Tensor:
    log_student, log_teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return (log_teacher.exp() * (log_teacher - log_student if kl else -log_student)).sum(-1)


def _binary(student: torch.Tensor, teacher: torch.Tensor, kl: bool) -> torch.Tensor:
    """Of labels that are each yes or no: log(1 + e^s) - p_t s."""
    target = torch.sigmoid(teacher)
    loss = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    if kl:
        loss = loss - F.binary_cross_entropy_with_logits(teacher, target, reduction="none")
    return loss.sum(-1)
