"""What a run trains and is evaluated on: a GLUE task, or a CSV or JSON lines file of the user's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.containment import overlapping, whole
from ..data.tasks import Task, get_task, load_task, read_split
from . import RecipeError, log, require

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def offline_if_local(model: str, *data: str | None) -> None:
    """No Hub traffic where the model and some data are local; works until huggingface_hub is first imported."""
    if Path(model).is_dir() and any(data):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load_glue(options: Any) -> tuple[Task, DatasetDict]:
    """The task of `GlueOptions` and its data: those held out, then as many training examples of the rest as asked for.

    Raises:
        RecipeError: more held out than the training set has whole examples.
    """
    require("datasets")
    task = get_task(options.task)
    data = load_task(options.task, options.data_dir)
    if options.heldout:  # first, so that the same are held out of any number of training examples
        data["train"], data["validation_heldout"] = held_out(data["train"], task, options.heldout)
        task = dataclasses.replace(task, validation=(*task.validation, "validation_heldout"))
    if options.max_train_samples:
        data["train"] = data["train"].select(range(min(options.max_train_samples, len(data["train"]))))
    return task, data


def held_out(train: Dataset, task: Task, count: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Whole examples for evaluation, and what is left for training without any of their text.

    Whole: no text of the example stands inside a longer one of another example. Of SST-2, whose examples are phrases of
    sentences, these are the sentences. An example is left out of training if any of its texts equals, holds or stands
    inside any text that is held out, word for word without regard to case and spaces. In tasks of pairs one text is
    enough: MNLI has each premise in three pairs and QQP a question in many, and a model knows it from any of them.

    Args:
        train: all training examples.
        task: its columns are compared.
        count: how many are held out.
        seed: which; not the seed of training, so that runs of several seeds are evaluated on the same examples.

    Returns:
        Training examples and those held out, both in their order.

    Raises:
        RecipeError: fewer whole examples than `count`, or no training example is left.
    """
    rows = list(zip(*(train[column][:] for column in task.columns), strict=True))
    candidates = np.flatnonzero(whole(rows))
    if len(candidates) < count:
        raise RecipeError(
            f"heldout={count}: {len(candidates)} of {len(rows)} training examples stand inside no other; "
            f"accepted: at most {len(candidates)}"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(candidates, count, replace=False))
    texts = [text for row in chosen for text in rows[row]]
    common = np.logical_or.reduce([overlapping(column, texts) for column in zip(*rows, strict=True)])
    common[chosen] = True  # texts without a word overlap with nothing
    left = np.flatnonzero(~common)
    log.info(
        "%d examples held out, %d dropped from training that share a text with them or a part of one, %d left",
        *(count, len(rows) - len(left) - count, len(left)),
    )
    if not len(left):
        raise RecipeError(f"heldout={count} leaves no training example that shares no text with them; hold out fewer")
    return train.select(left), train.select(chosen)


def labels_of(model: str, config: Any) -> tuple[str, ...]:
    """Names of a classifier's labels by index, in whatever order config.json lists them.

    Raises:
        RecipeError: `id2label` does not name each of 0 to N - 1.
    """
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    if missing := sorted(set(range(len(names))) - names.keys()):
        given = ", ".join(map(str, sorted(names)))
        raise RecipeError(
            f"{model} has {len(names)} labels; id2label in its config.json names {given} and not {missing[0]}, "
            f"accepted: a name for each of 0 to {len(names) - 1}"
        )
    return tuple(names[index] for index in range(len(names)))


def check_order(model: str, own: Sequence[str], labels: Sequence[str]) -> None:
    """RecipeError where a model has the labels of a task (in any spelling) in another order."""
    found, wanted = ([label.lower() for label in names] for names in (own, labels))
    if found != wanted and sorted(found) == sorted(wanted):
        raise RecipeError(f"{model} has the labels {', '.join(own)}, the task {', '.join(labels)}: another order")


def load_files(
    files: dict[str, str],
    text_columns: Sequence[str] = (),
    label_column: str = "label",
    names: Sequence[str] | None = None,
    max_length: int = 128,
    max_train_samples: int = 0,
) -> tuple[Task, DatasetDict]:
    """A classification task of the user's: texts, and labels that are text or whole numbers.

    Args:
        files: split ("train", "validation") -> CSV, TSV, JSON lines or parquet file.
        text_columns: one, or two for pairs of texts; empty: "text".
        label_column: of every file.
        names: of the labels, as the model has them; None: those of the training file, sorted.
        max_length: longer texts are truncated, tokens.
        max_train_samples: only the first of the training file, 0 for all.

    Returns:
        The task and its data; its column `label` holds indices of `task.labels`.

    Raises:
        FileNotFoundError: a file that does not exist.
        RecipeError: another kind of file, no rows, a column that is not there, a missing text or label, labels of
            another type, fewer than two of them, or (where `names` is None) one that the training file does not have.
    """
    require("datasets")
    from datasets import DatasetDict

    columns = tuple(text_columns) or ("text",)
    if len(columns) > 2:
        raise RecipeError(f"text columns {', '.join(columns)}; accepted: one, or two for pairs of texts")
    data = {}
    for split, path in files.items():
        data[split] = _read(Path(path), columns, label_column)
        if split == "train" and max_train_samples:
            data[split] = data[split].select(range(min(max_train_samples, len(data[split]))))
    if names is None:
        found = sorted(set(data["train"]["label"]), key=lambda label: (isinstance(label, str), label))
        if len(found) < 2:
            raise RecipeError(f"{files['train']} has one label only, {found[0]!r}; a classifier needs two or more")
        names = [str(label) for label in found]
    for split, path in files.items():
        data[split] = _indices(data[split], list(names), path)
    task = Task(columns, tuple(names), ("accuracy",), max_length)
    return task, DatasetDict(data)


def _read(path: Path, columns: tuple[str, ...], label_column: str) -> Dataset:
    """Texts and `label`, text or whole numbers, none missing."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.name.lower().endswith(FILE_SUFFIXES):
        raise RecipeError(f"{path}: accepted are files that end in {', '.join(FILE_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise RecipeError(f"{path} is empty")
    try:
        data = read_split(path, columns, label_column)
    except Exception as error:  # datasets and pandas raise many kinds for a file that is not what its name says
        text = str(error.__cause__ or error)
        named = text.startswith(str(path))
        raise RecipeError(text if named else f"{path} could not be read as {path.suffix}: {text}") from error
    if len(data) == 0:
        raise RecipeError(f"{path} has no rows")
    for column in (*columns, label_column):
        empty = [row for row, value in enumerate(data[column], 1) if _missing(value)]
        if empty:
            raise RecipeError(f"{path}: {len(empty)} rows without {column}, the first is row {empty[0]}")
    for column in columns:
        if not isinstance(data[column][0], str):
            raise RecipeError(f"{path}: column {column} is no text, its first value is {data[column][0]!r}")
    labels = data[label_column]
    wrong = [label for label in labels if isinstance(label, bool) or not isinstance(label, str | int)]
    if wrong:
        raise RecipeError(f"{path}: column {label_column} holds {wrong[0]!r}; accepted: text or whole numbers")
    data = data.select_columns([*columns, label_column])
    return data if label_column == "label" else data.rename_column(label_column, "label")


def _missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _indices(data: Dataset, names: list[str], path: str) -> Dataset:
    """The column `label` as indices of `names`; whole numbers may be indices already."""
    labels = data["label"]
    known = {name: index for index, name in enumerate(names)}
    if not all(str(label) in known for label in labels) and all(
        isinstance(label, int) and 0 <= label < len(names) for label in labels
    ):
        known = {str(index): index for index in range(len(names))}
    if twice := sorted({str(label) for label in labels if names.count(str(label)) > 1} & known.keys()):
        raise RecipeError(
            f"{path} has the label {twice[0]}, a name that several labels of the model have; give numbers"
        )
    unknown = sorted({str(label) for label in labels} - known.keys())
    if unknown:
        raise RecipeError(f"{path} has labels {', '.join(unknown[:10])}; known are {', '.join(names[:20])}")
    indices = [known[str(label)] for label in labels]
    return data.remove_columns("label").add_column("label", indices)
