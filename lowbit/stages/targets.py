"""Which modules of a model are quantized, and the modules that take their places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .. import models
from ..config import LowbitConfig
from ..nn import PackedDecoder, PackedEmbedding, PackedLinear, QuantDecoder, QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantized_modules(model: PreTrainedModel, config: LowbitConfig) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name, site in _linear_targets(model, config).items():
        modules[name] = QuantLinear(_expect(model, name, nn.Linear), config, site)
    for name, bits in _embedding_targets(model, config).items():
        modules[name] = QuantEmbedding(_expect(model, name, nn.Embedding), bits, config.embedding_granularity)
    for name in _decoder_targets(model, config):
        modules[name] = QuantDecoder(_expect(model, name, nn.Linear))
    return modules


def packed_modules(model: PreTrainedModel, config: LowbitConfig) -> dict[str, nn.Module]:
    """Empty packed modules of the float model's shapes and device, to load a checkpoint into."""
    modules: dict[str, nn.Module] = {}
    for name, site in _linear_targets(model, config).items():
        linear, weight = _expect(model, name, nn.Linear), model.get_parameter(f"{name}.weight")
        bias = linear.bias is not None
        modules[name] = PackedLinear(
            linear.in_features, linear.out_features, bias, config, site, weight.device, weight.dtype
        )
    for name, bits in _embedding_targets(model, config).items():
        table, weight = _expect(model, name, nn.Embedding), model.get_parameter(f"{name}.weight")
        modules[name] = PackedEmbedding(
            table.num_embeddings,
            table.embedding_dim,
            bits,
            config.embedding_granularity,
            config.split and bits == 1,
            table.padding_idx,
            weight.device,
            weight.dtype,
        )
    for name in _decoder_targets(model, config):
        linear, weight = _expect(model, name, nn.Linear), model.get_parameter(f"{name}.weight")
        bias = linear.bias is not None
        modules[name] = PackedDecoder(linear.in_features, linear.out_features, bias, weight.device, weight.dtype)
    return modules


def as_pair(module: Any) -> None:
    """Mark a module whose weight has become a pair of binary planes."""
    if isinstance(module, QuantLinear):
        module.quantizer = "bwn"
    else:
        module.bits = 1


def _linear_targets(model: PreTrainedModel, config: LowbitConfig) -> dict[str, str]:
    """Names of the linears to quantize, with the activation site of their input."""
    if config.weight_bits is None:
        return {}
    prefix = models.base_name(model)
    return {
        name: site
        for name, site in models.linears(model)
        if not config.skips(name) and (config.quantize_pooler or not models.is_pooler(model, name.removeprefix(prefix)))
    }


def _embedding_targets(model: PreTrainedModel, config: LowbitConfig) -> dict[str, int]:
    """Names of the embeddings to quantize, with their bits."""
    words, positions = models.embeddings(model)
    bits = {**dict.fromkeys(words, config.embedding_bits), **dict.fromkeys(positions, config.position_embedding_bits)}
    return {name: value for name, value in bits.items() if value is not None and not config.skips(name)}


def _decoder_targets(model: PreTrainedModel, config: LowbitConfig) -> list[str]:
    """Name of the decoder to quantize, if any."""
    found = models.decoder(model)
    return [] if config.output_embedding_bits is None or found is None or config.skips(found[0]) else [found[0]]


def _expect(model: PreTrainedModel, name: str, kind: type[nn.Module]) -> Any:
    """A module that can be replaced: of this very class, with its weight in it, and nothing hung on it that counts."""
    module: Any = model.get_submodule(name)
    problem = mend = ""
    if type(module) is not kind:
        problem = f"is {type(module).__module__}.{type(module).__name__}, expected {kind.__name__}"
        mend = "a model quantized or patched by another library cannot be prepared"
    elif "weight" not in module._parameters or {*module._parameters, *module._buffers} - {"weight", "bias"}:
        problem = "has a weight that is computed from other tensors (torch.nn.utils.prune, weight_norm?)"
        mend = "make it permanent first (torch.nn.utils.prune.remove)"
    elif "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        problem = "has a forward of its own, which would be lost"
        mend = "take it out, use a hook, or name the module in modules_to_not_convert"
    if problem:
        raise ValueError(f"{name} {problem}; {mend}")
    return module
