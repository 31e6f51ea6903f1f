"""Checkpoints by name: where their files are, the model, and the files of others beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..checkpoints import check_inside, read_json
from ..loading import class_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
SENTENCE_FILES = ("config_sentence_transformers.json", "modules.json", "sentence_*_config.json")


def quiet() -> None:
    """No warnings and progress bars of transformers and datasets for what takes a second."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def folder_of(checkpoint: str) -> Path:
    """The folder of a checkpoint: given, or where the Hub's files are kept.

    Raises:
        FileNotFoundError: neither; or a folder without config.json.
    """
    path = Path(checkpoint)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json, so it is no checkpoint")
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; a checkpoint is a folder with config.json and *.safetensors")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=["*.json", "*.safetensors", *TOKENIZER_FILES]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{checkpoint} is no folder here, and no model that the Hub gives ({type(error).__name__})"
        ) from error


def load_model(checkpoint: str) -> PreTrainedModel:
    """The model in eval mode, by the class that it was saved from, of safetensors files only.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: a class that transformers does not have; a damaged checkpoint of lowbit.
    """
    folder = folder_of(checkpoint)
    quantization = read_json(folder / "config.json").get("quantization_config")
    quiet()
    import lowbit

    if isinstance(quantization, dict) and quantization.get("quant_method") == "lowbit":
        return lowbit.from_pretrained(checkpoint)  # by its name, which cards show
    return class_of(folder).from_pretrained(checkpoint, use_safetensors=True).eval()


def load_classifier(checkpoint: str, labels: tuple[str, ...] | None = None) -> PreTrainedModel:
    """`load_model` of a classifier of texts, with as many labels as `labels` and in no other order.

    Raises:
        ValueError: another kind of model, or other labels.
    """
    from ..recipes.data import check_order

    model = load_model(checkpoint)
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}; accepted: a model ForSequenceClassification")
    own = tuple(map(str, model.config.id2label.values()))
    if labels is not None and len(own) != len(labels):
        raise ValueError(f"{checkpoint} has {len(own)} labels, the task has {len(labels)} ({', '.join(labels)})")
    if labels is not None:
        check_order(checkpoint, own, labels)
    return model


def label_names(checkpoint: str) -> tuple[str, ...]:
    """The labels of a fine-tuned classifier, by index."""
    from transformers import AutoConfig

    return tuple(map(str, AutoConfig.from_pretrained(checkpoint).id2label.values()))


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; FileNotFoundError where it has none."""
    from transformers import AutoTokenizer

    folder = folder_of(checkpoint)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{checkpoint} has no tokenizer; copy tokenizer.json from the model it was made of")
    return AutoTokenizer.from_pretrained(checkpoint)


def check_out(out: Path, overwrite: bool, *inputs: str) -> None:
    """Wrong usage where OUT is a file, one of the inputs, or holds files that nobody said may be replaced."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; OUT is a folder", param_hint="OUT")
    if any(Path(given).is_dir() and out.resolve() == Path(given).resolve() for given in inputs):
        raise typer.BadParameter(f"{out} is the model itself; choose another folder", param_hint="OUT")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise typer.BadParameter(f"{out} is not empty; choose another folder, or pass --overwrite", param_hint="OUT")


def save(model: PreTrainedModel, source: str, out: Path) -> None:
    """The model, and the files beside it of the checkpoint that it was made from."""
    folder = folder_of(source)
    modules = _sentence_modules(folder)
    model.save_pretrained(out)
    for pattern in (*TOKENIZER_FILES, *SENTENCE_FILES):
        for file in folder.glob(pattern):
            shutil.copyfile(file, out / file.name)
    for name in modules:
        shutil.copytree(folder / name, out / name, dirs_exist_ok=True)


def _sentence_modules(folder: Path) -> list[str]:
    """Folders of what sentence-transformers runs after the model: pooling, normalization, ..."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        names = [str(module["path"]) for module in json.loads(file.read_text(encoding="utf-8")) if module["path"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is no list of modules with their paths, as sentence-transformers writes it"
        ) from error
    check_inside(folder, [folder / name for name in names])
    return [name for name in names if (folder / name).is_dir()]  # the Hub has no empty ones


def device_of(name: str) -> str:
    """ "auto" is the GPU where there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"{name}: torch sees no CUDA device (lowbit doctor says why)", param_hint="--device")
    return name
