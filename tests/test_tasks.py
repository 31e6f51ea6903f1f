"""GLUE tasks load from local files of every kind, and say what is wrong with a file."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import socket
from pathlib import Path

import pytest

from lowbit.data.tasks import TASKS, compute_metrics, get_task, load_task, tokenize

ROWS = [{"sentence": f"\"quoted {i}'", "label": i % 2, "idx": i} for i in range(5)]


def write(folder: Path, suffix: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        path = folder / f"{split}{suffix}"
        if suffix == ".jsonl.gz":
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        elif suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif suffix == ".tsv":
            path.write_text("\n".join(["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]))
        elif suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        elif suffix == ".parquet":
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(str(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("nested", [True, False])
def test_local_files_load(suffix: str, nested: bool, tmp_path: Path) -> None:
    write(tmp_path / "sst2" if nested else tmp_path, suffix, ROWS)
    data = load_task("sst2", tmp_path)
    assert data["train"]["sentence"][:] == [row["sentence"] for row in ROWS]
    assert data["validation"]["label"][:] == [row["label"] for row in ROWS]


def test_missing_file_column_and_task_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no train file"):
        load_task("sst2", tmp_path)
    write(tmp_path, ".jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(ValueError, match="columns text, label; needed: sentence, label"):
        load_task("sst2", tmp_path)
    with pytest.raises(ValueError, match="known: cola"):
        load_task("sst3", tmp_path)


@pytest.mark.parametrize("labels", [[0, 2], [0, -1], ["positive", "negative"], [0.5, 1.0]])
def test_labels_of_another_task_are_a_clear_error(labels: list, tmp_path: Path) -> None:
    write(tmp_path, ".jsonl", [{"sentence": "a", "label": label} for label in labels])
    with pytest.raises(ValueError, match=f"has labels {labels[0]!r}, .* needed: 0 \\(negative\\), 1 \\(positive\\)"):
        load_task("sst2", tmp_path)


def test_rows_without_text_are_a_clear_error(tmp_path: Path) -> None:
    write(tmp_path, ".jsonl", [{"sentence": "a", "label": 1}, {"label": 0}])
    with pytest.raises(ValueError, match="1 rows without sentence"):
        load_task("sst2", tmp_path)


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
@pytest.mark.parametrize("sentences", [["NA", "null", ""], ["1984", "007", "2.50"]])
def test_text_that_looks_like_something_else_stays_text(suffix: str, sentences: list[str], tmp_path: Path) -> None:
    write(tmp_path, suffix, [{"sentence": text, "label": i % 2} for i, text in enumerate(sentences)])
    assert load_task("sst2", tmp_path)["train"]["sentence"][:] == sentences


def test_mnli_has_two_validation_files_and_stsb_float_labels(tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": i} for i in range(3)]
    write(tmp_path / "mnli", ".jsonl", rows)
    (tmp_path / "mnli/validation.jsonl").rename(tmp_path / "mnli/validation_matched.jsonl")
    with pytest.raises(FileNotFoundError, match="no validation_mismatched file"):
        load_task("mnli", tmp_path)
    shutil.copy(tmp_path / "mnli/train.jsonl", tmp_path / "mnli/validation_mismatched.jsonl")
    assert set(load_task("mnli", tmp_path)) == {"train", "validation_matched", "validation_mismatched"}
    write(tmp_path / "stsb", ".jsonl", [{"sentence1": "a", "sentence2": "b", "label": y} for y in (0.0, 4.75)])
    assert load_task("stsb", tmp_path)["train"]["label"][:] == [0.0, 4.75]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".tsv", ".parquet"])
def test_local_files_load_without_any_network(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)  # also where nobody asked to be offline
    write(tmp_path, suffix, ROWS)
    load_task("sst2", tmp_path)
    assert asked == []


def test_tokenize_truncates_pairs_and_keeps_labels() -> None:
    from datasets import Dataset, DatasetDict
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast(
        vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])}
    )
    rows = [{"sentence1": "a " * n, "sentence2": "a", "label": y} for n, y in [(3, 1.5), (500, 0.0)]]
    encoded = tokenize(DatasetDict({"train": Dataset.from_list(rows)}), tokenizer, get_task("stsb"))["train"]
    assert encoded["input_ids"][0] == [2, 5, 5, 5, 3, 5, 3]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 0, 1, 1]
    assert len(encoded["input_ids"][1]) == 128
    assert encoded["labels"][:] == [1.5, 0.0]
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_offline_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConnectionError, match="data_dir=DIR"):
        load_task("sst2")


@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_perfect_for_perfect_predictions(name: str) -> None:
    import numpy as np

    task = get_task(name)
    labels = np.arange(12) % max(len(task.labels), 3) if len(task.labels) != 2 else np.arange(12) % 2
    logits = labels[:, None].astype(float) if len(task.labels) == 1 else np.eye(len(task.labels))[labels]
    names = (*task.metrics, "combined_score") if len(task.metrics) > 1 else task.metrics
    assert compute_metrics(task)((logits, labels)) == dict.fromkeys(names, pytest.approx(1.0))


def test_logits_with_nan_have_no_score() -> None:
    import numpy as np

    logits = np.array([[0.0, 1.0], [np.nan, np.nan]])
    assert np.isnan(compute_metrics(get_task("sst2"))((logits, np.array([1, 0])))["accuracy"])


def test_constant_predictions_correlate_zero_not_nan() -> None:
    import numpy as np

    constant, labels = np.ones((4, 1)), np.array([0.0, 1.0, 2.5, 5.0])
    assert set(compute_metrics(get_task("stsb"))((constant, labels)).values()) == {0.0}
    assert compute_metrics(get_task("cola"))((np.eye(2)[[1, 1, 1]], np.array([0, 1, 0]))) == {"matthews": 0.0}


def test_metrics_equal_their_counts() -> None:
    import numpy as np

    logits, labels = np.eye(2)[[1, 1, 0, 0, 1]], np.array([1, 0, 0, 1, 1])
    scores = compute_metrics(get_task("mrpc"))((logits, labels))
    assert scores == pytest.approx({"f1": 2 / 3, "accuracy": 0.6, "combined_score": (2 / 3 + 0.6) / 2})
