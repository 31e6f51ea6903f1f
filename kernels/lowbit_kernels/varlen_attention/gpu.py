"""`varlen_attention`: Triton kernels and their launches. The formula is in `op.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._triton import tl, triton
from ..quantize.gpu import _rint, _scale_and_zero
from .cpu import SITES, outputs
from .shared_gpu import _flags, _load, _load_bias, _operand, _quantized, _scores, _sequence, _store

# Legend: a program takes BLOCK_M queries of one head of one sequence, its loops BLOCK_N keys at a time. Scores are in
# units of log2: `scaling` holds a factor log2(e), and exp2 is one instruction where exp is two.


@triton.jit
def _finite(highest, HAS_BIAS: tl.constexpr):
    """What to subtract from scores: where a bias hides all keys so far, -inf - -inf would be NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest) if HAS_BIAS else highest


@triton.jit
def _store_lse(lse_ptr, highest, total, start, row, length, T, head):
    lse = (highest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + tl.cast(head, tl.int64) * T + start + row, lse, mask=row < length)


@triton.jit(do_not_specialize=["T", "blocks"])
def _attention_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, cu_seqlens_ptr, out_ptr, lse_ptr, T, H, blocks, scaling,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_bh, stride_bi, stride_bj,
    HAS_BIAS: tl.constexpr, STORE_LSE: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start, length, first = _sequence(cu_seqlens_ptr, T, blocks, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    if HAS_BIAS:
        bias_ptr += tl.cast(head, tl.int64) * stride_bh
    row = first + tl.arange(0, BLOCK_M)
    query = _load(query_ptr + head * stride_qh, start, row, length, stride_qt, D)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for begin in range(0, length, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        key = _load(key_ptr + head * stride_kh, start, column, length, stride_kt, D)
        value = _load(value_ptr + head * stride_vh, start, column, length, stride_vt, D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, row, column, length, stride_bi, stride_bj)
        scores = tl.where((column < length)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        subtracted = _finite(new_highest, HAS_BIAS)
        exps = tl.exp2(scores - subtracted[:, None])
        shrink = tl.exp2(highest - subtracted)
        total = total * shrink + tl.sum(exps, axis=1)
        acc = tl.dot(exps.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        highest = new_highest
    _store(out_ptr, acc / total[:, None], start, row, length, H, head, D)
    if STORE_LSE:
        _store_lse(lse_ptr, highest, total, start, row, length, T, head)


@triton.jit(do_not_specialize=["T", "blocks"])
def _quantized_attention_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, cu_seqlens_ptr, out_ptr, lse_ptr, T, H, blocks, scaling,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_bh, stride_bi, stride_bj,
    BITS: tl.constexpr, SYMMETRIC_QUERY: tl.constexpr, SYMMETRIC_KEY: tl.constexpr, SYMMETRIC_PROBS: tl.constexpr,
    SYMMETRIC_VALUE: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_LSE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    QMAX: tl.constexpr = 2 ** (BITS - 1) - 1
    start, length, first = _sequence(cu_seqlens_ptr, T, blocks, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    key_ptr += head * stride_kh
    value_ptr += head * stride_vh
    if HAS_BIAS:
        bias_ptr += tl.cast(head, tl.int64) * stride_bh
    row = first + tl.arange(0, BLOCK_M)
    query = _load(query_ptr + head * stride_qh, start, row, length, stride_qt, D)
    query_codes, query_scale, query_zero = _quantized(query, BITS, SYMMETRIC_QUERY)
    query_sum = tl.sum(query_codes, axis=1)
    query = _operand(query_codes)
    query_scale *= scaling

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, length, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        own = (column < length)[None, :]
        scores = _scores(
            query, query_scale, query_zero, query_sum, key_ptr, start, column, length, stride_kt,
            BITS, SYMMETRIC_QUERY, SYMMETRIC_KEY, D,
        )  # fmt: skip
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, row, column, length, stride_bi, stride_bj)
        new_highest = tl.maximum(highest, tl.max(tl.where(own, scores, float("-inf")), axis=1))
        lowest = tl.minimum(lowest, tl.min(tl.where(own, scores, float("inf")), axis=1))
        subtracted = _finite(new_highest, HAS_BIAS)
        exps = tl.where(own, tl.exp2(scores - subtracted[:, None]), 0.0)
        total = total * tl.exp2(highest - subtracted) + tl.sum(exps, axis=1)
        highest = new_highest
    if STORE_LSE:
        _store_lse(lse_ptr, highest, total, start, row, length, T, head)

    high = 1.0 / total
    low = tl.exp2(lowest - highest) * high
    scale, inverse, zero = _scale_and_zero(low, high, BITS, SYMMETRIC_PROBS)
    # Probabilities are scale * (base + codes) with codes from 0 to 2^bits - 1, exact in float16 and bfloat16; base,
    # which has no bound, is multiplied with the sum of the values instead.
    base = (-QMAX - 1.0) - zero if not SYMMETRIC_PROBS else zero
    steps = high * inverse
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    value_sum = tl.zeros((D,), tl.float32)
    for begin in range(0, length, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        scores = _scores(
            query, query_scale, query_zero, query_sum, key_ptr, start, column, length, stride_kt,
            BITS, SYMMETRIC_QUERY, SYMMETRIC_KEY, D,
        )  # fmt: skip
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, row, column, length, stride_bi, stride_bj)
        values = _load(value_ptr, start, column, length, stride_vt, D)
        value_codes, value_scale, value_zero = _quantized(values, BITS, SYMMETRIC_VALUE)
        value = ((value_codes - value_zero[:, None]) * value_scale[:, None]).to(values.dtype)
        codes = _rint(tl.exp2(scores - highest[:, None]) * steps[:, None]) - base[:, None]
        # Keys beyond the sequence meet values of 0, so their codes only have to be finite.
        codes = tl.minimum(tl.maximum(codes, 0.0), QMAX if SYMMETRIC_PROBS else 2 * QMAX + 1)
        # Whole numbers lose nothing to TF32, and of a float32 value three terms leave 2^-21 out.
        acc = tl.dot(codes.to(values.dtype), value, acc, input_precision="tf32x3")
        if not SYMMETRIC_PROBS:
            value_sum += tl.sum(value.to(tl.float32), axis=0)
    out = (acc + base[:, None] * value_sum[None, :]) * scale[:, None]
    _store(out_ptr, out, start, row, length, H, head, D)


@triton.jit(do_not_specialize=["T", "blocks"])
def _importance_kernel(
    query_ptr, key_ptr, bias_ptr, cu_seqlens_ptr, lse_ptr, partial_ptr, T, blocks, scaling,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_bh, stride_bi, stride_bj,
    BITS: tl.constexpr, SYMMETRIC_QUERY: tl.constexpr, SYMMETRIC_KEY: tl.constexpr, HAS_BIAS: tl.constexpr,
    CLS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What BLOCK_N keys of one head of one sequence receive from its queries, BLOCK_M at a time: partial [H, T].

    Keys are the rows of the product, so that they stay in registers, and so do the sums.
    """
    start, length, first = _sequence(cu_seqlens_ptr, T, blocks, BLOCK_N)
    if first >= length:
        return
    head = tl.program_id(1)
    query_ptr += head * stride_qh
    head_row = tl.cast(head, tl.int64) * T + start
    if HAS_BIAS:
        bias_ptr += tl.cast(head, tl.int64) * stride_bh
    row = first + tl.arange(0, BLOCK_N)
    key = _load(key_ptr + head * stride_kh, start, row, length, stride_kt, D)
    if BITS is not None:
        key_codes, key_scale, key_zero = _quantized(key, BITS, SYMMETRIC_KEY)
        key_sum = tl.sum(key_codes, axis=1)
        key = _operand(key_codes)
        key_scale *= scaling
    received = tl.zeros((BLOCK_N,), tl.float32)
    end = 1 if CLS else length
    for begin in range(0, end, BLOCK_M):
        # Beyond the end the last query comes again, with a probability of 0: what is NaN there is NaN in it already.
        column = begin + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + head_row + column, mask=column < end, other=float("inf")) * 1.4426950408889634
        column = tl.minimum(column, end - 1)
        if BITS is None:
            query = _load(query_ptr, start, column, length, stride_qt, D)
            scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scaling
        else:
            scores = _scores(
                key, key_scale, key_zero, key_sum, query_ptr, start, column, length, stride_qt,
                BITS, SYMMETRIC_KEY, SYMMETRIC_QUERY, D,
            )  # fmt: skip
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, row, column, length, stride_bj, stride_bi)
        received += tl.sum(tl.exp2(scores - lse[None, :]), axis=1)
    tl.store(partial_ptr + head_row + row, received, mask=row < length)


@triton.jit(do_not_specialize=["T", "sequences"])
def _sum_heads_kernel(partial_ptr, cu_seqlens_ptr, out_ptr, T, H, sequences, BLOCK: tl.constexpr):
    """[H, T] to [T], in the order of the heads; 0 after the last sequence, where nobody has written."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = token < tl.minimum(tl.load(cu_seqlens_ptr + sequences), T)
    total = tl.zeros((BLOCK,), tl.float32)
    for head in range(H):
        total += tl.load(partial_ptr + tl.cast(head, tl.int64) * T + token, mask=used, other=0.0)
    tl.store(out_ptr + token, total, mask=token < T)


@dataclass(frozen=True)
class Tile:
    """A tile configuration: queries, keys per step, and Triton's warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(max_seqlen: int, D: int, dtype: torch.dtype, bits: int | None, has_bias: bool) -> Tile:
    """The tile for sequences up to `max_seqlen`; neither tuned nor measured.

    None that the gate compiles (`aot_cases`) spills with Triton 3.7.1 and 3.9. With 3.6 some do, 8 to 24 bytes: with a
    bias, D=128 on sm_80 and 89 and float32 D=64 on sm_80; beside the gate, 8 bits with D=32 on sm_100.

    Hopper's wgmma takes 64 rows or more; full float32 does without tensor cores and holds its operands in registers.
    """
    if dtype == torch.float32:
        return Tile(64, 16, 8, 2)
    # Three stages of a float32 bias exceed the shared memory of sm_89.
    num_stages = 3 if bits is None and not has_bias else 2
    if D == 128 or max_seqlen <= 32:
        return Tile(64, 32, 8, num_stages)
    return Tile(64 if max_seqlen <= 64 else 128, 64, 8, num_stages)


def choose_importance_tile(
    max_seqlen: int, D: int, dtype: torch.dtype, bits: int | None, importance: str, has_bias: bool
) -> Tile:
    """The tile of `_importance_kernel`: block_n keys, block_m queries per step; neither tuned nor measured."""
    if importance == "cls":
        full = dtype == torch.float32 and bits is None
        return Tile(16, 32, 4, 1) if full else Tile(16, 64, 8 if D == 128 else 4, 1)
    if dtype == torch.float32 and bits is None:
        return Tile(32, 32, 8, 2)
    if D == 128 or max_seqlen <= 32:
        return Tile(32, 64, 4 if bits is None else 8, 2)
    if bits is None and not has_bias:
        # Many queries a step, few warps: what is computed once a query is shared by more keys a thread.
        return Tile(64 if max_seqlen <= 64 else 128, 64, 4, 2)
    return Tile(64, 64 if max_seqlen <= 64 or has_bias else 128, 8, 2)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float,
    bits: int | None,
    asymmetric: Sequence[str],
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    importance: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the Triton kernel; arguments as the op's, already validated."""
    T, H, D = query.shape
    out, lse, received = outputs(query, return_lse, importance)
    if not out.numel():
        return out, lse, received.zero_()
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    cu_seqlens = cu_seqlens.contiguous()
    if importance is not None and not return_lse:
        lse = query.new_empty(H, T, dtype=torch.float32)
    tile = choose_tile(max_seqlen, D, query.dtype, bits, bias is not None)
    blocks = triton.cdiv(max_seqlen, tile.block_m)
    scaling *= math.log2(math.e)
    bias_strides = (0, 0, 0) if bias is None else (bias.stride(0) if bias.shape[0] > 1 else 0, *bias.stride()[1:])
    arguments = (
        query, key, value, bias, cu_seqlens, out, lse, T, H, blocks, scaling,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *bias_strides,
    )  # fmt: skip
    shape = {"D": D, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    extras = {"HAS_BIAS": bias is not None, "STORE_LSE": return_lse or importance is not None}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    grid = (blocks * (len(cu_seqlens) - 1), H)
    if bits is None:
        _attention_kernel[grid](*arguments, **extras, **shape, **options)
    else:
        _quantized_attention_kernel[grid](*arguments, BITS=bits, **_flags(asymmetric), **extras, **shape, **options)
    if importance is not None:
        partial = torch.empty_like(lse)
        tile = choose_importance_tile(max_seqlen, D, query.dtype, bits, importance, bias is not None)
        blocks = triton.cdiv(max_seqlen, tile.block_n)
        _importance_kernel[(blocks * (len(cu_seqlens) - 1), H)](
            query, key, bias, cu_seqlens, lse, partial, T, blocks, scaling,
            *query.stride()[:2], *key.stride()[:2], *bias_strides,
            BITS=bits, SYMMETRIC_QUERY="query" not in asymmetric, SYMMETRIC_KEY="key" not in asymmetric,
            HAS_BIAS=bias is not None, CLS=importance == "cls", D=D, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
        _sum_heads_kernel[(triton.cdiv(T, 256),)](
            partial, cu_seqlens, received, T, H, len(cu_seqlens) - 1, BLOCK=256, num_warps=4, enable_fp_fusion=True
        )
    return out, lse if return_lse else lse.new_empty(0), received


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    strides = dict.fromkeys((f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "th"), "i32:16")
    bias_strides = {"stride_bh": "i32:16", "stride_bi": "i32", "stride_bj": "i32"}
    others = {"cu_seqlens_ptr": "*i32", "lse_ptr": "*fp32", "partial_ptr": "*fp32", "bias_ptr": "*fp32"}
    others |= {"T": "i32", "H": "i32", "blocks": "i32", "scaling": "fp32", **strides, **bias_strides}
    # Every kernel with the shapes that are common, where flags make the code longest, and every tile of the choosers.
    usual, short, full = (64, 128, torch.float16), (64, 64, torch.float16), (64, 128, torch.float32)
    widest, widest_full = (128, 512, torch.bfloat16), (128, 512, torch.float32)
    narrow, narrow_short = (16, 128, torch.float16), (32, 32, torch.bfloat16)
    rare = (widest, widest_full, narrow)
    cases: list[tuple] = []

    def add(label: str, kernel: Any, tile: Tile, **constants: Any) -> None:
        constants |= {"D": D, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        signature = {name: floats if name in tensors else others[name] for name in kernel.arg_names if name in known}
        cases.append((label, kernel, signature, constants, tile.num_warps, tile.num_stages))

    tensors = ("query_ptr", "key_ptr", "value_ptr", "out_ptr")
    known = (*tensors, *others)
    for shape, quantizes in itertools.product((usual, short, full, *rare, narrow_short), (False, True)):
        D, max_seqlen, dtype = shape
        floats = types[dtype]
        bits, asymmetric = (None, ()) if not quantizes else (4, SITES) if shape in rare else (8, ("attention_probs",))
        label = f"{floats} D={D} up to {max_seqlen}"
        if bits is not None:
            label += f", {bits} bits{' asymmetric' if asymmetric == SITES else ''}"
        kernel = _attention_kernel if bits is None else _quantized_attention_kernel
        flags: dict[str, Any] = {} if bits is None else {"BITS": bits, **_flags(asymmetric)}
        if shape in (usual, short, narrow, narrow_short):
            tile = choose_tile(max_seqlen, D, dtype, bits, False)
            add(f"attention {label}", kernel, tile, **flags, HAS_BIAS=False, STORE_LSE=False)
        if shape in (usual, full, widest, widest_full):
            tile = choose_tile(max_seqlen, D, dtype, bits, True)
            add(f"attention {label}, lse, bias", kernel, tile, **flags, HAS_BIAS=True, STORE_LSE=True)
        flags = {"BITS": bits, "SYMMETRIC_QUERY": "query" not in asymmetric, "SYMMETRIC_KEY": "key" not in asymmetric}
        if shape in (usual, short, narrow_short):
            tile = choose_importance_tile(max_seqlen, D, dtype, bits, "all", False)
            add(f"importance {label}", _importance_kernel, tile, **flags, HAS_BIAS=False, CLS=False)
        if shape in (usual, full, widest, widest_full):
            tile = choose_importance_tile(max_seqlen, D, dtype, bits, "all", True)
            add(f"importance {label}, bias", _importance_kernel, tile, **flags, HAS_BIAS=True, CLS=False)
        if shape in (usual, widest, widest_full):
            tile = choose_importance_tile(max_seqlen, D, dtype, bits, "cls", True)
            add(f"importance {label}, bias, cls", _importance_kernel, tile, **flags, HAS_BIAS=True, CLS=True)
    signature = {"partial_ptr": "*fp32", "cu_seqlens_ptr": "*i32", "out_ptr": "*fp32"}
    signature |= dict.fromkeys(("T", "H", "sequences"), "i32")
    return [*cases, ("importance summed over heads", _sum_heads_kernel, signature, {"BLOCK": 256}, 4, 1)]
