"""What a checkpoint says about itself, and whether its files agree.

Every safetensors file of a checkpoint carries two records in its header:

    lowbit.checksums   {name: CRC-32 of dtype, shape and bytes} of all tensors of the checkpoint, other shards included
    lowbit.config      the fields of config.json that decide what the model computes

So a file that was damaged, a shard or a config.json of another checkpoint, and a tensor that is missing, renamed or
there twice are noticed before a weight is used. The records guard against accidents, not against an author of weights.
"""

from __future__ import annotations

import json
import reprlib
import zlib
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..config import LengthConfig, LowbitConfig
from ..errors import CheckpointError
from .fields import first_that_matters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKSUMS, _CONFIG = "lowbit.checksums", "lowbit.config"  # keys in the safetensors header
_BYTES_ONLY = "lowbit.crc32"  # of earlier files: CRC-32 of the bytes alone, and no record of the configuration
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

# Fields of config.json that people edit, and that change nothing of what a loaded model computes. So does dropout.
_FREE = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "finetuning_task", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "transformers_version", "use_cache",
}  # fmt: skip
# Ours, so no other version of transformers reads them differently.
_OWN = ("quantization_config", "length_config", "exit_config")


def verify(folder: str | PathLike[str]) -> None:
    """Read a saved model's files without building it, and raise unless they are whole and belong together.

    `lowbit.from_pretrained` begins with this. Stricter than plain `from_pretrained`, which reads config.json and finds
    the weights before lowbit is asked: what transformers itself refuses there, with exceptions of many types, is one
    `CheckpointError` here. Other files of the folder (tokenizers, pickles) are not opened, and no code of the folder is
    run by either.

    Args:
        folder: what `save_pretrained` wrote, without variants.

    Raises:
        CheckpointError: a file is missing, damaged, of another checkpoint, no regular file, or has no records (written
            by an earlier version or another program: load it and save it again).
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    if not isinstance(values.get("quantization_config"), dict):
        raise CheckpointError(f"{folder / 'config.json'}: no quantization_config; not a checkpoint of lowbit")
    recorded = read_tensors(_weight_files(folder), lambda file, name, tensor: None, complete=True)
    check_config(folder / "config.json", recorded, strict=True)


def record(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, str]:
    """What to write into the header of every file that holds a part of `state`."""
    dropped = model._keys_to_ignore_on_save or ()
    checksums = {name: _checksum(tensor) for name, tensor in state.items() if name not in dropped}
    # What transformers sets in config.json after it has asked for this.
    late = {
        "architectures": [type(model).__name__.removeprefix("FSDP")],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    config = {**_described(model.config), **late}
    return {_CHECKSUMS: json.dumps(checksums), _CONFIG: json.dumps(config)}


def read_tensors(
    files: Sequence[str | PathLike[str]], use: Callable[[str, str, torch.Tensor], None], complete: bool = False
) -> dict[str, Any] | None:
    """Read every tensor once, compare it with the records, and hand (file, name, tensor) to `use`.

    Args:
        files: all files of one checkpoint.
        use: raises CheckpointError where it does not like a tensor.
        complete: refuse files without records.

    Returns:
        The recorded configuration for `check_config`; None in files without.

    Raises:
        CheckpointError: a file cannot be read, records differ between files, or tensors are not what they say.
    """
    records: dict[str, str] = {}
    found: dict[str, int] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(f"{file}: lowbit models are read from safetensors only")
        if not Path(file).is_file():
            raise CheckpointError(f"{file}: no such file")
        try:
            with safe_open(file, framework="pt") as tensors:
                own = {key: text for key, text in (tensors.metadata() or {}).items() if key.startswith("lowbit.")}
                if complete and not own.keys() >= {_CHECKSUMS, _CONFIG}:
                    raise CheckpointError(
                        f"{file}: carries no checksums and configuration of lowbit, so nothing says that it is whole; "
                        "load it and save it again"
                    )
                if file == files[0]:
                    records = own
                    checksums, checksum = checksums_of(file, records)
                elif own != records:
                    raise CheckpointError(f"{file}: belongs to another checkpoint than {files[0]}")
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensor = tensors.get_tensor(name)
                    if name in found:
                        raise CheckpointError(f"{file}: {name} is also in another file of the checkpoint")
                    found[name] = checksum(tensor)
                    if checksums and checksums.get(name) != found[name]:
                        raise CheckpointError(f"{file}: {name} does not match its checksum; the file is damaged")
                    use(str(file), name, tensor)
        except CheckpointError:
            raise
        # What safetensors raises for a damaged header depends on its version and on the field.
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    # transformers writes one of several tied tensors: those have one checksum.
    missing = [name for name, checksum in checksums.items() if name not in found and checksum not in found.values()]
    if missing:
        raise CheckpointError(f"{files[0]}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return _loads(files[0], records[_CONFIG]) if _CONFIG in records else None


def check_config(path: Path, recorded: dict[str, Any] | None, config_class: Any = None, strict: bool = False) -> None:
    """Raise CheckpointError where a config.json says another model than was recorded with the weights.

    What the caller of `from_pretrained` changes by keywords is not in the file, and free.

    Args:
        config_class: reads the file; None: the one that transformers has for its model_type.
        strict: refuse another class in `architectures` too, and fields that were not there, unless they change nothing
            of the model (`_fields`): notes of people and other programs.
    """
    if recorded is None:
        return
    values = read_json(path)
    if strict and not isinstance(values.get("auto_map", {}), dict):  # Auto classes look into it before anything else
        raise CheckpointError(f"{path}: auto_map is {values['auto_map']!r}, accepted: a table of names and classes")
    try:
        from transformers import CONFIG_MAPPING

        config_class = config_class or CONFIG_MAPPING[values["model_type"]]
        added = set(values) - set(recorded) - _FREE if strict else set()
        edited = first_that_matters(config_class, values, added)
        found = _described(config_class.from_dict(dict(values)))
    except Exception as error:  # validation in transformers and huggingface_hub has no common exception
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from error
    if edited is not None:
        raise CheckpointError(
            f"{path}: {edited} is {reprlib.repr(values[edited])}, the weights were saved without this "
            "field, and it may change what the model computes or how it is loaded; remove it from the file"
        )
    try:
        recorded = _written_out(recorded)  # a field that is newer than the checkpoint has its default
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.parent}: the configuration recorded with the weights: {error}") from error
    free = _FREE - {"architectures"} if strict else _FREE
    same_version = recorded.get("transformers_version") == found.get("transformers_version")
    for name, wanted in recorded.items():
        value = found.get(name)
        # Lists and tables may be spelled differently by another version of transformers, and defaults may be absent.
        comparable = name in _OWN or (name in found and (same_version or not isinstance(wanted, dict | list)))
        unsaid = name == "dtype" and value is None
        if "dropout" in name and not (value is None or (isinstance(value, int | float) and 0 <= value <= 1)):
            raise CheckpointError(f"{path}: {name} is {value!r}, accepted: 0 to 1")
        if name not in free and "dropout" not in name and comparable and not unsaid and value != wanted:
            raise CheckpointError(
                f"{path}: {name} is {value!r}, the weights were saved with {wanted!r}; the file is damaged or was "
                f"edited (to change it on purpose, pass {name} to from_pretrained)"
            )


def _described(config: Any) -> dict[str, Any]:
    """A configuration as JSON gives it back, with every default of ours written out."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {**_written_out(values), "num_labels": getattr(config, "num_labels", None)}


def _written_out(values: dict[str, Any]) -> dict[str, Any]:
    quantization = values.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "lowbit":
        quantization = json.loads(json.dumps(LowbitConfig.from_dict(quantization).to_dict()))
    length = values.get("length_config")
    if length is not None:
        length = LengthConfig.from_dict(length).to_dict()
    exits = values.get("exit_config")
    return {**values, "quantization_config": quantization, "length_config": length, "exit_config": exits}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{folder}: neither {_WEIGHTS} nor {_INDEX}; lowbit models are read from safetensors only"
        )
    return shards(folder / _INDEX)


def shards(path: Path) -> list[Path]:
    """The files of weights that an index names; CheckpointError where they are none of its folder."""
    index = read_json(path)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(f"{path}: no weight_map and metadata; the file is damaged")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{path}: {name!r} is not the name of a file of this folder")
    return [path.parent / name for name in sorted(set(names.values()))]


def check_inside(folder: str | PathLike[str], files: Sequence[str | PathLike[str]]) -> None:
    """Raise CheckpointError where an index leads out of a local folder; links, as caches have them, may."""
    root = Path(folder).absolute()
    for file in files:
        if root.is_dir() and (".." in Path(file).absolute().parts[len(root.parts) :]
                              or not Path(file).absolute().is_relative_to(root)):  # fmt: skip
            raise CheckpointError(f"{file}: outside of the checkpoint's folder {folder}")


def read_json(path: Path) -> dict[str, Any]:
    """A table of names and values; CheckpointError where the file is missing or holds something else."""
    if not path.is_file():  # a pipe would wait for its writer
        raise CheckpointError(f"{path}: no such file")
    try:
        return _loads(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _loads(path: str | PathLike[str], text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds {type(values).__name__}, expected a table of names and values")
    return values


def checksums_of(
    file: str | PathLike[str], header: dict[str, str]
) -> tuple[dict[str, int], Callable[[torch.Tensor], int]]:
    """The checksums in a file's header ({} in files of other programs), and what makes one of a tensor."""
    key, function = (_CHECKSUMS, _checksum) if _CHECKSUMS in header else (_BYTES_ONLY, _crc32)
    return _loads(file, header.get(key, "{}")), function


def _checksum(tensor: torch.Tensor) -> int:
    return _crc32(tensor, zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode()))


def _crc32(tensor: torch.Tensor, start: int = 0) -> int:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data, start)  # type: ignore[arg-type]
