"""prepare: nn.Linear -> QuantLinear, nn.Embedding -> QuantEmbedding, attention gets its quantizers.

The decoder of a masked-LM head becomes a QuantDecoder where `output_embedding_bits` asks. In place; new modules are
built before the first old one is replaced, so an error leaves the model as it was.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from .. import models
from ..config import LowbitConfig, names
from ..errors import check_import
from ..files import saving
from ..files.stage import current_config, own_config
from ..nn import QuantDecoder, QuantEmbedding, QuantLinear
from ..quantizers import check_weight_quantizer
from .swap import set_attention, swap
from .targets import quantized_modules
from .trial import kept_in_float32, not_called, with_decoder_as_it_is
from .unpadding import check_encoder, check_quantized_attention, encoder_of, has_exits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("lowbit")


def prepare(model: PreTrainedModel, config: LowbitConfig) -> PreTrainedModel:
    """Fake-quantize a float model for training; its parameters stay float and keep their names.

    What is swapped: the linears of the encoder and the pooler, and the word embedding, of the architectures that
    `lowbit.models` describes; with `output_embedding_bits` the decoder of a masked-LM head too, which stays tied to the
    latent word embedding where it was. Of any other encoder, every linear and the word embedding of the base model
    (other tables by `position_embedding_bits`) that a forward pass calls and transformers does not keep in float32; its
    attention stays float, and a warning says what else.
    The configuration that the model has afterwards, `model.config.quantization_config`, says it too: in
    `modules_to_not_convert` and `quantize_attention`; `lowbit.left_in_float(model)` lists all.

    Args:
        model: an encoder of transformers, float (possibly slimmed), with or without a head.
        config: `TernaryConfig()` or `BinaryConfig()`.

    Returns:
        The same model, with `attn_implementation="lowbit"` where the attention is quantized.

    Raises:
        TypeError, ValueError: not a supported model, or a decoder; no configuration; already prepared or packed; a
            quantizer of other bits than the configuration's; a name in `modules_to_not_convert` that is none; NaN or
            infinity in a parameter; an encoder without description, or a head whose decoder is to be quantized, that
            cannot be run on token ids.
    """
    current = current_config(model)
    check_import(config, LowbitConfig, "config")
    if not isinstance(config, LowbitConfig):
        raise TypeError(f"config must be a TernaryConfig, BinaryConfig or LowbitConfig, got {type(config).__name__}")
    if current.stage != "float":
        raise ValueError(f"the model is already {current.stage}; prepare takes a float model")
    if models.has_plain_attention(model):
        check_encoder(model)
    config = config.replace(stage="prepared", split=False, **current.widths())
    check_weight_quantizer(config.weight_quantizer, config.weight_bits)
    _check_names(model, config)
    models.check_single(model, config.skips)
    _check_finite(model)
    drops = models.is_known(model) and getattr(encoder_of(model), "lengths", None) is not None
    if drops or has_exits(model):
        check_quantized_attention(config)
    if config.quantize_attention and not models.has_plain_attention(model):
        config = config.replace(quantize_attention=False)
        if models.is_known(model) and config.activation_bits is not None:
            logger.warning("%s does not call transformers' attention: it stays float", type(model).__name__)
    if not models.is_known(model):
        left = [*config.modules_to_not_convert, *kept_in_float32(model), *not_called(model)]
        config = config.replace(modules_to_not_convert=left)
    config = with_decoder_as_it_is(model, config)
    modules = quantized_modules(model, config)
    own_config(model)
    if not drops and hasattr(model.config, "length_config"):
        del model.config.length_config  # of a float checkpoint: the lengths were never set on this model
    if "exits" not in model._modules and hasattr(model.config, "exit_config"):
        del model.config.exit_config
    set_attention(model, config)
    swap(model, modules)
    if not models.is_known(model):
        logger.warning(
            "%s (type %r) is not in lowbit.models.ARCHITECTURES: %d modules quantized, attention float, and left: %s",
            type(model).__name__,
            model.config.model_type,
            len(modules),
            ", ".join(f"{name} ({kind})" for name, kind in left_in_float(model).items()) or "none",
        )
    return saving.attach(model, config)


def left_in_float(model: PreTrainedModel) -> dict[str, str]:
    """Which modules hold float weights: full name -> class, of those with a floating-point matrix of their own.

    Biases and norms, which are vectors, do not count. Works on float, prepared and packed models.
    """
    found = {}
    for name, module in model.named_modules():
        matrices = (p for p in module.parameters(recurse=False) if p.dim() >= 2 and p.is_floating_point())
        if not isinstance(module, QuantLinear | QuantEmbedding | QuantDecoder) and any(True for _ in matrices):
            found[name] = type(module).__name__
    return found


def _check_names(model: PreTrainedModel, config: LowbitConfig) -> None:
    all_names = [name for name, _ in model.named_modules()]
    unknown = [entry for entry in config.modules_to_not_convert if not any(names(entry, name) for name in all_names)]
    if unknown:
        raise ValueError(f"modules_to_not_convert: no module of {type(model).__name__} is named {', '.join(unknown)}")


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.numel() == 0:
            continue
        if not all(math.isfinite(extreme) for extreme in parameter.detach().aminmax()):  # quicker than looking at each
            raise ValueError(f"{name} holds NaN or infinity and cannot be quantized; check the float model")
