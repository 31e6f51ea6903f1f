"""Batches without padding: the tokens of all sequences one after the other, and where each sequence lies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Sequences(NamedTuple):
    """Where the sequences of a batch lie among its tokens."""

    cu_seqlens: torch.Tensor  # int32 [B + 1]
    max_seqlen: int
    host: torch.Tensor | None = None  # cu_seqlens on the CPU; None where only bounds are known, as in a CUDA graph
    begin_with_padding: bool = False  # whether some row of the batch has tokens, but none at its first place


def without_padding(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, Sequences, torch.Tensor | None]:
    """The tokens of a padded batch. With a mask on a GPU one copy to the host says all that has to be known there.

    Args:
        hidden_states: [B, S, H].
        attention_mask: bool or integer [B, S], 0 at padding (anywhere in a row), or None.

    Returns:
        tokens [T, H]; where the sequences begin; int64 [T] places of the tokens in [B * S], None without padding.
    """
    B, S, _ = hidden_states.shape
    rows = hidden_states.flatten(0, 1)
    if attention_mask is None or (not attention_mask.is_cuda and bool(attention_mask.all())):
        host = torch.arange(B + 1, dtype=torch.int32) * S
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=rows.device) * S  # made there, not copied: no wait
        return rows, Sequences(cu_seqlens, S, host), None
    mask = attention_mask.bool()
    cu_seqlens = nn.functional.pad(mask.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    late = (mask.any(1) & ~mask[:, :1].any(1)).sum(dtype=torch.int32)
    *starts, number_late = torch.cat([cu_seqlens, late[None]]).tolist()
    host, total = torch.tensor(starts, dtype=torch.int32), starts[-1]
    if total == B * S:
        return rows, Sequences(cu_seqlens, S, host), None
    real = mask.flatten()
    places = (torch.nonzero_static(real, size=total) if real.is_cuda else real.nonzero()).squeeze(1)
    return rows[places], Sequences(cu_seqlens, int(host.diff().max()), host, number_late > 0), places


def has_gaps(mask: torch.Tensor | None) -> bool:
    """Whether there is padding before a token of the same row, in a mask [B, S] or None."""
    return mask is not None and bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any())


def of_padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The padding mask [B, S] of a mask that is added to scores, [B, 1, S, S]; a mask that hides more, as it came."""
    if mask is None or mask.dim() != 4 or mask.shape[1] != 1 or not mask.is_floating_point():
        return mask
    keys = mask[:, :, :1]
    seen = keys == 0
    hidden = keys == torch.finfo(mask.dtype).min
    return seen[:, 0, 0] if bool((seen | hidden).all() & (mask == keys).all()) else mask


def with_padding(tokens: torch.Tensor, places: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """Inverse of `without_padding`: [T, H] -> [B, S, H], zeros at padding."""
    if places is None:
        return tokens.view(shape)
    padded = tokens.new_zeros(shape[0] * shape[1], shape[2])
    return padded.index_copy_(0, places, tokens).view(shape)


def with_first_tokens(
    tokens: torch.Tensor, sequences: Sequences, places: torch.Tensor | None, shape: torch.Size
) -> torch.Tensor:
    """The first tokens of all sequences, [B, H], as [B, S, H] whose other rows may be anything."""
    if places is None:
        return tokens.unsqueeze(1).expand(shape)
    assert sequences.host is not None
    starts = sequences.cu_seqlens[:-1].long()
    lengths = sequences.host.diff()
    if not bool(lengths.all()):  # an empty sequence has no place
        real = lengths.nonzero().squeeze(1).to(tokens.device)
        tokens, starts = tokens[real], starts[real]
    return with_padding(tokens, places[starts], shape)


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What layers take for a mask [B, S]: float [B, 1, 1, S], the least number at padding."""
    if mask is None or mask.dim() != 2:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask.bool(), torch.finfo(dtype).min)[:, None, None, :]
