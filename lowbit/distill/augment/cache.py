"""Work on many items in chunks, each kept in a file as soon as it is done: what is interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ...files.atomic import write_text

Item = TypeVar("Item")


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
    compute: Callable[[Sequence[Item], int], list[Any]],
    *,
    folder: Path | None,
    key: str,
    size: int,
    title: str,
) -> list[Any]:
    """The results of all items, `size` at a time, with a progress bar.

    Args:
        items: work is shared out by their order.
        compute: called with some items and the number of the first; gives a value of JSON for each.
        folder: chunks are kept in `folder/key`; None keeps nothing.
        key: whatever the results depend on, as a `fingerprint`; with another one nothing is taken from the files.
        size: items a chunk.
        title: of the progress bar.
    """
    results: list[Any] = []
    with tqdm(total=len(items), desc=title, unit="row", disable=None) as bar:
        for start in range(0, len(items), size):
            part = items[start : start + size]
            path = None if folder is None else folder / key / f"{size}-{start:09d}.json"
            if path is not None and path.is_file():
                found = json.loads(path.read_text())
            else:
                found = compute(part, start)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, json.dumps(found))
            results += found
            bar.update(len(part))
    return results
