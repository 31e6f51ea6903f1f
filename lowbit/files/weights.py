"""Weights in files, and in modules: what is written, what is expected, what is refused.

Files hold ternary codes five to a byte, modules four to a byte, and rows without the padding to whole blocks, both as
`weight`. So modules get a buffer of the file's shape before transformers loads (by whatever route: shards, other heads,
device maps), and the rows are expanded where they have landed. `state_dict()` gives the modules' form;
`load_state_dict` takes either.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowbit_kernels import archive_bytes, to_archive

from ..config import LowbitConfig
from ..errors import CheckpointError
from ..models import is_pooler
from ..nn import PackedDecoder
from ..nn._packed import Packed
from . import records

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ARCHIVED_SINCE = {"ternary": 2, "binary": 3, "split": 3}  # layout -> format version; before it files had the modules'


def verify_files(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse files where tensors of the encoder are missing, of another type or shape, or changed since written."""
    if model.name_or_path:
        records.check_inside(model.name_or_path, files)
    expected, own, base = _expected_tensors(model), model.state_dict(), model.base_model.state_dict()
    found: set[str] = set()

    def check(file: str, name: str, tensor: torch.Tensor) -> None:
        bare = _bare(model, name)
        found.add(bare)
        # Of what need not be there: a pooler has one shape; a head may be given another size by the caller.
        free = own[name].shape if bare in base and name in own else tensor.shape
        dtype, shape = expected.get(bare, (None, free))
        wants_float = dtype is None and (bare in expected or (name in own and own[name].is_floating_point()))
        fits = tensor.is_floating_point() if wants_float else dtype in (None, tensor.dtype)
        if not fits or tensor.shape != shape:
            raise CheckpointError(
                f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, config.json asks for "
                f"{dtype or 'float'} {tuple(shape)}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity, values must be finite; the file is damaged")

    recorded = records.read_tensors(files, check)
    config = Path(files[0]).parent / "config.json"
    if config.is_file():
        records.check_config(config, recorded, type(model.config))
    # A packed decoder shares a bias with its head, unless the file has two.
    for one, other in list(model.all_tied_weights_keys.items()):
        pair = {_bare(model, one), _bare(model, other)}
        if pair <= found and any(_is_of_decoder(model, name) for name in pair):
            del model.all_tied_weights_keys[one]
    ties = [(_bare(model, one), _bare(model, other)) for one, other in model.all_tied_weights_keys.items()]
    for one, other in ties:  # transformers writes one of them
        found |= {one, other} if found & {one, other} else set()
    missing = sorted(set(expected) - found)
    if missing and all(is_pooler(model, name) for name in missing):
        can_do_without = "add_pooling_layer" in inspect.signature(type(model)).parameters
        raise CheckpointError(
            f"{files[0]}: holds no pooler, the model that was saved has none, and the one of {type(model).__name__} is "
            "quantized, so that it cannot be initialized; "
            f"{'pass add_pooling_layer=False' if can_do_without else 'load the class that was saved'}"
        )
    if missing and all(_is_of_decoder(model, name) for name in missing):
        raise CheckpointError(
            f"{files[0]}: holds no {missing[0]}: the model that was saved has no such decoder, and the one of "
            f"{type(model).__name__} is quantized (output_embedding_bits), so that it cannot be initialized; load the "
            "class that was saved"
        )
    if missing:
        raise CheckpointError(
            f"{files[0]}: {len(missing)} tensors of the encoder are missing, the first is {missing[0]}; the file is "
            f"damaged, or was saved from a model without a part that {type(model).__name__} has"
        )


def verify_modules(model: PreTrainedModel) -> None:
    for name, module in _packed_modules(model).items():
        if problem := module.problems():
            raise CheckpointError(f"{name}: {problem}; the checkpoint is damaged")


def _packed_modules(model: PreTrainedModel) -> dict[str, Packed]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def _is_of_decoder(model: PreTrainedModel, bare: str) -> bool:
    """Whether a tensor, by its bare name, is a packed decoder's."""
    packed = _packed_modules(model).items()
    return any(
        bare.rpartition(".")[0] == _bare(model, name) for name, each in packed if isinstance(each, PackedDecoder)
    )


def archived(model: PreTrainedModel, version: int) -> dict[str, Packed]:
    """Modules whose rows have a form of their own in files of a format version."""
    return {
        name: module
        for name, module in _packed_modules(model).items()
        if version >= _ARCHIVED_SINCE.get(module.layout, version + 1)
    }


def expect_archive(model: PreTrainedModel, version: int) -> None:
    """Give modules, still on the meta device, a `weight` of the file's shape."""
    for module in archived(model, version).values():
        row_bytes = archive_bytes(module.row_length, module.layout)
        module.weight = module.weight.new_empty(module.weight.shape[0], row_bytes)


def expand_archive(model: PreTrainedModel) -> None:
    """Replace what `expect_archive` made room for by the layouts that kernels read.

    Raises:
        CheckpointError: bytes that stand for no codes.
    """
    for name, module in _packed_modules(model).items():
        try:
            # As in PackedLinear: of an inference tensor the CPU path could not keep its int8 expansion.
            with torch.inference_mode(False):
                module.weight = module.from_file(module.weight)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; the checkpoint is damaged") from error


def _expected_tensors(model: PreTrainedModel) -> dict[str, tuple[torch.dtype | None, torch.Size]]:
    """Bare names of the base model's tensors -> dtype (None: any float) and shape in a file.

    A float pooler may be missing, as in files of heads that have none: transformers initializes it and says so.
    """
    expected: dict[str, tuple[torch.dtype | None, torch.Size]] = {
        name: (None if tensor.is_floating_point() else tensor.dtype, tensor.shape)
        for name, tensor in model.base_model.state_dict().items()
        if not is_pooler(model, name)
    }
    for name, module in _packed_modules(model).items():
        bare = _bare(model, name)
        expected[f"{bare}.weight_scale"] = module.weight_scale.dtype, module.weight_scale.shape
        expected[f"{bare}.weight"] = module.weight.dtype, module.weight.shape
    return expected


def _bare(model: PreTrainedModel, name: str) -> str:
    """A tensor's name without the base model's prefix: heads and bare models load each other's files."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def to_write(
    model: PreTrainedModel, config: LowbitConfig, state: dict[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors as files hold them, checksums for the file header) of a state dict; None: the model's own."""
    state = dict(model.state_dict() if state is None else state)
    if config.stage == "packed":
        for name, module in archived(model, config.format_version).items():
            state[f"{name}.weight"] = to_archive(state[f"{name}.weight"], module.row_length, module.layout)
    return state, records.record(model, state)
