"""Augmented data sets: the rows given, then those that a method makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from datasets import Dataset

MADE = "augmented"  # the column that tells rows apart


class Method(Protocol):
    """Makes other texts of texts: `Substitution`, `Rules`, or any callable of this form."""

    def __call__(self, rows: Sequence[tuple[str, ...]], seed: int, cache: Path | None) -> list[list[tuple[str, ...]]]:
        """New rows of each row, none of which is the row itself; the same for the same rows and seed."""
        ...


def augment(
    data: Dataset,
    columns: Sequence[str],
    method: Method,
    *,
    seed: int = 0,
    labels: Literal["keep", "drop"] = "keep",
    label_column: str = "label",
    cache: str | Path | None = None,
) -> Dataset:
    """The rows of a data set, followed by those that `method` makes of them; a column `augmented` tells them apart.

    Nobody labelled the new rows. They have the label of the row that they were made of, which a changed word may have
    made wrong: train on them by objectives that compare with the teacher (`LogitsLoss`, `HiddenStateLoss`, ...), and
    use `TaskLoss` on `data.filter(lambda row: not row["augmented"])` only. With `labels="drop"` there is no label to
    use by mistake, of no row.

    Args:
        data: with text columns.
        columns: the texts, one or more (a pair keeps its partner). All other columns of a new row are its origin's.
        method: `Substitution` or `Rules`.
        seed: which words are replaced.
        labels: "keep" or "drop" the label column.
        label_column: its name.
        cache: a folder for what is made, by data, models and parameters. An interrupted call goes on from there, and
            an equal call only reads. None: nothing is kept.

    Raises:
        ValueError: a column that is not there or holds no text, data that is augmented already.
    """
    from datasets import Value, concatenate_datasets

    rows = _texts(data, columns)
    if labels not in ("keep", "drop"):
        raise ValueError(f"labels={labels!r}; accepted: keep, drop")
    if MADE in data.column_names:
        raise ValueError(f"the data has a column {MADE} already; augment the data that it was made of, or rename it")
    made = method(rows, seed, None if cache is None else Path(cache))
    origins = [row for row, new in enumerate(made) for _ in new]
    added = data.select(origins)
    for number, column in enumerate(columns):
        texts = [texts[number] for new in made for texts in new]
        added = added.add_column(f"{MADE} {column}", texts, feature=data.features[column])
    added = added.remove_columns(list(columns)).rename_columns({f"{MADE} {column}": column for column in columns})
    whole: Any = concatenate_datasets([data, added.select_columns(data.column_names)])
    flags = [False] * len(data) + [True] * len(added)
    whole = whole.add_column(MADE, flags, feature=Value("bool"))
    return whole.remove_columns(label_column) if labels == "drop" else whole


def _texts(data: Dataset, columns: Sequence[str]) -> list[tuple[str, ...]]:
    if isinstance(columns, str) or not columns:
        raise ValueError(f"columns={columns!r}; accepted: a list of names of text columns")
    for column in columns:
        if column not in data.column_names:
            raise ValueError(f"the data has columns {', '.join(data.column_names)}, and no {column}")
        if wrong := [i for i, text in enumerate(data[column]) if not isinstance(text, str)]:
            raise ValueError(f"column {column} holds no text in row {wrong[0]}")
    return list(zip(*(data[column][:] for column in columns), strict=True))
