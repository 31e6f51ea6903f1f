"""Ternary weight splitting: latent float [N, K] -> two of them.

w -> w1 + w2 with binarize(w1) + binarize(w2) = ternarize(w)      (Bai et al. 2021, section 3.2, eq. 8-10)
"""

from __future__ import annotations

import torch

from .._ops import define
from ..weights.op import _check
from .cpu import _split_cpu, _split_fake
from .gpu import launch_split

_split_op = define(
    "split_ternary(Tensor w, bool per_row) -> (Tensor, Tensor)", cpu=_split_cpu, cuda=launch_split, fake=_split_fake
)


def split_ternary(w: torch.Tensor, *, granularity: str = "per_row") -> tuple[torch.Tensor, torch.Tensor]:
    """Ternary weight splitting: two latent binary weights that sum to `w`, latent and quantized.

    Where t = ternarize(w) is not 0: (A w, (1-A) w); where t = 0: (B + w, -B) for w > 0 and (B, w - B) for w <= 0, with
    A and B such that both binary scales are half the ternary one. Sums are float64. If the zero-coded weights are so
    one-sided that A would leave (0, 1), some of them take (-B, B + w) or (w - B, B) instead, and the identity holds
    all the same. A row of zeros gives zeros; NaN or infinity in a row gives NaN scales.

    Args:
        w: float [N, K].
        granularity: "per_row" or "per_tensor", as the ternary weight is quantized.

    Returns:
        w1, w2: float32 [N, K].

    Raises:
        TypeError, ValueError: dtype, rank or granularity.
    """
    per_row = _check(w, granularity)
    return _split_op(w.detach(), per_row)
