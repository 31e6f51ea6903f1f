"""Run a model's encoder without padding: fused (packed models), and with tokens dropped on the way (any model).

    fuse          the packed encoder in a few operations a layer, the embeddings in one
    set_length    every layer keeps so many tokens of a sequence

Both put an encoder of `lowbit.nn.unpadded` in place of transformers', around the same layers: parameters and their
names do not change. Where a head reads the first token only ([CLS]: sequence classification, multiple choice, next
sentence), the last layer computes no other, which changes nothing but the time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import models
from ..config import LengthConfig, LowbitConfig
from ..errors import check_import
from ..files.stage import current_config, own_config
from ..models import describe, runner
from ..nn import FusedEmbeddings, PackedEncoder, PackedLinear, QuantLinear, UnpaddedEncoder
from ..nn import attention as lowbit_attention
from ..nn.unpadded import packed_encoder as lowbit_packed_encoder
from ..nn.unpadded.fused_embeddings import has_weights
from ..nn.unpadded.heads import reads_first_token_only
from ..nn.unpadded.stand_in import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Endings of class names of heads that read all tokens.
_ALL_TOKEN_HEADS = (
    "ForQuestionAnswering", "ForTokenClassification", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM"
)  # fmt: skip

logger = logging.getLogger("lowbit")


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Make sure that a packed model runs without padding (`lowbit.nn.PackedEncoder`), its embeddings in one operation.

    A packed model does so anyway in eval mode, whenever that computes the same; this says what prevents it, if
    anything does, and freezes the base model's parameters (`requires_grad`), so that calls with gradients enabled are
    as fast. The model is run both ways on a few tokens first (`lowbit.nn.unpadded.proof`).

    Hidden states at padding are 0; elsewhere they are the module-by-module model's up to rounding, with one
    difference: attention probabilities of a padded sentence are quantized over its own tokens only, so that no sentence
    depends on its batch. Where attention maps, hidden states of every layer, gradients, hooks or masks that are no
    padding masks ask for it, modules run one by one. Files are the same. Lengths stay set.

    Args:
        model: packed, with 8- or 4-bit activations quantized per token, no clip, and no linear left in float; of an
            architecture that `lowbit.models` describes, with attention by transformers' interface, or MPNet's.

    Raises:
        ValueError: not packed; a configuration that cannot be fused; or layers that compute something else than those
            of the architecture (the message says where it begins). The model is left as it was.
    """
    before = _stand_ins(model)
    _put_packed_encoder(model)
    for module in _stand_ins(model):
        if isinstance(module, PackedEncoder) and (reason := module.prevented()):
            _put_back_all(model, [module for module in _stand_ins(model) if module not in before])
            raise ValueError(f"the encoder cannot be fused: {reason}")
        if isinstance(module, FusedEmbeddings) and (reason := module.prevented()):
            logger.info("the embeddings are not fused: %s", reason)
    model.base_model.requires_grad_(False)
    return model


def fuse_where_possible(model: PreTrainedModel) -> PreTrainedModel:
    """`fuse`, unasked: nothing is tried before the first call, nothing frozen, and nothing raised."""
    if any(tensor.is_meta for tensor in (*model.base_model.parameters(), *model.base_model.buffers())):
        return model  # offloaded, so that modules have to be called
    try:
        _put_packed_encoder(model)
    except ValueError as reason:
        logger.debug("%s is not fused: %s", type(model).__name__, reason)
    return model


def _put_packed_encoder(model: PreTrainedModel) -> None:
    """Put lowbit's encoder and embeddings in place where they are not; ValueError where they cannot be."""
    config = current_config(model)
    architecture = models.describe_attention(model, "fuse", bias=True)
    encoder = encoder_of(model)
    check_fusable(model, config)
    if isinstance(encoder, PackedEncoder):
        return
    original = encoder.original if isinstance(encoder, UnpaddedEncoder) else encoder
    fused = PackedEncoder(original, architecture, model.config)
    fused.lengths = getattr(encoder, "lengths", None)
    fused.replaced_attention = getattr(encoder, "replaced_attention", None)
    if architecture.embeddings is not None:
        embeddings = model.base_model.get_submodule(architecture.embeddings)
        if has_weights(embeddings):
            _put(model, architecture.embeddings, FusedEmbeddings(embeddings))
    _put(model, _path(model), fused)
    _without_padding(model)


def _stand_ins(model: PreTrainedModel) -> list[StandIn]:
    return [module for module in model.modules() if isinstance(module, StandIn)]


def set_length(model: PreTrainedModel, config: LengthConfig | None) -> PreTrainedModel:
    """Let every layer of a model drop the tokens that receive the least attention, in place.

    Works on float, prepared, packed and fused models, also in training. `config` is kept in the model's own
    configuration: lowbit checkpoints load with it; for float ones call `set_length` again after `from_pretrained`.
    Attention maps and hidden states of every layer cannot be asked for as long as tokens are dropped.

    Args:
        model: of an architecture that `lowbit.models` describes, with attention by transformers' interface.
        config: None keeps all tokens again.

    Raises:
        TypeError, ValueError: not a supported model, or a decoder; a configuration for another number of layers; a head
            that reads all tokens and `restore=False`; a first segment to protect, and no token types; attention
            quantized per tensor or with a clip.
    """
    models.describe_attention(model, "set_length")
    encoder = encoder_of(model)
    if config is not None:
        check_import(config, LengthConfig, "config")
        if not isinstance(config, LengthConfig):
            raise TypeError(f"config must be a LengthConfig or None, got {type(config).__name__}")
        _check_length(model, config)
    if isinstance(encoder, UnpaddedEncoder):
        if config is None and not isinstance(encoder, PackedEncoder) and not has_exits(model):
            check_own_forward(model)
        encoder.lengths = config
        _without_padding(model)
        if isinstance(encoder, PackedEncoder):
            encoder.run = encoder._run  # CUDA graphs were captured with the lengths before
        elif config is None and not has_exits(model):
            _put_back_all(model, [encoder])
            quantized = current_config(model).stage != "float"
            model.set_attn_implementation(lowbit_attention.NAME if quantized else encoder.replaced_attention)
    elif config is not None:
        unpadded_encoder(model).lengths = config
    if config is not None:
        model.config.length_config = config.to_dict()
    elif hasattr(model.config, "length_config"):
        del model.config.length_config
    return model


def has_exits(model: PreTrainedModel) -> bool:
    """Whether a model has ramps (`lowbit.add_exits`), which need an encoder of ours."""
    return "exits" in model._modules and getattr(model.config, "exit_config", None) is not None


def unpadded_encoder(model: PreTrainedModel) -> UnpaddedEncoder:
    """The model's encoder; where that cannot drop tokens, one that can is put in its place, with no lengths yet."""
    encoder = encoder_of(model)
    if isinstance(encoder, UnpaddedEncoder):
        return encoder
    check_quantized_attention(current_config(model))
    unpadded = UnpaddedEncoder(encoder, models.describe_attention(model, "an encoder without padding"), model.config)
    unpadded.replaced_attention = model.config._attn_implementation
    _put(model, _path(model), unpadded)
    own_config(model)
    _without_padding(model)
    return unpadded


def restore_padding(model: PreTrainedModel) -> None:
    """Put transformers' own encoder and embeddings back: the inverse of `fuse` and `set_length`, whatever was called.

    Parameters that `fuse` froze want gradients again. Attention keeps its name.
    """
    stand_ins = _stand_ins(model)
    if any(isinstance(module, PackedEncoder) for module in stand_ins):
        model.base_model.requires_grad_(True)
    _put_back_all(model, stand_ins)
    for module, hook in ((model.base_model, _protect), (model, _read_first_token_only)):
        for key in [key for key, other in module._forward_pre_hooks.items() if other is hook]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    if hasattr(model.config, "length_config"):
        del model.config.length_config


def check_own_forward(model: PreTrainedModel) -> None:
    """Raise ValueError where a user put a `forward` over that of an encoder or embeddings that are to be replaced."""
    for name, module in model.named_modules():
        if isinstance(module, StandIn) and "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{name} has a forward of its own, which would be lost; take it out (`del`), or use a hook"
            )


def _put_back_all(model: PreTrainedModel, stand_ins: Sequence[StandIn]) -> None:
    """Replace what stands in for transformers' modules by these."""
    for name, module in list(model.named_modules()):
        if module in stand_ins:
            model.set_submodule(name, module.leave())


def check_fusable(model: PreTrainedModel, config: LowbitConfig) -> None:
    """Raise ValueError unless `fuse` can take a model of this configuration."""
    models.describe_attention(model, "fuse", bias=True)
    lowbit_packed_encoder.check(config)
    check_encoder(model)
    for name, _ in models.layer_linears(model):
        if not isinstance(model.get_submodule(name), PackedLinear | QuantLinear):
            raise ValueError(f"{name} is left in float (modules_to_not_convert?); a fused encoder needs it packed")


def check_quantized_attention(config: LowbitConfig) -> None:
    """Raise ValueError unless attention that is quantized so can run without padding."""
    quantized = config.stage != "float" and config.quantize_attention and config.activation_bits is not None
    if quantized and (config.activation_granularity != "per_token" or config.activation_clip is not None):
        raise ValueError(
            "lengths need activation_granularity='per_token' and activation_clip=None where attention is quantized, "
            f"got {config.activation_granularity!r} and {config.activation_clip}"
        )


def _check_length(model: PreTrainedModel, config: LengthConfig) -> None:
    count, head = len(list(models.layers(model))), type(model).__name__
    if len(config.keep) != count:
        raise ValueError(f"LengthConfig has {len(config.keep)} layers, {head} has {count}; give one number a layer")
    if not config.restore and head.endswith(_ALL_TOKEN_HEADS):
        raise ValueError(f"{head} reads all tokens: it needs LengthConfig(restore=True)")
    if "first_segment" in config.protect and getattr(model.config, "type_vocab_size", 1) < 2:
        raise ValueError(f"LengthConfig(protect=('first_segment',)) needs token types, which {head} does not have")
    if has_exits(model) and model.config.exit_config["criterion"] is not None:
        raise ValueError(
            "sentences leave this model early (lowbit.set_exit), by ramps that were not trained on what a model that "
            "drops tokens has; call lowbit.set_exit(model, None) first"
        )
    check_encoder(model)
    check_quantized_attention(current_config(model))


def check_encoder(model: PreTrainedModel) -> None:
    """Raise ValueError for a decoder: "lowbit" attention has no causal mask."""
    if getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is a decoder (is_decoder=True), whose attention needs its causal mask"
        )


def _path(model: PreTrainedModel) -> str:
    # Not `models.describe`: traced with torch 2.15, that fails once lowbit was imported again in the process.
    return describe(model).layers.rpartition(".")[0]


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the layers: transformers' or one of lowbit's."""
    path = _path(model)  # TypeError for what is no supported model
    encoder = model.base_model.get_submodule(path)
    check_import(encoder, UnpaddedEncoder, f"the encoder of this {type(model).__name__}")
    return encoder


def _put(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    base = model.base_model
    module.training = base.get_submodule(path).training  # not of its children, which stay as they are
    base.set_submodule(path, module)


def _without_padding(model: PreTrainedModel) -> None:
    """Padding masks as they come, and what the encoder has to know of head and batch."""
    if models.has_plain_attention(model):
        model.set_attn_implementation(lowbit_attention.NAME)
    for module, hook in ((model.base_model, _protect), (model, _read_first_token_only)):
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook, with_kwargs=True)


def _read_first_token_only(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Head -> encoder, by keyword through the base model, which may be called without its head too."""
    if isinstance(runner(model), UnpaddedEncoder) and reads_first_token_only(model):
        kwargs = {"first_token_only": True, **kwargs}
    return args, kwargs


def _protect(base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Base model -> encoder: the tokens of the first segment, where they are to be kept."""
    lengths = getattr(runner(base), "lengths", None)
    if lengths is not None and "first_segment" in lengths.protect and "protected_tokens" not in kwargs:
        place = [*inspect.signature(type(base).forward).parameters].index("token_type_ids") - 1  # without self
        token_type_ids = args[place] if len(args) > place else kwargs.get("token_type_ids")
        if token_type_ids is None:
            raise ValueError("LengthConfig(protect=('first_segment',)) needs token_type_ids; the call has none")
        kwargs = {**kwargs, "protected_tokens": token_type_ids == 0}
    return args, kwargs
