"""A student that reads other tokens than its teacher: both encodings of a text in one data set, and in one batch.

Only what does not depend on tokens can be compared: logits. The teacher's columns are called `teacher_input_ids`, ...
A trainer needs `remove_unused_columns=False`, and its objectives are `On(OwnColumns(), objective)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from ..objectives import Batch

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "teacher_"


def tokenize_for_both(
    data: Dataset,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    columns: Sequence[str],
    label: str | None = "label",
    max_length: int = 128,
) -> Dataset:
    """A data set of both encodings, and of the labels.

    Args:
        data: with text in `columns`.
        student, teacher: tokenizers.
        columns: one, or two of a pair.
        label: column that becomes `labels`; None: there is none.
        max_length: of each encoding, in its own tokens.

    Raises:
        ValueError: a column that is not there, or none or more than two.
    """
    missing = [name for name in (*columns, *((label,) if label else ())) if name not in data.column_names]
    if missing or not 1 <= len(columns) <= 2:
        raise ValueError(
            f"columns={[*columns]}, label={label!r}; accepted: one or two columns of text, of {data.column_names}"
        )

    def encode(rows: Mapping[str, Any]) -> dict[str, Any]:
        texts = [rows[name] for name in columns]
        own = student(*texts, truncation=True, max_length=max_length)
        taught = teacher(*texts, truncation=True, max_length=max_length)
        labels = {"labels": rows[label]} if label else {}
        return {**own, **{f"{PREFIX}{name}": each for name, each in taught.items()}, **labels}

    return data.map(encode, batched=True, remove_columns=data.column_names)


@dataclass
class PadBoth:
    """Collator: pads each encoding with its own tokenizer."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        def pad(tokenizer: Any, names: Mapping[str, str]) -> Any:
            wanted = [{new: row[old] for old, new in names.items()} for row in rows]
            return tokenizer.pad(wanted, return_tensors="pt")

        taught = {name: name.removeprefix(PREFIX) for name in rows[0] if name.startswith(PREFIX)}
        own = {name: name for name in rows[0] if name not in taught}
        batch = pad(self.teacher, taught)
        return {**pad(self.student, own), **{f"{PREFIX}{name}": each for name, each in batch.items()}}


class OwnColumns:
    """View: the student gets its own columns of a batch, the teacher those with its prefix."""

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> tuple[Batch, Batch]:
        taught = {name.removeprefix(PREFIX): each for name, each in batch.items() if name.startswith(PREFIX)}
        if not taught:
            raise ValueError(
                f"the batch has the columns {[*batch]} and none of the teacher's ({PREFIX}input_ids, ...): encode the "
                "data with `tokenize_for_both` and train with remove_unused_columns=False"
            )
        return {name: each for name, each in batch.items() if not name.startswith(PREFIX)}, taught
