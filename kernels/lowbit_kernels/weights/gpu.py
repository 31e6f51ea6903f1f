"""`weights`: Triton kernels and their launches. The formula is in `op.py`."""

from __future__ import annotations

import torch

from .._triton import tl, triton
from ..quantize.gpu import warps_holding
from .cpu import _outputs, _outputs_of_empty
from .shared import Codes

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


MAX_BLOCK = 2048  # 4096 would spill the loss-aware form

MAX_HELD = 16384  # the longest row that one program keeps in registers, by 16 warps

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
    return cases
