"""Which heads, neurons and layers a model has: taking some of them, in any order, in place.

    W_q, W_k, W_v rows, W_o columns      one block of `head_dim` a head
    W_1 rows, W_2 columns                one a neuron

Weights are float or latent (`QuantLinear`, a split pair too). The hidden size does not change.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import models
from ..architectures import Architecture
from ..files.stage import current_config
from ..nn import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(model: PreTrainedModel, verb: str, stages: Sequence[str] = ("float",)) -> Architecture:
    """The architecture of a model whose heads and neurons can be taken apart; nothing is changed.

    Raises:
        TypeError, ValueError: not a supported model, at another stage, or with linears of another library.
    """
    architecture = models.describe_attention(model, verb)
    models.check_single(model)
    stage = current_config(model.base_model).stage  # of a head on a body that another model shares
    if stage not in stages:
        raise ValueError(f"{verb} takes a {' or '.join(stages)} model, this one is already {stage}")
    for name, layer in models.layers(model):
        for path in architecture.layer_linears():
            linear: Any = layer.get_submodule(path)
            own = {*linear._parameters, *linear._buffers}
            if not isinstance(linear, nn.Linear | QuantLinear) or "weight" not in own or own - {"weight", "bias"}:
                raise ValueError(
                    f"{verb}: {name}.{path} is a {type(linear).__name__} with {', '.join(sorted(own)) or 'no tensor'}, "
                    "expected a linear with its weight in it (adapters? pruning masks? make them permanent first)"
                )
    return architecture


def sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(heads, neurons) of every layer."""
    architecture = models.describe(model)
    found = []
    for _, layer in models.layers(model):
        ffn: Any = layer.get_submodule(architecture.ffn_input)
        found.append((architecture.heads(layer), ffn.out_features))
    return found


def select(model: PreTrainedModel, heads: Sequence[torch.Tensor], neurons: Sequence[torch.Tensor]) -> None:
    """Every layer gets those of its heads and neurons, int64 [h] and [f], in this order; works on the meta device.

    `config.num_attention_heads` keeps the full count: transformers derives the head size from it, and a config cannot
    say "6 heads of 64 at hidden size 768".
    """
    architecture = models.describe(model)
    _part_shared(model)
    done: set[nn.Module] = set()
    for (_, layer), head, neuron in zip(models.layers(model), heads, neurons, strict=True):
        if layer in done:  # one layer in several places stays one
            continue
        done.add(layer)
        size = architecture.head_dim(layer)
        features = (head[:, None] * size + torch.arange(size, device=head.device)).flatten()
        for path in architecture.projections:
            _take(layer.get_submodule(path), rows=features)
        _take(layer.get_submodule(architecture.attention_output), columns=features)
        _take(layer.get_submodule(architecture.ffn_input), rows=neuron)
        _take(layer.get_submodule(architecture.ffn_output), columns=neuron)
        set_heads(layer.get_submodule(architecture.attention), len(head), len(features))
    setattr(model.config, architecture.intermediate_size, max(len(neuron) for neuron in neurons))


def _shared(model: PreTrainedModel) -> list[tuple[str, nn.Module, str]]:
    """(name of a layer, layer, path in it) of the linears that stand in several places of the model."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    paths = models.describe(model).layer_linears()
    found = ((name, layer, path) for name, layer in models.layers(model) for path in paths)
    return [each for each in found if places[id(each[1].get_submodule(each[2]))] > 1]


def check_parted(model: PreTrainedModel, verb: str) -> None:
    """Raise ValueError where a linear of the layers stands in several places, which gates and slices tell apart."""
    for name, _, path in _shared(model):
        raise ValueError(
            f"{verb}: {name}.{path} stands in several places of the model; give each a module of its own "
            "(copy.deepcopy of the linear)"
        )


def _part_shared(model: PreTrainedModel) -> None:
    """Linears that stand in several places become one a place: each loses what its own place does."""
    for _, layer, path in _shared(model):
        linear = layer.get_submodule(path)
        own = copy.copy(linear)
        own.__dict__ = {
            name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(linear).items()
        }  # hooks, too
        layer.set_submodule(path, own)


def set_heads(attention: nn.Module, heads: int, width: int) -> None:
    """What attention modules call their numbers of heads and of features."""
    for name, value in {"num_attention_heads": heads, "n_heads": heads, "all_head_size": width}.items():
        if hasattr(attention, name):
            setattr(attention, name, value)


def lead(model: PreTrainedModel, heads: int | Sequence[int], neurons: int | Sequence[int]) -> None:
    """Every layer keeps so many heads and neurons, its first ones; a list says so of each layer, from the first on.

    Raises:
        ValueError: more than there are, or fewer numbers than layers.
    """
    have = sizes(model)
    wanted = [[each] * len(have) if isinstance(each, int) else [*each][: len(have)] for each in (heads, neurons)]
    if any(len(each) < len(have) for each in wanted):
        raise ValueError(f"{heads} heads and {neurons} neurons for {len(have)} layers; one number each is needed")
    for number, (own, head, neuron) in enumerate(zip(have, *wanted, strict=True)):
        if not (1 <= head <= own[0] and 1 <= neuron <= own[1]):
            raise ValueError(f"{head} heads and {neuron} neurons of layer {number}, which has {own[0]} and {own[1]}")
    device = next(model.parameters()).device
    select(model, *([torch.arange(count, device=device) for count in each] for each in wanted))


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """The encoder's layers become those of these numbers, from 0, in this order."""
    path = models.describe(model).layers
    layers = [layer for _, layer in models.layers(model)]
    new = nn.ModuleList([layers[index] for index in kept])
    new.training = model.base_model.get_submodule(path).training  # a new list is in train mode, which encoders look at
    model.base_model.set_submodule(path, new)
    model.config.num_hidden_layers = len(kept)


@torch.no_grad()
def _take(linear: Any, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    """Rows (with their biases) or columns of a linear, of both planes of a split pair."""
    dim, index = (-2, rows) if rows is not None else (-1, columns)
    assert index is not None
    _set(linear, "weight", linear.weight.index_select(linear.weight.dim() + dim, index.to(linear.weight.device)))
    if rows is None:
        linear.in_features = len(index)
        return
    linear.out_features = len(index)
    if linear.bias is not None:
        _set(linear, "bias", linear.bias.index_select(0, index.to(linear.bias.device)))


def _set(linear: Any, name: str, value: torch.Tensor) -> None:
    setattr(linear, name, nn.Parameter(value, requires_grad=getattr(linear, name).requires_grad))
