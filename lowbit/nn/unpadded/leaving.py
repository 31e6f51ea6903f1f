"""Sequences that leave an encoder before its last layer, whole: what the exits of one forward pass are to encoders.

Which leave is decided elsewhere (`lowbit.exits`). An encoder tells the exits what is behind each layer, and goes on
with the tokens of the sequences that stay; their order never changes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from .pruning import Kept
from .sequences import Sequences, of_padding, without_padding


class Exits(Protocol):
    """The exits of one forward pass. Layers are counted from 1; 0 is what enters the first one."""

    def following(self, done: int) -> int:
        """The next layer with an exit behind it, after `done` layers; the last layer where there is none."""
        ...

    def after(self, layer: int, tokens: torch.Tensor, sequences: Sequences) -> Kept | None:
        """What stays of tokens [T, H] behind a layer; None where all do."""
        ...

    def look(self, layer: int, tokens: torch.Tensor, sequences: Sequences) -> None:
        """As `after`, where the encoder goes on with all sequences that there ever were."""
        ...

    def stayed(self) -> torch.Tensor | None:
        """int64 [B'], the rows of the batch that are still here; None: all."""
        ...


def staying(stay: torch.Tensor, host: torch.Tensor, device: torch.device) -> Kept:
    """The tokens of some sequences.

    Args:
        stay: bool [B], on the CPU.
        host: int32 [B + 1], where the sequences lie; on the CPU.
        device: where the result is wanted.
    """
    if not stay.any():
        return Kept(torch.zeros(0, dtype=torch.long, device=device), Sequences(host[:1].to(device), 0, host[:1]))
    lengths = host.diff()
    rows = stay.repeat_interleave(lengths).nonzero().squeeze(1)
    left = lengths[stay]
    cu_seqlens = nn.functional.pad(left.cumsum(0, dtype=torch.int32), (1, 0))
    return Kept(rows.to(device), Sequences(cu_seqlens.to(device), int(left.max()), cu_seqlens))


class _Noted(nn.Module):
    """A layer, and what is to be told its output."""

    def __init__(self, layer: nn.Module, note: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.layer, self.note = layer, note

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        layer: Any = self.layer
        if layer.training and getattr(layer, "gradient_checkpointing", False) and not torch.is_grad_enabled():
            raise ValueError("exits get no gradient under use_reentrant=True; set it to False")
        self.note(output[0] if isinstance(output, tuple) else output)
        return output


def noting(exits: Exits, encoder: nn.Module, entering: torch.Tensor, mask: torch.Tensor | None) -> nn.Module:
    """transformers' own encoder for one forward pass, in which exits look on: a copy around the same layers.

    Args:
        encoder: with its layers in its child `layer`; it is left alone, since other threads may run it.
        entering: [B, S, H], what enters the first layer.
        mask: of padding: [B, S], or added to scores; None.

    Raises:
        ValueError: a mask that hides more than padding, or padding where a row begins.
    """
    mask = of_padding(mask)
    if mask is not None and (mask.dim() != 2 or bool((mask.bool().any(1) & ~mask[:, 0].bool()).any())):
        raise ValueError(
            "a model with exits takes padding masks [B, S] with the padding on the right, got one of shape "
            f"{tuple(mask.shape)} (tokenizer.padding_side = 'right'; set_attn_implementation('lowbit'))"
        )

    def look(number: int, states: torch.Tensor) -> None:
        tokens, sequences, _ = without_padding(states, mask)
        exits.look(number, tokens, sequences)

    look(0, entering)
    layers: Any = encoder.layer
    noted = nn.ModuleList(_Noted(layer, functools.partial(look, number)) for number, layer in enumerate(layers, 1))
    encoder = copy.copy(encoder)
    encoder.__dict__["_modules"] = {**encoder._modules, "layer": noted}
    return encoder
