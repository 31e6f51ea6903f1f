"""Work on many items in chunks, each kept in a file as soon as it is done: what is interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ...files.atomic import staging, write_text

Item = TypeVar("Item")
Result = TypeVar("Result")


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits that say what a result depends on: values of JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def model_fingerprint(model: nn.Module) -> str:
    """As `fingerprint`, of the class, and of the name, type, shape and values of each tensor of a model."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def chunked(
    items: Sequence[Item],
    compute: Callable[[Sequence[Item], int], Result],
    *,
    folder: Path | None,
    key: str,
    size: int,
    title: str,
) -> list[Result]:
    """The results of all items, `size` at a time, with a progress bar.

    Args:
        items: work is shared out by their order.
        compute: called with some items and the number of the first; gives a value of JSON, or an array of numpy.
        folder: chunks are kept in `folder/key`; None keeps nothing.
        key: whatever the results depend on, as a `fingerprint`; with another one nothing is taken from the files.
        size: items a chunk.
        title: of the progress bar.

    Returns:
        What `compute` gave for each chunk. (Tuples come back as lists from files.)
    """
    results: list[Result] = []
    with tqdm(total=len(items), desc=title, unit="row", disable=None) as bar:
        for start in range(0, len(items), size):
            part = items[start : start + size]
            path = None if folder is None else folder / key / f"{size}-{start:09d}"
            result = None if path is None else _load(path)
            if result is None:
                result = compute(part, start)
                if path is not None:
                    _save(path, result)
            results.append(result)
            bar.update(len(part))
    return results


def flat(parts: Iterable[Iterable[Item]]) -> list[Item]:
    """One list of many."""
    return [item for part in parts for item in part]


def _load(path: Path) -> Any:
    if (array := path.with_suffix(".npy")).is_file():
        return np.load(array)
    return json.loads(text.read_text()) if (text := path.with_suffix(".json")).is_file() else None


def _save(path: Path, result: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(result, np.ndarray):
        return write_text(path.with_suffix(".json"), json.dumps(result))
    with staging(path.parent) as aside:
        np.save(aside / "chunk.npy", result)
        os.replace(aside / "chunk.npy", path.with_suffix(".npy"))
    return None
