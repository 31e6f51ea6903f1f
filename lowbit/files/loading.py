"""Load a checkpoint as what was saved, or raise one kind of error.

transformers reads config.json, finds files and builds the model before lowbit is asked, so plain `from_pretrained`
raises exceptions of many types for damaged folders. `from_pretrained` here verifies first.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import modeling
from ..errors import CheckpointError
from .records import read_json, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def from_pretrained(checkpoint: str | PathLike[str], *, subfolder: str = "", **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint of lowbit by the class that it was saved from, after `lowbit.verify`.

    Whatever is wrong with the files is one `CheckpointError`; files are read twice. Plain `from_pretrained` of
    transformers loads the same model, into any class, and also files of earlier versions.

    Args:
        checkpoint: a folder that `save_pretrained` wrote, or the name of a repository on the Hub, whose config.json
            and safetensors files are downloaded (or taken from the cache).
        subfolder: where in it the files are.
        **kwargs: for the Hub cache_dir, force_download, local_files_only, revision, token; all others go to the model
            class's `from_pretrained` (dtype, device_map, num_labels, ...), and what it raises for them is left alone.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: as `verify`; saved from a class that transformers does not have; or transformers cannot load
            the files, with no keywords either.
        ValueError: a variant is asked for.
        NotADirectoryError: `checkpoint` is a file.
        OSError: no folder, and no repository that can be reached; as transformers raises it.
    """
    if kwargs.get("variant") is not None:
        raise ValueError(
            f"variant={kwargs['variant']!r}: lowbit.from_pretrained reads files without variants only; load this one "
            "by from_pretrained of a class of transformers"
        )
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    folder = _folder_of(checkpoint, subfolder, hub)
    verify(folder)
    model = _load(class_of(folder), folder, kwargs)
    model.name_or_path = model.config._name_or_path = str(checkpoint)  # not where the Hub's files are kept
    return model


def _folder_of(checkpoint: str | PathLike[str], subfolder: str, hub: dict[str, Any]) -> Path:
    path = Path(checkpoint)
    if path.is_dir():
        return path / subfolder
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; lowbit.from_pretrained takes a folder or the name of a repository")
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    # First, since it raises what from_pretrained of transformers would.
    cached_file(str(checkpoint), "config.json", subfolder=subfolder, **hub)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    patterns = [f"{prefix}{name}" for name in ("config.json", "model*.safetensors", "model.safetensors.index.json")]
    return Path(snapshot_download(str(checkpoint), allow_patterns=patterns, **hub)) / subfolder


def class_of(folder: Path) -> type[PreTrainedModel]:
    """The class of transformers, or of ours, that config.json names; CheckpointError where it names none."""
    import transformers

    names = read_json(folder / "config.json").get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) or modeling.class_named(name) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder / 'config.json'}: architectures is {names!r}, accepted: the name of a model class of "
            "transformers or lowbit; load it by from_pretrained of the class that it was saved from"
        )
    return found


def _load(model_class: type[PreTrainedModel], folder: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    """What transformers raises without the caller's keywords too is the checkpoint's fault, all else the caller's."""
    try:
        return model_class.from_pretrained(folder, **kwargs)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if kwargs:
            _load(model_class, folder, {})
            raise
        raise CheckpointError(f"{folder}: transformers cannot load it ({type(error).__name__}: {error})") from error
