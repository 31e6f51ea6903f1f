"""The files of a model's weights: which they are, their size, and what is in those that are pickles."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files.records import shards

# In the order in which transformers looks for them.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, as transformers chooses them: safetensors before pickles.

    Raises:
        FileNotFoundError: none.
        CheckpointError: a damaged index.
    """
    for name in (*SAFETENSORS, *PICKLES):
        if (folder / name).is_file():
            return shards(folder / name) if name.endswith(".json") else [folder / name]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    raise FileNotFoundError(f"{folder} holds no *.safetensors file and no pytorch_model.bin")


def disk_mb(folder: Path) -> float:
    """Megabytes of a model's weights."""
    return round(sum(file.stat().st_size for file in weight_files(folder)) / 1e6, 2)


def tensor_names(file: Path) -> Iterator[str]:
    """Of a safetensors file or a pickle, without reading their values."""
    if file.suffix != ".safetensors":
        yield from pickled(file, "meta")
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error


def pickled(file: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save` wrote. Nothing but weights is unpickled, as in transformers.

    Raises:
        CheckpointError: the file holds more, or cannot be read.
    """
    try:
        mapped = device != "meta" and zipfile.is_zipfile(file)
        tensors = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise not_weights(file, error) from error
    if not isinstance(tensors, dict):
        raise not_weights(file, TypeError(type(tensors).__name__))
    return {name: tensor for name, tensor in tensors.items() if torch.is_tensor(tensor)}


def not_weights(file: Path, error: Exception) -> CheckpointError:
    """What to say of a pickle that torch does not read; its own advice is to unpickle whatever is in it."""
    return CheckpointError(
        f"{file}: damaged, or holds more than weights, which is not unpickled ({type(error).__name__}); save the model "
        "again with save_pretrained of transformers"
    )
