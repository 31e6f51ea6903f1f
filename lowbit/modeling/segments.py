"""Texts of a pair, taken out of the batch that holds both, and put back."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Segment(NamedTuple):
    """The chosen tokens of each row, moved to the left.

    Attributes:
        states: [B, n, ...], 0 behind a row's tokens.
        mask: bool [B, n], True where there is a token; a row without any has one, of zeros, so that attention and
            packing have something to read.
        rows, columns, ranks: int [tokens], where each token stands in the batch, and here.
    """

    states: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    ranks: torch.Tensor


def take(states: torch.Tensor, chosen: torch.Tensor) -> Segment:
    """Tokens of states [B, S, ...] where chosen, bool [B, S], is True."""
    rows, columns = chosen.nonzero(as_tuple=True)
    ranks = (chosen.cumsum(1) - 1)[rows, columns]
    longest = max(int(chosen.sum(1).max()), 1) if len(chosen) else 1
    part = states.new_zeros(states.shape[0], longest, *states.shape[2:])
    mask = torch.zeros(part.shape[:2], dtype=torch.bool, device=states.device)
    mask[rows, ranks] = True
    mask[:, 0] |= ~mask.any(1)
    return Segment(part.index_put((rows, ranks), states[rows, columns]), mask, rows, columns, ranks)


def put(joint: torch.Tensor, segment: Segment) -> torch.Tensor:
    """A segment's states at their places in [B, S, ...]."""
    return joint.index_put((segment.rows, segment.columns), segment.states[segment.rows, segment.ranks])
