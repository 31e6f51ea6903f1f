"""Checkpoints by name: the model, its labels, its tokenizer, and saving what was made of it."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..files.records import read_json
from . import copying
from .architectures import float_class
from .folders import TOKENIZER_FILES, folder_of, part_of
from .weights import not_weights, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger("lowbit")


def quiet() -> None:
    """No warnings and progress bars of transformers and datasets for what takes a second."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_folder(checkpoint: str) -> Path:
    """The folder of a checkpoint that config.json and the weights are in; errors as `folder_of`."""
    folder = folder_of(checkpoint)
    return folder / part_of(folder)


def for_transformers(checkpoint: str) -> str:
    """What transformers takes for this checkpoint: the same name, or the model's own folder."""
    folder = folder_of(checkpoint)
    part = part_of(folder)
    return str(folder / part) if part else checkpoint


def load_model(checkpoint: str) -> PreTrainedModel:
    """The model in eval mode, by the class that it was saved from.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: a class that transformers does not have; a damaged checkpoint of lowbit; pickled weights that
            hold more than weights.
    """
    root = folder_of(checkpoint)
    folder = root / part_of(root)
    quantization = read_json(folder / "config.json").get("quantization_config")
    quiet()
    import lowbit

    if isinstance(quantization, dict) and quantization.get("quant_method") == "lowbit":
        return lowbit.from_pretrained(checkpoint, subfolder=part_of(root))  # by its name, which cards show
    model_class, files = float_class(folder), weight_files(folder)
    try:
        model, report = model_class.from_pretrained(
            folder,
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise not_weights(files[0], error) from error
    if missing := sorted(report["missing_keys"]):
        _log.warning(
            "%s: %d tensors of %s are not in the files and have random values, the first is %s",
            checkpoint, len(missing), model_class.__name__, missing[0],
        )  # fmt: skip
    model.name_or_path = model.config._name_or_path = checkpoint  # not where the Hub's files are kept
    return model.eval()


def load_classifier(checkpoint: str, labels: tuple[str, ...] | None = None) -> PreTrainedModel:
    """`load_model` of a classifier of texts, with as many labels as `labels` and in no other order.

    Raises:
        ValueError: another kind of model, or other labels.
    """
    from ..recipes.data import check_order, labels_of

    model = load_model(checkpoint)
    if not type(model).__name__.endswith(("ForSequenceClassification", "WordClassifier")):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}; accepted: a model ForSequenceClassification")
    own = labels_of(checkpoint, model.config)
    if labels is not None and len(own) != len(labels):
        raise ValueError(f"{checkpoint} has {len(own)} labels, the task has {len(labels)} ({', '.join(labels)})")
    if labels is not None:
        check_order(checkpoint, own, labels)
    return model


def label_names(checkpoint: str) -> tuple[str, ...]:
    """The labels of a fine-tuned classifier, by index; RecipeError where config.json does not name each of them."""
    from transformers import AutoConfig

    from ..recipes.data import labels_of

    return labels_of(checkpoint, AutoConfig.from_pretrained(for_transformers(checkpoint)))


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; FileNotFoundError where it has none."""
    from transformers import AutoTokenizer

    folder = model_folder(checkpoint)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{checkpoint} has no tokenizer; copy tokenizer.json from the model it was made of")
    return AutoTokenizer.from_pretrained(for_transformers(checkpoint))


def check_out(out: Path, overwrite: bool, *inputs: str) -> None:
    """Wrong usage where OUT is a file, one of the inputs, or holds files that nobody said may be replaced."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; OUT is a folder", param_hint="OUT")
    folders = [Path(given) for given in inputs if Path(given).is_dir()]
    if any(out.resolve() in (folder.resolve(), (folder / part_of(folder)).resolve()) for folder in folders):
        raise typer.BadParameter(f"{out} is the model itself; choose another folder", param_hint="OUT")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise typer.BadParameter(f"{out} is not empty; choose another folder, or pass --overwrite", param_hint="OUT")


def save(model: PreTrainedModel, source: str, out: Path) -> Path:
    """The model, and the files beside it of the checkpoint that it was made from; the folder that the model is in."""
    folder = folder_of(source)
    files, target = copying.files_beside(folder, out), out / part_of(folder)
    model.save_pretrained(target)
    copying.copy(folder, files, out)
    return target


def device_of(name: str) -> str:
    """ "auto" is the GPU where there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"{name}: torch sees no CUDA device (lowbit doctor says why)", param_hint="--device")
    return name
