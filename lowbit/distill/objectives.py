"""What a student learns: objectives, small objects called with (student outputs, teacher outputs, batch).

hidden      sum over layers of MSE(student hidden, teacher hidden)                      (TernaryBERT eq. 7)
attention   sum over layers of MSE(student scores, teacher scores), before softmax      (TernaryBERT eq. 7)
logits      -sum softmax(teacher / T) log softmax(student / T), MSE for regression      (TernaryBERT eq. 8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from .. import models
from ..nn.attention import NAME as LOWBIT_ATTENTION

Batch = Mapping[str, torch.Tensor]


class Objective(Protocol):
    """A named loss: any object with these two attributes and this call will do.

    Attributes:
        name: logged as `loss_<name>`.
        needs: what forward has to return besides: "hidden_states", "scores" (of attention before softmax, as
            `attentions`), or nothing.

    It may also have a method `check(student, teacher)`, called with the two models when the trainer is made, and with
    each student that a `model_init` makes: to raise a ValueError that says what to pass instead, before training. The
    teacher is None where a trainer has none.
    """

    name: str
    needs: tuple[str, ...]

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        """The loss of a batch, a float scalar, already weighted.

        Args:
            student, teacher: outputs of the two models, as transformers gives them; the teacher's carry no gradient,
                and its scores are of the heads that a student of `lowbit.slim` kept.
            batch: the columns that either model's forward names; with `remove_unused_columns=False` all.
        """
        ...


def _layer_map(student: Sequence[Any], teacher: Sequence[Any], what: str) -> list[tuple[Any, Any]]:
    """Pair layers one to one, or every k-th teacher layer when it has k times as many (uniform map)."""
    if not student or not teacher:
        raise ValueError(
            f"{what}: {len(student)} student layers, {len(teacher)} teacher layers in the outputs; "
            f'scores need model.set_attn_implementation("{LOWBIT_ATTENTION}")'
        )
    _refuse_uneven_layers(what, len(student), len(teacher))
    step = len(teacher) // len(student)
    return list(zip(student, teacher[step - 1 :: step], strict=True))


def _refuse_uneven_layers(what: str, student: int, teacher: int) -> None:
    if teacher % student:
        fitting = ", ".join(str(layers) for layers in range(1, teacher + 1) if teacher % layers == 0)
        raise ValueError(
            f"{what}: {student} student layers do not divide {teacher} teacher layers evenly; take a student of "
            f"{fitting} layers, or objectives that compare no layers: objectives=[LogitsLoss()]"
        )


def _need_teacher(what: str, teacher: PreTrainedModel | None) -> PreTrainedModel:
    if teacher is None:
        raise ValueError(f"{what} compares with a teacher, and there is none; pass teacher=..., or leave it out")
    return teacher


def sizes_of(name: str, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int] | None:
    """A field of both configurations, None where one of them has no such number."""
    sizes = getattr(student.config, name, None), getattr(teacher.config, name, None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # type: ignore[return-value]


def _check_layers(what: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if counts := sizes_of("num_hidden_layers", student, teacher):
        _refuse_uneven_layers(what, *counts)


@dataclass
class HiddenStateLoss:
    """MSE of the embedding output and of every layer, summed over layers; padded tokens do not count.

    Args:
        weight: factor of the loss.
        include_padding: average over padded tokens too (the published mode).
    """

    weight: float = 1.0
    include_padding: bool = False
    name: str = "hidden"
    needs: tuple[str, ...] = ("hidden_states",)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for another hidden size, layers that do not divide the teacher's, or no teacher."""
        teacher = _need_teacher("HiddenStateLoss", teacher)
        widths = sizes_of("hidden_size", student, teacher)
        if widths and widths[0] != widths[1]:
            scores = all(map(models.has_plain_attention, (student, teacher)))
            raise ValueError(
                f"HiddenStateLoss: student hidden size {widths[0]}, teacher {widths[1]}; they must be equal. Pass "
                f"objectives=[{'AttentionScoreLoss(), ' if scores else ''}LogitsLoss()], or stages without "
                f"HiddenStateLoss, or take a student of hidden size {widths[1]}"
            )
        _check_layers("HiddenStateLoss", student, teacher)

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        s_embedding, *s_layers = student.hidden_states
        t_embedding, *t_layers = teacher.hidden_states
        if s_embedding.shape[-1] != t_embedding.shape[-1]:
            raise ValueError(
                f"HiddenStateLoss: student hidden size {s_embedding.shape[-1]}, teacher {t_embedding.shape[-1]}; "
                "they must be equal"
            )
        mask = None if self.include_padding else batch.get("attention_mask")
        pairs = [(s_embedding, t_embedding), *_layer_map(s_layers, t_layers, "HiddenStateLoss")]
        loss: Any = sum(_mean((s - t).float().square().mean(-1), mask) for s, t in pairs)
        return self.weight * loss


@dataclass
class AttentionScoreLoss:
    """MSE of the attention scores before softmax, summed over layers; padded queries and keys do not count.

    Where the numbers of heads differ both are averaged over heads, since heads cannot be paired. For a slimmed student
    they are equal: of the teacher's scores `DistillationTrainer` takes those of the heads that `lowbit.slim` kept.

    Args:
        weight: factor of the loss.
        include_padding: set masked keys to 0 in both and average over all entries (the published mode).
    """

    weight: float = 1.0
    include_padding: bool = False
    name: str = "attention"
    needs: tuple[str, ...] = ("scores",)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for layers that do not divide the teacher's, or no teacher."""
        _check_layers("AttentionScoreLoss", student, _need_teacher("AttentionScoreLoss", teacher))

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        mask = batch.get("attention_mask")
        loss: Any = 0.0
        for s, t in _layer_map(student.attentions, teacher.attentions, "AttentionScoreLoss"):
            if s.shape[1] != t.shape[1]:
                s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
            difference = (s - t).float().square()
            if mask is None:
                loss = loss + difference.mean()
                continue
            keys = mask.reshape(-1, 1, 1, mask.shape[-1]).to(difference)
            if self.include_padding:
                loss = loss + (difference * keys).mean()
            else:
                pairs = (keys * keys.transpose(2, 3)).expand_as(difference)
                loss = loss + (difference * pairs).sum() / pairs.sum().clamp(min=1)
        return self.weight * loss


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
        teacher = _need_teacher("LogitsLoss", teacher)
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
            return _mean(self._distance(student, teacher, "multi_label_classification"), mask)
        if student.dim() == 3:  # one prediction a token: labelled tokens count, or all real ones
            mask = batch.get("attention_mask") if labels is None else labels != -100
        return _mean(self._distance(student, teacher, problem_type), mask)

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


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over tokens [B, S], over the unmasked ones if there is a mask."""
    if mask is None:
        return values.mean()
    mask = mask.reshape(values.shape).to(values)
    return (values * mask).sum() / mask.sum().clamp(min=1)
