"""Gradients of tensors without a device: torch's engine asks the device for its streams, and there is none.

The nodes of the graph are torch's own; they are called in the order of the engine, latest first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]


def _call(node: Any, gradients: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    python = isinstance(node, torch.autograd.function.BackwardCFunction)  # of a torch.autograd.Function
    result = node.apply(*gradients) if python else node(*gradients)
    return result if isinstance(result, tuple) else (result,)


def _like(node: Any, place: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient as its node takes it: summed over what was broadcast, in the dtype of the forward pass."""
    if gradient is None:
        return None
    expected = node.variable if hasattr(node, "variable") else node._input_metadata[place]
    return gradient.sum_to_size(expected.shape).to(expected.dtype)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return a if b is None else b if a is None else a + b


def _of_leaves(outputs: Tensors, gradients: Sequence[torch.Tensor | None]) -> list[tuple[torch.Tensor, Any]]:
    """(leaf, gradient) of all leaves of the graph."""
    waiting: dict[Any, list[torch.Tensor | None]] = {}
    queue: list[tuple[int, int, Any]] = []
    order = itertools.count()  # nodes do not compare

    def give(node: Any, place: int, gradient: torch.Tensor | None) -> None:
        if node is None:
            return
        if node not in waiting:
            heapq.heappush(queue, (-node._sequence_nr(), next(order), node))
            waiting[node] = []
        waiting[node] += [None] * (place + 1 - len(waiting[node]))
        waiting[node][place] = _sum(waiting[node][place], _like(node, place, gradient))

    found: dict[Any, tuple[torch.Tensor, Any]] = {}
    for output, gradient in zip(outputs, gradients, strict=True):
        given = torch.ones_like(output) if gradient is None else gradient
        edge = torch.autograd.graph.get_gradient_edge(output)
        give(edge.node, edge.output_nr, given)
    while queue:
        _, _, node = heapq.heappop(queue)
        incoming = waiting.pop(node)
        if hasattr(node, "variable"):
            found[node] = node.variable, _sum(found[node][1] if node in found else None, incoming[0])
            continue
        inputs = len(node._input_metadata)
        results = _call(node, incoming + [None] * (inputs - len(incoming)))
        for (following, place), result in zip(node.next_functions, results, strict=False):
            give(following, place, result)
    return list(found.values())


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    """`torch.autograd.grad` for leaves."""
    outputs, inputs = (x if isinstance(x, list | tuple) else (x,) for x in (outputs, inputs))
    gradients = grad_outputs if isinstance(grad_outputs, list | tuple) else (grad_outputs,) * len(outputs)
    with torch.no_grad():
        by_leaf = {id(leaf): gradient for leaf, gradient in _of_leaves(outputs, gradients)}
    return tuple(by_leaf[id(leaf)] for leaf in inputs)


def backward(output: torch.Tensor, gradient: torch.Tensor | None = None, *_: Any, **__: Any) -> None:
    """`torch.Tensor.backward`."""
    with torch.no_grad():
        for leaf, found in _of_leaves([output], [gradient]):
            leaf.grad = _sum(leaf.grad, found)
