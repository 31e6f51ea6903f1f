"""Where the files of a checkpoint are: its folder, and the model's folder inside it.

In old folders of sentence-transformers the model has a folder of its own: modules.json is at the root, config.json in
0_Transformer.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from ..files.records import check_inside, read_json
from .weights import SAFETENSORS

TOKENIZER_FILES = (
    "added_tokens.json",
    "bpe.codes",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

# Of a repository of the Hub: the model, and what pipelines need beside it (modules of sentence-transformers, SetFit's
# head, code that config.json names); pickled weights only where there are no others.
_WANTED = ("*.json", "*.safetensors", "*.pkl", "*.py", "LICENSE*", "[1-9]*_*/*", *TOKENIZER_FILES,
           *(f"*/{name}" for name in TOKENIZER_FILES))  # fmt: skip
_UNWANTED = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "onnx/*", "openvino/*", "checkpoint-*/*", "runs/*"]
_PICKLED = ("pytorch_model*.bin", "0_*/pytorch_model*.bin")


def folder_of(checkpoint: str) -> Path:
    """The folder of a checkpoint: given, or where the Hub's files are kept. `part_of` it is the model's.

    Raises:
        FileNotFoundError: neither; or a folder without config.json.
        ValueError: a modules.json that is damaged, or leads out of the folder.
    """
    path = Path(checkpoint)
    if path.exists() and not path.is_dir():
        raise FileNotFoundError(f"{path} is a file; a checkpoint is a folder with config.json and *.safetensors")
    if not path.is_dir():
        path = _downloaded(checkpoint, _WANTED)
        if not any((path / part_of(path) / name).is_file() for name in SAFETENSORS):
            path = _downloaded(checkpoint, _WANTED + _PICKLED)
    part_of(path)
    return path


@functools.cache
def _downloaded(repository: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), ignore_patterns=_UNWANTED))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repository} is no folder here, and no model that the Hub gives ({type(error).__name__})"
        ) from error


def part_of(folder: Path) -> str:
    """The path of the model's own folder inside a checkpoint's: "", or the first of the modules.

    Raises:
        FileNotFoundError: no config.json in either.
        ValueError: as `sentence_modules`.
    """
    config = folder / "config.json"
    # sentence-transformers once wrote a config.json of its own, with its version alone.
    if config.is_file() and (not (folder / "modules.json").is_file() or "model_type" in read_json(config)):
        return ""
    first = next(iter(sentence_modules(folder)), "")
    if (folder / first / "config.json").is_file():
        return first
    where = f" and none in {first}, the first module of modules.json" if first else ""
    if config.is_file() and not first:
        return ""
    raise FileNotFoundError(f"{folder} holds no config.json{where}, so it is no checkpoint")


def sentence_modules(folder: Path) -> list[str]:
    """Paths inside the folder of what sentence-transformers runs, the model first; "" is the folder itself.

    Raises:
        CheckpointError: a path that leads out of the folder.
        ValueError: a modules.json that is no list of modules.
    """
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        names = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is no list of modules with their paths, as sentence-transformers writes it"
        ) from error
    check_inside(folder, [folder / name for name in names])
    return names
