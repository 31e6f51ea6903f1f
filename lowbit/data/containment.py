"""Which texts stand inside which: word for word, in one piece. Exact, and a matter of seconds for millions of words.

A suffix array of all words by prefix doubling (Karp, Miller and Rosenberg, 1972): ranks of all pieces of 1, 2, 4, ...
words, each made of two ranks of the step before. A text is looked for by two copies of it, one followed by a mark that
sorts before all words, one by a mark after all: what sorts between the two begins with the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

_WORD = re.compile(r"\w+|[^\w\s]")
_BEFORE, _END, _AFTER = -3, -2, -1  # marks: sorted before all words, after a text, sorted after all words


def words(text: str) -> list[str]:
    """Words and single punctuation marks, without regard to case and spaces."""
    return _WORD.findall(text.lower())


def occurrences(texts: Sequence[str], others: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where texts stand in others, as contiguous words (`words`); texts without a word stand nowhere.

    Args:
        texts: are looked for.
        others: are looked into.

    Returns:
        How many places of `others` hold each of `texts`, int64 [len(texts)] (an equal one is one place), and
        whether each of `others` holds any of them, bool [len(others)].
    """
    if not texts or not others:
        return np.zeros(len(texts), np.int64), np.zeros(len(others), bool)
    vocabulary: dict[str, int] = {}
    others_at, places = _numbered(others, _END, vocabulary)
    low, before = _numbered(texts, _BEFORE, vocabulary)
    high, after = _numbered(texts, _AFTER, vocabulary)
    searched = len(places)
    ids = np.concatenate([places, before, after])
    rank = _ranks(ids, longest=1 + int(np.diff(np.flatnonzero(ids < 0), prepend=-1).max()))

    order = np.argsort(rank[:searched], kind="stable")
    ranks = rank[:searched][order]
    first = np.searchsorted(ranks, rank[searched + low])
    last = np.searchsorted(ranks, rank[searched + len(before) + high])
    last = np.where(before[low] == _BEFORE, first, last)  # without a word
    begun = np.bincount(first, minlength=searched + 1) - np.bincount(last, minlength=searched + 1)
    holds = np.zeros(len(others), bool)
    holds[np.searchsorted(others_at, order[np.cumsum(begun[:-1]) > 0], side="right") - 1] = True
    return last - first, holds


def _numbered(texts: Sequence[str], mark: int, vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where each text begins, int64 [len(texts)], and the numbers of all words, a mark after each text's, int64."""
    starts: list[int] = []
    ids: list[int] = []
    for text in texts:
        starts.append(len(ids))
        ids += [vocabulary.setdefault(word, len(vocabulary)) for word in words(text)]
        ids.append(mark)
    return np.array(starts), np.array(ids)


def _ranks(ids: np.ndarray, longest: int) -> np.ndarray:
    """Order of the pieces of at least `longest` ids that begin at each place, int64; equal pieces rank alike."""
    sortable = np.where(ids == _AFTER, ids.max() + 1, ids)
    rank, length = np.unique(sortable, return_inverse=True)[1], 1
    while length < longest:
        following = np.zeros_like(rank)
        following[:-length] = rank[length:] + 1
        rank = np.unique(rank * (len(rank) + 1) + following, return_inverse=True)[1]
        length *= 2
    return rank


def overlapping(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Whether each of `texts` stands inside one of `others`, equals it, or holds one, bool [len(texts)]."""
    return (occurrences(texts, others)[0] > 0) | occurrences(others, texts)[1]


def whole(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether each row's texts have words, and stand inside no longer text of another row, bool [len(rows)].

    Args:
        rows: the texts of each row, one or more. A hypothesis that stands in its own premise is none the less whole.
    """
    distinct = _distinct(text for row in rows for text in row)
    counts, _ = occurrences(list(distinct.values()), list(distinct.values()))
    number = dict(zip(distinct, counts.tolist(), strict=True))
    return np.array([all(_is_whole(text, row, number) for text in row) for row in rows], bool)


def _is_whole(text: str, row: Sequence[str], number: dict[tuple[str, ...], int]) -> bool:
    own = tuple(words(text))
    if not own or number[own] == 1:  # 1: the place that is the text itself
        return bool(own)
    return number[own] == sum(_count(own, other) for other in {tuple(words(other)) for other in row})


def _count(piece: tuple[str, ...], text: tuple[str, ...]) -> int:
    return sum(text[at : at + len(piece)] == piece for at in range(len(text) - len(piece) + 1))


def _distinct(texts: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Words -> the last text that has these words."""
    return {tuple(words(text)): text for text in texts}
