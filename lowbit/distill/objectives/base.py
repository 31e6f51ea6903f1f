"""What an objective is, and what all of them share: checks of their fields, means over real tokens, parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

Batch = Mapping[str, torch.Tensor]


class Objective(Protocol):
    """A named loss: any object with these two attributes and this call will do.

    Attributes:
        name: logged as `loss_<name>`.
        needs: what forward has to return besides: "hidden_states", "scores" (of attention before softmax, as
            `attentions`), "qkv" (as `qkv`: for each layer a tuple of query, key and value, each [B, S, width], as the
            projections give them before heads are split), or nothing.

    An objective may be an `nn.Module`: its parameters (learned projections) are trained, saved in checkpoints and
    restored with the student's, and are never in the student's own file.

    Four more are asked for where an objective has them:

    `check(student, teacher)`: raises a ValueError that says what to pass instead, before training. Called with the two
        models when the trainer is made, and with each student that a `model_init` makes. The teacher is None where a
        trainer has none.
    `build(student, teacher)`: makes parameters whose shapes depend on the models, on the student's device. Called after
        `check`, once when the trainer is made, and again for each new student of a `model_init`: it then starts anew.
    `advance(progress)`: called before each training step with the fraction of the trainer's steps that is done, in
        [0, 1). It must set fields as a pure function of it, so that a resumed run needs no state.
    `view`: an attribute, a callable (student, teacher, batch) -> (student columns, teacher columns): another batch that
        both models are run on for this objective. The trainer runs each view once a step.
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


class Parametrised(nn.Module):
    """Base of objectives that have parameters and are dataclasses: `@dataclass(eq=False)`, with a `forward`.

    The initialiser that `dataclass` writes sets fields and nothing else, so the module is made ready before it.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Parametrised:
        made = super().__new__(cls)
        nn.Module.__init__(made)
        return made


def need_teacher(what: str, teacher: PreTrainedModel | None) -> PreTrainedModel:
    if teacher is None:
        raise ValueError(f"{what} compares with a teacher, and there is none; pass teacher=..., or leave it out")
    return teacher


def need_one_of(what: str, value: Any, accepted: Collection[Any]) -> None:
    """Raise ValueError where a field has none of its values."""
    if value not in accepted:
        raise ValueError(f"{what}={value!r}; accepted: {', '.join(map(repr, accepted))}")


def sizes_of(name: str, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int] | None:
    """A field of both configurations, None where one of them has no such number."""
    sizes = getattr(student.config, name, None), getattr(teacher.config, name, None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # type: ignore[return-value]


def full(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: losses are sums of many small squares. float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def token_mask(batch: Batch, like: torch.Tensor) -> torch.Tensor:
    """True at real tokens, [B, S], for states `like` [B, S, d]; all are real where a batch has no attention mask.

    Choices of a multiple-choice batch [B, choices, S] are rows of their own, as they are to the encoder.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    return mask.reshape(like.shape[:2]).bool()


def mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of [B, S], over the unmasked entries if there is a mask; 0 where it leaves none."""
    if mask is None:
        return values.mean()
    mask = mask.reshape(values.shape).to(values)
    return (values * mask).sum() / mask.sum().clamp(min=1)
