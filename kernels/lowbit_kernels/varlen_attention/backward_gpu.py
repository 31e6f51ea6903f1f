"""`varlen_attention`: Triton kernels of the gradient and their launches. The formula is in `backward.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._triton import tl, triton
from ..quantize.gpu import _rint, _scale_and_zero
from .cpu import SITES
from .shared_gpu import _flags, _load, _load_bias, _operand, _quantized, _scores, _sequence, _store

# Legend as in `gpu.py`: scores, bias and lse in units of log2; BITS 0 quantizes nothing. Blocks of the first kernel are
# [queries, keys], those of the second [keys, queries].


@triton.jit
def _values(x_ptr, start, row, length, stride_t, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, D: tl.constexpr):
    """Rows of one sequence and head as the forward pass multiplies them; 0 beyond its end."""
    x = _load(x_ptr, start, row, length, stride_t, D)
    if BITS:
        codes, scale, zero = _quantized(x, BITS, SYMMETRIC)
        x = ((codes - zero[:, None]) * scale[:, None]).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["T", "blocks"])
def _query_gradient_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, bias_ptr, cu_seqlens_ptr,
    grad_query_ptr, delta_ptr, scale_ptr, zero_ptr, T, H, blocks, scaling,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_bh, stride_bq, stride_bk,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC_QUERY: tl.constexpr, SYMMETRIC_KEY: tl.constexpr,
    SYMMETRIC_PROBS: tl.constexpr, SYMMETRIC_VALUE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start, length, first = _sequence(cu_seqlens_ptr, T, blocks, BLOCK_M)
    if first >= length:
        return
    head = tl.program_id(1)
    key_ptr += head * stride_kh
    value_ptr += head * stride_vh
    if HAS_BIAS:
        bias_ptr += head.to(tl.int64) * stride_bh
    row = first + tl.arange(0, BLOCK_M)
    own_row = row < length
    place = head.to(tl.int64) * T + start + row
    scaling_log2 = scaling * 1.4426950408889634
    lse = tl.load(lse_ptr + place, mask=own_row, other=0.0) * 1.4426950408889634
    grad_out = _load(grad_out_ptr + head * stride_gh, start, row, length, stride_gt, D)
    query = _load(query_ptr + head * stride_qh, start, row, length, stride_qt, D)
    if BITS:
        query_codes, query_scale, query_zero = _quantized(query, BITS, SYMMETRIC_QUERY)
        query_sum = tl.sum(query_codes, axis=1)
        query = _operand(query_codes)
        query_scale *= scaling_log2
        highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        delta = tl.zeros((BLOCK_M,), tl.float32)
        for begin in range(0, length, BLOCK_N):
            column = begin + tl.arange(0, BLOCK_N)
            own = (column < length)[None, :]
            scores = _scores(
                query, query_scale, query_zero, query_sum, key_ptr, start, column, length, stride_kt,
                BITS, SYMMETRIC_QUERY, SYMMETRIC_KEY, D,
            )  # fmt: skip
            if HAS_BIAS:
                scores += _load_bias(bias_ptr, row, column, length, stride_bq, stride_bk)
            highest = tl.maximum(highest, tl.max(tl.where(own, scores, float("-inf")), axis=1))
            lowest = tl.minimum(lowest, tl.min(tl.where(own, scores, float("inf")), axis=1))
            probs = tl.where(own, tl.exp2(scores - lse[:, None]), 0.0)
            value = _values(value_ptr, start, column, length, stride_vt, BITS, SYMMETRIC_VALUE, D)
            total += tl.sum(probs, axis=1)
            delta += tl.sum(probs * tl.dot(grad_out, tl.trans(value), input_precision="ieee"), axis=1)
        delta /= total
        scale, _, zero = _scale_and_zero(tl.exp2(lowest - lse), tl.exp2(highest - lse), BITS, SYMMETRIC_PROBS)
        tl.store(scale_ptr + place, scale, mask=own_row)
        tl.store(zero_ptr + place, zero, mask=own_row)
    else:
        out = _load(out_ptr + head * D, start, row, length, H * D, D)
        delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + place, delta, mask=own_row)

    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for begin in range(0, length, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        key = _values(key_ptr, start, column, length, stride_kt, BITS, SYMMETRIC_KEY, D)
        value = _values(value_ptr, start, column, length, stride_vt, BITS, SYMMETRIC_VALUE, D)
        if BITS:  # reads and quantizes the key again by its text; the compiler finds that it has it
            scores = _scores(
                query, query_scale, query_zero, query_sum, key_ptr, start, column, length, stride_kt,
                BITS, SYMMETRIC_QUERY, SYMMETRIC_KEY, D,
            )  # fmt: skip
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling_log2
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, row, column, length, stride_bq, stride_bk)
        # Of keys beyond the sequence the score is 0, whose exponential may overflow and meet the 0 of the key.
        probs = tl.where((column < length)[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        grad_scores = probs * (tl.dot(grad_out, tl.trans(value), input_precision="ieee") - delta[:, None])
        acc = tl.dot(grad_scores.to(key.dtype), key, acc, input_precision="ieee")
    _store(grad_query_ptr, acc * scaling, start, row, length, H, head, D)


@triton.jit(do_not_specialize=["T", "blocks"])
def _key_gradient_kernel(
    grad_out_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, bias_ptr, cu_seqlens_ptr, delta_ptr, scale_ptr, zero_ptr,
    grad_key_ptr, grad_value_ptr, T, H, blocks, scaling,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_bh, stride_bq, stride_bk,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, SYMMETRIC_QUERY: tl.constexpr, SYMMETRIC_KEY: tl.constexpr,
    SYMMETRIC_PROBS: tl.constexpr, SYMMETRIC_VALUE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    start, length, first = _sequence(cu_seqlens_ptr, T, blocks, BLOCK_N)
    if first >= length:
        return
    head = tl.program_id(1)
    grad_out_ptr += head * stride_gh
    query_ptr += head * stride_qh
    if HAS_BIAS:
        bias_ptr += head.to(tl.int64) * stride_bh
    row = first + tl.arange(0, BLOCK_N)
    scaling_log2 = scaling * 1.4426950408889634
    key = _load(key_ptr + head * stride_kh, start, row, length, stride_kt, D)
    value = _values(value_ptr + head * stride_vh, start, row, length, stride_vt, BITS, SYMMETRIC_VALUE, D)
    if BITS:
        QMAX: tl.constexpr = 2 ** (BITS - 1) - 1
        key_codes, key_scale, key_zero = _quantized(key, BITS, SYMMETRIC_KEY)
        key_sum = tl.sum(key_codes, axis=1)
        key = _operand(key_codes)
        key_scale *= scaling_log2
    grad_key = tl.zeros((BLOCK_N, D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, D), tl.float32)
    for begin in range(0, length, BLOCK_M):
        column = begin + tl.arange(0, BLOCK_M)
        own = column < length
        place = head.to(tl.int64) * T + start + column
        # Queries beyond the sequence get the probability 0.
        lse = tl.load(lse_ptr + place, mask=own, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + place, mask=own, other=0.0)
        query = _values(query_ptr, start, column, length, stride_qt, BITS, SYMMETRIC_QUERY, D)
        grad_out = _load(grad_out_ptr, start, column, length, stride_gt, D)
        if BITS:
            scores = _scores(
                key, key_scale, key_zero, key_sum, query_ptr, start, column, length, stride_qt,
                BITS, SYMMETRIC_KEY, SYMMETRIC_QUERY, D,
            )  # fmt: skip
        else:
            scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scaling_log2
        if HAS_BIAS:
            scores += _load_bias(bias_ptr, row, column, length, stride_bk, stride_bq)
        probs = tl.exp2(scores - lse[None, :])
        grad_probs = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        grad_scores = probs * (grad_probs - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
        if BITS:
            scale = tl.load(scale_ptr + place, mask=own, other=0.0)
            inverse = tl.where(scale == 0, 0.0, tl.div_rn(scale * 0.0 + 1.0, tl.where(scale == 0, 1.0, scale)))
            codes = _rint(probs * inverse[None, :])
            if not SYMMETRIC_PROBS:
                zero = tl.load(zero_ptr + place, mask=own, other=0.0)
                codes = tl.minimum(codes + zero[None, :], QMAX) - zero[None, :]
            probs = codes * scale[None, :]
        grad_value = tl.dot(probs.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
    _store(grad_key_ptr, grad_key * scaling, start, row, length, H, head, D)
    _store(grad_value_ptr, grad_value, start, row, length, H, head, D)


@dataclass(frozen=True)
class Tile:
    """A tile configuration: queries and keys of a block, and Triton's warps and stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tiles(max_seqlen: int, D: int, dtype: torch.dtype, bits: int | None) -> tuple[Tile, Tile]:
    """The tiles of the two kernels for sequences up to `max_seqlen`; neither tuned nor measured.

    None that the gate compiles (`aot_cases`) spills with Triton 3.7.1. With 3.6 the gradient of the key does: in half
    precision 8 to 16 bytes (sm_80, 89), in float32 with bits 104 to 224 on every architecture; and that of the query
    in two cases, 8 bytes on sm_80 and 24 on sm_100. With 3.9 the gradient of the key does in float32, 8 to 248 bytes,
    on sm_100 up to 840; and that of the query in three cases, 8 bytes.
    """
    if dtype == torch.float32:  # full float32 does without tensor cores, int8 takes 64 rows to a wgmma
        if bits is None:
            return Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)
        if D == 128:  # more than 16 queries spill: the product with the values holds rows and columns whole
            return Tile(16, 16, 8, 2), Tile(16, 64, 8, 2)
        return Tile(64, 16, 8, 2), Tile(16, 64, 4, 2)
    small = D == 128 or max_seqlen <= 32
    return (
        Tile(64, 32 if small or (D <= 32 and bits is not None) else 64, 8, 2),
        Tile(32 if small or bits is not None else 64, 64, 8, 2),
    )


def launch(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float,
    bits: int | None,
    asymmetric: Sequence[str],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Run the Triton kernels; arguments as the op's, already validated."""
    T, H, D = query.shape
    grads = query.new_zeros(3, T, H, D)  # tokens after the last sequence are written by no program
    if not grads.numel() or not max_seqlen:
        return grads
    grad_query, grad_key, grad_value = grads.unbind(0)
    grad_out, query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (grad_out, query, key, value))
    lse, cu_seqlens = lse.contiguous(), cu_seqlens.contiguous()
    delta, scale, zero = lse.new_empty(1 if bits is None else 3, H, T).expand(3, H, T).unbind(0)
    strides = [stride for x in (grad_out, query, key, value) for stride in x.stride()[:2]]
    strides += (0, 0, 0) if bias is None else bias.expand(H, -1, -1).stride()
    flags = {"HAS_BIAS": bias is not None, "BITS": bits or 0, **_flags(asymmetric), "D": D}

    def run(kernel, tile: Tile, block: int, *pointers: torch.Tensor | None) -> None:
        blocks = triton.cdiv(max_seqlen, block)
        kernel[(blocks * (len(cu_seqlens) - 1), H)](
            *pointers, T, H, blocks, scaling, *strides, **flags, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    for_query, for_key = choose_tiles(max_seqlen, D, query.dtype, bits)
    run(
        _query_gradient_kernel, for_query, for_query.block_m,
        grad_out, query, key, value, out.contiguous(), lse, bias, cu_seqlens, grad_query, delta, scale, zero,
    )  # fmt: skip
    run(
        _key_gradient_kernel, for_key, for_key.block_n,
        grad_out, query, key, value, lse, bias, cu_seqlens, delta, scale, zero, grad_key, grad_value,
    )  # fmt: skip
    return grads


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    usual, full = (64, 128, torch.float16), (64, 128, torch.float32)
    rare = [(16, 128, torch.float16), (128, 512, torch.bfloat16), (128, 512, torch.float32)]
    none, probs = (None, ()), (8, ("attention_probs",))
    modes = [(*shape, *mode, False) for shape in (usual, full) for mode in (none, probs)]
    modes += [(*usual, *mode, True) for mode in (none, probs)] + [(32, 32, torch.bfloat16, *none, False)]
    # The rare shapes take the longest code.
    modes += [(*shape, *mode, True) for shape in rare for mode in (none, (4, SITES))]
    others = dict.fromkeys(("lse_ptr", "delta_ptr", "scale_ptr", "zero_ptr", "bias_ptr"), "*fp32")
    others |= {"cu_seqlens_ptr": "*i32", "T": "i32", "H": "i32", "blocks": "i32", "scaling": "fp32"}
    others |= dict.fromkeys((f"stride_{tensor}{axis}" for tensor in "gqkv" for axis in "th"), "i32:16")
    others |= dict.fromkeys(("stride_bh", "stride_bq", "stride_bk"), "i32")
    cases = []
    for D, max_seqlen, dtype, bits, asymmetric, has_bias in modes:
        tensors = ("grad_out", "query", "key", "value", "out", "grad_query", "grad_key", "grad_value")
        signature = dict.fromkeys((f"{tensor}_ptr" for tensor in tensors), types[dtype]) | others
        label = f"{types[dtype]} D={D} up to {max_seqlen}"
        if bits is not None:
            label += f", {bits} bits{' asymmetric' if asymmetric == SITES else ''}"
        label += ", bias" if has_bias else ""
        flags = {"HAS_BIAS": has_bias, "BITS": bits or 0, **_flags(asymmetric), "D": D}
        tiles = choose_tiles(max_seqlen, D, dtype, bits)
        for name, kernel, tile in (
            ("query", _query_gradient_kernel, tiles[0]),
            ("key", _key_gradient_kernel, tiles[1]),
        ):
            constants = flags | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            used = {argument: signature[argument] for argument in kernel.arg_names if argument in signature}
            cases.append((f"gradient of {name} {label}", kernel, used, constants, tile.num_warps, tile.num_stages))
    return cases
