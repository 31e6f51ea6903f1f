"""Sentences of a corpus that are near to each example: candidates of MiniMax-kNN (2105.13608)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.containment import overlapping, words
from .cache import chunked, fingerprint, model_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

CANDIDATES, ANGLES = "candidates", "angles"
ROWS = 512  # queries at a time: with an index of 100,000 texts their cosines are 200 MB


def embed(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 128,
    batch_size: int = 64,
    cache: str | Path | None = None,
) -> np.ndarray:
    """Sentence embeddings: the mean of an encoder's last states over tokens, of length 1; float32 [len(texts), D].

    Args:
        texts: any number.
        model: an encoder, or a model with a head, which is not used; put in eval mode.
        tokenizer: its own.
        max_length: longer texts are cut, tokens.
        batch_size: texts a forward, of like length.
        cache: a folder; what is interrupted goes on from there.
    """
    encoder = model.base_model.eval()

    @torch.no_grad()
    def encode(some: Sequence[str], _: int) -> np.ndarray:
        means = np.empty((len(some), encoder.config.hidden_size), np.float32)
        order = sorted(range(len(some)), key=lambda i: len(some[i]))
        for start in range(0, len(some), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [some[i] for i in rows], truncation=True, max_length=max_length, padding=True, return_tensors="pt"
            ).to(model.device)
            mask = batch["attention_mask"].unsqueeze(-1)
            states = encoder(**batch, return_dict=True).last_hidden_state.float()
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            means[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return means

    key = fingerprint("embed", model_fingerprint(encoder), tokenizer.get_vocab(), max_length, list(texts))
    parts = chunked(
        texts, encode, folder=None if cache is None else Path(cache), key=key, size=4096, title="embedding"
    )  # fmt: skip
    return np.concatenate(parts) if parts else np.empty((0, encoder.config.hidden_size), np.float32)


def add_neighbours(
    data: Dataset,
    column: str,
    corpus: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 8,
    max_angle: float = 0.22,
    exclude: Sequence[str] = (),
    max_length: int = 128,
    cache: str | Path | None = None,
) -> Dataset:
    """The data with two columns more: `candidates`, the nearest texts of a corpus, and their `angles`, ascending.

    No candidate is the example's own text, a part of it, or holds it (word for word, without regard to case and
    spaces), and no two of a row have the same words: phrases of SST-2 would else find phrases of their own sentence.

    Args:
        data: any; pairs of texts have no neighbours.
        column: the text.
        corpus: unlabelled texts.
        model, tokenizer: what `embed` takes; the better it knows meanings, the better the neighbours.
        count: k, published 8; a row may have fewer, or none.
        max_angle: candidates are no further, arccos(cosine) / pi; published 0.22.
        exclude: texts that no candidate may share words in a row with as a whole: those of validation, say.
        max_length: of embedded texts, tokens.
        cache: a folder; what is interrupted goes on from there.

    Raises:
        ValueError: a column that is not there, or no text in the corpus that may be a candidate.
    """
    if column not in data.column_names:
        raise ValueError(f"the data has columns {', '.join(data.column_names)}, and no {column}")
    texts, index = data[column][:], _index(corpus, exclude)
    options: dict[str, Any] = {"max_length": max_length, "cache": cache}
    table, queries = (embed(some, model, tokenizer, **options) for some in (index, texts))
    found = _nearest(queries, table, texts, index, count, max_angle)
    data = data.add_column(CANDIDATES, [[index[i] for i, _ in row] for row in found])
    return data.add_column(ANGLES, [[angle for _, angle in row] for row in found])


def _index(corpus: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Texts with words, each once, that share no whole text with those excluded."""
    distinct = {tuple(found): text for text in reversed(corpus) if (found := words(text))}
    texts = list(distinct.values())[::-1]
    kept = [text for text, shared in zip(texts, overlapping(texts, list(exclude)), strict=True) if not shared]
    if not kept:
        raise ValueError(
            f"the index of neighbours is empty: of {len(corpus)} texts of the corpus {len(texts)} have words and "
            f"differ, and all of these overlap with what is excluded; pass a corpus of other texts"
        )
    return kept


def _nearest(
    queries: np.ndarray, table: np.ndarray, texts: Sequence[str], index: Sequence[str], count: int, max_angle: float
) -> list[list[tuple[int, float]]]:
    """Of each query the places in the index and angles of those that may be candidates, nearest first."""
    spaced = [f" {' '.join(words(text))} " for text in index]
    found: list[list[tuple[int, float]]] = [[] for _ in texts]
    waiting, asked = np.arange(len(texts)), min(count + 8, len(index))
    while len(waiting):
        short = []
        for start in range(0, len(waiting), ROWS):
            rows = waiting[start : start + ROWS]
            nearest, cosines = _products(queries[rows], table, asked)
            angles = np.arccos(np.clip(cosines, -1, 1)) / np.pi
            for row, places, far in zip(rows, nearest.tolist(), angles.tolist(), strict=True):
                own = f" {' '.join(words(texts[row]))} "
                near = [(place, angle) for place, angle in zip(places, far, strict=True) if angle <= max_angle]
                found[row] = [(i, angle) for i, angle in near if spaced[i] not in own and own not in spaced[i]][:count]
                if len(found[row]) < count and len(near) == asked < len(index):
                    short.append(row)  # all that were asked for are near, some were parts: others may be left
        waiting, asked = np.array(short, int), min(2 * asked, len(index))
    return found


def _products(queries: np.ndarray, table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in the table of the greatest cosines of each query, int64 [Q, count], and these, float64, descending.

    Plain products, exact: scikit-learn's brute force takes longer (it computes in float64, or sorts more), its trees
    are of no use in hundreds of dimensions, and an approximate index pays off from about a million texts on.
    """
    cosines = queries @ table.T
    nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
    exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), table[nearest])  # float32 is coarse near angle 0
    order = np.argsort(-exact, axis=1, kind="stable")
    return np.take_along_axis(nearest, order, 1), np.take_along_axis(exact, order, 1)
