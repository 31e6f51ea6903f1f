"""Weight quantization: latent float [N, K] -> codes and scale; and ternary weight splitting.

    ternarize       t = sign(w) where |w| > 0.7 mean|w|, else 0; scale = mean |w| over t != 0   (Li et al. 2016)
    loss-aware      min sum v (w - a t)^2: a = sum v|w t| / sum v|t|, t = rint(clamp(w/a, -1, 1)) (Hou & Kwok 2018)
    binarize        b = sign(w), sign(0) = +1;  scale = mean|w|                                  (Rastegari et al. 2016)
    split_ternary   w -> w1 + w2 with binarize(w1) + binarize(w2) = ternarize(w)                  (Bai et al. 2021)

Sums run over a row or the whole tensor, in float32 and in a fixed order (no float atomics); backends may differ in the
last bits of a sum, hence in the code of a weight that sits on the threshold. Zero rows get scale 0; NaN or infinity
makes the scale NaN. Training runs the first three on every weight in every step, so they make few passes.
"""

from __future__ import annotations

import torch

from ._ops import FLOATS, check_choice, check_device, check_tensor, define
from ._triton import tl, triton
from .quantize import warps_holding

Codes = tuple[torch.Tensor, torch.Tensor]

GRANULARITIES = ("per_row", "per_tensor")
THRESHOLD = 0.7

# ---------------------------------------------------------------------------------------------------------- Triton
# Both ternary forms are rounds of one step: given a threshold, sum v|w| and v over the weights above it.


@triton.jit
def _sums_above(w_ptr, v_ptr, length, threshold, HAS_V: tl.constexpr, BLOCK: tl.constexpr):
    """(sum of v|w|, sum of v) over |w| > threshold; v = 1 without curvature."""
    offs = tl.arange(0, BLOCK)
    weighted = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        mask = start + offs < length
        magnitude = tl.abs(tl.load(w_ptr + start + offs, mask=mask, other=0.0).to(tl.float32))
        above = mask & ~(magnitude <= threshold)  # a NaN counts, so that the sum shows it
        v = tl.load(v_ptr + start + offs, mask=mask, other=0.0).to(tl.float32) if HAS_V else 1.0
        weighted += tl.where(above, v * magnitude, 0.0)
        weight += tl.where(above, v, 0.0)
    return tl.sum(weighted, axis=0), tl.sum(weight, axis=0)


@triton.jit
def _mean_above(weighted, weight):
    """weighted / weight, and 0 where there is nothing above the threshold."""
    return tl.div_rn(weighted, tl.where(weight == 0.0, 1.0, weight))


@triton.jit
def _store_ternary(w_ptr, codes_ptr, length, threshold, scale, BLOCK: tl.constexpr):
    threshold = tl.where(scale > 0.0, threshold, float("inf"))
    offs = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        mask = start + offs < length
        w = tl.load(w_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        codes = tl.where(tl.abs(w) > threshold, tl.where(w > 0, 1, -1), 0)
        tl.store(codes_ptr + start + offs, codes.to(tl.int8), mask=mask)


@triton.jit
def _ternarize_row_kernel(
    w_ptr, v_ptr, codes_ptr, scale_ptr, K, iterations, HAS_V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program a row; all passes but the first read from cache."""
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * K
    if HAS_V:
        v_ptr += row * K
        weighted, weight = _sums_above(w_ptr, v_ptr, K, 0.0, HAS_V, BLOCK)
        scale = _mean_above(weighted, weight)
        poison = weighted - weighted
        threshold = scale * 0.0
        for _ in range(iterations):
            threshold = scale * 0.5
            weighted, weight = _sums_above(w_ptr, v_ptr, K, threshold, HAS_V, BLOCK)
            scale = _mean_above(weighted, weight)
    else:
        total, _ = _sums_above(w_ptr, v_ptr, K, -1.0, HAS_V, BLOCK)
        poison = total - total
        threshold = 0.7 * tl.div_rn(total, total * 0.0 + K)
        weighted, weight = _sums_above(w_ptr, v_ptr, K, threshold, HAS_V, BLOCK)
        scale = _mean_above(weighted, weight)
    scale += poison
    tl.store(scale_ptr + row, scale)
    _store_ternary(w_ptr, codes_ptr + row * K, K, threshold, scale, BLOCK)


@triton.jit
def _held_row_kernel(w_ptr, codes_ptr, scale_ptr, K, BINARY: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row, which is read once and kept in registers."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    magnitude = tl.abs(w)
    total = tl.sum(magnitude, axis=0)
    mean = tl.div_rn(total, total * 0.0 + K)
    if BINARY:
        codes, scale = tl.where(w >= 0, 1, -1), mean
    else:
        above = magnitude > 0.7 * mean
        codes = tl.where(above, tl.where(w > 0, 1, -1), 0)
        scale = _mean_above(tl.sum(tl.where(above, magnitude, 0.0), axis=0), tl.sum(above.to(tl.float32), axis=0))
    tl.store(scale_ptr + row, scale + (mean - mean))
    tl.store(codes_ptr + row * K + k, codes.to(tl.int8), mask=k < K)


# With one scale for the whole tensor, each launch leaves partial sums of chunks, and all programs of the next add them
# up in the same order: nothing happens between the launches.


@triton.jit
def _sum_of(partial_ptr, chunks):
    offs = tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float32)
    for start in range(0, chunks, 1024):
        total += tl.load(partial_ptr + start + offs, mask=start + offs < chunks, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _threshold_of(before_ptr, n, chunks, HAS_V: tl.constexpr):
    """The threshold that follows from the sums of the round before."""
    weighted = _sum_of(before_ptr, chunks)
    if HAS_V:
        return _mean_above(weighted, _sum_of(before_ptr + chunks, chunks)) * 0.5
    else:
        return 0.7 * tl.div_rn(weighted, weighted * 0.0 + n)


@triton.jit
def _sums_chunk_kernel(
    w_ptr, v_ptr, before_ptr, after_ptr, n, chunks,
    FIRST: tl.constexpr, HAS_V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of chunk p above the threshold: `after_ptr` float32 [2, chunks], v|w| and v."""
    p = tl.program_id(0).to(tl.int64)
    length = tl.minimum(n - p * CHUNK, CHUNK).to(tl.int32)
    if FIRST:
        threshold = 0.0 if HAS_V else -1.0
    else:
        threshold = _threshold_of(before_ptr, n, chunks, HAS_V)
    weighted, weight = _sums_above(w_ptr + p * CHUNK, v_ptr + p * CHUNK, length, threshold, HAS_V, BLOCK)
    tl.store(after_ptr + p, weighted)
    tl.store(after_ptr + chunks + p, weight)


@triton.jit
def _ternary_chunk_kernel(
    w_ptr, codes_ptr, first_ptr, before_ptr, after_ptr, scale_ptr, n, chunks,
    SIGNS: tl.constexpr, HAS_V: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scale and codes from the sums of the first round, of the last but one and of the last. SIGNS: threshold 0."""
    p = tl.program_id(0).to(tl.int64)
    length = tl.minimum(n - p * CHUNK, CHUNK).to(tl.int32)
    total = _sum_of(first_ptr, chunks)
    scale = _mean_above(_sum_of(after_ptr, chunks), _sum_of(after_ptr + chunks, chunks)) + (total - total)
    if SIGNS:
        threshold = total * 0.0
    else:
        threshold = _threshold_of(before_ptr, n, chunks, HAS_V)
    if p == 0:
        tl.store(scale_ptr, scale)
    _store_ternary(w_ptr + p * CHUNK, codes_ptr + p * CHUNK, length, threshold, scale, BLOCK)


@triton.jit
def _binary_chunk_kernel(w_ptr, codes_ptr, sum_ptr, n, CHUNK, BLOCK: tl.constexpr):
    """Codes and sum|w| of chunk p; a chunk is a long row, or a part of a whole tensor."""
    p = tl.program_id(0).to(tl.int64)
    length = tl.minimum(n - p * CHUNK, CHUNK).to(tl.int32)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        mask = start + offs < length
        w = tl.load(w_ptr + p * CHUNK + start + offs, mask=mask, other=0.0).to(tl.float32)
        total += tl.abs(w)
        tl.store(codes_ptr + p * CHUNK + start + offs, tl.where(w >= 0, 1, -1).to(tl.int8), mask=mask)
    tl.store(sum_ptr + p, tl.sum(total, axis=0))


@triton.jit
def _binary_scale_kernel(sum_ptr, scale_ptr, length, chunks):
    """The mean of `length` magnitudes from the sums of their chunks."""
    group = tl.program_id(0).to(tl.int64)
    total = _sum_of(sum_ptr + group * chunks, chunks)
    scale = tl.div_rn(total, total * 0.0 + length)
    tl.store(scale_ptr + group, scale + (scale - scale))


@triton.jit
def _store_halves(w, kept, side, a, b, w1_ptr, w2_ptr, mask):
    """Both halves of float64 w."""
    small = tl.where(side > 0, tl.where(w > 0, w, 0.0), tl.where(w < 0, w, 0.0)) + side * b
    w1 = tl.where(kept, a * w, small).to(tl.float32)
    tl.store(w1_ptr, w1, mask=mask)
    tl.store(w2_ptr, (w - w1.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def _split_row_kernel(w_ptr, codes_ptr, w1_ptr, w2_ptr, K, BLOCK: tl.constexpr):
    """One program a row, which it keeps in registers. Twin of `_split_terms`, in float64."""
    k = tl.arange(0, BLOCK)
    mask = k < K
    at = tl.program_id(0).to(tl.int64) * K + k
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
    kept = tl.load(codes_ptr + at, mask=mask, other=0) != 0
    small = tl.where(kept, 0.0, w)
    sum_kept = tl.sum(tl.where(kept, tl.abs(w), 0.0), axis=0)
    sum_all = sum_kept + tl.sum(tl.abs(small), axis=0)
    n_kept = tl.sum(kept.to(tl.int32), axis=0)
    balance = tl.sum(small, axis=0)
    side = small * 0.0 + 1.0
    if tl.abs(balance) >= sum_kept:
        heavier = tl.maximum(tl.where(balance > 0, small, -small), 0.0)
        moved = (heavier > 0) & (tl.cumsum(heavier, axis=0) <= tl.abs(balance) * 0.5)
        side = tl.where(moved, -1.0, side)
        balance = tl.sum(side * small, axis=0)
    some = tl.where(n_kept == 0, 1.0, sum_kept)  # without any code there is nothing to balance: halve the row
    a = tl.where(n_kept == 0, 0.5, (sum_kept - balance) / (2.0 * some))
    b = (K / tl.maximum(n_kept, 1).to(tl.float64) * sum_kept - sum_all) / (2 * tl.maximum(K - n_kept, 1)).to(tl.float64)
    b = tl.where(n_kept == 0, 0.0, b)
    _store_halves(w, kept | (n_kept == 0), side, a, b, w1_ptr + at, w2_ptr + at, mask)


@triton.jit
def _split_kernel(w_ptr, kept_ptr, side_ptr, a_ptr, b_ptr, w1_ptr, w2_ptr, length, blocks, BLOCK: tl.constexpr):
    """Both halves of one of the blocks of a group (a long row, or the whole tensor, of more blocks than axis y has)."""
    g = (tl.program_id(0) // blocks).to(tl.int64)
    offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    at, mask = g * length + offs, offs < length
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
    kept = tl.load(kept_ptr + at, mask=mask, other=0) != 0
    side = tl.load(side_ptr + at, mask=mask, other=0).to(tl.float64)
    _store_halves(w, kept, side, tl.load(a_ptr + g), tl.load(b_ptr + g), w1_ptr + at, w2_ptr + at, mask)


MAX_BLOCK = 2048  # 4096 would spill the loss-aware form
MAX_HELD = 16384  # the longest row that one program keeps in registers, by 16 warps
MAX_HELD_SPLIT = 4096  # the same in float64: more would spill
CHUNK = 16384  # values a program when one scale serves the whole tensor


def _block(K: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(K), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": 4 if block <= 1024 else 8, "enable_fp_fusion": True}


def _held(K: int) -> dict[str, int]:
    block = triton.next_power_of_2(K)
    return {"BLOCK": block, "num_warps": warps_holding(block), "enable_fp_fusion": True}


def launch_ternarize(w: torch.Tensor, per_row: bool, curvature: torch.Tensor | None, iterations: int) -> Codes:
    """Run the Triton kernels; arguments as the op's, already validated. One launch per row, else three or more."""
    n = w.numel()
    if n == 0:
        return _outputs_of_empty(w, per_row)
    codes, scale = _outputs(w, per_row)
    w, v = w.contiguous(), None if curvature is None else curvature.contiguous()
    has_v = v is not None
    v = w if v is None else v  # a pointer that is not read
    if per_row:
        rows, K = w.shape
        if has_v or K > MAX_HELD:
            _ternarize_row_kernel[(rows,)](w, v, codes, scale, K, iterations, HAS_V=has_v, **_block(K))
        else:
            _held_row_kernel[(rows,)](w, codes, scale, K, BINARY=False, **_held(K))
        return codes, scale
    chunks = triton.cdiv(n, CHUNK)
    first, before, after = scale.new_empty(3, 2, chunks)
    options = {"HAS_V": has_v, "CHUNK": CHUNK, "BLOCK": MAX_BLOCK, "num_warps": 8, "enable_fp_fusion": True}
    _sums_chunk_kernel[(chunks,)](w, v, first, first, n, chunks, FIRST=True, **options)
    rounds = iterations if has_v else 1
    last = [first, first]
    for turn in range(rounds):
        last = [last[1], (before, after)[turn % 2]]
        _sums_chunk_kernel[(chunks,)](w, v, *last, n, chunks, FIRST=False, **options)
    _ternary_chunk_kernel[(chunks,)](w, codes, first, *last, scale, n, chunks, SIGNS=rounds == 0, **options)
    return codes, scale


def launch_binarize(w: torch.Tensor, per_row: bool) -> Codes:
    """Run the Triton kernels; arguments as the op's. One launch per row, else two."""
    n = w.numel()
    if n == 0:
        return _outputs_of_empty(w, per_row)
    codes, scale = _outputs(w, per_row)
    w = w.contiguous()
    rows, K = w.shape
    if per_row and K <= MAX_HELD:
        _held_row_kernel[(rows,)](w, codes, scale, K, BINARY=True, **_held(K))
        return codes, scale
    groups, length, chunk = (rows, K, K) if per_row else (1, n, CHUNK)
    chunks = triton.cdiv(length, chunk)
    sums = scale.new_empty(groups * chunks)
    _binary_chunk_kernel[(groups * chunks,)](w, codes, sums, n, chunk, **_block(chunk))
    _binary_scale_kernel[(groups,)](sums, scale, length, chunks, num_warps=4, enable_fp_fusion=True)
    return codes, scale


def launch_split(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the Triton kernels; arguments as the op's. Per row one beside ternarize's, else torch reductions come first.

    Nothing is read back: the host does not wait for the device.
    """
    w1, w2 = _split_fake(w, per_row)
    w = w.contiguous()
    if w.numel() == 0:
        return w1, w2
    if per_row and w.shape[1] <= MAX_HELD_SPLIT:
        block = triton.next_power_of_2(w.shape[1])
        warps = min(2 * warps_holding(block), 16)  # float64 takes two registers
        codes, _ = _ternarize(w, True, None, 0)
        options = {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}
        _split_row_kernel[(w.shape[0],)](w, codes, w1, w2, w.shape[1], **options)
        return w1, w2
    kept, a, b, side = _split_terms(w, per_row, look=False)
    assert side is not None
    groups, length = kept.shape
    blocks = triton.cdiv(length, MAX_BLOCK)
    _split_kernel[(groups * blocks,)](
        w, kept.to(torch.int8), side.to(torch.int8), a.contiguous(), b.contiguous(), w1, w2, length, blocks,
        BLOCK=MAX_BLOCK, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return w1, w2


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    w, codes, scale = {"w_ptr": "*fp32"}, {"codes_ptr": "*i8"}, {"scale_ptr": "*fp32"}
    v, first, sums = ({name: "*fp32"} for name in ("v_ptr", "first_ptr", "sum_ptr"))
    rounds = {"before_ptr": "*fp32", "after_ptr": "*fp32"}
    size = {"n": "i32:16", "chunks": "i32"}
    cases: list[tuple] = []
    for binary in (False, True):
        for K in (1024, 4096, MAX_HELD):
            signature = {**w, **codes, **scale, "K": "i32:16"}
            constants, warps = {"BINARY": binary, "BLOCK": K}, warps_holding(K)
            cases.append((f"held rows binary={binary} {K}", _held_row_kernel, signature, constants, warps, 3))
    for has_v in (False, True):
        flags = {"HAS_V": has_v, "CHUNK": CHUNK, "BLOCK": MAX_BLOCK}
        for block, warps in ((1024, 4), (MAX_BLOCK, 8)):
            signature = {**w, **v, **codes, **scale, "K": "i32:16", "iterations": "i32"}
            constants = {"HAS_V": has_v, "BLOCK": block}
            cases.append((f"ternarize rows v={has_v} {block}", _ternarize_row_kernel, signature, constants, warps, 3))
        for is_first in (False, True):
            signature, constants = {**w, **v, **rounds, **size}, {"FIRST": is_first, **flags}
            cases.append((f"ternary sums v={has_v}, {is_first}", _sums_chunk_kernel, signature, constants, 8, 3))
        signature, constants = {**w, **codes, **first, **rounds, **scale, **size}, {"SIGNS": False, **flags}
        cases.append((f"ternary codes v={has_v}", _ternary_chunk_kernel, signature, constants, 8, 3))
    signature = {**w, **codes, **sums, "n": "i32:16", "CHUNK": "i32:16"}
    cases.append(("binary codes", _binary_chunk_kernel, signature, {"BLOCK": MAX_BLOCK}, 8, 3))
    signature = {**sums, **scale, "length": "i32:16", "chunks": "i32"}
    cases.append(("binary scale", _binary_scale_kernel, signature, {}, 4, 3))
    signature = {**w, "kept_ptr": "*i8", "side_ptr": "*i8", "a_ptr": "*fp64", "b_ptr": "*fp64"}
    signature |= {"w1_ptr": "*fp32", "w2_ptr": "*fp32", "length": "i32:16", "blocks": "i32"}
    cases.append(("split", _split_kernel, signature, {"BLOCK": MAX_BLOCK}, 8, 3))
    for K in (1024, MAX_HELD_SPLIT):
        signature, warps = {**w, **codes, "w1_ptr": "*fp32", "w2_ptr": "*fp32", "K": "i32:16"}, 2 * warps_holding(K)
        cases.append((f"split rows {K}", _split_row_kernel, signature, {"BLOCK": K}, warps, 3))
    return cases


# ------------------------------------------------------------------------------------------------------------- CPU

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


# ----------------------------------------------------------------------------------------------------------- split


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


# -------------------------------------------------------------------------------------------------------------- ops


def _ternarize_fake(w: torch.Tensor, per_row: bool, curvature: torch.Tensor | None, iterations: int) -> Codes:
    return _outputs(w, per_row)


def _split_fake(w: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return w.new_empty(w.shape, dtype=torch.float32), w.new_empty(w.shape, dtype=torch.float32)


_ternarize = define(
    "ternarize(Tensor w, bool per_row, Tensor? curvature, int iterations) -> (Tensor, Tensor)",
    cpu=_ternarize_cpu,
    cuda=launch_ternarize,
    fake=_ternarize_fake,
)
_binarize = define(
    "binarize(Tensor w, bool per_row) -> (Tensor, Tensor)", cpu=_binarize_cpu, cuda=launch_binarize, fake=_outputs
)
_split_op = define(
    "split_ternary(Tensor w, bool per_row) -> (Tensor, Tensor)", cpu=_split_cpu, cuda=launch_split, fake=_split_fake
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
