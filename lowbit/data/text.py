"""Plain text for general distillation and masked language models: texts of files or tasks, in chunks of one length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from .tasks import get_task, load_task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".json.gz")


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    """Texts of a file, in their order, without empty ones.

    Args:
        path: .txt, a text a line, or JSON lines (.jsonl, .json, gzipped or not).
        column: of JSON lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, rows without the column, or no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: accepted are files that end in {', '.join(SUFFIXES)}")
    if path.suffix == ".txt":
        texts = path.read_text(encoding="utf-8").split("\n")
    else:
        from datasets import load_dataset

        try:
            data = load_dataset("json", data_files=str(path), split="train")
        except Exception as error:  # datasets raises many kinds for a file that is not what its name says
            raise ValueError(f"{path} could not be read as JSON lines: {error.__cause__ or error}") from error
        if column not in data.column_names:
            raise ValueError(f"{path} has columns {', '.join(data.column_names)}, and no {column}")
        texts = data[column][:]
        if wrong := [row for row, text in enumerate(texts, 1) if not isinstance(text, str)]:
            raise ValueError(f"{path}: {len(wrong)} rows whose {column} is no text, the first is row {wrong[0]}")
    if not (texts := [text.strip() for text in texts if text.strip()]):
        raise ValueError(f"{path} has no text")
    return texts


def task_texts(name: str, data_dir: str | Path | None = None) -> list[str]:
    """Training texts of a GLUE task without their labels, each once, in their order; both texts of pairs.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load_task`.
    """
    data = load_task(name, data_dir, ("train",))["train"]
    return list(dict.fromkeys(text for column in get_task(name).columns for text in data[column]))


def check_one_row(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int = 128) -> None:
    """ValueError where `chunks` would have no row to give; reads no more texts than it takes to know."""
    tokens = -1  # the last text has no [SEP] after it
    for text in texts:
        tokens += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        if tokens >= length - 2:
            return
    raise ValueError(
        f"{len(texts)} texts have {max(tokens, 0)} tokens, fewer than the {length - 2} of one row; give more"
    )


def chunks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int = 128) -> Dataset:
    """The tokens of all texts one after another, cut into rows of one length: no padding, nothing cut off.

    A row is [CLS], `length` - 2 tokens, [SEP]; between two texts there is a [SEP]. Tokens after the last full row are
    left out. To mix texts over rows, shuffle them first.

    Args:
        texts: any number.
        tokenizer: one with tokens for the beginning and end of a text.
        length: tokens of a row.

    Returns:
        Columns `input_ids`, `attention_mask`, `special_tokens_mask` (1 where nothing may be masked), `length` each.

    Raises:
        ValueError: fewer tokens than one row, a length without room for tokens, a tokenizer without these tokens.
    """
    from datasets import Dataset

    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    if begin is None or end is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokens for the beginning and end of a text (CLS, SEP)")
    if length < 3:
        raise ValueError(f"length={length}; accepted: 3 or more, two of them are special tokens")
    check_one_row(texts, tokenizer, length)
    ids: list[np.ndarray] = []
    with tqdm(total=len(texts), desc="tokenizing", unit="text", disable=None) as bar:
        for start in range(0, len(texts), 1000):
            part = list(texts[start : start + 1000])
            for own in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]:
                ids.append(np.array([*own, end], np.int32))
            bar.update(len(part))
    stream = np.concatenate(ids)[:-1] if ids else np.empty(0, np.int32)
    count = len(stream) // (length - 2)
    inside = stream[: count * (length - 2)].reshape(count, length - 2)
    rows = np.pad(inside, ((0, 0), (1, 1)), constant_values=((0, 0), (begin, end)))
    special = np.isin(rows, tokenizer.all_special_ids) & (rows != tokenizer.unk_token_id)
    return Dataset.from_dict(
        {
            "input_ids": list(rows),
            "attention_mask": list(np.ones_like(rows, np.int8)),
            "special_tokens_mask": list(special.astype(np.int8)),
        }
    )
