"""Weight quantization: latent float [N, K] -> codes and scale.

    ternarize       t = sign(w) where |w| > 0.7 mean|w|, else 0; scale = mean |w| over t != 0   (Li et al. 2016)
    loss-aware      min sum v (w - a t)^2: a = sum v|w t| / sum v|t|, t = rint(clamp(w/a, -1, 1)) (Hou & Kwok 2018)
    binarize        b = sign(w), sign(0) = +1;  scale = mean|w|                                  (Rastegari et al. 2016)

Sums run over a row or the whole tensor, in float32 and in a fixed order (no float atomics); backends may differ in the
last bits of a sum, hence in the code of a weight that sits on the threshold. Zero rows get scale 0; NaN or infinity
makes the scale NaN. Training runs them on every weight in every step, so they make few passes.
"""

from __future__ import annotations

import torch

from .._ops import FLOATS, check_choice, check_device, check_tensor, define
from .cpu import _binarize_cpu, _outputs, _ternarize_cpu
from .gpu import launch_binarize, launch_ternarize
from .shared import Codes

GRANULARITIES = ("per_row", "per_tensor")


def _ternarize_fake(w: torch.Tensor, per_row: bool, curvature: torch.Tensor | None, iterations: int) -> Codes:
    return _outputs(w, per_row)


_ternarize = define(
    "ternarize(Tensor w, bool per_row, Tensor? curvature, int iterations) -> (Tensor, Tensor)",
    cpu=_ternarize_cpu,
    cuda=launch_ternarize,
    fake=_ternarize_fake,
)

_binarize = define(
    "binarize(Tensor w, bool per_row) -> (Tensor, Tensor)", cpu=_binarize_cpu, cuda=launch_binarize, fake=_outputs
)


def _check(w: torch.Tensor, granularity: str) -> bool:
    check_tensor("w", w, FLOATS, ndim=2)
    check_choice("granularity", granularity, GRANULARITIES)
    return granularity == "per_row"


def ternarize(
    w: torch.Tensor,
    *,
    granularity: str = "per_row",
    curvature: torch.Tensor | None = None,
    iterations: int = 10,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ternary codes and scale of a weight.

    Args:
        w: float [N, K].
        granularity: "per_row" or "per_tensor".
        curvature: None for the TWN threshold; else non-negative float [N, K], the diagonal Hessian estimate of the
            loss-aware form (the square root of Adam's second moment). All zero in a row (or the tensor): even weights.
        iterations: rounds of the loss-aware form, from t = sign(w); the scale is the best for the last codes.

    Returns:
        codes int8 [N, K] in {-1, 0, 1}; scale float32 [N] or [1].

    Raises:
        TypeError, ValueError: dtype, rank, granularity, negative iterations, or a curvature of another shape.
    """
    per_row = _check(w, granularity)
    if not isinstance(iterations, int) or not 0 <= iterations < 2**31:
        raise ValueError(f"iterations={iterations!r}, accepted: a whole number from 0")
    if curvature is not None:
        check_tensor("curvature", curvature, FLOATS)
        check_device(w=w, curvature=curvature)
        if curvature.shape != w.shape:
            raise ValueError(
                f"curvature has shape {tuple(curvature.shape)}, w has {tuple(w.shape)}; they must be equal"
            )
        known = (curvature != 0).any(1, keepdim=True) if per_row else (curvature != 0).any()
        curvature = torch.where(known, curvature, 1.0)
    return _ternarize(w.detach(), per_row, None if curvature is None else curvature.detach(), iterations)


def binarize(w: torch.Tensor, *, granularity: str = "per_row") -> tuple[torch.Tensor, torch.Tensor]:
    """Binary codes and scale of a weight.

    Args:
        w: float [N, K].
        granularity: "per_row" or "per_tensor".

    Returns:
        codes int8 [N, K] in {-1, 1}; scale float32 [N] or [1].

    Raises:
        TypeError, ValueError: dtype, rank or granularity.
    """
    per_row = _check(w, granularity)
    return _binarize(w.detach(), per_row)
