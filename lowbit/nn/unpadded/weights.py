"""The weights of a packed model's layers as a fused encoder takes them.

To find them by the names of modules takes a few percent of a forward pass of one sentence, so they are kept. Modules
and tensors are replaced behind an encoder's back (`.to(device)`, offloading, users): every step on the way to them is
kept, too, and looked at again in every forward pass.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import nn

from ...models import Architecture


class Product(NamedTuple):
    """Weights of linears that share an input: packed codes, scales, biases, layouts of the codes."""

    packed: list[torch.Tensor]
    scale: list[torch.Tensor]
    bias: list[torch.Tensor | None]
    layouts: list[str]


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


class Weights(NamedTuple):
    """Of one layer."""

    projections: Product
    attention_output: Product
    attention_norm: Norm
    ffn_input: Product
    ffn_activation: nn.Module
    ffn_output: Product
    ffn_norm: Norm
    shapes: list[torch.Size]  # of all packed codes

    @property
    def products(self) -> tuple[Product, ...]:
        return self.projections, self.attention_output, self.ffn_input, self.ffn_output

    @property
    def norms(self) -> tuple[Norm, ...]:
        return self.attention_norm, self.ffn_norm


class Found(NamedTuple):
    """Weights of all layers, and the steps on the way to them: modules or tensors of a module, name, what it was."""

    weights: list[Weights]
    tables: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    were: tuple[Any, ...]

    def holds(self, layers: nn.ModuleList) -> bool:
        """Whether these are still the weights of the layers."""
        now = map(dict.get, self.tables, self.names)
        return len(layers) == len(self.weights) and all(map(operator.is_, now, self.were))


def find(layers: nn.ModuleList, paths: Architecture) -> Found:
    """Of a packed model."""
    steps: list[tuple[dict[str, Any], str, Any]] = []

    def step(own: dict[str, Any], name: str) -> Any:
        steps.append((own, name, own.get(name)))
        return own.get(name)

    def child(layer: nn.Module, path: str) -> nn.Module:
        for name in path.split("."):
            layer = step(layer._modules, name)
        return layer

    def product(layer: nn.Module, *names: str) -> Product:
        linears = [child(layer, name) for name in names]
        packed, scale = ([step(own._buffers, name) for own in linears] for name in ("weight", "weight_scale"))
        biases = [step(own._parameters, "bias") for own in linears]
        return Product(packed, scale, biases, [str(own.layout) for own in linears])

    def norm(layer: nn.Module, name: str) -> Norm:
        own = child(layer, name)._parameters
        return Norm(step(own, "weight"), step(own, "bias"))

    def weights(layer: nn.Module) -> Weights:
        projections = product(layer, *paths.projections)
        others = [product(layer, name) for name in (paths.attention_output, paths.ffn_input, paths.ffn_output)]
        attention_output, ffn_input, ffn_output = others
        attention_norm, ffn_norm = norm(layer, paths.attention_norm), norm(layer, paths.ffn_norm)
        activation = child(layer, paths.ffn_activation)
        shapes = [packed.shape for own in (projections, *others) for packed in own.packed]
        return Weights(
            projections, attention_output, attention_norm, ffn_input, activation, ffn_output, ffn_norm, shapes
        )

    found = [weights(step(layers._modules, number)) for number in layers._modules]
    return Found(found, *map(tuple, zip(*steps, strict=True)))  # type: ignore[arg-type]
