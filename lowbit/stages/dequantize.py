"""Back to float: `model.dequantize()` of a prepared or packed model gives a plain Hugging Face one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbit_kernels import quantized_embedding

from ..config import LowbitConfig
from ..files import saving
from ..files.stage import current_config, own_config
from ..nn import PackedDecoder, PackedEmbedding, PackedLinear, QuantDecoder, QuantEmbedding, QuantLinear
from ..nn.embedding import table_codes
from ..quantizers import weight_codes, weight_values
from .swap import part_ties, swap
from .unpadding import check_own_forward, has_exits, restore_padding, unpadded_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace lowbit's modules by `nn.Linear` and `nn.Embedding` that hold scale x code, in place.

    Weights are the quantized ones, not the latent ones that were trained. Activations and attention are not quantized
    any more, so outputs move by as much as quantizing them had moved them. A decoder that was tied to the word
    embedding keeps a table of its own, untied: both had one latent table, but not the same bits. A fused model and one
    that drops tokens get transformers' encoder back; lengths are forgotten. Attention is transformers' default. Exits
    stay, and the encoder that knows them.

    Adapters of peft stay where they are, and weights below them frozen; they can be merged now.

    A model of full width then saves and loads without lowbit. A slimmed one stays slim, and one with exits has them
    still, which transformers' configuration cannot say: these need lowbit to load.

    Args:
        model: prepared or packed, in any form.
        dtype: of the whole model afterwards; None keeps the model's own.

    Returns:
        The same model, float.

    Raises:
        ValueError: the model is float already, weights are offloaded, or a `forward` was put over that of the encoder.
    """
    config = current_config(model)
    if config.stage == "float":
        raise ValueError("the model is float already; dequantize takes a prepared or packed one")
    offloaded = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if offloaded is not None:
        raise ValueError(f"{offloaded} is offloaded (device_map) and cannot be dequantized; load without offloading")
    check_own_forward(model)
    own_config(model)
    restore_padding(model)
    own, trained = model.dtype, not any(hasattr(module, "base_layer") for module in model.modules())
    swapped = []
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear | QuantLinear | PackedDecoder | QuantDecoder):
            swap(model, {name: _linear(module, own, trained)})
            swapped.append(name)
        elif isinstance(module, PackedEmbedding | QuantEmbedding):
            swap(model, {name: _embedding(module, own, trained)})
            swapped.append(name)
        module._modules.pop("quantizers", None)  # of attention
    part_ties(model, swapped)
    saving.detach(model)
    model.config._attn_implementation = model.get_correct_attn_implementation(None)  # transformers' default
    if has_exits(model):
        unpadded_encoder(model)
    if config.num_attention_heads is not None or has_exits(model):
        saving.attach(model, LowbitConfig(stage="float", **config.widths()))
    return model if dtype is None else model.to(dtype)


@torch.no_grad()
def _linear(
    module: PackedLinear | QuantLinear | PackedDecoder | QuantDecoder, dtype: torch.dtype, trained: bool
) -> nn.Linear:
    if isinstance(module, PackedLinear | PackedDecoder):
        weight = module.dequantize()
    elif isinstance(module, QuantDecoder):
        weight = weight_values(*table_codes(module.weight, module.bits, module.granularity), torch.float32)
    else:
        weight = weight_values(*weight_codes(module.weight, module.quantizer, module.granularity), torch.float32)
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
    linear.register_parameter("bias", module.bias)
    return linear


@torch.no_grad()
def _embedding(module: PackedEmbedding | QuantEmbedding, dtype: torch.dtype, trained: bool) -> nn.Embedding:
    rows, columns = module.num_embeddings, module.embedding_dim
    if isinstance(module, PackedEmbedding):
        ids = torch.arange(rows, device=module.weight.device)
        weight = quantized_embedding(ids, *module.table(), embedding_dim=columns, out_dtype=torch.float32)
    else:
        weight = weight_values(*table_codes(module.weight, module.bits, module.granularity), torch.float32)
    table = nn.Embedding(rows, columns, module.padding_idx, device="meta")
    table.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
    return table
