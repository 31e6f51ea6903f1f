"""Which tokens a layer keeps: the plan for all layers of a batch, and what a layer does by it.

How many tokens every layer keeps of every sequence depends on their lengths only (with ratios and absolute lengths), so
all shapes of a forward pass are known on the host before it begins, and nothing waits for a device. Only a threshold
has to look at the importance first.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from lowbit_kernels import gather_tokens, kept_cu_seqlens, select_tokens

from ...config import LengthConfig
from .sequences import Sequences


class Keep(NamedTuple):
    """What a layer that drops tokens leaves of its sequences."""

    sequences: Sequences | None  # None: decided by the threshold
    num_tokens: int  # in all; at least so many where only bounds are known
    score: str | None  # what `attention` calls the importance to choose by; None: the first token only
    threshold: float = 0.0
    min_tokens: int = 1

    @property
    def first_only(self) -> bool:
        return self.score is None


class Kept(NamedTuple):
    """What a layer has left: int64 [T'] rows of its input, and where the sequences lie among them."""

    rows: torch.Tensor
    sequences: Sequences


def plan(
    config: LengthConfig | None,
    layers: int,
    sequences: Sequences,
    num_tokens: int,
    first_token_only: bool,
    keep: torch.Tensor | None = None,
) -> list[Keep | None]:
    """For each layer what it keeps, None where nothing is dropped.

    Args:
        config: None drops nothing.
        layers: of the encoder.
        sequences: as they enter the first layer.
        num_tokens: that enter the first layer.
        first_token_only: only the first token of each sequence is read afterwards: the last layer drops the rest.
        keep: `config.keep` as float64 on the device of `sequences`; None makes it, which a CUDA graph must not.
    """
    steps: list[Keep | None] = [None] * layers
    if config is not None and config.unit == "threshold":
        steps = [Keep(None, 0, config.score, k, config.min_tokens) if k > 0 else None for k in config.keep]
    elif config is not None:
        steps = _by_length(config, sequences, num_tokens, keep)
    if first_token_only:
        batch = sequences.cu_seqlens.numel() - 1
        each = torch.arange(batch + 1, dtype=torch.int32, device=sequences.cu_seqlens.device)
        steps[-1] = Keep(Sequences(each, 1), batch, None)
    return steps


def _by_length(
    config: LengthConfig, sequences: Sequences, num_tokens: int, keep: torch.Tensor | None
) -> list[Keep | None]:
    cu_seqlens, longest, host, _ = sequences
    on_host = torch.tensor(config.keep, dtype=torch.float64)
    keep = on_host.to(cu_seqlens.device) if keep is None else keep
    table = kept_cu_seqlens(cu_seqlens, keep, config.unit, config.min_tokens)
    if host is None:
        batch = cu_seqlens.numel() - 1
        bounds = [_bounds(config, k, num_tokens, longest, batch) for k in config.keep]
        none_dropped = 1.0 if config.unit == "ratio" else float(longest)
        kept = [min(k, none_dropped) for k in config.keep]
        drops = [after < before for before, after in itertools.pairwise([none_dropped, *kept])]
    else:
        known = table
        if table.device != host.device:
            known = kept_cu_seqlens(host, on_host, config.unit, config.min_tokens)
        totals = known[:, -1].tolist()
        bounds = list(zip(totals, known.diff().amax(1).tolist(), strict=True))
        drops = [after < before for before, after in itertools.pairwise([num_tokens, *totals])]
    return [
        Keep(Sequences(cu, longest), total, config.score) if dropped else None
        for cu, (total, longest), dropped in zip(table, bounds, drops, strict=True)
    ]


def _bounds(config: LengthConfig, keep: float, num_tokens: int, longest: int, batch: int) -> tuple[int, int]:
    """(tokens, longest length) that are at most kept of any lengths."""
    if config.unit == "ratio":
        most = math.ceil(keep * num_tokens) + batch * config.min_tokens
        return min(num_tokens, most), min(longest, max(math.ceil(keep * longest), config.min_tokens))
    most = max(int(keep), config.min_tokens)
    return min(num_tokens, batch * most), min(longest, most)


def drop(
    importance: torch.Tensor | None,
    sequences: Sequences,
    keep: Keep,
    num_tokens: int,
    heads: int,
    protected: torch.Tensor | None,
) -> Kept:
    """Choose the tokens that a layer keeps.

    Args:
        importance: float32 [T], attention received; None where only first tokens are kept.
        sequences: the layer's input.
        keep: from `plan`.
        num_tokens: T.
        heads: that importance is a sum over.
        protected: bool [T] or None.
    """
    cu_seqlens, longest, *_ = sequences
    if keep.first_only:
        assert keep.sequences is not None
        # An empty sequence gets some token; it has no place to be read from.
        return Kept(cu_seqlens[:-1].clamp(max=num_tokens - 1).long(), keep.sequences)
    assert importance is not None
    if keep.sequences is not None:
        rows, _ = select_tokens(
            importance,
            cu_seqlens,
            keep.sequences.cu_seqlens,
            protected=protected,
            max_seqlen=longest,
            num_tokens=keep.num_tokens,
        )
        return Kept(rows, keep.sequences)
    even_shares = importance / heads  # importance of all queries has the mean `heads`, that of the first one heads / n
    if keep.score == "cls":
        lengths = cu_seqlens.diff().long()
        even_shares = even_shares * lengths.repeat_interleave(lengths, output_size=num_tokens)
    rows, kept = select_tokens(
        even_shares,
        cu_seqlens,
        keep.threshold,
        unit="threshold",
        min_tokens=keep.min_tokens,
        protected=protected,
        max_seqlen=longest,
    )
    return Kept(rows, Sequences(kept, int(kept.diff().max())))


def importance_loss(importance: torch.Tensor, target: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Cross-entropy between a target and the share of its sequence's importance that each token has, a scalar.

    Args:
        importance: float [T], attention received.
        target: float [T]; what it lacks to 1 in a sequence, as where tokens were dropped before, does not count.
        sequences: that the tokens are of. The loss is the mean over them.
    """
    lengths = sequences.cu_seqlens.diff().long()
    of = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(importance))
    total = importance.new_zeros(len(lengths)).index_add(0, of, importance)
    share = importance / total[of]
    return -(target * (share + 1e-6).log()).sum() / len(lengths)  # a share may be 0, its logarithm must not be


class Survivors:
    """Where the tokens that are left came from, and the states of those that are not.

    Args:
        restore: give dropped tokens the state that they had when they were dropped, else zeros.
        exact: whether there are never more rows than tokens kept. Surplus rows belong to no token.
    """

    def __init__(self, restore: bool, exact: bool) -> None:
        self.restore, self.exact = restore, exact
        self.states: torch.Tensor | None = None
        self.origin: torch.Tensor | None = None

    def keep(self, before: torch.Tensor, kept: Kept) -> None:
        """Note that of the tokens `before` [T, H] the rows `kept.rows` are left."""
        origin = kept.rows if self.origin is None else self.origin[kept.rows]
        if self.states is None:
            spare = before.new_zeros(1, before.shape[1])  # where surplus rows go
            self.states = torch.cat([before if self.restore else torch.zeros_like(before), spare])
        elif self.restore:
            assert self.origin is not None
            self.states = self.states.index_copy(0, self.origin, before)
        if not self.exact:
            surplus = torch.arange(len(origin), device=origin.device) >= kept.sequences.cu_seqlens[-1]
            origin = origin.masked_fill(surplus, len(self.states) - 1)
        self.origin = origin

    def all(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last states of the tokens that are left, [T', H] -> those of all that ever were, [T, H]."""
        if self.states is None or self.origin is None:
            return tokens
        return self.states.index_copy(0, self.origin, tokens)[:-1]


def gathered(kept: Kept | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Rows that are kept of each tensor [T, ...]; the tensors themselves where nothing is dropped."""
    return [x if kept is None else gather_tokens(x, kept.rows) for x in tensors]
