"""The GPU path of the linears: Triton kernels, tiles and the launch. Formulas and shapes are those of `linear.py`.

Weights move N*K/4 (or N*K/8) bytes instead of 2*N*K in float16. The kernel computes y^T = W x^T so that the decoded
weights are the left operand of the tensor-core product, the only one that may sit in registers on Hopper. Weights are
decoded with their sign, times 64, four in two instructions; |x| <= 128 keeps sums below 2^31 for K < 2^18. On Hopper
the planes of a byte are joined to one left operand, elsewhere each is a product of its own; the integers are the same.

Up to 8 tokens a kernel without tensor cores multiplies four weights at a time (dp4a), so that a few rows fill the
device. Where tiles are few and K is long, several programs share a tile, each a slice of K: sums of integers do not
depend on their order, so the result is the same to the bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from . import configs
from ._derived import Derived, outlives_capture
from ._triton import INTERPRET, tl, triton
from .packing import unpacked
from .quantize import _rint, _to_int8

TERNARY, BINARY, SPLIT = 0, 1, 2  # `LAYOUT` of the kernels
LAYOUTS = {"ternary": TERNARY, "binary": BINARY, "split": SPLIT}
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}

# Legend: tile of BLOCK_N weight rows x BLOCK_M tokens; the K loop takes BLOCK_B packed bytes a row at a time.


@triton.jit
def _decode(packed, SHIFT: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr, INTERPRET: tl.constexpr):
    """((packed << SHIFT) & MASK) ^ FLIP of each byte as int8, four to a register in two instructions.

    The code goes to the top of its byte, where flipping bits makes it a signed multiple of the weight: ternary codes
    0, 1, 2 at bits 7:6 with bit 6 flipped are 64, 0, -64; binary codes 0, 1 at bit 7 with bits 7 and 6 flipped are
    -64, 64. `_weight_sum` takes the factor out of the sums. The interpreter has no inline assembly. Words (uint32)
    hold their four weights already.
    """
    WORD_MASK: tl.constexpr = MASK * 0x01010101
    WORD_FLIP: tl.constexpr = FLIP * 0x01010101
    if packed.dtype == tl.uint32:
        return (((packed << SHIFT) & WORD_MASK) ^ WORD_FLIP).to(tl.int32, bitcast=True)
    elif INTERPRET:
        return (((packed << SHIFT) & MASK) ^ FLIP).to(tl.int8, bitcast=True)
    else:
        MOVE: tl.constexpr = f"shl.b32 $0, $1, {SHIFT};" if SHIFT else "mov.b32 $0, $1;"
        return tl.inline_asm_elementwise(
            f"{MOVE} lop3.b32 $0, $0, {WORD_MASK}, {WORD_FLIP}, 0x6A;",  # (a & b) ^ c
            "=r,r",
            [packed],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _weight_sum(acc, LAYOUT: tl.constexpr):
    """sum_k x w, from the sum over what `_decode` gives for w: exact, since that is a multiple of 64."""
    return -(acc >> 6) if LAYOUT == 0 else acc >> 6


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
    """What `_decode` makes of one plane of a tile of bytes; SECOND takes the second matrix of a split pair."""
    if LAYOUT == 0:
        return _decode(packed, 2 * PLANE, 0xC0, 0x40, INTERPRET)
    elif LAYOUT == 1:
        return _decode(packed, 7 - PLANE, 0x80, 0xC0, INTERPRET)
    elif SECOND:
        return _decode(packed, 2 * PLANE + 1, 0x80, 0xC0, INTERPRET)
    else:
        return _decode(packed, 2 * PLANE, 0x80, 0xC0, INTERPRET)


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


@triton.jit
def _dp4a(a, b, total, INTERPRET: tl.constexpr):
    """total + the sum of the four products of the int8 of two words."""
    if INTERPRET:
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _epilogue(
    acc, acc2, offs_n, offs_m,
    scale_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, w_sum_ptr, residual_ptr, out_scale_ptr, out_ptr,
    M, N, stride_om, stride_rm, stride_scale, stride_xs, stride_plane,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_OUT_SCALE: tl.constexpr,
):  # fmt: skip
    """From sums over decoded weights [weight rows, tokens] to the stored result."""
    mask_n = offs_n < N
    mask_m = offs_m < M
    x_scale = tl.load(x_scale_ptr + offs_m * stride_xs, mask=mask_m, other=0.0)
    scale = tl.load(scale_ptr + offs_n * stride_scale, mask=mask_n, other=0.0)
    y = _weight_sum(acc, LAYOUT).to(tl.float32)
    if HAS_ZERO:
        # In float32, since zero points reach 2^30 in rows far from 0; exact as long as the product is below 2^24.
        x_zero = tl.load(x_zero_ptr + offs_m * stride_xs, mask=mask_m, other=0).to(tl.float32)
        w_sum = tl.load(w_sum_ptr + offs_n, mask=mask_n, other=0).to(tl.float32)
        y -= w_sum[:, None] * x_zero[None, :]
    y = y * scale[:, None]
    if LAYOUT == 2:
        y2 = _weight_sum(acc2, LAYOUT).to(tl.float32)
        if HAS_ZERO:
            w_sum2 = tl.load(w_sum_ptr + N + offs_n, mask=mask_n, other=0).to(tl.float32)
            y2 -= w_sum2[:, None] * x_zero[None, :]
        scale2 = tl.load(scale_ptr + stride_plane + offs_n * stride_scale, mask=mask_n, other=0.0)
        y += y2 * scale2[:, None]
    y = y * x_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION != 0 and not HAS_RESIDUAL and not HAS_OUT_SCALE:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)  # the bits of an activation on its own, in half precision too
    y = _gelu(y, ACTIVATION)
    y = tl.trans(y)  # tokens x weight rows, as residual and result lie in memory
    mask = mask_m[:, None] & mask_n[None, :]
    rows = offs_m[:, None].to(tl.int64)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + rows * stride_rm + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_OUT_SCALE:
        # Twin of `static_codes`.
        out_scale = tl.load(out_scale_ptr)
        small = out_scale < 1.1754943508222875e-38  # TINY
        one = tl.full((), 1.0, tl.float32)
        y = _to_int8(_rint(y * tl.where(small, 0.0, tl.div_rn(one, tl.where(small, 1.0, out_scale)))), -127, 127)
    tl.store(out_ptr + rows * stride_om + offs_n[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _last_of_slices(acc, acc2, workspace_ptr, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Add a slice's sums to those of its tile: (whether this program is the last of its tile, sums, second sums).

    The workspace holds int32 sums [tiles, 1 or 2, BLOCK_N, BLOCK_M], then the number of slices that arrived at each
    tile. It is all zeros before a launch, and the last program of each tile leaves it so.

    Why the last program sees every slice: one thread of a program counts its arrival. The barrier before orders the
    additions of all its threads before that, and release passes them on. Arrivals at one counter are a chain of
    read-modify-writes, so acquire by the last takes in what all before it released, and the barrier after hands that
    to its other threads. Loads go past the L1 cache (.cg), which the atomics do not write.
    """
    SIZE: tl.constexpr = BLOCK_N * BLOCK_M
    PLANES: tl.constexpr = 2 if LAYOUT == 2 else 1
    tile = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    sums = workspace_ptr + tile * (PLANES * SIZE) + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M
    sums += tl.arange(0, BLOCK_M)[None, :]
    arrived = workspace_ptr + tiles.to(tl.int64) * (PLANES * SIZE) + tile
    tl.atomic_add(sums, acc, sem="relaxed")
    if LAYOUT == 2:
        tl.atomic_add(sums + SIZE, acc2, sem="relaxed")
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(2) - 1
    if last:
        tl.debug_barrier()
        acc = tl.load(sums, cache_modifier=".cg")
        if LAYOUT == 2:
            acc2 = tl.load(sums + SIZE, cache_modifier=".cg")
        tl.debug_barrier()  # loads and stores may give an element to different threads
        tl.store(sums, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32))
        if LAYOUT == 2:
            tl.store(sums + SIZE, tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32))
        tl.store(arrived, 0)
    return last, acc, acc2


@triton.jit
def _load_columns(x_rows, k, x_columns, EVEN_K: tl.constexpr):
    """x^T [len(k), tokens], 0 beyond K."""
    if EVEN_K:
        return tl.load(x_rows + k[:, None])
    else:
        return tl.load(x_rows + k[:, None], mask=(k < x_columns)[:, None], other=0)


@triton.jit(do_not_specialize=["M"])  # one binary for every number of tokens
def _linear_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, w_sum_ptr, residual_ptr, out_scale_ptr, out_ptr,
    M, N, x_columns, row_bytes,
    stride_xm, stride_wn, stride_om, stride_rm, stride_scale, stride_xs, stride_plane,
    workspace_ptr, slice_bytes,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_OUT_SCALE: tl.constexpr, INTERPRET: tl.constexpr,
    CONCAT: tl.constexpr, EVEN_K: tl.constexpr, SLICED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A tile of the result; SLICED: its third program id takes `slice_bytes` of every row of weights."""
    PLANES: tl.constexpr = 8 if LAYOUT == 1 else 4
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    byte = tl.arange(0, BLOCK_B)
    # Rows beyond the last are the last again and never stored: masks would cost the loop more than the loads.
    w_ptrs = w_ptr + tl.minimum(offs_n, N - 1)[:, None].to(tl.int64) * stride_wn + byte[None, :]
    x_rows = x_ptr + tl.minimum(offs_m, M - 1)[None, :].to(tl.int64) * stride_xm

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    acc2 = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)  # second matrix of a split pair
    first, end = 0, row_bytes
    if SLICED:
        first = tl.program_id(2) * slice_bytes
        end = tl.minimum(first + slice_bytes, row_bytes)
    for start in range(first, end, BLOCK_B):
        if EVEN_K:
            packed = tl.load(w_ptrs + start)
        else:  # what is beyond K decodes to some weight and meets x = 0
            packed = tl.load(w_ptrs + start, mask=(start + byte < row_bytes)[None, :], other=0)
        if CONCAT:
            k = start * PLANES + tl.arange(0, PLANES * BLOCK_B)
            x = _load_columns(x_rows, k, x_columns, EVEN_K)
            acc = tl.dot(_side_by_side(packed, LAYOUT, False, BLOCK_N, BLOCK_B, INTERPRET), x, acc, out_dtype=tl.int32)
            if LAYOUT == 2:
                w2 = _side_by_side(packed, LAYOUT, True, BLOCK_N, BLOCK_B, INTERPRET)
                acc2 = tl.dot(w2, x, acc2, out_dtype=tl.int32)
        else:
            # Byte j of a row holds, in plane p, the value of column (j // 32) * 32 * PLANES + 32 p + j % 32.
            column = start * PLANES + (byte // 32) * (32 * PLANES) + byte % 32
            for plane in tl.static_range(PLANES):
                k = column + 32 * plane
                x = _load_columns(x_rows, k, x_columns, EVEN_K)
                acc = tl.dot(_plane(packed, plane, LAYOUT, False, INTERPRET), x, acc, out_dtype=tl.int32)
                if LAYOUT == 2:
                    acc2 = tl.dot(_plane(packed, plane, LAYOUT, True, INTERPRET), x, acc2, out_dtype=tl.int32)

    last = True
    if SLICED:
        last, acc, acc2 = _last_of_slices(acc, acc2, workspace_ptr, LAYOUT, BLOCK_N, BLOCK_M)
    if last:
        _epilogue(
            acc, acc2, offs_n, offs_m,
            scale_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, w_sum_ptr, residual_ptr, out_scale_ptr, out_ptr,
            M, N, stride_om, stride_rm, stride_scale, stride_xs, stride_plane,
            LAYOUT, ACTIVATION, HAS_BIAS, HAS_ZERO, HAS_RESIDUAL, HAS_OUT_SCALE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _small_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, w_sum_ptr, residual_ptr, out_scale_ptr, out_ptr,
    M, N, x_columns, row_bytes,
    stride_xm, stride_wn, stride_om, stride_rm, stride_scale, stride_xs, stride_plane,
    LAYOUT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_OUT_SCALE: tl.constexpr, INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One weight row for all tokens (at most BLOCK_M), without tensor cores.

    Four neighbouring bytes of the row are one word. Shifted and masked, it holds four neighbouring columns of a plane,
    which meet four neighbouring values of x, also one word. Each thread keeps sums of its own until the end. Bound by
    the latency of the few loads of a row: a warp a row needs no barrier, and all rows are under way at once.
    """
    PLANES: tl.constexpr = 8 if LAYOUT == 1 else 4
    row = tl.program_id(0)
    offs_n = row + tl.arange(0, 1)
    offs_m = tl.arange(0, BLOCK_M)
    word = tl.arange(0, BLOCK_W)
    w_words = (w_ptr + row.to(tl.int64) * stride_wn).to(tl.pointer_type(tl.uint32), bitcast=True)
    x_words = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + offs_m[:, None].to(tl.int64) * (stride_xm // 4)

    acc = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.int32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_W), dtype=tl.int32)
    for start in range(0, row_bytes // 4, BLOCK_W):
        places = start + word
        packed = tl.load(w_words + places, mask=places < row_bytes // 4, other=0)
        column = (places // 8) * (8 * PLANES) + places % 8  # in words of x
        for plane in tl.static_range(PLANES):
            k = column + 8 * plane
            x = tl.load(x_words + k[None, :], mask=(offs_m < M)[:, None] & (k < x_columns // 4)[None, :], other=0)
            acc = _dp4a(_plane(packed, plane, LAYOUT, False, INTERPRET)[None, :], x, acc, INTERPRET)
            if LAYOUT == 2:
                acc2 = _dp4a(_plane(packed, plane, LAYOUT, True, INTERPRET)[None, :], x, acc2, INTERPRET)

    acc = tl.sum(acc, axis=1)[None, :]
    acc2 = tl.sum(acc2, axis=1)[None, :]
    _epilogue(
        acc, acc2, offs_n, offs_m,
        scale_ptr, bias_ptr, x_scale_ptr, x_zero_ptr, w_sum_ptr, residual_ptr, out_scale_ptr, out_ptr,
        M, N, stride_om, stride_rm, stride_scale, stride_xs, stride_plane,
        LAYOUT, ACTIVATION, HAS_BIAS, HAS_ZERO, HAS_RESIDUAL, HAS_OUT_SCALE,
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A tile configuration: tokens, weight rows and packed bytes per step, Triton's warps and stages, slices of K."""

    block_m: int
    block_n: int
    block_b: int
    num_warps: int
    num_stages: int
    split_k: int = 0  # programs that share a tile, each a slice of K; 0: as `choose_split_k` says

    def __post_init__(self) -> None:
        for name, least in (("block_m", 16), ("block_n", 16), ("block_b", 32), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name}={value}, accepted: powers of two from {least}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages}, accepted: 1 and more")
        if self.split_k < 0:
            raise ValueError(f"split_k={self.split_k}, accepted: 0 and more")

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_b} {self.num_warps}w {self.num_stages}s"


def choose_tile(layout: str, M: int, N: int, K: int, arch: int | None) -> Tile:
    """The tile for x [M, K] and a weight [N, K] on a device of compute capability `arch` (`configs.lookup`)."""
    return configs.lookup(f"{layout}_linear", Tile, M, N, K, arch)


def shipped_tiles(layout: str, arch: int) -> list[Tile]:
    """Every tile that the package's tables have for a layout on a compute capability."""
    return configs.shipped(f"{layout}_linear", Tile, arch)


LEAST_ARCH = 80  # compute capability of the devices that the kernels compile for
MAX_GRID = 65_535  # programs along axis y
SMALL_M = 8  # up to this M a tile of 16 tokens is at least half empty
SMALL_W = 64  # words a step: two a lane, so that x and the weights are read in one layout, without an exchange


def choose_split_k(M: int, N: int, K: int, tile: Tile, per_byte: int, processors: int) -> int:
    """Slices of K, so that a product of few tiles and a long K fills the device; each has at least 256 values."""
    tiles = triton.cdiv(N, tile.block_n) * triton.cdiv(M, tile.block_m)
    if K < 1024 or 2 * tiles > processors:
        return 1
    steps = triton.cdiv(K, per_byte * tile.block_b)
    most = min(processors // tiles, K // 256, steps)
    return triton.cdiv(steps, triton.cdiv(steps, most))  # no slice stays empty


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}


def _workspace(device: torch.device, size: int) -> torch.Tensor:
    """At least `size` int32 zeros, which the launch leaves zeros.

    One is kept for each device and stream, since launches on one stream follow each other; a larger one takes its
    place when needed, and the caching allocator gives the memory of the old one to later work of that stream only.
    Not kept: what is allocated while a graph is captured (its zeros do not exist before a replay, and graphs captured
    on one stream may be replayed on two), and what comes from a private memory pool (the warm-up of torch.compile's
    CUDA graphs: the pool takes its memory back unasked). Such launches get zeros of their own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    workspace = _workspaces.get(key)
    if workspace is None or workspace.numel() < size:
        workspace = torch.zeros(max(size, 2**18), dtype=torch.int32, device=device)
        if device.type != "cuda" or outlives_capture(workspace):
            _workspaces[key] = workspace
    return workspace


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
    *,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a Triton kernel; arguments as the op's, already validated.

    `w_sum`, the sums of the weight codes over K (int32 [N] or [2, N]), is found out where zero points need it. With a
    `tile` the tensor-core kernel runs, however few the tokens. `concat` chooses between one product of all planes and
    one a plane; default: what suits the device.
    """
    M, K = x.shape
    N, row_bytes = packed.shape
    out = torch.empty(M, N, dtype=out_dtype, device=x.device)
    if M == 0 or N == 0:
        return out
    if K >= 2**18:
        raise ValueError(f"x has K={K} columns, the GPU kernels take less than {2**18}")
    arch = configs.device_arch(x.device)
    _check_arch(arch, x.device)
    if x_zero_point is not None:
        x_zero_point, w_sum = x_zero_point.contiguous(), _w_sum(packed, K, layout) if w_sum is None else w_sum
    x, packed = _aligned(x), _aligned(packed)
    bias = None if bias is None else bias.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    arguments = (
        x, packed, scale.contiguous(), bias, x_scale.contiguous(), x_zero_point, w_sum, residual, out_scale, out,
        M, N, x.shape[1], row_bytes,
        x.stride(0), packed.stride(0), out.stride(0), 0 if residual is None else residual.stride(0),
        int(scale.shape[-1] > 1), int(x_scale.numel() > 1), scale.shape[-1],
    )  # fmt: skip
    constants = {
        "LAYOUT": LAYOUTS[layout], "ACTIVATION": ACTIVATIONS[activation], "HAS_BIAS": bias is not None,
        "HAS_ZERO": x_zero_point is not None, "HAS_RESIDUAL": residual is not None,
        "HAS_OUT_SCALE": out_scale is not None, "INTERPRET": INTERPRET, "enable_fp_fusion": True,
    }  # fmt: skip
    if tile is None and M <= SMALL_M:
        block_m = triton.next_power_of_2(M)
        _small_kernel[(N,)](*arguments, **constants, BLOCK_M=block_m, BLOCK_W=SMALL_W, num_warps=1)
        return out
    planes = 8 if layout == "binary" else 4
    tile = tile or choose_tile(layout, M, N, K, arch)
    split_k = tile.split_k or choose_split_k(M, N, K, tile, planes, _processors(x.device))
    tiles = triton.cdiv(N, tile.block_n), triton.cdiv(M, tile.block_m)
    if tiles[1] > MAX_GRID:
        raise ValueError(f"x has M={M} rows, the GPU kernels take up to {MAX_GRID * tile.block_m} of them")
    workspace, slice_bytes = None, row_bytes
    if split_k > 1:
        sums = tile.block_n * tile.block_m * (2 if layout == "split" else 1)
        workspace = _workspace(x.device, tiles[0] * tiles[1] * (sums + 1))
        slice_bytes = triton.cdiv(triton.cdiv(row_bytes, tile.block_b), split_k) * tile.block_b
    _linear_kernel[(*tiles, split_k)](
        *arguments, workspace, slice_bytes, **constants,
        CONCAT=_concat(arch) if concat is None else concat, SLICED=split_k > 1,
        EVEN_K=row_bytes % tile.block_b == 0 and row_bytes * planes == x.shape[1],
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_B=tile.block_b,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _check_arch(arch: int | None, device: torch.device) -> None:
    """Raise RuntimeError for a GPU without the int8 tensor cores that the kernels use, or not of NVIDIA."""
    if arch is None or (arch >= LEAST_ARCH and torch.version.hip is None):
        return
    raise RuntimeError(
        f"the GPU kernels of lowbit take NVIDIA GPUs of compute capability 8.0 (Ampere) and later, {device} is "
        f"{torch.cuda.get_device_name(device)} ({'ROCm' if torch.version.hip else f'{arch // 10}.{arch % 10}'}); "
        "move the model and its inputs to the CPU, or train and run it in float"
    )


def _concat(arch: int | None) -> bool:
    """One product of all planes on Hopper, whose wgmma takes the joined tile from registers; elsewhere it costs."""
    return arch is not None and arch // 10 == 9


w_sums = Derived()


def _w_sum(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    return w_sums.get([packed], (K, layout), lambda: unpacked(packed, K, layout).sum(-1, dtype=torch.int32))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that begin and end at multiples of 16 bytes, zeros after K: what the kernels load in one go."""
    K = x.shape[1]
    if K % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -K % 16)).contiguous()


def _work(tile: Tile) -> float:
    """Values of the result that a warp computes."""
    return tile.block_m * tile.block_n / tile.num_warps


def aot_cases(arch: int) -> list[tuple]:
    """What `python -m lowbit_kernels.aot` compiles: (label, kernel, signature, constants, warps, stages)."""
    pointers = {"x_ptr": "*i8", "w_ptr": "*u8", "scale_ptr": "*fp32", "bias_ptr": "*fp32", "x_scale_ptr": "*fp32"}
    pointers |= {"x_zero_ptr": "*i32", "w_sum_ptr": "*i32", "residual_ptr": "*bf16", "out_scale_ptr": "*fp32"}
    others = dict.fromkeys(("M", "stride_scale", "stride_xs"), "i32")
    others |= dict.fromkeys(("x_columns", "row_bytes", "stride_xm", "stride_wn"), "i32:16")
    sizes = "N", "stride_om", "stride_rm", "stride_plane"
    cases = []
    for name, layout in LAYOUTS.items():
        tiles = shipped_tiles(name, arch)
        smallest, largest = (pick(tiles, key=_work) for pick in (min, max))
        # (label, tile, activation, what is known of N and K, sliced, residual and int8 output)
        variants = [(str(tile), tile, "gelu", ":16", False, False) for tile in tiles]
        variants += [
            (f"{largest}, odd N", largest, "gelu_tanh", "", False, False),
            (f"{largest} to int8", largest, "gelu", ":16", False, True),
            (f"{smallest}, sliced", smallest, "gelu", ":16", True, True),
            (f"{largest}, sliced", largest, "gelu", ":16", True, True),
        ]
        constants = {"LAYOUT": layout, "HAS_BIAS": True, "HAS_ZERO": True, "INTERPRET": False}
        for label, tile, activation, size, sliced, to_int8 in variants:
            signature = {**pointers, "out_ptr": "*i8" if to_int8 else "*fp32", **others}
            signature |= {**dict.fromkeys(sizes, "i32" + size), "workspace_ptr": "*i32", "slice_bytes": "i32:16"}
            own = {"ACTIVATION": ACTIVATIONS[activation], "HAS_RESIDUAL": to_int8, "HAS_OUT_SCALE": to_int8}
            own |= {"CONCAT": _concat(arch), "EVEN_K": size == ":16", "SLICED": sliced}
            own |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_B": tile.block_b}
            warps, stages = tile.num_warps, tile.num_stages
            cases.append((f"linear {name} {label}", _linear_kernel, signature, {**constants, **own}, warps, stages))
        for tokens in (1, SMALL_M):
            signature = {**pointers, "out_ptr": "*fp32", **others, **dict.fromkeys(sizes, "i32:16")}
            own = {"ACTIVATION": ACTIVATIONS["gelu"], "HAS_RESIDUAL": True, "HAS_OUT_SCALE": False}
            own |= {"BLOCK_M": tokens, "BLOCK_W": SMALL_W}
            label = f"linear {name} small, {tokens} tokens"
            cases.append((label, _small_kernel, signature, {**constants, **own}, 1, 3))
    return cases
