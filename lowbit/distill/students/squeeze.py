"""Weight squeezing (Chumachenko et al. 2020, 2010.06993): the student's weights are learned maps of the teacher's.

    W_s = L W_t R                                       matrices;  w_s = L w_t of biases and LayerNorms, E_s = E_t R
    W_s = sigmoid(g) W_own + (1 - sigmoid(g)) L W_t R   gated: the student has weights of its own as well

L and R are trained (and W_own, g), W_t is not; the loss is the task's. Weights are
parametrizations of `torch.nn.utils.parametrize`; `finish` computes each once: what is saved is an ordinary narrower
model.

Of queries, keys and values, L is a block for each head, and so is R of what reads the heads, so that each head of the
student is made of one of the teacher. (The gated form is from notes on the paper, whose text was not at hand.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from ... import models
from . import Built, copies
from .sides import Sides

Factor = torch.Tensor | None  # [d, D], or of heads [A, d / A, D / A'], A' the teacher's; None: this side stays


class Squeezed(nn.Module):
    """The parametrization of one weight or bias.

    Args:
        teacher: W_t [out, in] or w_t [out], kept as a buffer that is not saved.
        left, right: initial L and R^T.
        gate: initial g, None for the form without a gate.
    """

    def __init__(self, teacher: torch.Tensor, left: Factor, right: Factor, gate: float | None) -> None:
        super().__init__()
        self.register_buffer("teacher", teacher, persistent=False)
        self.start = left, right
        self.has_left, self.has_right, self.gate = left is not None, right is not None, gate

    def right_inverse(self, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is trained instead of the weight: L, R^T, W_own, g, those that there are."""
        gated = () if self.gate is None else (own, own.new_tensor(self.gate))
        factors, self.start = [factor for factor in self.start if factor is not None], (None, None)
        return *factors, *gated

    def forward(self, *trained: torch.Tensor) -> torch.Tensor:
        rest = [*trained]
        weight: Any = self.teacher
        matrix = weight if weight.dim() == 2 else weight[:, None]
        if self.has_left:
            matrix = mapped(rest.pop(0), matrix)
        if self.has_right:
            matrix = mapped(rest.pop(0), matrix.T).T
        squeezed = matrix if weight.dim() == 2 else matrix[:, 0]
        if self.gate is None:
            return squeezed
        own, gate = rest
        return torch.sigmoid(gate) * own + (1 - torch.sigmoid(gate)) * squeezed


def mapped(factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """factor x matrix: [d, D] x [D, n] -> [d, n]; blocks [A, a, b] map b rows each to a, of the first A b rows."""
    if factor.dim() == 2:
        return factor @ matrix
    heads, _, size = factor.shape
    return (factor @ matrix[: heads * size].reshape(heads, size, -1)).flatten(0, 1)


def build(
    teacher: PreTrainedModel,
    layers: int = 3,
    hidden: int = 312,
    heads: int = 12,
    intermediate: int = 1200,
    which: str | Sequence[int] = "uniform",
    gated: bool = False,
    gate: float = 0.0,
    init: str = "identity",
    seed: int = 0,
) -> Built:
    """A narrower student whose weights are maps of the teacher's; `finish` makes them its own, in place.

    Args:
        teacher: float, of an architecture that `lowbit.models` describes; nothing of it is shared.
        layers, hidden, heads, intermediate: the student's sizes.
        which: the teacher's layers that its layers are made of, as `copies.layers` takes them.
        gated: give the student weights of its own too, random by `seed`, mixed by `sigmoid(gate)` for each tensor.
        gate: where it starts: 0 is half and half.
        init: of L and R: "identity" (truncated: the student starts as a slice of the teacher), or "random" (normal,
            1 / sqrt(D), so that weights keep their size; vectors and embeddings begin as slices still).
        seed: of what is random.

    Raises:
        TypeError, ValueError: as `copies.layers` and `copies.random`; more heads than the teacher has; another `init`;
            a head that shares its weight with an embedding (masked LM), or a tensor that is of neither width.
    """
    if init not in ("identity", "random"):
        raise ValueError(f"init={init!r}; accepted: identity, random")
    chosen = copies.choose(len(copies.layers_of(teacher)), layers, which)
    student: Any = copies.random(teacher, len(chosen), hidden, heads, intermediate, seed).model
    if heads > teacher.config.num_attention_heads:
        raise ValueError(
            f"heads={heads}, and the teacher has {teacher.config.num_attention_heads}: a head is made of one of its"
        )
    own = [*student.named_parameters(remove_duplicate=False)]
    if len({id(parameter) for _, parameter in own}) < len(own):
        raise ValueError(
            f"{type(student).__name__} shares a weight between modules, which a map of each would part; squeeze a "
            "model whose head has weights of its own, such as a classifier"
        )
    factors = _Factors(Sides(student, teacher), init)
    sources = _sources(student, teacher, chosen)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in own:
            weight = teacher.get_parameter(sources[name]).detach().clone()
            left, right = factors.of(name, parameter.shape, weight.shape)
            module, _, tensor = name.rpartition(".")
            if left is None and right is None:  # as large as the teacher's: taken as it is
                with torch.no_grad():
                    parameter.copy_(weight)
                continue
            squeezed = Squeezed(weight, left, right, gate if gated else None)
            parametrize.register_parametrization(student.get_submodule(module), tensor, squeezed)
    return Built(student.eval(), finish=_finish)


def _finish(model: Any) -> Any:
    for module in [*model.modules()]:
        if parametrize.is_parametrized(module):
            for tensor in [*module.parametrizations]:
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
                weight = getattr(module, tensor)
                weight.data = weight.data.contiguous()  # as a loaded one: products round by how weights lie
    return model


def _sources(student: PreTrainedModel, teacher: PreTrainedModel, chosen: Sequence[int]) -> dict[str, str]:
    """Name of each of the student's parameters -> name of the teacher's that it is made of."""
    places = {
        f"{new}.": f"{old}." for (new, _), old in zip(models.layers(student), _picked(teacher, chosen), strict=True)
    }
    found = {}
    for name, _ in student.named_parameters():
        place = next((place for place in places if name.startswith(place)), "")
        found[name] = places.get(place, "") + name.removeprefix(place)
    return found


def _picked(teacher: PreTrainedModel, chosen: Sequence[int]) -> list[str]:
    names = [name for name, _ in models.layers(teacher)]
    return [names[index] for index in chosen]


class _Factors:
    """Initial factors of the axes of a tensor."""

    def __init__(self, sides: Sides, init: str) -> None:
        self.sides, self.random = sides, init == "random"

    def of(self, name: str, own: torch.Size, taught: torch.Size) -> tuple[Factor, Factor]:
        """Initial L and R^T of a tensor."""
        learned = len(own) == 2 and not self.sides.is_table(name)
        left, right = (*self.sides.of(name, own, taught), None)[:2]
        return self._factor(left, learned), self._factor(right, learned)

    def _factor(self, kind: str | None, learned: bool) -> Factor:
        if kind is None:
            return None
        shape = self.sides.heads if kind == "heads" else self.sides.sizes[kind]
        if self.random and learned:
            return torch.randn(shape) / math.sqrt(shape[-1])
        return torch.eye(*shape[-2:]).expand(shape).clone()
