"""`weights`: the CPU path. The formula is in `op.py`."""

from __future__ import annotations

import torch

from .shared import THRESHOLD, Codes

CPU_CHUNK = 2**18  # values treated at a time, so that intermediates stay in cache


def _outputs(w: torch.Tensor, per_row: bool) -> Codes:
    """(codes, scale) to fill."""
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[0] if per_row else 1, dtype=torch.float32)


def _outputs_of_empty(w: torch.Tensor, per_row: bool) -> Codes:
    """What a w without values gives: scale 0."""
    codes, scale = _outputs(w, per_row)
    return codes, scale.zero_()


def _finite_or_nan(scale: torch.Tensor) -> torch.Tensor:
    return scale + (scale - scale)


def _twn(w: torch.Tensor, v: torch.Tensor | None, iterations: int) -> Codes:
    """Codes (as float32 [N, K]) and scale [N] of rows, threshold form."""
    mean = w.abs().mean(1, keepdim=True)
    # In place: comparisons, bool products and torch.where are several times slower on a CPU.
    codes = w.abs().sub_(THRESHOLD * mean).sign_().relu_()
    count = codes.sum(1)
    codes.copysign_(w)
    scale = torch.linalg.vecdot(codes, w) / count.clamp_(min=1)
    return codes, scale + (mean - mean).squeeze(1)


def _loss_aware(w: torch.Tensor, v: torch.Tensor | None, iterations: int) -> Codes:
    """Codes (as float32 [N, K]) and scale [N] of rows, curvature-weighted form."""
    assert v is not None
    magnitude = w.abs()
    weighted = v * magnitude
    total = weighted.sum(1)
    scale = torch.zeros_like(total)  # above 0: sign(w)
    for _ in range(iterations + 1):
        codes = (magnitude - scale.unsqueeze(1) / 2).sign_().relu_()
        weight = torch.linalg.vecdot(codes, v)
        scale = torch.linalg.vecdot(codes, weighted) / weight.masked_fill_(weight == 0, 1.0)
    return codes.mul_((scale > 0).unsqueeze(1)).copysign_(w), scale + (total - total)


def _ternarize_cpu(w: torch.Tensor, per_row: bool, curvature: torch.Tensor | None, iterations: int) -> Codes:
    if w.numel() == 0:
        return _outputs_of_empty(w, per_row)
    codes, scale = _outputs(w, per_row)
    w = w.contiguous()
    method = _twn if curvature is None else _loss_aware
    rows, row_codes = (w, codes) if per_row else (w.reshape(1, -1), codes.view(1, -1))
    v = None if curvature is None else curvature.reshape(rows.shape)
    step = max(1, CPU_CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        new_codes, scale[part] = method(rows[part].float(), None if v is None else v[part].float(), iterations)
        row_codes[part] = new_codes
    return codes, scale


def _binarize_cpu(w: torch.Tensor, per_row: bool) -> Codes:
    if w.numel() == 0:
        return _outputs_of_empty(w, per_row)
    w = w.contiguous()
    codes = (w >= 0).view(torch.int8).mul_(2).sub_(1)
    rows = w.float() if per_row else w.float().reshape(1, -1)
    step = max(1, CPU_CHUNK // rows.shape[1])
    return codes, _finite_or_nan(torch.cat([part.abs().mean(1) for part in rows.split(step)]))
