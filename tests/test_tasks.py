"""GLUE tasks load from local files of every kind, and say what is wrong with a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lowbit.tasks import TASKS, compute_metrics, get_task, load_task

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
        elif suffix == ".parquet":
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(str(path))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl", ".tsv", ".parquet"])
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
    assert compute_metrics(task)((logits, labels)) == dict.fromkeys(task.metrics, pytest.approx(1.0))
