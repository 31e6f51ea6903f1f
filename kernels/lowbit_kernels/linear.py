"""Linears on packed weights: int8 activations [M, K] x ternary, binary or split-pair codes [N, K] -> float [M, N].

    sum[m, n] = sum_k x[m, k] * w[n, k]                                          exact, int32
    acc[m, n] = sum[m, n] - x_zero_point[m] * sum_k w[n, k]                      float32 from here on
    y[m, n]   = act(x_scale[m] * scale[n] * acc[m, n] + bias[n])                 one rounding per factor
    split     y = act(x_scale[m] * (scale[0, n] * acc1[m, n] + scale[1, n] * acc2[m, n]) + bias[n])

Weights move N*K/4 (or N*K/8) bytes instead of 2*N*K in float16. The Triton kernel computes y^T = W x^T so that the
decoded weights are the left operand of the tensor-core product, the only one that may sit in registers on Hopper.
Weights are decoded with their sign, four bytes in four instructions: multiplying unsigned codes and subtracting the row
sum of x saves two of them, but summing x costs more than that. On Hopper the planes of a byte are joined to one left
operand, elsewhere each is a product of its own; the integers are the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import configs
from ._derived import Derived
from ._ops import FLOATS, check_choice, check_device, check_tensor, define, traced_on_cpu
from ._triton import INTERPRET, tl, triton
from .linear_cpu import codes_linear_cpu, linears_cpu
from .packing import pack_codes, unpacked
from .quantize import quantize_per_token

TERNARY, BINARY, SPLIT = 0, 1, 2  # `LAYOUT` of the kernel
LAYOUTS = {"ternary": TERNARY, "binary": BINARY, "split": SPLIT}
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}

# ---------------------------------------------------------------------------------------------------------- Triton
# Legend: tile of BLOCK_N weight rows x BLOCK_M tokens; the K loop takes BLOCK_B packed bytes a row at a time.


@triton.jit
def _decode(packed, SHIFT: tl.constexpr, MASK: tl.constexpr, INTERPRET: tl.constexpr):
    """((packed >> SHIFT) & MASK) - 1 on uint8, four to a register; SHIFT may be -1, a left shift.

    MASK 3 gives the weight of a ternary code, MASK 2 that of the bit at SHIFT + 1. With a field of at most 3, adding
    0x7F cannot carry into the next byte, and flipping the top bit then takes 0x80 away. The interpreter has no inline
    assembly.
    """
    if INTERPRET:
        moved = packed << 1 if SHIFT < 0 else packed >> SHIFT
        return (moved & MASK).to(tl.int8) - 1
    else:
        MOVE: tl.constexpr = "shl.b32 $0, $1, 1;" if SHIFT < 0 else f"shr.u32 $0, $1, {SHIFT};"
        WORD: tl.constexpr = MASK * 0x01010101
        return tl.inline_asm_elementwise(
            f"{MOVE} and.b32 $0, $0, {WORD}; add.u32 $0, $0, 0x7F7F7F7F; xor.b32 $0, $0, 0x80808080;",
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _gelu(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == 2:
        # (1 + tanh(t)) / 2 = 1 / (1 + exp(-2 t)): nothing cancels, and where exp overflows the quotient is 0.
        t = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * t))
    return y


@triton.jit
def _plane(packed, PLANE: tl.constexpr, LAYOUT: tl.constexpr, SECOND: tl.constexpr, INTERPRET: tl.constexpr):
    """Weights of one plane of a tile of bytes; SECOND takes the second matrix of a split pair."""
    if LAYOUT == 0:
        return _decode(packed, 6 - 2 * PLANE, 3, INTERPRET)
    elif LAYOUT == 1:
        return _decode(packed, PLANE - 1, 2, INTERPRET)
    elif SECOND:
        return _decode(packed, 5 - 2 * PLANE, 2, INTERPRET)
    else:
        return _decode(packed, 6 - 2 * PLANE, 2, INTERPRET)


@triton.jit
def _side_by_side(
    packed, LAYOUT: tl.constexpr, SECOND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """All planes of a tile of bytes as weights [BLOCK_N, PLANES * BLOCK_B] in the order of the columns.

    `join` adds a last axis: the first join takes the highest bit of the plane's number, the last one the lowest.
    """
    p0 = _plane(packed, 0, LAYOUT, SECOND, INTERPRET)
    p1 = _plane(packed, 1, LAYOUT, SECOND, INTERPRET)
    p2 = _plane(packed, 2, LAYOUT, SECOND, INTERPRET)
    p3 = _plane(packed, 3, LAYOUT, SECOND, INTERPRET)
    if LAYOUT == 1:
        p4 = _plane(packed, 4, LAYOUT, SECOND, INTERPRET)
        p5 = _plane(packed, 5, LAYOUT, SECOND, INTERPRET)
        p6 = _plane(packed, 6, LAYOUT, SECOND, INTERPRET)
        p7 = _plane(packed, 7, LAYOUT, SECOND, INTERPRET)
        even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
        odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
        blocks = tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_B // 32, 32, 2, 2, 2))
        return tl.reshape(tl.permute(blocks, (0, 1, 3, 4, 5, 2)), (BLOCK_N, 8 * BLOCK_B))
    else:
        blocks = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (BLOCK_N, BLOCK_B // 32, 32, 2, 2))
        return tl.reshape(tl.permute(blocks, (0, 1, 3, 4, 2)), (BLOCK_N, 4 * BLOCK_B))


@triton.jit(do_not_specialize=["M"])  # one binary for every number of tokens
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, w_sum_ptr, out_ptr,
    M, N, x_columns, row_bytes,
    stride_xm, stride_wn, stride_om, stride_scale, stride_xs, stride_plane,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZERO: tl.constexpr,
    CONCAT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 if LAYOUT == 1 else 4
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    byte = tl.arange(0, BLOCK_B)
    mask_n = offs_n < N
    mask_m = offs_m < M
    w_ptrs = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + byte[None, :]
    x_rows = x_ptr + offs_m[None, :].to(tl.int64) * stride_xm

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    acc2 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)  # second matrix of a split pair
    for start in range(0, row_bytes, BLOCK_B):
        # What is beyond K decodes to -1 and meets x = 0.
        packed = tl.load(w_ptrs + start, mask=mask_n[:, None] & (start + byte < row_bytes)[None, :], other=0)
        if CONCAT:
            k = start * PLANES + tl.arange(0, PLANES * BLOCK_B)
            x = tl.load(x_rows + k[:, None], mask=(k < x_columns)[:, None] & mask_m[None, :], other=0)
            acc = tl.dot(_side_by_side(packed, LAYOUT, False, BLOCK_N, BLOCK_B, INTERPRET), x, acc, out_dtype=tl.int32)
            if LAYOUT == 2:
                w2 = _side_by_side(packed, LAYOUT, True, BLOCK_N, BLOCK_B, INTERPRET)
                acc2 = tl.dot(w2, x, acc2, out_dtype=tl.int32)
        else:
            # Byte j of a row holds, in plane p, the value of column (j // 32) * 32 * PLANES + 32 p + j % 32.
            column = start * PLANES + (byte // 32) * (32 * PLANES) + byte % 32
            for plane in tl.static_range(PLANES):
                k = column + 32 * plane
                x = tl.load(x_rows + k[:, None], mask=(k < x_columns)[:, None] & mask_m[None, :], other=0)
                acc = tl.dot(_plane(packed, plane, LAYOUT, False, INTERPRET), x, acc, out_dtype=tl.int32)
                if LAYOUT == 2:
                    acc2 = tl.dot(_plane(packed, plane, LAYOUT, True, INTERPRET), x, acc2, out_dtype=tl.int32)

    x_scale = tl.load(x_scale_ptr + offs_m * stride_xs, mask=mask_m, other=0.0)
    scale = tl.load(scale_ptr + offs_n * stride_scale, mask=mask_n, other=0.0)
    y = acc.to(tl.float32)
    if HAS_ZERO:
        # In float32, since zero points reach 2^30 in rows far from 0; exact as long as the product is below 2^24.
        x_zero = tl.load(x_zero_ptr + offs_m * stride_xs, mask=mask_m, other=0).to(tl.float32)
        w_sum = tl.load(w_sum_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
        y -= w_sum[:, None] * x_zero[None, :]
    y = y * scale[:, None]
    if LAYOUT == 2:
        y2 = acc2.to(tl.float32)
        if HAS_ZERO:
            w_sum2 = tl.load(w_sum_ptr + N + offs_n, mask=mask_n, other=0).to(tl.float32)
            y2 -= w_sum2[:, None] * x_zero[None, :]
        scale2 = tl.load(scale_ptr + stride_plane + offs_n * stride_scale, mask=mask_n, other=0.0)
        y += y2 * scale2[:, None]
    y = y * x_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y = _gelu(y, ACTIVATION)
    out_ptrs = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :]
    tl.store(out_ptrs, tl.trans(y).to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class Tile:
    """A tile configuration: tokens, weight rows and packed bytes per step, and Triton's warps and stages."""

    block_m: int
    block_n: int
    block_b: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, least in (("block_m", 16), ("block_n", 16), ("block_b", 32), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}={value}, accepted: powers of two from {least}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages}, accepted: 1 and more")

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_b} {self.num_warps}w {self.num_stages}s"


def choose_tile(layout: str, M: int, N: int, K: int, arch: int | None) -> Tile:
    """The tile for x [M, K] and a weight [N, K] on a device of compute capability `arch` (`configs.lookup`)."""
    return configs.lookup(f"{layout}_linear", Tile, M, N, K, arch)


def shipped_tiles(layout: str, arch: int) -> list[Tile]:
    """Every tile that the package's tables have for a layout on a compute capability."""
    return configs.shipped(f"{layout}_linear", Tile, arch)


def launch(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
    tile: Tile | None = None,
    w_sum: torch.Tensor | None = None,
    concat: bool | None = None,
) -> torch.Tensor:
    """Run the Triton kernel; arguments as the op's, already validated.

    `w_sum`, the sums of the weight codes over K (int32 [N] or [2, N]), is found out where zero points need it. `concat`
    chooses between one product of all planes and one a plane; default: what suits the device.
    """
    M, K = x.shape
    N, row_bytes = packed.shape
    out = torch.empty(M, N, dtype=out_dtype, device=x.device)
    if M == 0 or N == 0:
        return out
    arch = configs.device_arch(x.device)
    tile = tile or choose_tile(layout, M, N, K, arch)
    x, packed = _aligned(x), packed if packed.stride(1) == 1 else packed.contiguous()
    bias = None if bias is None else bias.contiguous()
    if x_zero_point is not None:
        x_zero_point, w_sum = x_zero_point.contiguous(), _w_sum(packed, K, layout) if w_sum is None else w_sum
    concat = _concat(arch) if concat is None else concat
    per_row = scale.shape[-1] > 1
    grid = (triton.cdiv(N, tile.block_n), triton.cdiv(M, tile.block_m))
    _linear_kernel[grid](
        x, packed, scale.contiguous(), bias, x_scale.contiguous(), x_zero_point, w_sum, out,
        M, N, x.shape[1], row_bytes,
        x.stride(0), packed.stride(0), out.stride(0), int(per_row), int(x_scale.numel() > 1), scale.shape[-1],
        LAYOUT=LAYOUTS[layout], ACTIVATION=ACTIVATIONS[activation], HAS_BIAS=bias is not None,
        HAS_ZERO=x_zero_point is not None, CONCAT=concat, INTERPRET=INTERPRET,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_B=tile.block_b,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _concat(arch: int | None) -> bool:
    """One product of all planes on Hopper, whose wgmma takes the joined tile from registers; elsewhere it costs."""
    return arch is not None and arch // 10 == 9


_w_sums = Derived()


def _w_sum(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    return _w_sums.get([packed], (K, layout), lambda: unpacked(packed, K, layout).sum(-1, dtype=torch.int32))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that begin and end at multiples of 16 bytes, zeros after K: what the kernel loads in one go."""
    K = x.shape[1]
    if K % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) == 1:
        return x
    return torch.nn.functional.pad(x, (0, -K % 16)).contiguous()


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    pointers = {"x_ptr": "*i8", "w_ptr": "*u8", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "x_scale_ptr": "*fp32"}
    pointers |= {"x_zero_ptr": "*i32", "w_sum_ptr": "*i32", "out_ptr": "*fp32"}
    others = dict.fromkeys(("M", "stride_scale", "stride_xs"), "i32")
    others |= dict.fromkeys(("x_columns", "row_bytes", "stride_xm", "stride_wn"), "i32:16")
    cases = []
    for name, layout in LAYOUTS.items():
        tiles = shipped_tiles(name, arch)
        largest = max(tiles, key=lambda tile: tile.block_m * tile.block_n / tile.num_warps)
        for tile, activation, size in (*((tile, "gelu", "i32:16") for tile in tiles), (largest, "gelu_tanh", "i32")):
            signature = {**pointers, **others, **dict.fromkeys(("N", "stride_om", "stride_plane"), size)}
            constants = {"LAYOUT": layout, "ACTIVATION": ACTIVATIONS[activation], "HAS_BIAS": True, "HAS_ZERO": True}
            constants |= {
                "CONCAT": _concat(arch),
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_B": tile.block_b,
                "INTERPRET": False,
            }
            label = f"linear {name} {tile}{'' if size == 'i32:16' else ', odd N'}"
            cases.append((label, _linear_kernel, signature, constants, tile.num_warps, tile.num_stages))
    return cases


# -------------------------------------------------------------------------------------------------------------- ops


def _cpu(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
) -> torch.Tensor:
    return linears_cpu(x, [packed], [scale], [bias], x_scale, x_zero_point, activation, out_dtype, layout)[0]


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=out_dtype)


def _define(layout: str) -> Any:
    return define(
        f"{layout}_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor x_scale, Tensor? x_zero_point, "
        "str? activation, ScalarType out_dtype) -> Tensor",
        cpu=functools.partial(_cpu, layout=layout),
        cuda=functools.partial(launch, layout=layout),
        fake=_fake,
    )


_OPS = {layout: _define(layout) for layout in LAYOUTS}


def _joint_cuda(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
) -> list[torch.Tensor]:
    weights = zip(packed, scale, bias, strict=True)
    return [launch(x, *weight, x_scale, x_zero_point, activation, out_dtype, layout) for weight in weights]


def _joint_fake(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    layout: str,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], tensor.shape[0], dtype=out_dtype) for tensor in packed]


_joint_op = define(
    "joint_linear(Tensor x, Tensor[] packed, Tensor[] scale, Tensor?[] bias, Tensor x_scale, Tensor? x_zero_point, "
    "str? activation, ScalarType out_dtype, str layout) -> Tensor[]",
    cpu=linears_cpu,
    cuda=_joint_cuda,
    fake=_joint_fake,
)


def joint_linear(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    activation: str | None,
    out_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Linears that share their input (query, key and value): one product on the CPU, the same bits as one by one.

    What the modules call, whose weights are known to fit: arguments are not checked.

    Args:
        x: int8 [..., K].
        packed, scale, bias: of each linear, as `ternary_linear`.
        x_scale, x_zero_point, activation, out_dtype: as `ternary_linear`.
        layout: "ternary", "binary" or "split".

    Returns:
        [..., N] of each.
    """
    tokens = x.shape[:-1]
    zero = None if x_zero_point is None else x_zero_point.reshape(-1)
    run = linears_cpu if traced_on_cpu(x) else _joint_op
    rows = x.reshape(math.prod(tokens), x.shape[-1])
    parts = run(rows, packed, scale, bias, x_scale.reshape(-1), zero, activation, out_dtype, layout)
    return [part.reshape(*tokens, part.shape[-1]) for part in parts]


def _codes_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    # Codes come from a quantizer, so their range needs no check, which would stall the device.
    packed = pack_codes(codes, layout)
    w_sum = codes.sum(-1, dtype=torch.int32)
    return launch(x, packed, scale, bias, x_scale, x_zero_point, None, out_dtype, layout, w_sum=w_sum)


def _codes_fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[-2], dtype=out_dtype)


_codes_op = define(
    "codes_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor x_scale, Tensor? x_zero_point, "
    "str layout, ScalarType out_dtype) -> Tensor",
    cpu=codes_linear_cpu,
    cuda=_codes_cuda,
    fake=_codes_fake,
)


def codes_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    layout: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same product from unpacked codes, bit for bit: what quantization-aware training runs forward.

    Args:
        x: int8 [..., K].
        codes: int8 [N, K]; [2, N, K] for layout "split".
        scale, bias, x_scale, x_zero_point, out_dtype: as `ternary_linear`.
        layout: "ternary", "binary" or "split".

    Returns:
        [..., N].
    """
    zero = None if x_zero_point is None else x_zero_point.reshape(-1)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _codes_op(rows, codes, scale, bias, x_scale.reshape(-1), zero, layout, out_dtype)
    return y.reshape(*x.shape[:-1], codes.shape[-2])


def _linear(
    layout: str,
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    x_zero_point: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    check_tensor("x", x, (torch.int8, *FLOATS))
    check_tensor("packed", packed, (torch.uint8,), ndim=2)
    check_tensor("scale", scale, (torch.float32,), ndim=2 if layout == "split" else 1)
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_device(x=x, packed=packed, scale=scale, bias=bias, x_scale=x_scale, x_zero_point=x_zero_point)
    if x.dim() == 0:
        raise ValueError("x is a scalar, expected [..., K]")
    N, K = packed.shape[0], x.shape[-1]
    block = 256 if layout == "binary" else 128
    if packed.shape[1] != -(-K // block) * 32:
        raise ValueError(
            f"x has K={K} columns, which needs {-(-K // block) * 32} packed bytes a row, got {packed.shape[1]}"
        )
    lead = (2,) if layout == "split" else ()
    if tuple(scale.shape) not in ((*lead, N), (*lead, 1)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {(*lead, N)} or {(*lead, 1)}")
    if bias is not None:
        check_tensor("bias", bias, FLOATS)
        if tuple(bias.shape) != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({N},)")
    if x.dtype == torch.int8:
        if x_scale is None:
            raise ValueError("x is int8: pass its x_scale (float x is quantized per token by itself)")
        out_dtype = out_dtype or torch.float32
    else:
        if x_scale is not None or x_zero_point is not None:
            raise ValueError(f"x_scale and x_zero_point belong to int8 x, got {x.dtype} x")
        out_dtype = out_dtype or x.dtype
        x, x_scale, x_zero_point = quantize_per_token(x)
    check_choice("out_dtype", out_dtype, FLOATS)
    tokens = x.shape[:-1]
    check_tensor("x_scale", x_scale, (torch.float32,))
    if x_zero_point is not None:
        check_tensor("x_zero_point", x_zero_point, (torch.int32,))
        if x_zero_point.shape != x_scale.shape:
            raise ValueError(
                f"x_zero_point {tuple(x_zero_point.shape)} and x_scale {tuple(x_scale.shape)} must have one shape"
            )
        x_zero_point = x_zero_point.reshape(-1)
    if x_scale.shape not in (tokens, (1,)):
        raise ValueError(f"x_scale has shape {tuple(x_scale.shape)}, expected {tuple(tokens)} (per token) or (1,)")
    x, x_scale = x.reshape(math.prod(tokens), K), x_scale.reshape(-1)
    y = _OPS[layout](x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype)
    return y.reshape(*tokens, N)


def ternary_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Linear on ternary weights (W2A8).

    Args:
        x: int8 [..., K] with `x_scale`, used as it is; or float [..., K], quantized per token to symmetric int8 first.
        packed: uint8 [N, ceil(K/128)*32] from `pack_ternary`.
        scale: float32 [N] or [1].
        bias: float [N] or None.
        x_scale: float32, one per token ([...]) or [1].
        x_zero_point: int32 like `x_scale`, or None for symmetric activations.
        activation: None, "gelu" (erf) or "gelu_tanh", applied last.
        out_dtype: float dtype of the result; default x's, or float32 for int8 x.

    Returns:
        [..., N].

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, naming the argument.
    """
    return _linear("ternary", x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype)


def binary_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Linear on binary weights (W1A8); as `ternary_linear`, with packed uint8 [N, ceil(K/256)*32] of `pack_binary`."""
    return _linear("binary", x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype)


def split_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Linear on a split pair of binary weights, exact two-accumulator form.

    As `ternary_linear`, with packed uint8 [N, ceil(K/128)*32] of `pack_split` and scale float32 [2, N] or [2, 1]
    (Bai et al. 2021, eq. 8).
    """
    return _linear("split", x, packed, scale, bias, x_scale, x_zero_point, activation, out_dtype)
