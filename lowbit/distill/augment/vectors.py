"""Words whose vectors are near: of a GloVe file, or of a model's table of word embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import fingerprint
from .masked_lm import whole_words

ROWS = 256  # words looked up at a time: [256, 100,000] cosines are 100 MB


@dataclass
class WordVectors:
    """The `count` words of the greatest cosine; made by `read_vectors` or `vectors_of`.

    Args:
        words: of letters only, distinct.
        table: float32 [len(words), D], of length 1 each.
        vector: that of any word, float32 [D], None where it has none.
        count: K, published 15.
    """

    words: Sequence[str]
    table: np.ndarray
    vector: Callable[[str], np.ndarray | None]
    count: int = 15

    @property
    def key(self) -> str:
        """What candidates depend on."""
        digest = hashlib.sha256(self.table.tobytes()).hexdigest()
        return fingerprint(digest, list(self.words), self.count, "vectors")

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """Candidates for each word, nearest first, never the word itself; none for one that has no vector."""
        vectors = {word: self.vector(word) for word in dict.fromkeys(words)}
        known = [word for word, vector in vectors.items() if vector is not None]
        found: dict[str, list[str]] = {}
        for start in range(0, len(known), ROWS):
            part = known[start : start + ROWS]
            cosines = np.stack([vectors[word] for word in part]) @ self.table.T  # type: ignore[misc]
            kept = min(self.count + 1, len(self.words))  # one may be the word itself
            nearest = np.argpartition(-cosines, kept - 1, axis=1)[:, :kept]
            order = np.take_along_axis(-cosines, nearest, 1).argsort(1, kind="stable")
            for word, row in zip(part, np.take_along_axis(nearest, order, 1), strict=True):
                others = [self.words[i] for i in row if self.words[i].lower() != word.lower()]
                found[word] = others[: self.count]
        return [found.get(word, []) for word in words]


def read_vectors(path: str | Path, limit: int = 100_000, count: int = 15) -> WordVectors:
    """Word vectors of a text file: a line a word, the word and D numbers between spaces, frequent words first (GloVe).

    Args:
        path: may begin with a line of two numbers, as of word2vec.
        limit: only the first lines, as published.
        count: K of `WordVectors`.

    Raises:
        ValueError: a line of another form, or no line.
    """
    rows: dict[str, list[float]] = {}
    size = 0
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2:
                continue
            if number > limit:
                break
            size = size or len(fields) - 1
            word = " ".join(fields[:-size])  # some words of GloVe hold spaces
            try:
                numbers = [float(value) for value in fields[-size:]]
            except ValueError:
                numbers = []
            if size < 1 or len(numbers) != size or not word:
                raise ValueError(
                    f"{path}, line {number}: accepted is a word and {max(size, 1)} numbers between spaces, as in the "
                    f"first line, got {line[:60]!r}"
                )
            if word.isalpha():
                rows.setdefault(word, numbers)
    if not rows:
        raise ValueError(f"{path} has no word vectors; accepted is a text file of GloVe, a word and its numbers a line")
    words, table = list(rows), _unit(np.array(list(rows.values()), np.float32))
    at = {word: i for i, word in enumerate(words)}

    def vector(word: str) -> np.ndarray | None:
        place = at.get(word, at.get(word.lower()))
        return None if place is None else table[place]

    return WordVectors(words, table, vector, count)


def vectors_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 15) -> WordVectors:
    """Word vectors of a model's input embeddings, for where there is no file of vectors.

    Candidates are the words of one token. A word of several has the mean of theirs.
    """
    table = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    names = whole_words(tokenizer)
    first = {name: i for i, name in reversed([*enumerate(names)]) if name and i < len(table)}
    words = list(first)

    def vector(word: str) -> np.ndarray | None:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        if not ids or tokenizer.unk_token_id in ids:
            return None
        return _unit(table[ids].mean(0, keepdims=True))[0]

    return WordVectors(words, _unit(table[list(first.values())]), vector, count)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; zero rows stay zero."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
