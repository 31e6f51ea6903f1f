"""The transformers plug-in: `save_pretrained` and `from_pretrained` of slimmed, prepared and packed models.

A model's `config.quantization_config` is a `LowbitConfig`; with `quant_method: "lowbit"` in config.json, transformers
hands the freshly built model (on the meta device) to `LowbitQuantizer`, which gives it the checkpoint's modules. Files
carry checksums and the configuration in the safetensors header (`checkpoints`) and are verified before any weight is
used.

Files hold ternary codes five to a byte, modules four to a byte, both as `weight`. So ternary modules get a buffer of
the file's shape before transformers loads (by whatever route: shards, other heads, device maps), and the codes are
expanded where they have landed. `state_dict()` and `load_state_dict` know the modules' form only.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit_kernels import pack_ternary, pack_trits, unpack_ternary, unpack_trits

from . import checkpoints
from ._files import exclusive
from .config import FORMAT_VERSION, LengthConfig, LowbitConfig
from .errors import CheckpointError
from .nn._packed import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = re.compile(
    r"model(?:\.(?!safetensors)([^.-]+))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.([^.]+))?\.json"
)


@register_quantization_config("lowbit")
class _RegisteredConfig(QuantizationConfigMixin):
    """What transformers calls to read config.json; the object it gets is a `LowbitConfig`."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        try:
            config = LowbitConfig.from_dict(config_dict)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: {error}") from error
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer("lowbit")
class LowbitQuantizer(HfQuantizer):
    """Builds lowbit modules before weights load, checks them after."""

    given_state: dict[str, torch.Tensor] | None = None  # `save_pretrained(state_dict=...)`, which transformers drops
    quantization_config: LowbitConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            from .conversion import build

            build(model, self.quantization_config)
            # Without files there is a state dict from memory, which has the modules' form.
            if checkpoint_files:
                if self.quantization_config.stage == "packed" and self.quantization_config.format_version >= 2:
                    _expect_trits(model)
                _verify_files(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            from .conversion import quantize

            # transformers has already noted the wanted config on the model, which is still float.
            wanted, model.config.quantization_config = self.quantization_config, None
            return quantize(model, wanted)
        if self.quantization_config.stage == "packed":
            _expand_trits(model)
            _verify_modules(model)
        attach(model, self.quantization_config.replace(format_version=FORMAT_VERSION))
        return _set_saved_length(model)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What to write in place of the model's own state dict, and checksums for the file header."""
        state = dict(model.state_dict() if self.given_state is None else self.given_state)
        if self.quantization_config.stage == "packed" and self.quantization_config.format_version >= 2:
            for name, module in _ternary_modules(model).items():
                state[f"{name}.weight"] = pack_trits(unpack_ternary(state[f"{name}.weight"], module.row_length))
        return state, checkpoints.record(model, state)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        raise ValueError("a lowbit model cannot be dequantized in place; load the float checkpoint it came from")


def _set_saved_length(model: PreTrainedModel) -> PreTrainedModel:
    """Drop tokens as the model did that was saved."""
    from .unpadding import set_length

    values = getattr(model.config, "length_config", None)
    try:
        return model if values is None else set_length(model, LengthConfig.from_dict(values))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from error


def current_config(model: PreTrainedModel) -> LowbitConfig:
    """The model's `LowbitConfig`; a fresh one with stage "float" where it has none.

    A model built from the configuration of another one is float, whatever became of the other.

    Raises:
        TypeError, ValueError: not a supported model, or quantized by another method.
    """
    from .models import describe

    describe(model)
    config = getattr(model.config, "quantization_config", None)
    if config is None or not isinstance(getattr(model, "hf_quantizer", None), HfQuantizer):
        return LowbitConfig(stage="float")
    if not isinstance(config, LowbitConfig):
        raise ValueError(f"the model is already quantized by another method ({config}); load its float checkpoint")
    return config


def own_config(model: PreTrainedModel) -> None:
    """Give the model a configuration of its own: a teacher built from the same object must not change with it."""
    old, new = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def attach(model: PreTrainedModel, config: LowbitConfig) -> PreTrainedModel:
    """Make `model` save and load as what `config` says it is."""
    model.config.quantization_config = config
    model.hf_quantizer = LowbitQuantizer(config, pre_quantized=True)
    # transformers refuses .half() and .float() on models marked quantized; lowbit modules survive both.
    model.is_quantized = False
    model.config._is_quantized = config.stage == "packed"
    model.save_pretrained = functools.partial(_save_pretrained, model)  # unlike a method, it can be pickled
    return model


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained`, with files written aside and renamed: a failure leaves the old ones intact.

    Raises:
        NotADirectoryError: `save_directory` is a file.
        OSError: no space left, no permission; nothing has changed.
    """
    target = Path(save_directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; save_pretrained needs a directory")
    target.mkdir(parents=True, exist_ok=True)
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", target.name)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    model.hf_quantizer.given_state = kwargs.get("state_dict")
    try:
        type(model).save_pretrained(model, staging, **kwargs)
        written = {path.name for path in staging.iterdir()}
        variants = {_variant(name) for name in written} - {None}
        with exclusive(target):  # of two processes that save, one checkpoint stays, not parts of both
            # config.json last: until then a reader sees the old one, and mismatches are refused by the checks.
            for name in sorted(written, key=lambda name: (name == "config.json", name)):
                os.replace(staging / name, target / name)
            for path in target.iterdir():
                if path.name not in written and _variant(path.name) in variants:
                    path.unlink()  # shards of the checkpoint before
    finally:
        model.hf_quantizer.given_state = None
        shutil.rmtree(staging, ignore_errors=True)


def _variant(file_name: str) -> str | None:
    """The variant ("" for none) that a file of weights, or an index of such files, belongs to; None for other files."""
    match = _WEIGHTS.fullmatch(file_name)
    return match and (match[1] or match[2] or "")


def _verify_files(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse files where tensors of the encoder are missing, of another type or shape, or changed since written."""
    if model.name_or_path:
        checkpoints.check_inside(model.name_or_path, files)
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

    recorded = checkpoints.read_tensors(files, check)
    config = Path(files[0]).parent / "config.json"
    if config.is_file():
        checkpoints.check_config(config, recorded)
    missing = sorted(set(expected) - found)
    if missing:
        raise CheckpointError(
            f"{files[0]}: {len(missing)} tensors of the encoder are missing, the first is {missing[0]}; the file is "
            f"damaged, or was saved from a head without a part that {type(model).__name__} has"
        )


def _verify_modules(model: PreTrainedModel) -> None:
    for name, module in _packed_modules(model).items():
        if problem := module.problems():
            raise CheckpointError(f"{name}: {problem}; the checkpoint is damaged")


def _packed_modules(model: PreTrainedModel) -> dict[str, Packed]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def _ternary_modules(model: PreTrainedModel) -> dict[str, Packed]:
    return {name: module for name, module in _packed_modules(model).items() if module.layout == "ternary"}


def _expect_trits(model: PreTrainedModel) -> None:
    """Give ternary modules, still on the meta device, a `weight` of the file's shape: uint8 [N, ceil(K/5)]."""
    for module in _ternary_modules(model).values():
        module.weight = module.weight.new_empty(module.weight.shape[0], -(-module.row_length // 5))


def _expand_trits(model: PreTrainedModel) -> None:
    """Replace what `_expect_trits` made room for by layout lb2: uint8 [N, ceil(K/128)*32].

    Raises:
        CheckpointError: a byte that five ternary codes do not reach.
    """
    for name, module in _ternary_modules(model).items():
        if module.weight.shape[1] != -(-module.row_length // 5):
            continue  # lb2 already (version 1, or a state dict); its rows are always longer
        try:
            # As in PackedLinear: of an inference tensor the CPU path could not keep its int8 expansion.
            with torch.inference_mode(False):
                module.weight = pack_ternary(unpack_trits(module.weight, module.row_length))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; the checkpoint is damaged") from error


def _expected_tensors(model: PreTrainedModel) -> dict[str, tuple[torch.dtype | None, torch.Size]]:
    """Bare names of the base model's tensors -> dtype (None: any float) and shape in a file.

    A float pooler may be missing, as in files of heads that have none: transformers initializes it and says so.
    """
    from .models import describe

    expected: dict[str, tuple[torch.dtype | None, torch.Size]] = {
        name: (None, tensor.shape)
        for name, tensor in model.base_model.state_dict().items()
        if not name.startswith(f"{describe(model).pooler}.")
    }
    for name, module in _packed_modules(model).items():
        bare = _bare(model, name)
        expected[f"{bare}.weight_scale"] = module.weight_scale.dtype, module.weight_scale.shape
        expected[f"{bare}.weight"] = module.weight.dtype, module.weight.shape
    return expected


def _bare(model: PreTrainedModel, name: str) -> str:
    """A tensor's name without the base model's prefix: heads and bare models load each other's files."""
    return name.removeprefix(f"{model.base_model_prefix}.")
