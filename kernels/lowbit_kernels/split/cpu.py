"""`split`: the CPU path. The formula is in `op.py`."""

from __future__ import annotations

import torch

from ..weights.op import _ternarize


def _split_terms(
    w: torch.Tensor, per_row: bool, look: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(kept, A, B, side) of every row, or of the whole tensor as one row; A and B float64 [rows, 1].

    A = (S_I + S_K - S_J) / (2 S_I), B = (n/|I| S_I - S_all) / (2 (|J| + |K|)) over I = {t != 0}, J = {t = 0, w > 0},
    K = {t = 0, w <= 0}. `side` says which half gets a small weight: the first, +1 (None: all), or the second, -1. None
    takes a look at the values, for which a device would have to be waited for.
    """
    codes, _ = _ternarize(w, per_row, None, 0)
    rows = (w if per_row else w.reshape(1, -1)).float().double()
    kept = (codes if per_row else codes.reshape(1, -1)) != 0
    small = rows.masked_fill(kept, 0.0)
    sum_all, sum_small, excess = (t.sum(1, keepdim=True) for t in (rows.abs(), small.abs(), small))
    sum_kept = sum_all - sum_small
    # If nearly all small weights had one sign, A would leave (0, 1) and the halves lose the sign of w. Then enough of
    # that sign change sides: what stays is less than twice the TWN threshold, hence less than S_I.
    side, balance = None, excess  # S_J - S_K
    one_sided = excess.abs() >= sum_kept
    if not look or bool(one_sided.any()):
        heavier = (small * excess.sign()).clamp_(min=0)
        moved = one_sided & (heavier > 0) & (heavier.cumsum(1) <= excess.abs() / 2)
        side = torch.ones_like(rows).masked_fill_(moved, -1.0)
        balance = (side * small).sum(1, keepdim=True)
    n, n_kept = rows.shape[1], kept.sum(1, keepdim=True)
    a = (sum_kept - balance) / (2 * sum_kept)
    b = (n / n_kept * sum_kept - sum_all) / (2 * (n - n_kept).clamp(min=1))
    # Without any code (zeros, NaN) there is nothing to balance: halve the row.
    empty = n_kept == 0
    return kept | empty, torch.where(empty, 0.5, a), torch.where(empty, 0.0, b), side


def _split_cpu(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if w.numel() == 0:
        return _split_fake(w, per_row)
    w = w.contiguous()
    kept, a, b, side = _split_terms(w, per_row, look=True)
    rows = w.view(kept.shape).float().double()
    # The offset puts the halves on opposite sides of 0, and the one on w's side takes w.
    if side is None:
        small = rows.clamp(min=0) + b
    else:
        small = torch.where(side > 0, rows.clamp(min=0), rows.clamp(max=0)) + side * b
    w1 = torch.where(kept, a * rows, small).float()
    return w1.view(w.shape), (rows - w1).float().view(w.shape)


def _split_fake(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return w.new_empty(w.shape, dtype=torch.float32), w.new_empty(w.shape, dtype=torch.float32)
