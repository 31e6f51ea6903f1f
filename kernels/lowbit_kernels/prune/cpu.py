"""`prune`: the CPU path. The formula is in `op.py`."""

from __future__ import annotations

import itertools

import torch


def _cpu(
    importance: torch.Tensor,
    cu_seqlens: torch.Tensor,
    new_cu_seqlens: torch.Tensor,
    protected: torch.Tensor | None,
    max_seqlen: int | None,
    num_tokens: int | None,
) -> torch.Tensor:
    """Sequences are sorted as rows of one matrix, padded with NaN: it stays behind a token's NaN, which comes first."""
    longest, T = _check_lengths(cu_seqlens, len(importance), max_seqlen)
    total = _check_new_lengths(new_cu_seqlens, cu_seqlens, num_tokens)
    if total == 0:
        return importance.new_zeros(num_tokens or 0, dtype=torch.int64)
    starts, new_starts = cu_seqlens[:-1].unsqueeze(1), new_cu_seqlens[:-1].unsqueeze(1)
    place = torch.arange(longest, dtype=torch.int32)
    own = None if len(starts) * longest == T else place < cu_seqlens[1:].unsqueeze(1) - starts
    descending = _rows(importance[:T], own, longest, torch.nan).neg()
    descending[:, 0] = -torch.inf
    order = descending.sort(dim=1, stable=True).indices
    if protected is not None:
        last = _rows(protected[:T].logical_not(), own, longest, True)
        last[:, 0] = False
        order = order.gather(1, last.gather(1, order).sort(dim=1, stable=True).indices)
    tokens = order.add_(starts)[place < new_cu_seqlens[1:].unsqueeze(1) - new_starts]
    kept = importance.new_zeros(T, dtype=torch.bool).index_fill_(0, tokens, True)
    index = kept.nonzero().squeeze(1)
    return index if num_tokens in (None, total) else torch.nn.functional.pad(index, (0, num_tokens - total))


def _rows(x: torch.Tensor, own: torch.Tensor | None, longest: int, padding: float) -> torch.Tensor:
    """Sequences as rows; `own` says where a row holds tokens, None where all do (the rows may then be x itself)."""
    if own is None:
        return x.view(-1, longest)
    return x.new_full(own.shape, padding).masked_scatter_(own, x)


def _check_lengths(cu_seqlens: torch.Tensor, T: int, max_seqlen: int | None) -> tuple[int, int]:
    """(longest length, end of the last sequence) or ValueError. Lists: ten tensor operations cost more than a sort."""
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[0] != 0 or min(lengths, default=0) < 0 or ends[-1] > T:
        raise ValueError(f"cu_seqlens={_shown(cu_seqlens)}, expected to start at 0, never to fall, to end within T={T}")
    longest = max(lengths, default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen={max_seqlen}, but cu_seqlens has a sequence of {longest} tokens")
    return longest, ends[-1]


def _check_new_lengths(new_cu_seqlens: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int | None) -> int:
    """The number of tokens kept, or ValueError."""
    ends, old_ends = new_cu_seqlens.tolist(), cu_seqlens.tolist()
    lengths = (end - start for start, end in itertools.pairwise(ends))
    old_lengths = (end - start for start, end in itertools.pairwise(old_ends))
    if ends[0] != 0 or not all(0 <= new <= old for new, old in zip(lengths, old_lengths, strict=True)):
        raise ValueError(
            f"keep={_shown(new_cu_seqlens)} as new cu_seqlens, expected to start at 0, never to fall, and no sequence "
            f"longer than in cu_seqlens={_shown(cu_seqlens)}"
        )
    if num_tokens is not None and num_tokens < ends[-1]:
        raise ValueError(f"num_tokens={num_tokens}, but {ends[-1]} tokens are kept")
    return ends[-1]


def _shown(cu_seqlens: torch.Tensor) -> str:
    shown = ", ".join(map(str, cu_seqlens[:16].tolist()))
    return f"[{shown}{', ...' if len(cu_seqlens) > 16 else ''}]"
