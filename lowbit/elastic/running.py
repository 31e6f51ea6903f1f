"""Run a model as one of its sub-networks: for as long as a context is open, linears hold leading rows and columns.

The slices are views of the model's own parameters, which get the gradients. Modules stay the same ones, so that a
`QuantLinear` quantizes the slice, with scales of the slice: the forward pass is that of what `lowbit.extract` takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import models
from . import layout
from .subnet import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Kept(nn.ModuleList):
    """A list of layers of which a forward pass sees some; all stay its children, for hooks that are put on them."""

    kept: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return (self._modules[str(index)] for index in self.kept)

    def __len__(self) -> int:
        return len(self.kept)


@contextlib.contextmanager
def running(model: PreTrainedModel, shape: Shape) -> Iterator[None]:
    """While open, `model` is its sub-network of `shape`, for forward passes only.

    Not for gradient checkpointing, which runs layers again when the context is closed.

    Args:
        model: float or prepared, as `lowbit.elastic.layout.describe` accepts it.
        shape: of `Subnet.shape(model)`.
    """
    architecture = models.describe(model)
    base, path = model.base_model, architecture.layers
    with contextlib.ExitStack() as stack:
        for index, ((_, layer), (heads, neurons)) in enumerate(
            zip(models.layers(model), layout.sizes(model), strict=True)
        ):
            if index not in shape.layers or (heads, neurons) == (shape.heads, shape.neurons):
                continue
            attention, find = layer.get_submodule(architecture.attention), layer.get_submodule
            features = shape.heads * architecture.head_dim(layer)
            stack.callback(layout.set_heads, attention, heads, heads * architecture.head_dim(layer))
            for each in architecture.projections:
                _slice(stack, find(each), rows=features)
            _slice(stack, find(architecture.attention_output), columns=features)
            _slice(stack, find(architecture.ffn_input), rows=shape.neurons)
            _slice(stack, find(architecture.ffn_output), columns=shape.neurons)
            layout.set_heads(attention, shape.heads, features)
        every: Any = base.get_submodule(path)
        if shape.layers != tuple(range(len(every))):
            some = _Kept(every)
            some.kept, some.training = shape.layers, every.training
            parent, _, name = path.rpartition(".")
            table = base.get_submodule(parent)._modules
            stack.callback(table.__setitem__, name, every)
            table[name] = some
        yield


def _slice(stack: contextlib.ExitStack, linear: Any, rows: int | None = None, columns: int | None = None) -> None:
    """Leading rows or columns of a linear's weight and bias, in the place of the parameters, until the stack closes."""
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    parameters = dict(linear._parameters)
    stack.callback(linear.__dict__.update, sizes)
    stack.callback(linear._parameters.update, parameters)
    weight, bias = parameters["weight"], parameters["bias"]
    linear._parameters["weight"] = weight[..., :rows, :columns]
    if rows is None:
        linear.in_features = columns
        return
    linear.out_features = rows
    if bias is not None:
        linear._parameters["bias"] = bias[:rows]
