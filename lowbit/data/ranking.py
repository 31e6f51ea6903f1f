"""Re-ranking: (query, passage) pairs for a classifier, documents ranked by their passages, MRR@10 and nDCG@10.

Measures are ir-measures' by trec_eval: nDCG has DCG = sum rel / log2(rank + 1), not (2^rel - 1) / log2(rank + 1), which
MS MARCO's and some libraries' code have; with relevances of 0 and 1 they are the same. Every query of the judgements
counts; one that has no document in the ranking, or none that is relevant, counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

Qrels = Mapping[str, Mapping[str, int]]  # query -> document -> relevance
Run = dict[str, dict[str, float]]  # query -> document -> score, higher first
Aggregate = Literal["max", "first", "sum"]
COLUMNS = ("query_id", "doc_id", "query", "passage")
_COMBINE: dict[str, Callable[[list[float]], float]] = {"max": max, "first": lambda scores: scores[0], "sum": math.fsum}
_INSTALL = "ir-measures not installed; ranking is measured by it: pip install 'lowbit[train]'"


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance judgements in TREC's form, a line each: query, anything, document, relevance (0 or less: not relevant).

    Raises:
        ValueError: a line of another form, or none; a document judged twice for a query.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            query, _, document, relevance = fields
            value = int(relevance)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: accepted is query, iteration, document, relevance (a whole number), "
                f"got {line[:60]!r}"
            ) from None
        if document in qrels.setdefault(query, {}):
            raise ValueError(f"{path}, line {number}: document {document} is judged twice for query {query}")
        qrels[query][document] = value
    if not qrels:
        raise ValueError(f"{path} has no judgements")
    return qrels


def read_pairs(path: str | Path, qrels: Qrels | None = None) -> Dataset:
    """Passages to rank: JSON lines with `query_id`, `doc_id`, `query`, `passage`; a document's passages in their order.

    Args:
        path: .jsonl or .jsonl.gz.
        qrels: adds a column `label`: 1 where the document is relevant to the query, else 0, to train on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no row, or one without these columns.
    """
    from datasets import Dataset, load_dataset

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path} has no rows; needed are the columns {', '.join(COLUMNS)}")
    rows = load_dataset("json", data_files=str(path), split="train")
    if lacking := set(COLUMNS) - {*rows.column_names}:
        raise ValueError(
            f"{path} has columns {', '.join(rows.column_names)}; needed besides: {', '.join(sorted(lacking))}"
        )
    columns = {name: rows[name][:] for name in COLUMNS}
    if empty := [name for name in COLUMNS if any(value is None for value in columns[name])]:
        raise ValueError(f"{path} has rows without {', '.join(empty)}")
    columns = {name: [*map(str, values)] for name, values in columns.items()}  # ids may be numbers
    if qrels is not None:
        pairs = zip(columns["query_id"], columns["doc_id"], strict=True)
        columns["label"] = [int(qrels.get(query, {}).get(document, 0) > 0) for query, document in pairs]
    return Dataset.from_dict(columns)


def relevance(logits: Any) -> np.ndarray:
    """Scores of pairs, float64 [N]: the probability of label 1 of logits [N, 2], or logits [N, 1] as they are."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or logits.shape[1] not in (1, 2):
        raise ValueError(f"logits of shape {logits.shape}; accepted: [pairs, 2] of a classifier, or [pairs, 1]")
    if logits.shape[1] == 1:
        return logits[:, 0]
    return np.exp(-np.logaddexp(0, logits[:, 0] - logits[:, 1]))


def rank(
    scores: Sequence[float] | np.ndarray,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    aggregate: Aggregate = "max",
) -> Run:
    """Documents of each query, ranked by the scores of their passages.

    Args:
        scores: of each passage, [N].
        query_ids, doc_ids: whose passage it is; a document's passages in their order.
        aggregate: a document's score is that of its best passage ("max", published), of its "first", or their "sum".

    Returns:
        For each query its documents, best first, with the number of documents that are not before it as score: whole
        numbers, since trec_eval reads scores as float32, where near ones are equal. Equal scores: the greater document
        id first, as in trec_eval.

    Raises:
        ValueError: other lengths, a score that is no number, another way to aggregate.
    """
    if aggregate not in _COMBINE:
        raise ValueError(f"aggregate={aggregate!r}; accepted: {', '.join(_COMBINE)}")
    passages: dict[str, dict[str, list[float]]] = {}
    for score, query, document in zip(scores, query_ids, doc_ids, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the score of document {document} for query {query} is {score}")
        passages.setdefault(query, {}).setdefault(document, []).append(float(score))
    run: Run = {}
    for query, documents in passages.items():
        total = {document: _COMBINE[aggregate](own) for document, own in documents.items()}
        order = sorted(total, key=lambda document: (total[document], document), reverse=True)
        run[query] = {document: float(len(order) - place) for place, document in enumerate(order)}
    return run


def evaluate(qrels: Qrels, run: Run, cutoff: int = 10) -> dict[str, float]:
    """`mrr@10` and `ndcg@10` of a ranking, means over all queries of the judgements (see the module).

    Raises:
        ImportError: ir-measures is not installed.
        ValueError: no query of the ranking is judged.
    """
    try:
        import ir_measures
    except ImportError:
        raise ImportError(_INSTALL) from None
    if not run.keys() & qrels.keys():
        raise ValueError(
            f"no query of the ranking ({', '.join(list(run)[:3])}) is judged ({', '.join(list(qrels)[:3])})"
        )
    measures = {f"mrr@{cutoff}": ir_measures.RR @ cutoff, f"ndcg@{cutoff}": ir_measures.nDCG @ cutoff}
    judged = {query: run[query] for query in qrels if query in run}
    found = ir_measures.calc_aggregate(list(measures.values()), qrels, judged)
    return {name: float(found[measure]) for name, measure in measures.items()}


def ranking_metrics(pairs: Dataset, qrels: Qrels, aggregate: Aggregate = "max") -> Callable[[Any], dict[str, float]]:
    """A `compute_metrics` for `Trainer`, which evaluates a classifier on `pairs` in their order."""
    queries, documents = pairs["query_id"][:], pairs["doc_id"][:]

    def compute(prediction: Any) -> dict[str, float]:
        return evaluate(qrels, rank(relevance(prediction[0]), queries, documents, aggregate))

    return compute
