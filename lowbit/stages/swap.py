"""Modules in the place of others: what they keep of the old ones, and what goes with them (attention, ties)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import models
from ..config import LowbitConfig
from ..nn import PackedDecoder, PackedLinear
from ..nn.attention import NAME as LOWBIT_ATTENTION
from ..nn.linear import JointProjection, attention_quantizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def swap(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Put modules in the places of others, whose mode and hooks they get."""
    for name, module in modules.items():
        old = model.get_submodule(name)
        module.train(old.training)
        module.__dict__.update({hooks: old.__dict__[hooks] for hooks in (*_HOOKS, "_is_full_backward_hook")})
        if hasattr(old, "_hf_hook"):  # of accelerate, where a device map spreads the model
            from accelerate.hooks import add_hook_to_module

            add_hook_to_module(module, old._hf_hook)  # type: ignore[arg-type]
        model.set_submodule(name, module)


def set_attention(model: PreTrainedModel, config: LowbitConfig) -> None:
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


def join_projections(model: PreTrainedModel) -> None:
    """Query, key and value of a packed layer in one product."""
    if not models.is_known(model):
        return
    architecture = models.describe(model)
    for _, layer in models.layers(model):
        submodules = [layer.get_submodule(path) for path in architecture.projections]
        projections = [module for module in submodules if isinstance(module, PackedLinear)]
        if len(projections) == 3 and projections[0].input_quantizer is not None:
            JointProjection(projections)


def part_ties(model: PreTrainedModel, names: Iterable[str]) -> None:
    """After modules of these names were replaced: what was tied to their weights is so no more.

    A table is shared by latent floats only. The configuration ties all or nothing, so whatever else was tied gets a
    copy of its own then. But a packed decoder and its head go on to share their bias, which is once in files.
    """
    weights, ties = {f"{name}.weight" for name in names}, model.all_tied_weights_keys
    parted = any(one in weights or other in weights for one, other in ties.items())
    if not ties or (not parted and model.config.tie_word_embeddings):
        return  # nothing, or something else: LUKE ties entities
    kept = bias_tie(model)
    for one, other in ties.items():
        shared: Any = model.get_parameter_or_buffer(one)
        if one not in kept and shared is model.get_parameter_or_buffer(other):
            owner, _, tensor = one.rpartition(".")
            setattr(model.get_submodule(owner), tensor, nn.Parameter(shared.detach().clone(), shared.requires_grad))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {one: other for one, other in kept.items() if one in ties}


def bias_tie(model: PreTrainedModel) -> dict[str, str]:
    """Names of a packed decoder's bias and of the one that its class ties it to, either way, if any."""
    found = models.decoder(model)
    name = None if found is None or not isinstance(found[1], PackedDecoder) else f"{found[0]}.bias"
    return {one: other for one, other in (model._tied_weights_keys or {}).items() if name in (one, other)}


@contextmanager
def left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
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
def all_or_nothing(model: PreTrainedModel) -> Iterator[None]:
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
