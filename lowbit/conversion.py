"""prepare -> (train) -> convert: swap the modules of a Hugging Face encoder for quantized, then packed ones.

    prepare    nn.Linear -> QuantLinear,  nn.Embedding -> QuantEmbedding,  attention gets its quantizers
    split      ternary latent weights -> pairs of binary latent weights, same function (BinaryBERT section 3.2)
    convert    QuantLinear -> PackedLinear,  QuantEmbedding -> PackedEmbedding

The decoder of a masked-LM head goes the same way, QuantDecoder -> PackedDecoder, where `output_embedding_bits` asks.

    quantize   prepare + convert

All work in place and return the model. New modules are built before the first old one is replaced, so an error
leaves the model as it was.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit_kernels import split_ternary

from . import hf, models
from .config import LowbitConfig, names
from .errors import CheckpointError, check_import
from .nn import PackedDecoder, PackedEmbedding, PackedLinear, QuantDecoder, QuantEmbedding, QuantLinear
from .nn._packed import Packed
from .nn.attention import NAME as LOWBIT_ATTENTION
from .nn.linear import JointProjection, attention_quantizers
from .quantizers import check_weight_quantizer
from .unpadding import (
    check_encoder,
    check_fusable,
    check_quantized_attention,
    encoder_of,
    fuse,
    fuse_where_possible,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("lowbit")

_LENGTHS = (64, 128, 512, 1024)  # of the sequences on which an unknown model is tried, after its own dummy inputs


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
    current = hf.current_config(model)
    check_import(config, LowbitConfig, "config")
    if not isinstance(config, LowbitConfig):
        raise TypeError(f"config must be a TernaryConfig, BinaryConfig or LowbitConfig, got {type(config).__name__}")
    if current.stage != "float":
        raise ValueError(f"the model is already {current.stage}; prepare takes a float model")
    if models.has_plain_attention(model):
        check_encoder(model)
    config = config.replace(
        stage="prepared", split=False, num_attention_heads=current.num_attention_heads, kept_heads=current.kept_heads
    )
    check_weight_quantizer(config.weight_quantizer, config.weight_bits)
    _check_names(model, config)
    models.check_single(model, config.skips)
    _check_finite(model)
    drops = models.is_known(model) and getattr(encoder_of(model), "lengths", None) is not None
    if drops:
        check_quantized_attention(config)
    if config.quantize_attention and not models.has_plain_attention(model):
        config = config.replace(quantize_attention=False)
        if models.is_known(model) and config.activation_bits is not None:
            logger.warning("%s does not call transformers' attention: it stays float", type(model).__name__)
    if not models.is_known(model):
        left = [*config.modules_to_not_convert, *_kept_in_float32(model), *_not_called(model)]
        config = config.replace(modules_to_not_convert=left)
    config = _with_decoder_as_it_is(model, config)
    modules = _quantized(model, config)
    hf.own_config(model)
    if not drops and hasattr(model.config, "length_config"):
        del model.config.length_config  # of a float checkpoint: the lengths were never set on this model
    _set_attention(model, config)
    _swap(model, modules)
    if not models.is_known(model):
        logger.warning(
            "%s (type %r) is not in lowbit.models.ARCHITECTURES: %d modules quantized, attention float, and left: %s",
            type(model).__name__,
            model.config.model_type,
            len(modules),
            ", ".join(f"{name} ({kind})" for name, kind in left_in_float(model).items()) or "none",
        )
    return hf.attach(model, config)


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
    config = _expect_prepared(model, "convert")
    if fused:
        check_fusable(model, config.replace(stage="packed"))
        with _all_or_nothing(model):  # layers that cannot be fused show when they are packed
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
    _swap(model, packed)
    _part_ties(model, packed)
    _join_projections(model)
    _warn_of_float_decoder(model, config)
    hf.attach(model, config.replace(stage="packed"))
    return fuse_where_possible(model)


def quantize(model: PreTrainedModel, config: LowbitConfig, fused: bool = False) -> PreTrainedModel:
    """Post-training quantization: `convert(prepare(model, config), fused)`; arguments and errors are theirs."""
    with _all_or_nothing(model):
        return convert(prepare(model, config), fused)


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
    config = _expect_prepared(model, "split")
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
        _as_pair(module)
    _part_ties(model, pairs)
    return hf.attach(model, config)


def build(model: PreTrainedModel, config: LowbitConfig) -> None:
    """Give a freshly constructed model (usually on the meta device) the modules of a checkpoint with `config`."""
    if config.quantize_attention and config.stage != "float" and not models.has_plain_attention(model):
        raise CheckpointError(
            f"the checkpoint was saved with lowbit.models.ARCHITECTURES[{model.config.model_type!r}], an entry that is "
            "not there now; add it before loading"
        )
    if config.num_attention_heads is not None:
        from .slimming import resize

        heads = model.config.num_attention_heads
        if any(head >= heads for layer in config.kept_heads or () for head in layer):
            raise CheckpointError(f"kept_heads={config.kept_heads} of a model that had {heads} heads: 0 to {heads - 1}")
        resize(model, config.num_attention_heads, models.intermediate_size(model))
    if config.stage == "float":
        return
    if config.stage == "prepared":
        check_weight_quantizer(config.weight_quantizer, config.weight_bits)
        modules: dict[str, Any] = _quantized(model, config)
        for module in modules.values():
            if config.split and (isinstance(module, QuantLinear) or module.bits == 1):
                module.weight = nn.Parameter(torch.empty_like(module.weight).expand(2, -1, -1).clone())
                _as_pair(module)
    else:
        modules = _packed_like(model, config)
    _swap(model, modules)
    # As `convert` and `split` did. A table left in float, or not a pair, is still the decoder's too.
    _part_ties(model, [name for name, new in modules.items() if isinstance(new, Packed) or new.weight.dim() == 3])
    if not getattr(model.config, "tie_word_embeddings", False):
        model.all_tied_weights_keys.update(_bias_tie(model))  # unless the files have two
    if config.stage == "packed":
        _join_projections(model)
    _set_attention(model, config)


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


def _kept_in_float32(model: PreTrainedModel) -> list[str]:
    """Linears that transformers itself keeps in float32, such as "wo" of T5, which reads the dtype of their weights."""
    entries = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    linears = [name for name, _ in models.linears(model)]
    return sorted(entry for entry in entries if any(names(entry, name) for name in linears))


def _not_called(model: PreTrainedModel) -> list[str]:
    """Linears and embeddings, by their names in the base model, that a forward pass of it does not call.

    Their weights are read in another way (DeBERTa's table of relative positions), which codes would not survive.
    """
    base = model.base_model
    prefix, words = models.base_name(model), models.embeddings(model)
    linears = dict(models.linears(model))
    if not linears:
        raise ValueError(f"{type(model).__name__} (model_type {model.config.model_type!r}) has no torch.nn.Linear")
    names = [name.removeprefix(prefix) for name in (*linears, *words[0], *words[1])]
    hint = f"describe it in lowbit.models.ARCHITECTURES[{model.config.model_type!r}]"
    called = _called(base, names, hint)
    return [name for name in names if name not in called]


def _called(model: PreTrainedModel, names: list[str], hint: str) -> set[str]:
    """Which of these modules a forward pass on token ids calls; ValueError, with a hint, where there can be none."""
    called: set[str] = set()
    hooks = [model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names]
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    lengths, problem = {model.dummy_inputs["input_ids"].shape[-1]: None, **dict.fromkeys(_LENGTHS)}, None
    try:
        for length in lengths:  # some take only multiples of a block, or no short ones
            ids = model.dummy_inputs["input_ids"][:, :1].expand(-1, length).to(model.device)
            try:
                with _left_as_it_was(model), torch.no_grad():
                    model.eval()
                    model(ids, **({"attention_mask": torch.ones_like(ids)} if takes_mask else {}))
                return called
            except Exception as error:
                problem = problem or error
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(
        f"{type(model).__name__} cannot be run on token ids, to see which linears it calls ({problem!r}); {hint}"
    ) from problem


def _with_decoder_as_it_is(model: PreTrainedModel, config: LowbitConfig) -> LowbitConfig:
    """The configuration without bits of a decoder that the model does not have, or reads rather than calls."""
    found = models.decoder(model)
    if config.output_embedding_bits is None or found is None:
        return config.replace(output_embedding_bits=None)
    name = found[0]
    if config.skips(name) or _called(model, [name], f"modules_to_not_convert=[{name!r}] leaves its decoder in float"):
        return config
    logger.warning(
        "%s reads the weight of its decoder %s instead of calling it, which codes would not survive: it stays float",
        type(model).__name__,
        name,
    )
    return config.replace(modules_to_not_convert=[*config.modules_to_not_convert, name])


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


@contextmanager
def _left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Undoes what a forward pass changes: modes, settings, modules (BigBird replaces its attention), configuration."""
    put_back = _remember(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        put_back()
        with torch.no_grad():
            for buffer, was_buffer in buffers:
                buffer.copy_(was_buffer)


@contextmanager
def _all_or_nothing(model: PreTrainedModel) -> Iterator[None]:
    """What raises an error leaves the model as it was: modules, hooks, settings, configuration; no value changes."""
    models.check(model)
    put_back = _remember(model)
    try:
        yield
    except BaseException:
        put_back()
        raise


def _remember(model: PreTrainedModel) -> Callable[[], None]:
    """What puts a model's modules, hooks, settings and configuration back, as they are now."""
    tables: list[dict[Any, Any]] = []
    for module in model.modules():
        own = module.__dict__
        tables += [
            own,
            *(own[name] for name in ("_modules", "_parameters", "_buffers", *_HOOKS) if own[name] is not None),
        ]
    tables.append(model.config.__dict__)
    were = [dict(table) for table in tables]

    def put_back() -> None:
        for table, was in zip(tables, were, strict=True):
            table.clear()
            table.update(was)

    return put_back


def _as_pair(module: Any) -> None:
    """Mark a module whose weight has become a pair of binary planes."""
    if isinstance(module, QuantLinear):
        module.quantizer = "bwn"
    else:
        module.bits = 1


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


def _expect_prepared(model: PreTrainedModel, verb: str) -> LowbitConfig:
    config = hf.current_config(model)
    if config.stage != "prepared":
        hint = "it is already packed" if config.stage == "packed" else "call lowbit.prepare(model, config) first"
        raise ValueError(f"{verb} takes a prepared model; this one is {config.stage}: {hint}")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            f"{verb} needs whole weights, these are sharded (FSDP2); load the full state dict of "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict into a prepared model that is not"
        )
    return config


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


def _quantized(model: PreTrainedModel, config: LowbitConfig) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name, site in _linear_targets(model, config).items():
        modules[name] = QuantLinear(_expect(model, name, nn.Linear), config, site)
    for name, bits in _embedding_targets(model, config).items():
        modules[name] = QuantEmbedding(_expect(model, name, nn.Embedding), bits, config.embedding_granularity)
    for name in _decoder_targets(model, config):
        modules[name] = QuantDecoder(_expect(model, name, nn.Linear))
    return modules


def _packed_like(model: PreTrainedModel, config: LowbitConfig) -> dict[str, nn.Module]:
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


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def _swap(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Put modules in the places of others, whose mode and hooks they get."""
    for name, module in modules.items():
        old = model.get_submodule(name)
        module.train(old.training)
        module.__dict__.update({hooks: old.__dict__[hooks] for hooks in (*_HOOKS, "_is_full_backward_hook")})
        if hasattr(old, "_hf_hook"):  # of accelerate, where a device map spreads the model
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(module, old._hf_hook)  # type: ignore[arg-type]
        model.set_submodule(name, module)


def _set_attention(model: PreTrainedModel, config: LowbitConfig) -> None:
    """Give attention that can be quantized its quantizers, if any, and its implementation."""
    if not models.has_plain_attention(model):
        return
    model.set_attn_implementation(LOWBIT_ATTENTION)
    if model.config._attn_implementation != LOWBIT_ATTENTION:  # transformers only warns
        raise ValueError(
            f"transformers cannot set the attention of {type(model).__name__}: its module has to call "
            "ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward). To leave it in float, "
            f"give lowbit.models.ARCHITECTURES[{model.config.model_type!r}] own_attention=True"
        )
    for _, layer in models.layers(model):
        quantizers = attention_quantizers(config)
        if quantizers is not None:
            attention = layer.get_submodule(models.describe(model).attention)
            attention.quantizers = quantizers.train(attention.training)


def _join_projections(model: PreTrainedModel) -> None:
    """Query, key and value of a packed layer in one product."""
    if not models.is_known(model):
        return
    architecture = models.describe(model)
    for _, layer in models.layers(model):
        submodules = [layer.get_submodule(path) for path in architecture.projections]
        projections = [module for module in submodules if isinstance(module, PackedLinear)]
        if len(projections) == 3 and projections[0].input_quantizer is not None:
            JointProjection(projections)


def _part_ties(model: PreTrainedModel, names: Iterable[str]) -> None:
    """After modules of these names were replaced: what was tied to their weights is so no more.

    A table is shared by latent floats only. The configuration ties all or nothing, so whatever else was tied gets a
    copy of its own then. But a packed decoder and its head go on to share their bias, which is once in files.
    """
    weights, ties = {f"{name}.weight" for name in names}, model.all_tied_weights_keys
    parted = any(one in weights or other in weights for one, other in ties.items())
    if not ties or (not parted and model.config.tie_word_embeddings):
        return  # nothing, or something else: LUKE ties entities
    kept = _bias_tie(model)
    for one, other in ties.items():
        shared: Any = model.get_parameter_or_buffer(one)
        if one not in kept and shared is model.get_parameter_or_buffer(other):
            owner, _, tensor = one.rpartition(".")
            setattr(model.get_submodule(owner), tensor, nn.Parameter(shared.detach().clone(), shared.requires_grad))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {one: other for one, other in kept.items() if one in ties}


def _bias_tie(model: PreTrainedModel) -> dict[str, str]:
    """Names of a packed decoder's bias and of the one that its class ties it to, either way, if any."""
    found = models.decoder(model)
    name = None if found is None or not isinstance(found[1], PackedDecoder) else f"{found[0]}.bias"
    return {one: other for one, other in (model._tied_weights_keys or {}).items() if name in (one, other)}
