"""A freshly constructed float model becomes one of a checkpoint's stage, before its weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import models
from ..config import LowbitConfig
from ..elastic.layout import lead
from ..errors import CheckpointError
from ..nn import QuantLinear
from ..nn._packed import Packed
from ..quantizers import check_weight_quantizer
from .swap import bias_tie, join_projections, part_ties, set_attention, swap
from .targets import as_pair, packed_modules, quantized_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(model: PreTrainedModel, config: LowbitConfig) -> None:
    """Give a freshly constructed model (usually on the meta device) the modules of a checkpoint with `config`."""
    if config.quantize_attention and config.stage != "float" and not models.has_plain_attention(model):
        raise CheckpointError(
            f"the checkpoint was saved with lowbit.models.ARCHITECTURES[{model.config.model_type!r}], an entry that is "
            "not there now; add it before loading"
        )
    if config.num_attention_heads is not None:
        heads = model.config.num_attention_heads
        if any(head >= heads for layer in config.kept_heads or () for head in layer):
            raise CheckpointError(f"kept_heads={config.kept_heads} of a model that had {heads} heads: 0 to {heads - 1}")
        lead(model, config.num_attention_heads, config.intermediate_sizes or models.intermediate_size(model))
    if config.stage == "float":
        return
    if config.stage == "prepared":
        check_weight_quantizer(config.weight_quantizer, config.weight_bits)
        modules: dict[str, Any] = quantized_modules(model, config)
        for module in modules.values():
            if config.split and (isinstance(module, QuantLinear) or module.bits == 1):
                module.weight = nn.Parameter(torch.empty_like(module.weight).expand(2, -1, -1).clone())
                as_pair(module)
    else:
        modules = packed_modules(model, config)
    swap(model, modules)
    # As `convert` and `split` did. A table left in float, or not a pair, is still the decoder's too.
    part_ties(model, [name for name, new in modules.items() if isinstance(new, Packed) or new.weight.dim() == 3])
    if not getattr(model.config, "tie_word_embeddings", False):
        model.all_tied_weights_keys.update(bias_tie(model))  # unless the files have two
    if config.stage == "packed":
        join_projections(model)
    set_attention(model, config)
