"""`prune`: Triton kernels and their launches. The formula is in `op.py`."""

from __future__ import annotations

import torch

from .._triton import tl, triton


@triton.jit(do_not_specialize=["num_tokens"])
def _select_kernel(
    importance_ptr, protected_ptr, cu_seqlens_ptr, new_cu_seqlens_ptr, index_ptr, num_tokens,
    PROTECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence. The key of the last token kept is found bit by bit, a count of the sequence for each: 32
    counts instead of n^2 compares. Tokens with that key stay from the front as long as there is room.
    """
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    new_start = tl.load(new_cu_seqlens_ptr + sequence)
    room = tl.load(new_cu_seqlens_ptr + sequence + 1) - new_start
    j = tl.arange(0, BLOCK)
    s = tl.load(importance_ptr + start + j, mask=j < length, other=0.0)
    if s.dtype.primitive_bitwidth < 32:
        s = s.to(tl.float32)

    # An integer that orders as the float does: -0 as 0, NaN below -inf.
    BITS: tl.constexpr = s.dtype.primitive_bitwidth
    KEY: tl.constexpr = tl.int64 if BITS == 64 else tl.int32
    lowest = tl.full([], 1, KEY) << (BITS - 1)
    key = s.to(KEY, bitcast=True)
    key = tl.where(key == lowest, 0, key)
    key = tl.where(s == s, key ^ ((key >> (BITS - 1)) & ~lowest), lowest)

    # A single condition is never joined with a block of them: Triton 3.9's interpreter refuses such masks.
    kept = (j == 0) & (j < tl.minimum(length, room))
    candidate = (j > 0) & (j < length)
    room -= 1
    if PROTECTED:
        protected = candidate & (tl.load(protected_ptr + start + j, mask=j < length, other=0) != 0)
        count = tl.sum(protected.to(tl.int32))
        all_fit = count <= room
        candidate = tl.where(all_fit, candidate & ~protected, protected)
        kept |= protected & (j < tl.where(all_fit, length, 0))
        room -= tl.where(all_fit, count, 0)

    last = lowest
    for bit in range(BITS):
        higher = last ^ (tl.full([], 1, KEY) << (BITS - 1 - bit))
        last = tl.where(tl.sum((candidate & (key >= higher)).to(tl.int32)) >= room, higher, last)
    above = candidate & (key > last)
    equal = candidate & (key == last)
    left = room - tl.sum(above.to(tl.int32))
    kept |= above | (equal & (tl.cumsum(equal.to(tl.int32)) <= left))

    place = new_start + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(index_ptr + place, (start + j).to(tl.int64), mask=kept & (place < num_tokens))

    sequences = tl.num_programs(0)
    total = tl.load(new_cu_seqlens_ptr + sequences)
    for surplus in range(total + sequence * BLOCK, num_tokens, sequences * BLOCK):
        tl.store(index_ptr + surplus + j, tl.zeros([BLOCK], tl.int64), mask=surplus + j < num_tokens)


def warps(BLOCK: int) -> int:
    """4 keys a thread, more beyond 2048: counting, not loading, takes the time."""
    return max(1, min(16, BLOCK // 128))


def launch(
    importance: torch.Tensor,
    cu_seqlens: torch.Tensor,
    new_cu_seqlens: torch.Tensor,
    protected: torch.Tensor | None,
    max_seqlen: int | None,
    num_tokens: int | None,
) -> torch.Tensor:
    """Run the Triton kernel; arguments as the op's, already validated."""
    B = cu_seqlens.shape[0] - 1
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if B else 0
    if num_tokens is None:
        num_tokens = int(new_cu_seqlens[-1])
    if B == 0 or max_seqlen == 0 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=importance.device)
    index = torch.empty(num_tokens, dtype=torch.int64, device=importance.device)
    BLOCK = max(32, triton.next_power_of_2(max_seqlen))
    _select_kernel[(B,)](
        importance.contiguous(), None if protected is None else protected.contiguous().view(torch.uint8),
        cu_seqlens.contiguous(), new_cu_seqlens.contiguous(), index, num_tokens,
        PROTECTED=protected is not None, BLOCK=BLOCK, num_warps=warps(BLOCK), enable_fp_fusion=True,
    )  # fmt: skip
    return index


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    cases = []
    for protected, dtype, BLOCK in ((0, "fp32", 128), (1, "fp32", 512), (1, "fp32", 8192), (1, "fp64", 8192)):
        signature = {"importance_ptr": f"*{dtype}", "protected_ptr": "*u8", "cu_seqlens_ptr": "*i32"}
        signature |= {"new_cu_seqlens_ptr": "*i32", "index_ptr": "*i64", "num_tokens": "i32"}
        constants = {"PROTECTED": bool(protected), "BLOCK": BLOCK}
        label = f"select tokens {dtype} {BLOCK}{' protected' if protected else ''}"
        cases.append((label, _select_kernel, signature, constants, warps(BLOCK), 3))
    return cases
