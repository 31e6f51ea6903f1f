"""Rankings: measures by plain loops and by scikit-learn, passages of documents, ties, missing queries, bad files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, BertTokenizerFast, DataCollatorWithPadding, Trainer

from helpers import tiny_config, training_arguments
from lowbit.data.ranking import evaluate, rank, ranking_metrics, read_pairs, read_qrels, relevance

TOPICS = ["rain", "trains", "bread", "stars", "chess", "whales"]
PLACES = ["north", "south", "coast", "valley"]


def made_up() -> tuple[list[dict], str]:
    """Documents of two passages; those of the north are relevant, which only their second passage says."""
    rows, qrels = [], []
    for q, topic in enumerate(TOPICS):
        for other in TOPICS:
            for where in PLACES:
                document = f"{other}-{where}"
                texts = [f"a page on {other}", f"here {other} of the {where}"]
                rows += [{"query_id": q, "doc_id": document, "query": f"about {topic}", "passage": t} for t in texts]
                value = (where == "north") * (1 + (other == topic))
                qrels += [f"{q} 0 {document} {value}"] if value else []
    return rows, "\n".join(qrels)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rows, qrels = made_up()
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "qrels.txt").write_text(qrels)
    return tmp_path / "pairs.jsonl", tmp_path / "qrels.txt"


def slow(qrels: dict, run: dict, cutoff: int = 10) -> dict[str, float]:
    """By the definitions, linear gain, over all judged queries."""
    mrr, ndcg = [], []
    for query, judged in qrels.items():
        order = sorted(run.get(query, {}), key=lambda d: -run[query][d])[:cutoff]
        ranks = [i for i, document in enumerate(order, 1) if judged.get(document, 0) > 0]
        mrr.append(1 / ranks[0] if ranks else 0.0)
        dcg = sum(judged.get(document, 0) / math.log2(i + 1) for i, document in enumerate(order, 1))
        best = sorted(judged.values(), reverse=True)[:cutoff]
        ideal = sum(value / math.log2(i + 1) for i, value in enumerate(best, 1))
        ndcg.append(dcg / ideal if ideal else 0.0)
    return {f"mrr@{cutoff}": float(np.mean(mrr)), f"ndcg@{cutoff}": float(np.mean(ndcg))}


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_those_of_the_definition_and_of_scikit_learn(seed: int) -> None:
    pytest.importorskip("ir_measures")
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(seed)
    qrels = {f"q{q}": {f"d{d}": int(rng.choice([0, 0, 0, 1, 2])) for d in range(25)} for q in range(9)}
    qrels["q0"] = dict.fromkeys(qrels["q0"], 0)  # nothing relevant
    ids = [(query, document) for query in [*list(qrels)[:-2], "unjudged"] for document in qrels["q1"]]
    scores = rng.normal(size=len(ids))
    run = rank(scores, *zip(*ids, strict=True))
    found = evaluate(qrels, run)
    assert found == pytest.approx(slow(qrels, run), abs=1e-6)
    assert evaluate(qrels, run, 3) == pytest.approx(slow(qrels, run, 3), abs=1e-6)
    by_query = {query: scores[[i for i, (q, _) in enumerate(ids) if q == query]] for query in run}
    values = [ndcg_score([[*qrels[q].values()]], [by_query[q]], k=10) if q in by_query else 0.0 for q in qrels]
    assert found["ndcg@10"] == pytest.approx(np.mean(values), abs=1e-6)
    assert len(values) == 9 and values[-2:] == [0, 0]  # missing queries count


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("max", ["b", "c", "a"]), ("first", ["a", "c", "b"]), ("sum", ["b", "a", "c"])]
)
def test_documents_are_ranked_by_their_passages(aggregate: str, expected: list[str]) -> None:
    documents, scores = ["a", "a", "b", "b", "b", "c", "c"], [0.5, 0.1, 0.1, 0.9, 0.1, 0.55, -0.1]
    if aggregate == "first":
        scores[0] = 0.6
    run = rank(scores, ["q"] * 7, documents, aggregate)
    assert list(run["q"]) == expected and list(run["q"].values()) == [3, 2, 1]


def test_near_scores_are_no_ties_and_ties_go_to_the_greater_id() -> None:
    pytest.importorskip("ir_measures")
    near = rank([1 - 1e-12, 1 - 2e-12, 1.0], ["q"] * 3, ["x", "y", "a"])  # equal in float32
    assert list(near["q"]) == ["a", "x", "y"] and evaluate({"q": {"x": 1}}, near)["mrr@10"] == 0.5
    tied = rank([0.0] * 3, ["q"] * 3, ["b", "c", "a"])
    assert list(tied["q"]) == ["c", "b", "a"] and evaluate({"q": {"b": 1}}, tied)["mrr@10"] == 0.5
    far = rank(np.arange(12, 0, -1.0), ["q"] * 12, [f"d{i}" for i in range(12)])
    assert evaluate({"q": {"d10": 1}}, far) == {"mrr@10": 0, "ndcg@10": 0}


def test_scores_are_probabilities_also_of_saturated_logits() -> None:
    logits = np.array([[0.0, 0.0], [1, 3], [-200, 200], [200, -200], [5, 4.5]])
    expected = [0.5, 1 / (1 + math.exp(-2)), 1.0, math.exp(-400), 1 / (1 + math.exp(0.5))]
    np.testing.assert_allclose(relevance(logits), expected, rtol=1e-12)
    assert relevance(logits[:, :1]).tolist() == logits[:, 0].tolist()
    with pytest.raises(ValueError, match="logits of shape"):
        relevance(np.zeros((2, 3)))


def test_files_are_read_and_labelled(files: tuple[Path, Path]) -> None:
    qrels = read_qrels(files[1])
    assert len(qrels) == 6 and sorted(qrels["0"].values()) == [1, 1, 1, 1, 1, 2]
    pairs = read_pairs(files[0], qrels)
    assert pairs.column_names == ["query_id", "doc_id", "query", "passage", "label"] and len(pairs) == 6 * 24 * 2
    assert pairs[0] == {"query_id": "0", "doc_id": "rain-north", "query": "about rain", "passage": "a page on rain",
                        "label": 1}  # fmt: skip
    assert sum(pairs["label"]) == 6 * 6 * 2 and "label" not in read_pairs(files[0]).column_names


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("", "no judgements"),
        ("q 0 d", "line 1: accepted is"),
        ("q 0 d 1\nq 0 d x", "line 2"),
        ("q 0 d 1\nq 0 d 1", "judged twice"),
    ],
)
def test_other_judgements_are_refused(qrels: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text(qrels)
    with pytest.raises(ValueError, match=message):
        read_qrels(tmp_path / "qrels")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"query_id": 1, "doc_id": 2}], "needed besides: passage, query"),
        ([{"query_id": 1, "doc_id": 2, "query": "a", "passage": None}], "rows without passage"),
    ],
)
def test_other_pairs_are_refused(rows: list[dict], message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        read_pairs(path)
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "none.jsonl")


def test_wrong_rankings_are_refused() -> None:
    with pytest.raises(ValueError, match="is nan"):
        rank([float("nan")], ["q"], ["d"])
    with pytest.raises(ValueError, match="accepted: max, first, sum"):
        rank([1.0], ["q"], ["d"], "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        rank([1.0, 2.0], ["q"], ["d"])
    pytest.importorskip("ir_measures")
    with pytest.raises(ValueError, match=r"no query of the ranking \(q\) is judged \(7\)"):
        evaluate({"7": {"d": 1}}, {"q": {"d": 1.0}})


def test_without_ir_measures_there_is_a_line_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(ImportError, match=r"pip install 'lowbit\[train\]'"):
        evaluate({"q": {"d": 1}}, {"q": {"d": 1.0}})


def test_a_classifier_learns_to_rank(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ir_measures")
    qrels = read_qrels(files[1])
    pairs = read_pairs(files[0], qrels)
    words = sorted({word for row in pairs for word in f"{row['query']} {row['passage']}".split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path)
    data = pairs.map(lambda row: tokenizer(row["query"], row["passage"]), remove_columns=pairs.column_names)
    data = data.add_column("labels", pairs["label"][:])
    torch.manual_seed(0)
    trainer = Trainer(
        model=BertForSequenceClassification(tiny_config(vocab_size=len(tokenizer))),
        args=training_arguments(tmp_path, max_steps=120, learning_rate=1e-3, per_device_train_batch_size=32,
                                train_sampling_strategy="random"),
        train_dataset=data, eval_dataset=data, data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=ranking_metrics(pairs, qrels, "max"),
    )  # fmt: skip
    trainer.train()
    best = trainer.evaluate()
    trainer.compute_metrics = ranking_metrics(pairs, qrels, "first")
    first = trainer.evaluate()
    assert best["eval_mrr@10"] == 1 and best["eval_ndcg@10"] > 0.7
    assert first["eval_ndcg@10"] < best["eval_ndcg@10"] - 0.2
