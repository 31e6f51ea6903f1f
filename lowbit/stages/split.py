"""split: ternary latent weights -> pairs of binary latent weights, the same function (BinaryBERT section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbit_kernels import split_ternary

from ..config import LowbitConfig
from ..files import saving
from ..files.stage import current_config
from ..nn import QuantEmbedding, QuantLinear
from .swap import part_ties
from .targets import as_pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def split(model: PreTrainedModel) -> PreTrainedModel:
    """Ternary weight splitting: each ternary weight becomes two binary ones whose sum is the same function.

    (Bai et al. 2021, section 3.2, eq. 8-10.) Biases are not doubled: the pair shares one input and one bias. Activation
    quantizers are kept. A decoder tied to the word embedding is untied, keeping the latent weight.

    Args:
        model: prepared with ternary weights (`TernaryConfig`), usually at half width.

    Returns:
        The same model, prepared as a binary pair (1-1-8), `weight` of shape [2, N, K].

    Raises:
        ValueError: not prepared, not ternary, or already split.
    """
    config = expect_prepared(model, "split")
    if config.split or config.weight_bits != 2 or config.embedding_bits == 1:
        raise ValueError(
            f"split takes a ternary model (weight_bits=2, embedding_bits=2, 8 or None), got "
            f"weight_bits={config.weight_bits}, embedding_bits={config.embedding_bits}, split={config.split}"
        )
    if config.weight_quantizer != "twn":
        raise ValueError(f"split inverts the threshold of the quantizer 'twn', got {config.weight_quantizer!r}")
    embedding_bits = 1 if config.embedding_bits == 2 else config.embedding_bits
    config = config.replace(weight_bits=1, weight_quantizer="bwn", embedding_bits=embedding_bits, split=True)
    pairs: dict[str, tuple[QuantLinear | QuantEmbedding, nn.Parameter]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) or (isinstance(module, QuantEmbedding) and module.bits == 2):
            halves = split_ternary(module.weight.detach(), granularity=module.granularity)
            pairs[name] = module, nn.Parameter(torch.stack(halves).to(module.weight.dtype))
    for module, weight in pairs.values():
        module.weight = weight
        as_pair(module)
    part_ties(model, pairs)
    return saving.attach(model, config)


def expect_prepared(model: PreTrainedModel, verb: str) -> LowbitConfig:
    config = current_config(model)
    if config.stage != "prepared":
        hint = "it is already packed" if config.stage == "packed" else "call lowbit.prepare(model, config) first"
        raise ValueError(f"{verb} takes a prepared model; this one is {config.stage}: {hint}")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            f"{verb} needs whole weights, these are sharded (FSDP2); load the full state dict of "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict into a prepared model that is not"
        )
    return config
