"""Learned projections between the widths of two models: made once both are known, trained, and dropped in the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .base import full


def make(sizes: Mapping[str, tuple[int, int]], bias: bool, device: torch.device) -> nn.ModuleDict:
    """A float32 linear for each name, from (inputs, outputs).

    Their random values are drawn on the CPU, so that they follow `torch.manual_seed` on every device alike.
    """
    return nn.ModuleDict({name: nn.Linear(*size, bias=bias) for name, size in sizes.items()}).to(device)


def apply(projections: nn.ModuleDict, name: str, states: torch.Tensor, what: str) -> torch.Tensor:
    """States [.., inputs] -> [.., outputs].

    Raises:
        ValueError: there is no projection, or it is for another width.
    """
    if name not in projections:
        raise ValueError(f"{what} has no projection {name!r} yet: call build(student, teacher), as the trainer does")
    projection = projections[name]
    if states.shape[-1] != projection.in_features:
        raise ValueError(
            f"{what}: states of width {states.shape[-1]}, and projection {name!r} takes {projection.in_features}; "
            "call build(student, teacher) with these models"
        )
    return full(projection(states))
