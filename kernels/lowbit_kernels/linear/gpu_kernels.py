"""Triton kernels of the linears; their tiles and launches are in `gpu.py`, formulas and shapes in `op.py`.

Weights move N*K/4 (or N*K/8) bytes instead of 2*N*K in float16. The kernel computes y^T = W x^T so that the decoded
weights are the left operand of the tensor-core product, the only one that may sit in registers on Hopper. Weights are
decoded with their sign, times 64, four in two instructions; |x| <= 128 keeps sums below 2^31 for K < 2^18. On Hopper
the planes of a byte are joined to one left operand, elsewhere each is a product of its own; the integers are the same.

Up to 8 tokens a kernel without tensor cores multiplies four weights at a time (dp4a), so that a few rows fill the
device. Where tiles are few and K is long, several programs share a tile, each a slice of K: sums of integers do not
depend on their order, so the result is the same to the bit.
"""

from __future__ import annotations

from .._triton import tl, triton
from ..quantize.gpu import _rint, _to_int8

TERNARY, BINARY, SPLIT = 0, 1, 2  # `LAYOUT` of the kernels

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
