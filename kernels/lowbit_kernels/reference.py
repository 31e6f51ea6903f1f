"""Every op of this package by its definition, in float64 and int64, written for reading and for tests to compare with.

Same names and arguments as the ops, no shared code with them, no speed. Only `quantize_per_token` computes in float32,
because there the float32 roundings are part of the definition.
"""

from __future__ import annotations

import itertools
import math

import torch

Tensor = torch.Tensor

# --- layouts -------------------------------------------------------------------------------------------------------


def _fields(packed: Tensor, K: int, bits: int) -> Tensor:
    """The unsigned `bits`-wide field of every value: int64 [N, K].

    A block is 32 bytes; byte t of it holds the values t, t + 32, t + 64, ... Two-bit fields start at the top of the
    byte (bits 7:6 first), and four-bit fields; one-bit fields at the bottom (bit 0 first).
    """
    per_byte = 8 // bits
    fields = torch.zeros(packed.shape[0], K, dtype=torch.int64)
    for k in range(K):
        block, place = divmod(k, 32 * per_byte)
        plane, t = divmod(place, 32)
        shift = plane if bits == 1 else 8 - bits - bits * plane
        fields[:, k] = packed[:, block * 32 + t].long() // 2**shift % 2**bits
    return fields


def unpack_ternary(packed: Tensor, K: int) -> Tensor:
    """uint8 [N, ceil(K/128)*32] -> int8 [N, K]; field = code + 1."""
    return (_fields(packed, K, 2) - 1).to(torch.int8)


def unpack_binary(packed: Tensor, K: int) -> Tensor:
    """uint8 [N, ceil(K/256)*32] -> int8 [N, K]; field = (code + 1) / 2."""
    return (2 * _fields(packed, K, 1) - 1).to(torch.int8)


def unpack_split(packed: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, ceil(K/128)*32] -> two int8 [N, K]; field = 2 * b1 + b2, code = 2 b - 1."""
    fields = _fields(packed, K, 2)
    return (2 * (fields // 2) - 1).to(torch.int8), (2 * (fields % 2) - 1).to(torch.int8)


def unpack_uniform(packed: Tensor, K: int, layout: str) -> Tensor:
    """uint8 [N, bytes] -> int8 [N, K]; field = code + 1 (2 bits) or + 8 (4 bits); int8 is what it is."""
    if layout in ("int8", "uniform8"):
        return packed.clone()
    return (_fields(packed, K, int(layout[-1])) - {"uniform2": 1, "uniform4": 8}[layout]).to(torch.int8)


def _pack(fields: Tensor, bits: int, padding: int) -> Tensor:
    """Inverse of `_fields`; the last block is filled up with `padding`."""
    per_byte = 8 // bits
    rows, K = fields.shape
    blocks = math.ceil(K / (32 * per_byte))
    packed = torch.zeros(rows, blocks * 32, dtype=torch.int64)
    for k in range(blocks * 32 * per_byte):
        block, place = divmod(k, 32 * per_byte)
        plane, t = divmod(place, 32)
        shift = plane if bits == 1 else 8 - bits - bits * plane
        packed[:, block * 32 + t] += 2**shift * (fields[:, k].long() if k < K else padding)
    return packed.to(torch.uint8)


def pack_ternary(codes: Tensor) -> Tensor:
    """int8 {-1, 0, 1} [N, K] -> uint8 [N, ceil(K/128)*32]; padded with the field of 0."""
    return _pack(codes.long() + 1, 2, 1)


def pack_binary(codes: Tensor) -> Tensor:
    """int8 {-1, 1} [N, K] -> uint8 [N, ceil(K/256)*32]; padded with 0 bits."""
    return _pack((codes.long() + 1) // 2, 1, 0)


def pack_split(codes1: Tensor, codes2: Tensor) -> Tensor:
    """Two int8 {-1, 1} [N, K] -> uint8 [N, ceil(K/128)*32]; padded with 0 bits."""
    return _pack(codes1.long() + 1 + (codes2.long() + 1) // 2, 2, 0)


def pack_uniform(codes: Tensor, layout: str) -> Tensor:
    """int8 [N, K] -> uint8 [N, bytes] or int8; padded with the field of 0."""
    if layout in ("int8", "uniform8"):
        return codes.clone()
    middle = {"uniform2": 1, "uniform4": 8}[layout]
    return _pack(codes.long() + middle, int(layout[-1]), middle)


# --- activations ---------------------------------------------------------------------------------------------------

SMALLEST_NORMAL = 2.0**-126


def _quantize_row(row: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One float32 row [K] -> (q int8 [K], scale float32 [], zero_point int32 [])."""
    no_zero_point = torch.tensor(0, dtype=torch.int32)
    if not bool(row.isfinite().all()):
        return torch.zeros(len(row), dtype=torch.int8), torch.tensor(math.nan), no_zero_point
    if len(row) == 0:
        return row.to(torch.int8), torch.tensor(0.0), no_zero_point
    q_max = 2 ** (bits - 1) - 1
    q_min = -q_max if symmetric else -q_max - 1
    lo, hi = row.min(), row.max()
    largest = torch.maximum(hi.abs(), lo.abs())
    if symmetric:
        scale = largest / q_max
    else:
        scale = (hi - lo) / (2**bits - 1)
        if scale.isinf():
            return torch.zeros(len(row), dtype=torch.int8), torch.tensor(math.nan), no_zero_point
        if scale < SMALLEST_NORMAL or scale < largest * 2.0**-30:  # a constant row: x = |c| sign(c)
            scale = largest
    if scale < SMALLEST_NORMAL:
        scale, inverse = torch.tensor(0.0), torch.tensor(0.0)
    else:
        inverse = 1.0 / scale
    zero_point = torch.tensor(0.0) if symmetric else q_min - torch.round(lo * inverse)
    q = torch.round(row * inverse) + zero_point
    return q.clamp(q_min, q_max).to(torch.int8), scale, zero_point.to(torch.int32)


def quantize_per_token(x: Tensor, bits: int = 8, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Min-max quantization of every row of x [..., K], x ~ scale * (q - zero_point); float32 arithmetic.

    Symmetric: scale = max|x| / q_max, q = rint(x * (1/scale)). Asymmetric: scale = (max - min) / (2^bits - 1),
    zero_point = q_min - rint(min * (1/scale)), q = rint(x * (1/scale)) + zero_point. A scale below the smallest normal
    float32 is 0; a constant row c has scale |c| (asymmetric); NaN, Inf or an overflowing range make the scale NaN.
    """
    rows = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    parts = [_quantize_row(row, bits, symmetric) for row in rows]
    q = torch.stack([part[0] for part in parts]) if parts else torch.zeros(rows.shape, dtype=torch.int8)
    scale = torch.tensor([float(part[1]) for part in parts])
    zero_point = torch.tensor([int(part[2]) for part in parts], dtype=torch.int32)
    token_shape = x.shape[:-1]
    return q.reshape(x.shape), scale.reshape(token_shape), None if symmetric else zero_point.reshape(token_shape)


def quantize_per_tensor(
    x: Tensor, bits: int = 8, symmetric: bool = True, *, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with one scale [1]; with a given (static) scale, values outside the range saturate."""
    if scale is None:
        q, new_scale, new_zero = quantize_per_token(x.reshape(1, -1), bits, symmetric)
        return q.reshape(x.shape), new_scale, new_zero
    if not bool(x.isfinite().all()) or not bool(scale.isfinite().all()):
        nan = torch.full_like(scale, math.nan)
        return torch.zeros(x.shape, dtype=torch.int8), nan, zero_point
    q_max = 2 ** (bits - 1) - 1
    inverse = 1.0 / scale if float(scale) >= SMALLEST_NORMAL else torch.zeros_like(scale)
    q = torch.round(x.float() * inverse) + (0 if zero_point is None else zero_point)
    q = q.clamp(-q_max if symmetric else -q_max - 1, q_max).to(torch.int8)
    return q.reshape(x.shape), scale, zero_point


# --- linears -------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    None: lambda y: y,
    "gelu": lambda y: 0.5 * y * (1 + torch.erf(y / math.sqrt(2))),
    "gelu_tanh": lambda y: 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
}


def _linear(
    x: Tensor,
    planes: list[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
) -> Tensor:
    """act(sum over planes of x_scale[m] * scale[n] * sum_k (x[m,k] - zero_point[m]) * codes[n,k] + bias[n]) + residual.

    With out_scale the int8 codes of that, NaN becoming 0.
    """
    out_dtype = out_dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype)
    if x.dtype != torch.int8:
        x, x_scale, x_zero_point = quantize_per_token(x)
    assert x_scale is not None
    values = x.long() - (0 if x_zero_point is None else x_zero_point.long().unsqueeze(-1))
    out = torch.zeros((*x.shape[:-1], planes[0][0].shape[0]), dtype=torch.float64)
    for codes, scale in planes:
        accumulator = values @ codes.long().T
        out += x_scale.double().unsqueeze(-1) * scale.double() * accumulator.double()
    if bias is not None:
        out += bias.double()
    out = _ACTIVATIONS[activation](out)
    if residual is not None:
        out = out + residual.double()
    if out_scale is None:
        return out.to(out_dtype)
    if float(out_scale) < SMALLEST_NORMAL:
        out = out * 0  # an infinity becomes NaN
    else:
        out = torch.round(out / out_scale.double())
    return torch.where(out.isnan(), 0.0, out.clamp(-127, 127)).to(torch.int8)


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """x [..., K] times ternary weights [N, K]^T: exact integer sums, then all else in float64."""
    planes = [(unpack_ternary(packed, x.shape[-1]), scale)]
    return _linear(x, planes, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def binary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """The same with binary weights."""
    planes = [(unpack_binary(packed, x.shape[-1]), scale)]
    return _linear(x, planes, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def split_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """The same with the sum of two binary weights; scale [2, N] or [2, 1]."""
    planes = list(zip(unpack_split(packed, x.shape[-1]), scale, strict=True))
    return _linear(x, planes, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def int8_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """The same with int8 weights."""
    planes = [(packed, scale)]
    return _linear(x, planes, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


def uniform_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """The same with weights step * code + offset; scale [2, G] holds both for each of G groups of rows."""
    N, groups = packed.shape[0], scale.shape[1]
    step, offset = (own[[n * groups // N for n in range(N)]] for own in scale)
    codes = unpack_uniform(packed, x.shape[-1], f"uniform{bits}")
    planes = [(codes, step), (torch.ones_like(codes), offset)]
    return _linear(x, planes, bias, x_scale, x_zero_point, activation, out_dtype, residual, out_scale)


# --- attention -----------------------------------------------------------------------------------------------------


def _dequantized(x: Tensor, bits: int | None, symmetric: bool) -> Tensor:
    """x [..., K] as its codes say, float64; x itself without bits."""
    if bits is None:
        return x.double()
    q, scale, zero_point = quantize_per_token(x, bits, symmetric)
    zero = 0 if zero_point is None else zero_point.double().unsqueeze(-1)
    return scale.double().unsqueeze(-1) * (q.double() - zero)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scaling: float | None = None,
    bits: int | None = None,
    asymmetric: tuple[str, ...] = ("attention_probs",),
    bias: Tensor | None = None,
    return_lse: bool = False,
    importance: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None]:
    """softmax(scaling * Q K^T + bias) V for every sequence and head of [T, H, D], with every operand quantized by rows.

    lse [H, T] and importance [T] are float64.
    """
    T, H, D = query.shape
    scaling = D**-0.5 if scaling is None else scaling
    out = torch.zeros(T, H, D, dtype=torch.float64)
    lse, received = torch.zeros(H, T, dtype=torch.float64), torch.zeros(T, dtype=torch.float64)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        assert end - start <= max_seqlen
        for head in range(H):
            q, k, v = (
                _dequantized(x[start:end, head], bits, site not in asymmetric)
                for site, x in (("query", query), ("key", key), ("value", value))
            )
            scores = scaling * (q @ k.T)
            if bias is not None:
                scores += bias[head % len(bias), : end - start, : end - start].double()
            probs = torch.softmax(scores, dim=1)
            lse[head, start:end] = torch.logsumexp(scores, dim=1)
            received[start:end] += probs.sum(0) if importance == "all" else probs[:1].sum(0)
            if bits is not None:
                probs = _dequantized(probs.float(), bits, "attention_probs" not in asymmetric)
            out[start:end, head] = probs @ v
    if not return_lse and importance is None:
        return out.to(query.dtype)
    return out.to(query.dtype), lse if return_lse else None, received if importance else None


def attention_of_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    bits: int | None = None,
    asymmetric: tuple[str, ...] = ("attention_probs",),
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp of the scores) of one sequence and head [n, D], float64; straight-through gradients."""

    def quantized(site: str, x: Tensor) -> Tensor:
        if bits is None:
            return x
        return x + (_dequantized(x.detach().float(), bits, site not in asymmetric) - x.detach())

    q, k, v = quantized("query", query.double()), quantized("key", key.double()), quantized("value", value.double())
    scores = scaling * (q @ k.T)
    if bias is not None:
        scores = scores + bias
    return quantized("attention_probs", torch.softmax(scores, dim=1)) @ v, torch.logsumexp(scores, dim=1)


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scaling: float,
    bits: int | None = None,
    asymmetric: tuple[str, ...] = ("attention_probs",),
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in query, key and value by autograd, 0 for tokens after the last sequence; needs no saved results."""
    grads = tuple(torch.zeros(query.shape, dtype=torch.float64) for _ in range(3))
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        n = end - start
        assert n <= max_seqlen
        for head in range(query.shape[1] if n else 0):
            own = [x[start:end, head].detach().double().requires_grad_() for x in (query, key, value)]
            shift = None if bias is None else bias[head % len(bias), :n, :n].double()
            out, _ = attention_of_one(*own, scaling=scaling, bits=bits, asymmetric=asymmetric, bias=shift)
            for grad, part in zip(
                grads, torch.autograd.grad(out, own, grad_out[start:end, head].double()), strict=True
            ):
                grad[start:end, head] = part
    grad_query, grad_key, grad_value = (grad.to(query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value


# --- weights -------------------------------------------------------------------------------------------------------


def _groups(w: Tensor, granularity: str) -> Tensor:
    """float64 [N, K] per row, [1, N*K] per tensor."""
    return w.double() if granularity == "per_row" else w.double().reshape(1, -1)


def _ternarize_group(w: Tensor, curvature: Tensor | None, iterations: int) -> tuple[Tensor, Tensor]:
    """One float64 group [n] -> (codes float64 [n] in {-1, 0, 1}, scale [])."""
    magnitude = w.abs()
    nothing = torch.zeros_like(w), torch.zeros((), dtype=torch.float64)
    if not bool(w.isfinite().all()):
        return torch.zeros_like(w), torch.tensor(math.nan)
    if len(w) == 0:
        return nothing
    if curvature is None:
        codes = torch.where(magnitude > 0.7 * magnitude.mean(), w.sign(), 0.0)
        if not codes.any():
            return nothing
        return codes, magnitude[codes != 0].mean()
    v = curvature if bool((curvature != 0).any()) else torch.ones_like(curvature)
    codes = w.sign()
    for iteration in range(iterations + 1):
        weight = (v * codes.abs()).sum()
        if weight == 0:
            return nothing
        scale = (v * magnitude * codes.abs()).sum() / weight
        if iteration < iterations:
            codes = torch.round(torch.clamp(w / scale, -1, 1))  # half to even: |w| = scale / 2 becomes 0
    return codes, scale


def ternarize(
    w: Tensor, *, granularity: str = "per_row", curvature: Tensor | None = None, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """TWN (Li et al. 2016): code = sign(w) where |w| > 0.7 mean|w|, else 0; scale = mean|w| over the codes not 0.

    With `curvature` v, the loss-aware form (Hou & Kwok 2018): minimise sum v (w - scale * code)^2 by alternating
    scale = sum v |w code| / sum v |code| and code = rint(clamp(w / scale, -1, 1)), from code = sign(w).
    """
    groups = _groups(w, granularity)
    weights = [None] * len(groups) if curvature is None else list(_groups(curvature, granularity))
    parts = [_ternarize_group(group, v, iterations) for group, v in zip(groups, weights, strict=True)]
    codes = torch.stack([part[0] for part in parts]) if parts else groups
    return codes.to(torch.int8).reshape(w.shape), torch.tensor([float(part[1]) for part in parts])


def binarize(w: Tensor, *, granularity: str = "per_row") -> tuple[Tensor, Tensor]:
    """BWN (Rastegari et al. 2016): code = +1 where w >= 0 else -1, scale = mean|w|."""
    groups = _groups(w, granularity)
    scale = groups.abs().sum(1) / max(groups.shape[1], 1)
    scale[~groups.isfinite().all(1)] = math.nan
    return torch.where(w >= 0, 1, -1).to(torch.int8), scale.float()


def _split_group(w: Tensor) -> tuple[Tensor, Tensor]:
    """One float64 group [n] -> two latent binary groups."""
    codes, _ = _ternarize_group(w, None, 0)
    kept, zero = codes != 0, codes == 0
    sum_kept, sum_all = w[kept].abs().sum(), w.abs().sum()
    if not bool(kept.any()):
        return w / 2, w / 2  # all weights are 0 (or NaN)
    # Where |sum of the zero-coded| >= sum of the kept, A would leave (0, 1): entries of the heavier sign change sides.
    side = torch.ones_like(w)
    excess = w[zero].sum()
    if excess.abs() >= sum_kept:
        moved = 0.0
        for i in range(len(w)):
            if zero[i] and w[i] * excess > 0:
                moved += abs(float(w[i]))
                side[i] = -1.0 if moved <= abs(float(excess)) / 2 else 1.0
    balance = (side * w)[zero].sum()  # S_J - S_K
    a = (sum_kept - balance) / (2 * sum_kept)
    b = (len(w) / kept.sum() * sum_kept - sum_all) / (2 * zero.sum()) if bool(zero.any()) else 0.0
    w1, w2 = a * w, (1 - a) * w
    for i in range(len(w)):
        if zero[i]:
            opposite = b + w[i].abs(), -b  # (the larger part has the sign of w, the other is opposite)
            larger, smaller = (opposite[0], opposite[1]) if w[i] > 0 else (-opposite[0], -opposite[1])
            in_first = (w[i] > 0) == (side[i] > 0)
            w1[i], w2[i] = (larger, smaller) if in_first else (smaller, larger)
    return w1, w2


def split_ternary(w: Tensor, *, granularity: str = "per_row") -> tuple[Tensor, Tensor]:
    """Ternary weight splitting (BinaryBERT, Bai et al. 2021, section 3.2): w = w1 + w2, and after BWN of both the
    binary values sum to the TWN values of w.
    """
    parts = [_split_group(group) for group in _groups(w, granularity)]
    if not parts:
        return torch.zeros(w.shape), torch.zeros(w.shape)
    w1, w2 = (torch.stack(halves).float().reshape(w.shape) for halves in zip(*parts, strict=True))
    return w1, w2


# --- embedding -----------------------------------------------------------------------------------------------------


def quantized_embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    *,
    embedding_dim: int | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """scale[id] * codes[id] for every id; a split pair (scale [2, V] or [2, 1]) sums both planes."""
    K = embedding_dim if embedding_dim is not None else packed.shape[1] * (8 // bits)
    if scale.dim() == 2:
        planes = list(zip(unpack_split(packed, K), scale, strict=True))
    else:
        codes = {1: unpack_binary, 2: unpack_ternary, 8: lambda rows, K: rows[:, :K]}[bits](packed, K)
        planes = [(codes, scale)]
    table = sum(codes.double() * scales.double().unsqueeze(-1) for codes, scales in planes)
    return table[ids.long()].to(out_dtype)  # type: ignore[index]


# --- LayerNorm -----------------------------------------------------------------------------------------------------


def add_layernorm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    bits: int | None = None,
    symmetric: bool = True,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(v - mean) / sqrt(variance + eps) * weight + bias of v = x + residual; the codes are of y as rounded."""
    v = x.double() if residual is None else x.double() + residual.double()
    centred = v - v.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    y = (centred / (variance + eps) ** 0.5 * weight.double() + bias.double()).to(x.dtype)
    return y if bits is None else (y, *quantize_per_token(y, bits, symmetric))


def embedding_layernorm(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    embedding_bits: int,
    token_type_ids: Tensor,
    token_type_table: Tensor,
    position_ids: Tensor,
    position_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-12,
    *,
    bits: int | None = None,
    symmetric: bool = True,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """LayerNorm of (word + token type) + position, where rows and sums are rounded to `out_dtype`."""
    v = quantized_embedding(ids, packed, scale, embedding_bits, embedding_dim=len(weight), out_dtype=out_dtype)
    for rows in (token_type_table[token_type_ids.long()], position_table[position_ids.long()]):
        v = (v.double() + rows.to(out_dtype).double()).to(out_dtype)
    return add_layernorm(v, None, weight, bias, eps, bits=bits, symmetric=symmetric)


# --- token pruning -------------------------------------------------------------------------------------------------


def _kept(n: int, keep: float, unit: str, min_tokens: int) -> int:
    """How many of n tokens stay, by ratio or number."""
    if unit == "ratio":
        return min(max(math.ceil(keep * n), min_tokens), n)
    return int(min(n, max(keep, min_tokens)))


def kept_cu_seqlens(cu_seqlens: Tensor, keep: float, unit: str = "ratio", min_tokens: int = 1) -> Tensor:
    """cu_seqlens [B + 1] of what stays."""
    ends = [0]
    for n in cu_seqlens.diff().tolist():
        ends.append(ends[-1] + _kept(n, keep, unit, min_tokens))
    return torch.tensor(ends, dtype=torch.int32)


def _goes_before(a: float, b: float) -> bool:
    """Whether importance a is above b; NaN is below all."""
    return not math.isnan(a) and (math.isnan(b) or a > b)


def select_tokens(
    importance: Tensor,
    cu_seqlens: Tensor,
    keep: float | Tensor,
    *,
    unit: str = "ratio",
    min_tokens: int = 1,
    protected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens before which fewer go than stay; in order: the first, those protected, by importance, by place."""
    ends, index = cu_seqlens.tolist(), []
    new_ends = [0]
    for b, (start, end) in enumerate(itertools.pairwise(ends)):
        s = importance[start:end].double().tolist()
        n = end - start
        group = [0 if j == 0 else 1 if protected is not None and bool(protected[start + j]) else 2 for j in range(n)]
        if isinstance(keep, Tensor):
            room = int(keep[b + 1] - keep[b])
        elif unit == "threshold":
            room = min(max(sum(group[j] < 2 or s[j] >= keep for j in range(n)), min_tokens), n)
        else:
            room = _kept(n, keep, unit, min_tokens)
        for j in range(n):
            rank = sum(
                group[k] < group[j]
                or (
                    group[k] == group[j]
                    and (_goes_before(s[k], s[j]) or (k < j and not _goes_before(s[j], s[k])))
                )
                for k in range(n)
            )  # fmt: skip
            if rank < room:
                index.append(start + j)
        new_ends.append(new_ends[-1] + room)
    return torch.tensor(index, dtype=torch.int64), torch.tensor(new_ends, dtype=torch.int32)
