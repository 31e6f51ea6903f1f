"""GLUE as a table: columns, labels, official metrics and lengths; loading from the Hub or from local files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """One task: text columns, label names (one for regression), metrics (the first ranks), longest input."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    max_length: int = 128
    validation: tuple[str, ...] = ("validation",)


_NLI = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews",), 64),
    "sst2": Task(("sentence",), ("negative", "positive"), ("accuracy",), 64),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "stsb": Task(("sentence1", "sentence2"), ("score",), ("spearman", "pearson")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), _NLI, ("accuracy",)),
    "rte": Task(("sentence1", "sentence2"), _NLI, ("accuracy",)),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}
_SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".parquet", ".csv", ".tsv")


def get_task(name: str) -> Task:
    """The task of that name; ValueError listing the known ones otherwise."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def load_task(name: str, data_dir: str | Path | None = None, splits: Sequence[str] | None = None) -> DatasetDict:
    """Splits of a GLUE task, with columns named as on the Hub.

    Args:
        name: a key of `TASKS`.
        data_dir: a folder holding `<name>/train.*` and `<name>/validation.*`, or those files themselves; JSON lines
            (gzipped or not), parquet, csv or tsv. None downloads `nyu-mll/glue`.
        splits: None for training and validation.

    Raises:
        ValueError: an unknown task, or a file without the task's columns.
        FileNotFoundError: a split that is not in `data_dir`.
        ConnectionError: no `data_dir`, and the Hub cannot be reached.
    """
    from datasets import DatasetDict, load_dataset

    task = get_task(name)
    splits = ("train", *task.validation) if splits is None else splits
    if data_dir is None:
        try:
            hub = load_dataset("nyu-mll/glue", name)
        except Exception as error:  # the hub library raises many kinds for "offline"
            raise ConnectionError(
                f"could not load nyu-mll/glue {name} from the Hub ({type(error).__name__}); put train.jsonl and "
                f"validation.jsonl with columns {', '.join(task.columns)}, label into DIR/{name} and pass data_dir=DIR"
            ) from error
        return DatasetDict({split: hub[split] for split in splits})
    folder = Path(data_dir)
    folder = folder / name if (folder / name).is_dir() else folder
    return DatasetDict({split: _load_file(find_split(folder, split), task) for split in splits})


def find_split(folder: Path, split: str, suffixes: tuple[str, ...] = _SUFFIXES) -> Path:
    """The file of a split: the first suffix that exists; FileNotFoundError otherwise."""
    for suffix in suffixes:
        if (path := folder / f"{split}{suffix}").is_file():
            return path
    raise FileNotFoundError(f"{folder} has no {split} file; accepted: {split} with suffix {', '.join(suffixes)}")


def read_split(path: Path, text_columns: tuple[str, ...], other_column: str) -> Dataset:
    """The rows of a local file; ValueError where a column is missing or a row has no text."""
    from datasets import Dataset, load_dataset

    if ".json" in path.name:
        data = load_dataset("json", data_files=str(path), split="train")
    elif path.suffix == ".parquet":
        data = Dataset.from_parquet(str(path))
    else:
        import pandas

        # Text stays text: "NA" is a word and "007" no number. GLUE's tsv files do not quote.
        tsv = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        frame = pandas.read_csv(path, dtype=dict.fromkeys(text_columns, str), keep_default_na=False, **tsv)
        data = Dataset.from_pandas(frame, preserve_index=False)
    needed = (*text_columns, other_column)
    if any(column not in data.column_names for column in needed):
        raise ValueError(f"{path} has columns {', '.join(data.column_names)}; needed: {', '.join(needed)}")
    for column in text_columns:
        if absent := sum(text is None for text in data[column]):
            raise ValueError(f"{path} has {absent} rows without {column}")
    return data


def _load_file(path: Path, task: Task) -> Dataset:
    data = read_split(path, task.columns, "label")
    labels = dict.fromkeys(data["label"])
    if not all(_is_label(label, task) for label in labels):
        wanted = ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels))
        raise ValueError(
            f"{path} has labels {', '.join(map(repr, list(labels)[:10]))}; needed: "
            f"{'numbers' if _is_regression(task) else wanted}"
        )
    return data


def _is_regression(task: Task) -> bool:
    return len(task.labels) == 1


def _is_label(label: object, task: Task) -> bool:
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return _is_regression(task) or value in range(len(task.labels))


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, task: Task) -> DatasetDict:
    """Token ids, mask and `labels` (int, or float for regression); truncated to the task's length, not padded."""
    regression = _is_regression(task)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(rows[column] for column in task.columns), truncation=True, max_length=task.max_length)
        encoded["labels"] = [float(y) if regression else int(y) for y in rows["label"]]
        return dict(encoded)

    columns = next(iter(data.values())).column_names
    return data.map(encode, batched=True, remove_columns=columns, desc="tokenizing")


def compute_metrics(task: Task) -> Callable[[Any], dict[str, float]]:
    """A `compute_metrics` for `Trainer`: logits and labels -> the task's metrics, and their mean where there are two.

    Scores are fractions; NaN where a logit is NaN. Constant predictions correlate 0.
    """

    import numpy as np

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = np.asarray(prediction[0]), np.asarray(prediction[1])
        predicted = logits.squeeze(-1) if _is_regression(task) else logits.argmax(-1)
        valid = np.isfinite(logits).all()
        scores = {name: float(_METRICS[name](labels, predicted)) if valid else float("nan") for name in task.metrics}
        return scores if len(scores) == 1 else {**scores, "combined_score": float(np.mean(list(scores.values())))}

    return compute


def _accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predicted)


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predicted, zero_division=0.0)


def _matthews(labels: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predicted)


def _pearson(labels: np.ndarray, predicted: np.ndarray) -> float:
    import numpy as np
    from scipy.stats import pearsonr

    return 0.0 if np.ptp(predicted) == 0 or np.ptp(labels) == 0 else pearsonr(labels, predicted).statistic


def _spearman(labels: np.ndarray, predicted: np.ndarray) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(labels), rankdata(predicted))


_METRICS = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}
