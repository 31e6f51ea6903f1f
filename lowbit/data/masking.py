"""Which tokens a masked language model has to predict: the same after resuming; rare rather than frequent ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling


def count_tokens(rows: Iterable[Iterable[int]], vocabulary: int) -> torch.Tensor:
    """How often each token id stands in rows of ids, int64 [vocabulary]."""
    counts = np.zeros(vocabulary, np.int64)
    for row in rows:
        counts += np.bincount(np.asarray(row, np.int64), minlength=vocabulary)
    return torch.from_numpy(counts)


@dataclass
class SeededByBatch:
    """A collator whose random choices are a function of the rows of its batch.

    Batches are made ahead of their step, so that a run that is resumed would draw other masks than one left alone
    (transformers 5.23, `DataCollatorForLanguageModeling`). Rows meet in other batches in each epoch, and
    get other masks.

    Args:
        collate: draws from torch's global generator, which is put back.
        seed: of all batches.
    """

    collate: Callable[[Sequence[Any]], Any]
    seed: int = 0

    def __call__(self, rows: Sequence[Any]) -> Any:
        ids = np.concatenate([np.asarray(row["input_ids"], np.int64) for row in rows])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(ids.tobytes(), self.seed))
            return self.collate(rows)


@dataclass
class RareTokenCollator(DataCollatorForLanguageModeling):
    """transformers' dynamic masking, with tokens chosen at odds of count^-power (1910.01108, published code).

    Of a batch exactly ceil(mlm_probability x real tokens) are chosen, special tokens and padding never; they become
    [MASK], a random token, or stay, as in transformers' collator, whose other fields these are.

    Args:
        counts: of each token in the corpus, int [vocabulary]; tokens that were not seen count as seen once.
        power: published 0.7; 0 chooses all tokens alike.

    Raises:
        ValueError: no counts, or whole_word_mask.
    """

    counts: torch.Tensor | None = None
    power: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.counts is None or self.counts.ndim != 1 or self.whole_word_mask:
            raise ValueError(
                "RareTokenCollator chooses tokens by their counts, not words; give counts=count_tokens(...), and leave "
                "whole_word_mask"
            )
        self._odds = self.counts.clamp(min=1).double() ** -self.power

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[Any, Any]:
        """Ids with masks, and labels, -100 where nothing was chosen; int64 [B, S] each."""
        if special_tokens_mask is None:
            special_tokens_mask = [
                self.tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True) for row in inputs.tolist()
            ]
        fixed = torch.as_tensor(special_tokens_mask).bool()
        odds = self._odds[inputs].masked_fill(fixed, 0.0).flatten()
        own: Any = self  # fields of transformers' class, which mypy does not see
        count = math.ceil(own.mlm_probability * int((~fixed).sum()))
        free = torch.ones_like(odds, dtype=torch.bool)
        if count:
            free[torch.multinomial(odds, count, generator=self.generator)] = False
        rate, own.mlm_probability = own.mlm_probability, 1.0  # of what is not special: just those chosen
        try:
            return super().torch_mask_tokens(inputs, free.reshape(inputs.shape))
        finally:
            own.mlm_probability = rate
