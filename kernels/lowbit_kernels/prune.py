"""Token pruning on packed batches: which tokens of every sequence stay, and their rows.

    rank[j] = #{k: s[k] > s[j], or s[k] == s[j] and k < j}     over the tokens k of the same sequence
    index   = the tokens with rank[j] < new length of their sequence, in their old order

The first token of a sequence has rank 0, protected tokens come next; s is the importance, and NaN ranks last.
"""

from __future__ import annotations

import itertools
import math

import torch

from ._ops import FLOATS, check_choice, check_device, check_tensor, define
from ._triton import tl, triton

UNITS = ("ratio", "tokens", "threshold")
KEEP_DTYPES = (torch.float64, torch.int64, torch.int32)  # float32 would turn the ratio 0.1 of 10 tokens into 2

# ---------------------------------------------------------------------------------------------------------- Triton


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


# ------------------------------------------------------------------------------------------------------------- CPU


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


# -------------------------------------------------------------------------------------------------------------- op


def _fake(
    importance: torch.Tensor,
    cu_seqlens: torch.Tensor,
    new_cu_seqlens: torch.Tensor,
    protected: torch.Tensor | None,
    max_seqlen: int | None,
    num_tokens: int | None,
) -> torch.Tensor:
    size = torch.library.get_ctx().new_dynamic_size() if num_tokens is None else num_tokens
    return importance.new_empty(size, dtype=torch.int64)


_op = define(
    "select_tokens(Tensor importance, Tensor cu_seqlens, Tensor new_cu_seqlens, Tensor? protected, "
    "SymInt? max_seqlen, SymInt? num_tokens) -> Tensor",
    cpu=_cpu,
    cuda=launch,
    fake=_fake,
)


def select_tokens(
    importance: torch.Tensor,
    cu_seqlens: torch.Tensor,
    keep: float | torch.Tensor,
    *,
    unit: str = "ratio",
    min_tokens: int = 1,
    protected: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    num_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the most important tokens of every sequence; carries no gradient.

    The first token of a sequence goes before all others, then protected ones, then by importance; of equals the one
    further in front, and NaN last. The kept ones stay in their order.

    Args:
        importance: float32, float16, bfloat16 or float64 [T].
        cu_seqlens: int32 [B + 1], from 0 to T: sequence b holds the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
            Tokens behind the last sequence belong to none.
        keep: a number, by `unit`; or int32 [B + 1], the cu_seqlens of the kept tokens (`kept_cu_seqlens`), where unit
            and min_tokens play no part.
        unit: "ratio" or "tokens", as in `kept_cu_seqlens`; "threshold": tokens of at least that importance stay, the
            first one and protected ones too.
        min_tokens: fewer are not kept of a sequence that has as many.
        protected: bool [T].
        max_seqlen: no sequence is longer; without it, CUDA has to wait for the lengths.
        num_tokens: how many tokens are kept, or more; without it, CUDA has to wait for the number, and torch.compile
            sees a size that depends on data.

    Returns:
        index: int64 [T'], the tokens kept, ascending; T' is num_tokens where given, entries beyond the kept ones are 0.
        new_cu_seqlens: int32 [B + 1].

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, units or numbers that do not fit; cu_seqlens, max_seqlen or
            num_tokens that do not fit each other or T (CPU; on CUDA, where a check would stall the device, they give
            undefined results).
    """
    check_tensor("importance", importance, FLOATS, ndim=1)
    _check_cu_seqlens("cu_seqlens", cu_seqlens)
    if protected is not None:
        check_tensor("protected", protected, (torch.bool,))
        if protected.shape != importance.shape:
            raise ValueError(f"protected has shape {tuple(protected.shape)}, expected {tuple(importance.shape)}")
    if isinstance(keep, torch.Tensor):
        _check_cu_seqlens("keep", keep)
        if keep.shape != cu_seqlens.shape:
            raise ValueError(f"keep has {len(keep)} entries, expected as many as cu_seqlens: {len(cu_seqlens)}")
        check_device(cu_seqlens=cu_seqlens, keep=keep)
    check_choice("unit", unit, UNITS)
    check_device(importance=importance, cu_seqlens=cu_seqlens, protected=protected)
    importance = importance.detach()
    if isinstance(keep, torch.Tensor):
        new_cu_seqlens = keep
    elif unit == "threshold":
        new_cu_seqlens = _above_threshold(importance, cu_seqlens, keep, min_tokens, protected)
    else:
        new_cu_seqlens = kept_cu_seqlens(cu_seqlens, keep, unit, min_tokens)
    return _op(importance, cu_seqlens, new_cu_seqlens, protected, max_seqlen, num_tokens), new_cu_seqlens


def _above_threshold(
    importance: torch.Tensor, cu_seqlens: torch.Tensor, keep: float, min_tokens: int, protected: torch.Tensor | None
) -> torch.Tensor:
    """The new cu_seqlens of a threshold: these tokens have the lowest ranks, so their number says which they are."""
    _check_min_tokens(min_tokens)
    if not isinstance(keep, int | float) or math.isnan(keep):
        raise ValueError(f"keep={keep!r} with unit='threshold', accepted: a number that is not NaN")
    if importance.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_lengths(cu_seqlens, len(importance), None)
    stays = importance.double() >= float(keep)
    if protected is not None:
        stays |= protected
    stays = torch.nn.functional.pad(stays, (0, 1))  # room for the start of empty sequences at the end
    stays.index_fill_(0, cu_seqlens[:-1].long(), True)
    before = torch.nn.functional.pad(stays.cumsum(0, dtype=torch.int32), (1, 0))
    return _cu_seqlens(before.index_select(0, cu_seqlens).diff(), cu_seqlens.diff(), min_tokens)


def kept_cu_seqlens(
    cu_seqlens: torch.Tensor, keep: float | torch.Tensor, unit: str = "ratio", min_tokens: int = 1
) -> torch.Tensor:
    """How many tokens of every sequence are kept, as cu_seqlens; no synchronisation on CUDA.

        ratio   clamp(ceil(keep * n), min_tokens, n)     in float64
        tokens  min(n, max(keep, min_tokens))

    Args:
        cu_seqlens: int32 [..., B + 1].
        keep: a ratio in (0, 1] or a number of tokens from 1; float64, int64 or int32 [L] gives L results at once.
        unit: "ratio" or "tokens".
        min_tokens: fewer are not kept of a sequence that has as many; at least 1.

    Returns:
        int32 [..., B + 1] like cu_seqlens, or broadcast with [L, B + 1].

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, units or numbers that do not fit (values of a CUDA tensor are
            not looked at).
    """
    check_choice("unit", unit, UNITS[:2])
    _check_min_tokens(min_tokens)
    _check_cu_seqlens("cu_seqlens", cu_seqlens, ndim=None)
    if isinstance(keep, torch.Tensor):
        check_tensor("keep", keep, KEEP_DTYPES, ndim=1)
        check_device(cu_seqlens=cu_seqlens, keep=keep)
        if cu_seqlens.dim() > 1 and 1 != len(keep) != cu_seqlens.shape[-2] != 1:
            raise ValueError(f"keep has {len(keep)} entries, expected as many as cu_seqlens {tuple(cu_seqlens.shape)}")
        if keep.device.type == "cpu" and not torch.compiler.is_compiling():
            for value in keep.tolist():
                _check_keep(value, unit)
        keep = keep.unsqueeze(-1)
    else:
        _check_keep(keep, unit)
    lengths = cu_seqlens.diff()
    if unit == "ratio":
        kept = (lengths.double() * keep).ceil()
    else:
        kept = torch.zeros_like(lengths, dtype=torch.float64) + (
            keep if isinstance(keep, torch.Tensor) else float(keep)
        )
    return _cu_seqlens(kept, lengths, min_tokens)


def _cu_seqlens(kept: torch.Tensor, lengths: torch.Tensor, min_tokens: int) -> torch.Tensor:
    """cu_seqlens of so many tokens, but at least min_tokens and at most the length."""
    kept = torch.minimum(kept.clamp(min=min(min_tokens, 2**31 - 1)), lengths)
    return torch.nn.functional.pad(kept.cumsum(-1, dtype=torch.int32), (1, 0))


def _check_cu_seqlens(name: str, cu_seqlens: torch.Tensor, ndim: int | None = 1) -> None:
    check_tensor(name, cu_seqlens, (torch.int32,), ndim=ndim)
    if cu_seqlens.dim() == 0 or cu_seqlens.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(cu_seqlens.shape)}, expected B + 1 entries")


def _check_keep(keep: float, unit: str) -> None:
    accepted = {"ratio": "a ratio in (0, 1]", "tokens": "a whole number from 1"}[unit]
    fits = isinstance(keep, int | float) and (0 < keep <= 1 if unit == "ratio" else keep >= 1 and keep % 1 == 0)
    if not fits:
        raise ValueError(f"keep={keep!r} with unit={unit!r}, accepted: {accepted}")


def _check_min_tokens(min_tokens: int) -> None:
    if not isinstance(min_tokens, int) or min_tokens < 1:
        raise ValueError(f"min_tokens={min_tokens!r}, accepted: a whole number from 1")


def gather_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of the tokens kept: x[index]; differentiable.

    Args:
        x: [T, ...], any dtype.
        index: int64 or int32 [T'], of `select_tokens`.

    Returns:
        [T', ...] like x.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
        IndexError: an index outside of x (CPU).
    """
    check_tensor("index", index, (torch.int64, torch.int32), ndim=1)
    if not isinstance(x, torch.Tensor) or x.dim() == 0:
        raise TypeError(f"x must be a tensor with at least 1 dimension, got {x!r}")
    check_device(x=x, index=index)
    if x.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= x.shape[0]:  # index_select itself raises one error or another, by the shape of x
            raise IndexError(f"index runs from {low} to {high}, x has rows 0 to {x.shape[0] - 1}")
    return x.index_select(0, index)
