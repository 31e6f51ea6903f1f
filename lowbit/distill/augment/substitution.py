"""TinyBERT's augmentation: words replaced by what a masked language model or word vectors offer (1909.10351, 3.2)."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cache import chunked, fingerprint, flat
from .masked_lm import MaskedLM
from .vectors import WordVectors, read_vectors, vectors_of
from .words import STOP_WORDS, Span, replace, replaceable

# N_a of each task in TinyBERT's code.
COPIES = {"cola": 30, "mnli": 10, "mrpc": 30, "sst2": 20, "stsb": 30, "qqp": 10, "qnli": 20, "rte": 30}
Row = tuple[str, ...]


@dataclass
class Substitution:
    """Each word, with probability `p`, becomes one of its candidates: a method of `augment`.

    Candidates of a word of one token are the language model's; of other words, and where the model has none, those of
    the vectors. Words that are not of letters only and stop words stay.

    Args:
        lm, vectors: where candidates come from; one of them may be None.
        p: p_t, published 0.4.
        copies: N_a, how many are made of each text; published 20, by task `COPIES`. Copies that are equal to each other
            or to the original are dropped, so short texts have fewer. Of a pair this many are made of either text; the
            other one stays. (Published code pairs the second text with the last copy of the first.)
        never: lower-case words that stay; `words.STOP_WORDS` are English.

    Raises:
        ValueError: neither lm nor vectors, p outside of (0, 1], fewer than one copy.
    """

    lm: MaskedLM | None = None
    vectors: WordVectors | None = None
    p: float = 0.4
    copies: int = 20
    never: Collection[str] = STOP_WORDS

    def __post_init__(self) -> None:
        if self.lm is None and self.vectors is None:
            raise ValueError("Substitution: neither lm nor vectors given; pass a MaskedLM, WordVectors, or both")
        if not 0 < self.p <= 1 or self.copies < 1:
            raise ValueError(f"Substitution: p={self.p}, copies={self.copies}; accepted: 0 < p <= 1, copies >= 1")

    def __call__(self, rows: Sequence[Row], seed: int, cache: Path | None) -> list[list[Row]]:
        """Copies of each row of texts."""
        never = frozenset(self.never)
        texts = list(dict.fromkeys(text for row in rows for text in row))
        parts = [source.key for source in (self.lm, self.vectors) if source is not None]
        key = fingerprint(parts, sorted(never), texts)

        def look(some: Sequence[str], _: int) -> list[Any]:
            return self._candidates(some, never)

        lists = chunked(texts, look, folder=cache, key=key, size=256, title="candidates")
        candidates = dict(zip(texts, flat(lists), strict=True))

        def copy(some: Sequence[Row], start: int) -> list[list[Row]]:
            return [self._copies(row, candidates, random.Random(f"{seed} {start + i}")) for i, row in enumerate(some)]

        key = fingerprint(key, rows, self.p, self.copies, seed)
        return flat(chunked(rows, copy, folder=cache, key=key, size=4096, title="copies"))

    def _candidates(self, texts: Sequence[str], never: Collection[str]) -> list[list[Any]]:
        """Of each text [[begin, end, candidates], ...], of words that have any."""
        spans = [replaceable(text, never) for text in texts]
        found: list[list[list[str]]] = [[[] for _ in words] for words in spans]
        if self.lm is not None:
            found = self.lm(texts, spans)
        if self.vectors is not None:
            lacking = [(i, j) for i, words in enumerate(found) for j, word in enumerate(words) if not word]
            words = [texts[i][slice(*spans[i][j])] for i, j in lacking]
            for (i, j), nearest in zip(lacking, self.vectors(words), strict=True):
                found[i][j] = nearest
        return [
            [[*span, words] for span, words in zip(spans[i], found[i], strict=True) if words] for i in range(len(texts))
        ]

    def _copies(self, row: Row, candidates: dict[str, list[Any]], rng: random.Random) -> list[Row]:
        made: dict[Row, None] = {}
        for column, text in enumerate(row):
            for _ in range(self.copies):
                changes: dict[Span, str] = {}
                for start, end, words in candidates[text]:
                    if rng.random() < self.p:
                        changes[start, end] = rng.choice(words)
                made[*row[:column], replace(text, changes), *row[column + 1 :]] = None
        made.pop(row, None)
        return list(made)


def load_substitution(
    lm: str | None = None,
    vectors: str | None = None,
    count: int = 15,
    sees_original: bool = True,
    p: float = 0.4,
    copies: int = 20,
) -> Substitution:
    """A `Substitution` from what is saved: the form for a recipe's file.

    Args:
        lm: folder or Hub id of a masked language model.
        vectors: a text file of word vectors, or folder or Hub id of a model whose word embeddings are taken.
        count: K of both.
        sees_original: of `MaskedLM`.
        p, copies: of `Substitution`.

    Raises:
        ValueError, OSError: what these refuse, a model that is not there or has no head over words.
    """
    from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

    model = near = None
    if lm is not None:
        whole, loading = AutoModelForMaskedLM.from_pretrained(lm, output_loading_info=True)
        if fresh := sorted(loading["missing_keys"]):
            raise ValueError(
                f"{lm} is no masked language model: {fresh[0]} is missing; train one, or give vectors alone"
            )
        model = MaskedLM(whole, AutoTokenizer.from_pretrained(lm), count, sees_original)
    if vectors is not None and Path(vectors).is_file():
        near = read_vectors(vectors, count=count)
    elif vectors is not None:
        near = vectors_of(AutoModel.from_pretrained(vectors), AutoTokenizer.from_pretrained(vectors), count)
    return Substitution(model, near, p, copies)
