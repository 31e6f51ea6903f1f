"""BERT-of-Theseus (Xu et al. 2020, 2002.02925): a teacher's modules are replaced at random until none is left.

    y_{i+1} = successor_i(y_i)     if r_i    r_i ~ Bernoulli(p), for each module and batch, in training
              predecessor_i(y_i)   else      N / L layers of the teacher, frozen; gradients flow through them

p rises with the global step. In evaluation all modules are successors. The loss is the task's; a teacher beside it does
no harm.

The successor may be any model of the teacher's kind with the same width: a float copy of some layers, or a prepared one
of the same depth, whose 2-bit layers then replace float ones.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ... import models
from ...files.stage import own_config
from . import Built, copies


class Replaceable(nn.Module):
    """One place of the hybrid's encoder, called as a layer is.

    Attributes:
        rate: p, the probability that the successor runs while training.
    """

    def __init__(self, successor: nn.Module, predecessor: Sequence[nn.Module]) -> None:
        super().__init__()
        self.successor = successor
        self.predecessor = nn.ModuleList(predecessor)
        self.rate = 0.0

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Of torch's own generator on the CPU, whose state Trainer saves and restores.
        if not self.training or float(torch.rand((), device="cpu")) < self.rate:
            return self.successor(hidden_states, *args, **kwargs)
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            # Else a batch for which no successor was drawn would have no graph, and no backward.
            hidden_states = hidden_states.detach().requires_grad_()
        output: Any = hidden_states
        for layer in self.predecessor:
            output = layer(output[0] if isinstance(output, tuple) else output, *args, **kwargs)
        return output


def replacing_rate(step: int, start: float = 0.3, slope: float = 6e-4, until: int | None = None) -> float:
    """p at a global step: min(1, start + slope * step), and 1 from step `until` on.

    Published: linear (0.3, 6e-4), or constant (0.5, slope 0, until 2500).
    """
    return 1.0 if until is not None and step >= until else min(1.0, start + slope * step)


class ReplacingRate(TrainerCallback):
    """Sets p of all modules before each step: a function of the global step alone, so that a run resumes."""

    def __init__(self, start: float, slope: float | None, until: int | None) -> None:
        self.start, self.slope, self.until = start, slope, until

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        slope = (1 - self.start) / max(state.max_steps, 1) if self.slope is None else self.slope
        rate = replacing_rate(state.global_step, self.start, slope, self.until)
        for module in kwargs["model"].modules():
            if isinstance(module, Replaceable):
                module.rate = rate


def build(
    teacher: PreTrainedModel,
    layers: int = 3,
    which: str | Sequence[int] = "uniform",
    successor: PreTrainedModel | None = None,
    start: float = 0.3,
    slope: float | None = 6e-4,
    until: int | None = None,
    train: str = "successors",
) -> Built:
    """The hybrid of a teacher and its successor; `finish` gives the successor alone, in place.

    Args:
        teacher: float, fine-tuned, of an architecture that `lowbit.models` describes; its layers are copied.
        layers: of the successor; they have to divide the teacher's.
        which: the teacher's layers that a successor starts from, as `copies.layers` takes them. Published code takes
            the first ones. The default is "uniform": successor i starts as the last of the layers that it replaces.
        successor: instead of a copy of layers: a model of the teacher's class and width, float or prepared. It becomes
            the hybrid: its own embeddings and head are what runs.
        start, slope, until: see `replacing_rate`. A slope of None reaches 1 at the end of the run, however short.
        train: "successors": only they are trained, also when none is left to replace (published). "all": embeddings,
            pooler and head too, as a successor whose embedding is quantized needs.

    Raises:
        TypeError, ValueError: as `copies.layers`; layers that do not divide the teacher's; a successor of another class
            or width; a rate outside [0, 1], a negative slope; another `train`.
    """
    if train not in ("successors", "all"):
        raise ValueError(f"train={train!r}; accepted: successors, all")
    if not 0 <= start <= 1 or (slope is not None and (slope < 0 or (slope == 0 and start < 1 and until is None))):
        raise ValueError(
            f"start={start}, slope={slope}, until={until}: accepted is a start in [0, 1] and a slope of at least 0, "
            "with which the rate reaches 1 at some step, or until=STEP, from which on it is 1"
        )
    copies.config_of(teacher)  # refuses what is no float model
    hybrid: Any = copies.layers(teacher, layers, which).model if successor is None else _checked(successor, teacher)
    old, new = copies.layers_of(teacher), copies.layers_of(hybrid)
    if len(old) % len(new):
        fitting = ", ".join(str(count) for count in range(1, len(old) + 1) if len(old) % count == 0)
        raise ValueError(f"{len(new)} successors do not divide {len(old)} layers of the teacher; accepted: {fitting}")
    size = len(old) // len(new)
    predecessors = [copy.deepcopy(layer).requires_grad_(False) for layer in old]
    for layer in predecessors:
        for module in layer.modules():
            if "config" in module.__dict__:
                module.config = hybrid.config  # its attention: the mask is made for that one
    path = models.describe(hybrid).layers
    places = [Replaceable(each, predecessors[i * size : (i + 1) * size]) for i, each in enumerate(new)]
    if train == "successors":
        hybrid.requires_grad_(False)
        for place in places:
            place.successor.requires_grad_(True)
    hybrid.base_model.set_submodule(path, nn.ModuleList(places))
    hybrid.compares_no_layers = hybrid.register_forward_pre_hook(_refuse_states, with_kwargs=True)
    return Built(hybrid.eval(), (ReplacingRate(start, slope, until),), _finish)


def _finish(hybrid: Any) -> Any:
    """The successor alone: its layers in the places of the hybrid's, everything trainable again."""
    hybrid.compares_no_layers.remove()
    del hybrid.compares_no_layers
    path = models.describe(hybrid).layers
    places: Any = hybrid.base_model.get_submodule(path)
    hybrid.base_model.set_submodule(path, nn.ModuleList([place.successor for place in places]))
    return hybrid.requires_grad_(True)


def _refuse_states(hybrid: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if hybrid.training and (kwargs.get("output_hidden_states") or kwargs.get("output_attentions")):
        raise ValueError(
            "a hybrid runs other layers in every batch, so no objective can compare them with the teacher's; accepted "
            "are TaskLoss and LogitsLoss"
        )


def _checked(successor: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """A successor that can stand in for the teacher's layers, with a configuration of its own."""
    if type(successor) is not type(teacher):
        raise ValueError(
            f"the successor is a {type(successor).__name__}, the teacher a {type(teacher).__name__}; equal needed"
        )
    widths = successor.config.hidden_size, teacher.config.hidden_size
    if widths[0] != widths[1]:
        raise ValueError(
            f"the successor's hidden size is {widths[0]}, the teacher's {widths[1]}: a module that reads what others "
            f"write has to have their width; take a successor of {widths[1]}"
        )
    if successor is teacher:
        raise ValueError("the successor is the teacher itself; give it a copy: copy.deepcopy(teacher)")
    own_config(successor)
    return successor
