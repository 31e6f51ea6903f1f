"""The transformers plug-in: `from_pretrained` of slimmed, prepared and packed models.

A model's `config.quantization_config` is a `LowbitConfig`; with `quant_method: "lowbit"` in config.json, transformers
hands the freshly built model (on the meta device) to `LowbitQuantizer`, which gives it the checkpoint's modules. Files
carry checksums and the configuration in the safetensors header (`files.records`) and are verified before any weight is
used.

The verbs are imported when they are called: it may be their own import that loads transformers, and this with it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import FORMAT_VERSION, BinaryConfig, LengthConfig, LowbitConfig, TernaryConfig
from .errors import CheckpointError
from .files import saving, weights
from .models import has_plain_attention, layers
from .nn import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("lowbit")

for _registered in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    if getattr(_registered.get("lowbit"), "__module__", "").startswith(f"{__package__}."):
        del _registered["lowbit"]  # of an earlier import of this package: transformers refuses a second one


@register_quantization_config("lowbit")
class _RegisteredConfig(QuantizationConfigMixin):
    """What transformers calls to read config.json; the object it gets is a `LowbitConfig`.

    Its class is the one a user would have passed: transformers compares the names, where both are given.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        try:
            config = LowbitConfig.from_dict(config_dict)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: {error}") from error
        kind = {2: TernaryConfig, 1: BinaryConfig}.get(config.weight_bits or 0, LowbitConfig)
        if config.stage != "float":
            config = kind.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer("lowbit")
class LowbitQuantizer(HfQuantizer):
    """Builds lowbit modules before weights load, checks them after."""

    given_state: dict[str, torch.Tensor] | None = None  # `save_pretrained(state_dict=...)`, which transformers drops
    asked_attention: str | dict[str, str] | None = None  # `from_pretrained(attn_implementation=...)`
    quantization_config: LowbitConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Before the model is built: afterwards what was asked for looks like the default. (New in transformers.)"""
        self.asked_attention = config._attn_implementation
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            from .exits.verbs import rebuild
            from .stages.build import build

            try:
                build(model, self.quantization_config)
                rebuild(model)
            except CheckpointError:
                raise
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"config.json: {error}") from error
            # Without files there is a state dict from memory, which has the modules' form.
            if checkpoint_files:
                if self.quantization_config.stage == "packed":
                    weights.expect_archive(model, self.quantization_config.format_version)
                weights.verify_files(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            from .stages.convert import quantize

            offloaded = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
            if offloaded is not None:
                raise ValueError(
                    f"{offloaded} is offloaded (device_map) and cannot be quantized while loading; "
                    "load with a device_map that keeps all weights on devices, or device_map='cpu'"
                )
            # transformers has already noted the wanted config on the model, which is still float.
            wanted, model.config.quantization_config, model.hf_quantizer = self.quantization_config, None, None
            return _set_asked_attention(quantize(model, wanted), self.asked_attention)
        if self.quantization_config.stage == "packed":
            weights.expand_archive(model)
            weights.verify_modules(model)
        saving.attach(model, self.quantization_config.replace(format_version=FORMAT_VERSION))
        if self.quantization_config.stage == "packed":
            from .stages.unpadding import fuse_where_possible

            fuse_where_possible(model)
        from .exits.verbs import start

        start(model)
        return _set_saved_length(_set_asked_attention(model, self.asked_attention))

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What to write in place of the model's own state dict, and checksums for the file header."""
        if getattr(model, "_hf_peft_config_loaded", False):  # what is written is the adapter alone
            return self.given_state, {}
        return weights.to_write(model, self.quantization_config, self.given_state)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from .stages.dequantize import dequantize

        return dequantize(model, dtype)


def _set_asked_attention(model: PreTrainedModel, asked: str | dict[str, str] | None) -> PreTrainedModel:
    """What the caller of `from_pretrained` asked for where attention is float; a warning where it is quantized."""
    if asked is None or not has_plain_attention(model):
        return model
    if not saving.has_quantized_attention(model):
        model.set_attn_implementation(asked)
    elif saving.of_model(asked) not in (None, attention.NAME):
        _log.warning(
            "from_pretrained(attn_implementation=%r): kept 'lowbit', which quantizes the attention of this model; for "
            "float attention quantize with quantize_attention=False, or call model.dequantize()",
            asked,
        )
    return model


def _set_saved_length(model: PreTrainedModel) -> PreTrainedModel:
    """Drop tokens as the model did that was saved; the first layers of it, where fewer were asked for.

    (`from_pretrained(..., length_config=None)` keeps all tokens.)
    """
    from .stages.unpadding import set_length

    values = getattr(model.config, "length_config", None)
    try:
        if values is None:
            return model
        length = LengthConfig.from_dict(values)
        return set_length(model, dataclasses.replace(length, keep=length.keep[: len(list(layers(model)))]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from error
