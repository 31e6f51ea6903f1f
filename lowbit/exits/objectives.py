"""What trains ramps: objectives of `lowbit.DistillationTrainer` on a student with exits (`lowbit.add_exits`).

    exit_task        sum over exits of w_i L_i, L_i the exit's loss against the labels
                     "sum": w_i = 1, the last exit left out (DeeBERT's second stage, the rest frozen)
                     "linear": w_i = i / sum of all i, the last exit with them (PABEE)
                     "alternate": the last exit alone in even steps, the sum of all in odd ones (BERxiT)
    exit_logits      sum over ramps of KL(p || p_i), p of the last exit (FastBERT) or of the teacher; no labels
    exit_certainty   mean over exits of (u_i - wrong_i)^2, u_i how probably ramp i is wrong (BERxiT)

L_i is a mean over the batch, so is KL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .losses import kind_of, task_loss
from .ramps import Ramps

Batch = Mapping[str, torch.Tensor]
_WEIGHTS = ("sum", "linear", "alternate")


def _check_exits(what: str, student: Any) -> Ramps:
    model = student.get_base_model() if hasattr(student, "get_base_model") else student
    ramps = getattr(model, "exits", None)
    if not isinstance(ramps, Ramps):
        raise ValueError(
            f"{what} trains the exits of its student, and {type(model).__name__} has none; call "
            "lowbit.add_exits(student) first, which takes sequence classifiers"
        )
    return ramps


def _exit_logits(what: str, student: Any) -> torch.Tensor:
    if "exit_logits" not in student:
        raise ValueError(f"{what}: the outputs hold no exit_logits; a model gives them in training, after add_exits")
    return student["exit_logits"]


def _labels(what: str, batch: Batch) -> torch.Tensor:
    if batch.get("labels") is None:
        raise ValueError(f"{what}: the batch has no labels; ExitLogitsLoss needs none")
    return batch["labels"]


class ExitTaskLoss(nn.Module):
    """Every exit's own loss against the labels.

    Args:
        weights: "sum", "linear" or "alternate", see above.
        weight: factor of the loss.
        problem_type: transformers' name, where the labels do not tell ("regression" to several numbers).

    State: of "alternate" the number of steps, in `state_dict`, so that resumed training goes on with the right one.
    """

    steps: torch.Tensor

    def __init__(self, weights: str = "sum", weight: float = 1.0, problem_type: str | None = None) -> None:
        super().__init__()
        if weights not in _WEIGHTS:
            raise ValueError(f"ExitTaskLoss: weights={weights!r}; accepted: {', '.join(map(repr, _WEIGHTS))}")
        self.weights, self.weight, self.problem_type = weights, weight, problem_type
        self.name, self.needs = "exit_task", ()
        self._progress: float | None = None  # that `steps` are of; after resuming the next one is always new
        if weights == "alternate":
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def check(self, student: Any, teacher: Any) -> None:
        """Raise ValueError for a student without exits."""
        _check_exits("ExitTaskLoss", student)

    def advance(self, progress: float) -> None:
        """Before each batch; batches whose gradients are accumulated have one progress, and are one step."""
        if self.weights == "alternate" and progress != self._progress:
            self.steps = torch.zeros_like(self.steps) if progress == 0 else self.steps + 1
            self._progress = progress

    def forward(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        ramps, labels = _exit_logits("ExitTaskLoss", student), _labels("ExitTaskLoss", batch)
        if self.weights == "alternate" and int(self.steps) % 2 == 0:
            return self.weight * task_loss(student["logits"], labels, self.problem_type)
        exits = [*ramps] if self.weights == "sum" else [*ramps, student["logits"]]
        losses = torch.stack([task_loss(logits, labels, self.problem_type) for logits in exits])
        if self.weights == "linear":
            order = torch.arange(1, len(losses) + 1, device=losses.device, dtype=losses.dtype)
            return self.weight * (losses * order).sum() / order.sum()
        return self.weight * losses.sum()


class ExitLogitsLoss:
    """Every ramp learns the answers of the last exit, or of the teacher; text without labels will do.

    Args:
        weight: factor of the loss.
        temperature: of both distributions. 1 as published.
        target: "final": the student's last exit, which gets no gradient (self-distillation, FastBERT); "teacher".
        reverse: KL(p_i || p) instead, as FastBERT's paper writes it; the default is what its code does.
    """

    def __init__(
        self, weight: float = 1.0, temperature: float = 1.0, target: str = "final", reverse: bool = False
    ) -> None:
        if target not in ("final", "teacher"):
            raise ValueError(f"ExitLogitsLoss: target={target!r}; accepted: 'final', 'teacher'")
        if not temperature > 0:
            raise ValueError(f"ExitLogitsLoss: temperature={temperature!r}; accepted: above 0")
        self.weight, self.temperature, self.target, self.reverse = weight, temperature, target, reverse
        self.name, self.needs = "exit_logits", ()

    def check(self, student: Any, teacher: Any) -> None:
        """Raise ValueError for a student without exits; for target="teacher" a teacher that is none of its task."""
        _check_exits("ExitLogitsLoss", student)
        if self.target == "teacher":
            labels = getattr(teacher, "num_labels", None)
            if teacher is None or labels != student.num_labels:
                raise ValueError(
                    f"ExitLogitsLoss(target='teacher'): student of {student.num_labels} labels, teacher of {labels}; "
                    "pass a teacher of the student's task, or target='final'"
                )

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        ramps = _exit_logits("ExitLogitsLoss", student).float()
        target = (teacher if self.target == "teacher" else student)["logits"].detach().float()
        kind = kind_of(target, batch.get("labels"), None)
        if kind == "regression":
            return self.weight * (ramps - target).square().mean(-1).sum(0).mean()
        if kind == "multi_label_classification":
            pair = [torch.stack([x, torch.zeros_like(x)], -1) for x in (ramps, target)]  # each label yes or no
            return self.weight * self._divergence(*pair).mean(-1).sum(0).mean()
        return self.weight * self._divergence(ramps, target).sum(0).mean()

    def _divergence(self, ramps: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """KL over the last dimension: [ramps, B, ..., C] and [B, ..., C] -> [ramps, B, ...]."""
        own, wanted = (torch.log_softmax(x / self.temperature, -1) for x in (ramps, target))
        wanted = wanted.expand_as(own)
        first, second = (own, wanted) if self.reverse else (wanted, own)
        return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)


class ExitCertaintyLoss:
    """The certainty head learns whether each ramp's answer is wrong (BERxiT's learning to exit).

    The target of ramp i is 1 where its argmax is not the label, else 0; of regression tanh |label - value|. It carries
    no gradient, but the ramps' layers get one through what the head reads, as in BERxiT.

    Args:
        weight: factor of the loss.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight, self.name, self.needs = weight, "exit_certainty", ()

    def check(self, student: Any, teacher: Any) -> None:
        """Raise ValueError for a student without exits, or without a certainty head."""
        if _check_exits("ExitCertaintyLoss", student).certainty_head is None:
            raise ValueError("ExitCertaintyLoss trains a certainty head; add exits by add_exits(model, certainty=True)")

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        ramps, labels = _exit_logits("ExitCertaintyLoss", student), _labels("ExitCertaintyLoss", batch)
        kind = kind_of(ramps[0], labels, None)
        if kind == "regression":
            values = labels.reshape(ramps.shape[1:]).float()
            wrong = torch.tanh((values - ramps.detach().float()).abs().mean(-1))
        elif kind == "multi_label_classification":
            wrong = ((ramps.detach() > 0) != labels.bool()).any(-1).float()
        else:
            wrong = (ramps.detach().argmax(-1) != labels.reshape(-1)).float()
        return self.weight * (student["exit_wrong"].float().sigmoid() - wrong).square().mean()
