"""Weight quantization: latent float [N, K] -> codes and scale; and ternary weight splitting.

    ternarize       t = sign(w) where |w| > 0.7 mean|w|, else 0;  scale = mean |w| over t != 0   (TernaryBERT eq. 4)
    loss-aware      min sum v (w - a t)^2, alternating a and t                                   (TernaryBERT sec. 3.1)
    binarize        b = sign(w), sign(0) = +1;  scale = mean|w|                                  (BinaryBERT eq. 3)
    split_ternary   w -> w1 + w2 with binarize(w1) + binarize(w2) = ternarize(w)                 (BinaryBERT eq. 8-10)

Means run over a row or the whole tensor. Rows of zeros get scale 0; NaN or infinity makes the scale NaN. The Triton
kernels hold one row in registers and move each weight once; a whole tensor's means are torch reductions before them.
"""

from __future__ import annotations

import torch

from ._ops import FLOATS, check_choice, check_device, check_tensor, define
from ._triton import tl, triton

GRANULARITIES = ("per_row", "per_tensor")
THRESHOLD = 0.7

# ---------------------------------------------------------------------------------------------------------- Triton
# `GIVEN` means that the whole tensor's statistics come in through a pointer; else the row's own are computed.


@triton.jit
def _load_row(w_ptr, K, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    return row, k, tl.load(w_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _ternarize_kernel(w_ptr, codes_ptr, scale_ptr, threshold_ptr, K, GIVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    row, k, w = _load_row(w_ptr, K, BLOCK_K)
    magnitude = tl.abs(w)
    threshold = tl.load(threshold_ptr) if GIVEN else 0.7 * (tl.sum(magnitude, axis=0) / K)
    keep = (magnitude > threshold) & (k < K)
    codes = tl.where(keep, tl.where(w > 0, 1, -1), 0)
    tl.store(codes_ptr + row * K + k, codes.to(tl.int8), mask=k < K)
    if not GIVEN:
        count = tl.sum(keep.to(tl.float32), axis=0)
        scale = tl.sum(tl.where(keep, magnitude, 0.0), axis=0) / tl.maximum(count, 1.0)
        tl.store(scale_ptr + row, scale + (threshold - threshold))


@triton.jit
def _binarize_kernel(w_ptr, codes_ptr, scale_ptr, K, GIVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    row, k, w = _load_row(w_ptr, K, BLOCK_K)
    tl.store(codes_ptr + row * K + k, tl.where(w >= 0, 1, -1).to(tl.int8), mask=k < K)
    if not GIVEN:
        scale = tl.sum(tl.abs(w), axis=0) / K
        tl.store(scale_ptr + row, scale + (scale - scale))


@triton.jit
def _split_kernel(
    w_ptr, w1_ptr, w2_ptr, ab_ptr, threshold_ptr, K, GIVEN: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """`ab_ptr` holds A and B: read when GIVEN, else A is written for the caller to check. Sums are float64."""
    row, k, w = _load_row(w_ptr, K, BLOCK_K)
    magnitude = tl.abs(w)
    threshold = tl.load(threshold_ptr) if GIVEN else 0.7 * (tl.sum(magnitude, axis=0) / K)
    in_i = (magnitude > threshold) & (k < K)
    in_j = (magnitude <= threshold) & (w > 0) & (k < K)
    w = w.to(tl.float64)
    if GIVEN:
        a = tl.load(ab_ptr)
        b = tl.load(ab_ptr + 1)
    else:
        magnitude = magnitude.to(tl.float64)
        s_i = tl.sum(tl.where(in_i, magnitude, 0.0), axis=0)
        s_j = tl.sum(tl.where(in_j, magnitude, 0.0), axis=0)
        s_all = tl.sum(magnitude, axis=0)
        n_i = tl.sum(in_i.to(tl.float64), axis=0)
        n_zero = K - n_i
        # A row of zeros (n_i = 0) is halved; one without zero codes needs no B.
        a = tl.where(n_i > 0, (s_all - 2 * s_j) / (2 * tl.where(n_i > 0, s_i, 1.0)), 0.5)
        b = tl.where(
            (n_zero > 0) & (n_i > 0),
            (K / tl.where(n_i > 0, n_i, 1.0) * s_i - s_all) / (2 * tl.where(n_zero > 0, n_zero, 1.0)),
            0.0,
        )
        tl.store(ab_ptr + row, a)
    w1 = tl.where(in_i, a * w, tl.where(in_j, b + w, b))
    tl.store(w1_ptr + row * K + k, w1.to(tl.float32), mask=k < K)
    tl.store(w2_ptr + row * K + k, (w - w1).to(tl.float32), mask=k < K)


def launch_ternarize(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Triton kernel; arguments as the op's."""
    w = w.contiguous()
    codes, scale = _empty(w, per_row)
    threshold = None
    if not per_row and w.numel():
        threshold = THRESHOLD * w.float().abs().mean().reshape(1)
        scale = _ternary_scale(w.float().reshape(1, -1), threshold.reshape(1, 1))[1]
    if w.numel():
        grid, block = (w.shape[0],), triton.next_power_of_2(w.shape[1])
        _ternarize_kernel[grid](w, codes, scale, threshold, w.shape[1], GIVEN=not per_row, BLOCK_K=block)
    return codes, scale


def launch_binarize(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Triton kernel; arguments as the op's."""
    w = w.contiguous()
    codes, scale = _empty(w, per_row)
    if not per_row and w.numel():
        scale = _poisoned(w.float().abs().mean().reshape(1))
    if w.numel():
        grid, block = (w.shape[0],), triton.next_power_of_2(w.shape[1])
        _binarize_kernel[grid](w, codes, scale, w.shape[1], GIVEN=not per_row, BLOCK_K=block)
    return codes, scale


def launch_split(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the Triton kernel; arguments as the op's."""
    w = w.contiguous()
    w1, w2 = torch.empty_like(w, dtype=torch.float32), torch.empty_like(w, dtype=torch.float32)
    ab = w.new_empty(max(w.shape[0], 2), dtype=torch.float64)
    threshold = None
    if not w.numel():
        return w1, w2, ab[:0]
    if not per_row:
        flat = w.float().reshape(1, -1)
        threshold = THRESHOLD * flat.abs().mean().reshape(1)
        a, b = _split_constants(flat, flat.abs() > threshold)
        ab = torch.cat([a.reshape(1), b.reshape(1)])
    grid, block = (w.shape[0],), triton.next_power_of_2(w.shape[1])
    _split_kernel[grid](
        w, w1, w2, ab, threshold, w.shape[1], GIVEN=not per_row, BLOCK_K=block, num_warps=4 if block <= 1024 else 8
    )
    return w1, w2, ab[: w.shape[0] if per_row else 1]


# ------------------------------------------------------------------------------------------------------------- CPU


def _empty(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    return codes, torch.zeros(w.shape[0] if per_row else 1, dtype=torch.float32, device=w.device)


def _rows(w: torch.Tensor, per_row: bool) -> torch.Tensor:
    """What shares a scale, as rows."""
    return w.float() if per_row else w.float().reshape(1, -1)


def _poisoned(scale: torch.Tensor) -> torch.Tensor:
    """NaN where the mean is infinite: an infinite weight is as unusable as NaN."""
    return scale + (scale - scale)


def _ternary_scale(rows: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = (rows > threshold).view(torch.int8) - (rows < -threshold).view(torch.int8)
    total = (rows * codes).sum(1)
    return codes, total / codes.count_nonzero(1).clamp(min=1) + (threshold - threshold).squeeze(1)


def _ternarize_cpu(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not w.numel():
        return _empty(w, per_row)
    rows = _rows(w, per_row)
    codes, scale = _ternary_scale(rows, THRESHOLD * rows.abs().mean(1, keepdim=True))
    return codes.view(w.shape), scale


def _binarize_cpu(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not w.numel():
        return _empty(w, per_row)
    codes = (w >= 0).view(torch.int8) * 2 - 1
    return codes, _poisoned(_rows(w, per_row).abs().mean(1))


def _split_constants(rows: torch.Tensor, in_i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of BinaryBERT eq. 9-10 for each row, float64 [rows, 1]."""
    rows = rows.double()
    magnitude, in_j = rows.abs(), ~in_i & (rows > 0)
    s_i, s_j = (magnitude * in_i).sum(1, keepdim=True), (magnitude * in_j).sum(1, keepdim=True)
    s_all = magnitude.sum(1, keepdim=True)
    n_i = in_i.sum(1, keepdim=True)
    n_zero = rows.shape[1] - n_i
    # S_I + S_K - S_J = S_all - 2 S_J. A row of zeros (n_i = 0) is halved; one without zero codes needs no B.
    a = torch.where(n_i > 0, (s_all - 2 * s_j) / (2 * s_i), 0.5)
    b = (rows.shape[1] / n_i.clamp(min=1) * s_i - s_all) / (2 * n_zero.clamp(min=1))
    return a, torch.where((n_zero > 0) & (n_i > 0), b, 0.0)


def _split_cpu(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not w.numel():
        return w.float(), w.float(), w.new_empty(0, dtype=torch.float64)
    rows = _rows(w, per_row)
    in_i = rows.abs() > THRESHOLD * rows.abs().mean(1, keepdim=True)
    a, b = _split_constants(rows, in_i)
    rows = rows.double()
    w1 = torch.where(in_i, a * rows, torch.where(rows > 0, b + rows, b))
    return w1.float().view(w.shape), (rows - w1).float().view(w.shape), a.squeeze(1)


# -------------------------------------------------------------------------------------------------------------- ops


def _fake_split(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w1 = w.new_empty(w.shape, dtype=torch.float32)
    scales = 0 if w.numel() == 0 else w.shape[0] if per_row else 1
    return w1, torch.empty_like(w1), w.new_empty(scales, dtype=torch.float64)


_ternarize = define(
    "ternarize(Tensor w, bool per_row) -> (Tensor, Tensor)", cpu=_ternarize_cpu, cuda=launch_ternarize, fake=_empty
)
_binarize = define(
    "binarize(Tensor w, bool per_row) -> (Tensor, Tensor)", cpu=_binarize_cpu, cuda=launch_binarize, fake=_empty
)
_split = define(
    "split_ternary(Tensor w, bool per_row) -> (Tensor, Tensor, Tensor)",
    cpu=_split_cpu,
    cuda=launch_split,
    fake=_fake_split,
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
            loss-aware form (the square root of Adam's second moment).
        iterations: rounds of the loss-aware form.

    Returns:
        codes int8 [N, K] in {-1, 0, 1}; scale float32 [N] or [1].

    Raises:
        TypeError, ValueError: dtype, rank, granularity, or a curvature of another shape.
    """
    per_row = _check(w, granularity)
    if curvature is None:
        return _ternarize(w, per_row)
    check_tensor("curvature", curvature, FLOATS)
    check_device(w=w, curvature=curvature)
    if curvature.shape != w.shape:
        raise ValueError(f"curvature has shape {tuple(curvature.shape)}, w has {tuple(w.shape)}; they must be equal")
    if not w.numel():
        return _empty(w, per_row)
    rows, v = _rows(w, per_row), _rows(curvature, per_row)
    codes = rows.sign()
    scale = rows.new_zeros(rows.shape[0], 1)
    for _ in range(iterations):
        total = (v * codes.abs()).sum(1, keepdim=True)
        scale = torch.where(total == 0, 0.0, (v * codes * rows).sum(1, keepdim=True) / total)
        codes = torch.where(scale == 0, 0.0, torch.round((rows / scale).clamp(-1, 1)))
    return codes.nan_to_num().to(torch.int8).view(w.shape), _poisoned(scale.squeeze(1))


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
    return _binarize(w, _check(w, granularity))


def split_ternary(w: torch.Tensor, *, granularity: str = "per_row") -> tuple[torch.Tensor, torch.Tensor]:
    """Ternary weight splitting: two latent binary weights that sum to `w`, latent and quantized.

    Where t = ternarize(w) is not 0: (A w, (1-A) w); where t = 0: (B + w, -B) for w > 0 and (B, w - B) for w <= 0, with
    A and B such that both binary scales are half the ternary one. Sums are float64.

    Args:
        w: float [N, K].
        granularity: "per_row" or "per_tensor", as the ternary weight is quantized.

    Returns:
        w1, w2: float32 [N, K].

    Raises:
        TypeError, ValueError: dtype, rank, granularity; NaN or infinity; or a row whose zero-coded weights are so
            one-sided that A is not in (0, 1) and no such pair exists.
    """
    w1, w2, a = _split(w, _check(w, granularity))
    wrong = ~((a > 0) & (a < 1))
    if not a.is_meta and bool(wrong.any()):
        where = f"row {int(wrong.nonzero()[0])}" if granularity == "per_row" else "the tensor"
        raise ValueError(
            f"split_ternary: {where} gives A={float(a[wrong][0]):.3g}, which must be in (0, 1): its small weights "
            "are nearly all of one sign, or it holds NaN or infinity; train further or use granularity='per_tensor'"
        )
    return w1, w2
