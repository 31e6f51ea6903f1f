"""Of each example's neighbours the one on which student and teacher differ most (MiniMax-kNN, 2105.13608)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..columns import arguments

if TYPE_CHECKING:
    from datasets import Dataset

IDS, MASK = "candidate_input_ids", "candidate_attention_mask"


def with_candidates(
    encoded: Dataset, candidates: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int = 128
) -> Dataset:
    """Tokenized data with a column `candidate_input_ids` more: the token ids of each row's candidates.

    A row without candidates stands in for itself.

    Args:
        encoded: tokenized rows, with `input_ids`.
        candidates: of each row, as in the column that `add_neighbours` adds.
        tokenizer: of both models.
        max_length: longer candidates are cut, tokens.
    """
    from datasets import List, Value

    if len(candidates) != len(encoded):
        raise ValueError(f"{len(candidates)} rows of candidates for {len(encoded)} rows of data; equal needed")
    ids = [
        tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else [own]
        for texts, own in zip(candidates, encoded["input_ids"], strict=True)
    ]
    return encoded.add_column(IDS, ids, feature=List(List(Value("int32"))))


@dataclass
class CandidateCollator:
    """Pads rows, and their candidates to [B, k, S]; a row of fewer than k repeats its own, which changes no choice.

    The trainer has to keep the column: `TrainingArguments(remove_unused_columns=False)`.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [{name: value for name, value in row.items() if name != IDS} for row in features]
        batch = dict(DataCollatorWithPadding(self.tokenizer)(rows))
        if IDS not in features[0]:  # of evaluation
            return batch
        lists = [row[IDS] for row in features]
        most = max(map(len, lists))
        texts = [{"input_ids": own[i % len(own)]} for own in lists for i in range(most)]
        padded = self.tokenizer.pad(texts, return_tensors="pt")
        for name, column in ((IDS, "input_ids"), (MASK, "attention_mask")):
            batch[name] = padded[column].reshape(len(lists), most, -1)
        return batch


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) at a temperature of logits [..., C], C > 1; (difference)^2 where C = 1. Float32 [...]."""
    student, teacher = student.float(), teacher.float()
    if student.shape[-1] == 1:
        return (student - teacher).square().squeeze(-1)
    target = F.log_softmax(teacher / temperature, -1)
    return (target.exp() * (target - F.log_softmax(student / temperature, -1))).sum(-1)


@dataclass
class HardestNeighbour:
    """A view: in the place of each example the candidate on which student and teacher differ most, as they are now.

    Both models run on all k candidates in eval mode without gradient, the student as it is in this step. (In its
    online mode the published code asks a copy of the student as it was before training.)

    Args:
        temperature: of the divergence that is compared; it changes the choice.
        start: progress in [0, 1) from which on neighbours are taken; before, examples stand for themselves. Published
            as an epoch. (Its README starts after the last one: augmentation never begins.)

    Raises:
        ValueError: `start` outside of [0, 1); at the first step, a batch without candidates, models without logits.
    """

    temperature: float = 1.0
    start: float = 0.0
    progress: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1 or self.temperature <= 0:
            raise ValueError(
                f"HardestNeighbour: start={self.start}, temperature={self.temperature}; accepted: 0 <= start < 1, "
                "temperature > 0"
            )

    def advance(self, progress: float) -> None:
        self.progress = progress

    def __call__(
        self, student: nn.Module, teacher: nn.Module, batch: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """`input_ids` and `attention_mask` [B, S] of the chosen candidates, the same for both models."""
        if IDS not in batch:
            raise ValueError(
                f"HardestNeighbour: the batch has no {IDS}; add them by lowbit.distill.augment.with_candidates, "
                "collate by CandidateCollator, and set remove_unused_columns=False"
            )
        if self.progress < self.start:
            own = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
            return own, own
        ids, mask = batch[IDS], batch[MASK]
        flat = {"input_ids": ids.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
        with torch.no_grad(), _evaluating(student), _evaluating(teacher):
            logits = [model(**arguments(model, flat, {"return_dict": True})).logits for model in (student, teacher)]
        hardest = divergence(logits[0], logits[1], self.temperature).reshape(ids.shape[:2]).argmax(1)
        rows = torch.arange(len(ids), device=ids.device)
        used = mask[rows, hardest].any(0)  # other columns are padding of candidates that were not chosen
        chosen = {"input_ids": ids[rows, hardest][:, used], "attention_mask": mask[rows, hardest][:, used]}
        return chosen, chosen


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
