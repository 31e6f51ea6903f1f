"""convert: QuantLinear -> PackedLinear, QuantEmbedding -> PackedEmbedding, QuantDecoder -> PackedDecoder.

    quantize   prepare + convert

Both work in place and return the model. New modules are built before the first old one is replaced, so an error leaves
the model as it was.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import models
from ..config import LowbitConfig
from ..files import saving
from ..nn import PackedDecoder, PackedEmbedding, PackedLinear, QuantDecoder, QuantEmbedding, QuantLinear
from .prepare import prepare
from .split import expect_prepared
from .swap import all_or_nothing, join_projections, part_ties, swap
from .unpadding import check_fusable, fuse, fuse_where_possible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("lowbit")


def convert(model: PreTrainedModel, fused: bool = False) -> PreTrainedModel:
    """Pack a prepared model: 2- and 1-bit codes instead of latent floats, integer matrix products.

    A decoder tied to the word embedding (masked-LM heads) is untied. It has 8 bits with `output_embedding_bits=8`, else
    it keeps the latent float weight, which a warning says: it may be most of the file.

    Args:
        model: from `prepare`, usually trained.
        fused: also call `lowbit.fuse`.

    Raises:
        ValueError: the model is not prepared, is already packed, or holds NaN.
    """
    config = expect_prepared(model, "convert")
    if fused:
        check_fusable(model, config.replace(stage="packed"))
        with all_or_nothing(model):  # layers that cannot be fused show when they are packed
            return fuse(convert(model))
    packed: dict[str, nn.Module] = {}
    made: dict[nn.Module, Any] = {}  # a module may be in several places
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in made and isinstance(module, QuantLinear):
            made[module] = PackedLinear.from_float(module)
        elif module not in made and isinstance(module, QuantEmbedding):
            made[module] = PackedEmbedding.from_float(module, module.bits, module.granularity)
        elif module not in made and isinstance(module, QuantDecoder):
            made[module] = PackedDecoder.from_float(module)
        if module in made:
            packed[name] = made[module]
    for name, new in packed.items():
        _check_same(name, model.get_submodule(name), new)
    swap(model, packed)
    part_ties(model, packed)
    join_projections(model)
    _warn_of_float_decoder(model, config)
    saving.attach(model, config.replace(stage="packed"))
    return fuse_where_possible(model)


def quantize(model: PreTrainedModel, config: LowbitConfig, fused: bool = False) -> PreTrainedModel:
    """Post-training quantization: `convert(prepare(model, config), fused)`; arguments and errors are theirs."""
    with all_or_nothing(model):
        return convert(prepare(model, config), fused)


@torch.no_grad()
def _check_same(name: str, prepared: nn.Module, packed: nn.Module) -> None:
    """Raise RuntimeError unless a packed module gives what it was made from gives, on a few random inputs."""
    weight = prepared.get_parameter("weight")
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x: torch.Tensor
    if isinstance(prepared, QuantLinear | QuantDecoder):
        x = torch.randn(3, prepared.in_features, generator=generator).to(weight.device, weight.dtype)
    else:
        x = torch.randint(weight.shape[-2], (8,), generator=generator).to(weight.device)
    with torch.autocast(weight.device.type, enabled=False):
        expected, got = prepared.forward(x), packed.forward(x)  # no hooks
    # Bits: but with float activations a sum over the columns is one of floats.
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()), equal_nan=True):
        raise RuntimeError(f"{name}: the packed module computes something else; the model was left as it was")


def _warn_of_float_decoder(model: PreTrainedModel, config: LowbitConfig) -> None:
    """Say what is left of a packed model's size: a float decoder of its own that nobody asked for."""
    size = models.float_decoder_bytes(model)
    found = models.decoder(model)
    if size and found is not None and not config.skips(found[0]):
        logger.warning(
            "the decoder %s stays float, a table of its own of %d bytes (%.1f MB); output_embedding_bits=8 of the "
            "configuration stores it in 8 bits, modules_to_not_convert=[%r] says that float is meant",
            found[0],
            size,
            size / 1e6,
            found[0],
        )
