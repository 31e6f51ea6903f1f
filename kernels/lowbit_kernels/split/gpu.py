"""`split`: Triton kernels and their launches. The formula is in `op.py`."""

from __future__ import annotations

import torch

from .._triton import tl, triton
from ..quantize.gpu import warps_holding
from ..weights.gpu import MAX_BLOCK
from ..weights.op import _ternarize
from .cpu import _split_fake, _split_terms


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


MAX_HELD_SPLIT = 4096  # the same in float64: more would spill


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
    w, codes = {"w_ptr": "*fp32"}, {"codes_ptr": "*i8"}
    cases: list[tuple] = []
    signature = {**w, "kept_ptr": "*i8", "side_ptr": "*i8", "a_ptr": "*fp64", "b_ptr": "*fp64"}
    signature |= {"w1_ptr": "*fp32", "w2_ptr": "*fp32", "length": "i32:16", "blocks": "i32"}
    cases.append(("split", _split_kernel, signature, {"BLOCK": MAX_BLOCK}, 8, 3))
    for K in (1024, MAX_HELD_SPLIT):
        signature, warps = {**w, **codes, "w1_ptr": "*fp32", "w2_ptr": "*fp32", "K": "i32:16"}, 2 * warps_holding(K)
        cases.append((f"split rows {K}", _split_row_kernel, signature, {"BLOCK": K}, warps, 3))
    return cases
