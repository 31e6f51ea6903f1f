"""The attention of `varlen_attention` in plain torch: the CPU path of the op, and `attention_eager` for any device.

Both hold the map of probabilities, as the kernels do not. The CPU path holds that of a few sequences at a time and
takes all that is asked for out of it in one go; `attention_eager` holds all of it and is differentiable throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import native
from .._ops import FLOATS, check_choice, check_device, check_tensor, stored
from ..quantize.op import fake_quantize_per_token

SITES = ("query", "key", "attention_probs", "value")

IMPORTANCE = (None, "all", "cls")

CPU_SCORES = 2**20  # scores held at a time, so that they stay in cache: 1.4 to 2 times as fast as a whole batch


class AttentionOutput(NamedTuple):
    """Attention and what was asked for besides; None what was not."""

    output: torch.Tensor
    lse: torch.Tensor | None
    importance: torch.Tensor | None


class Mode(NamedTuple):
    """What to compute, as the arguments of `attention` and `attention_eager`."""

    scaling: float
    bits: int | None
    asymmetric: Sequence[str]
    bias: torch.Tensor | None = None
    return_lse: bool = False
    importance: str | None = None
    dropout_p: float = 0.0


# Like `AttentionOutput`, but all three by tokens: [b, S, H, D], [b, S, H], [b, S], or with b and S joined.
_Results = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class _StraightThrough(torch.autograd.Function):
    """The quantized value forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def _padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: torch.Tensor | None, mode: Mode
) -> _Results:
    """`_padded_in_float32` whatever torch.autocast says, as the kernels do: it would round importance too."""
    if not torch.is_autocast_enabled(query.device.type):
        return _padded_in_float32(query, key, value, own, mode)
    with torch.autocast(query.device.type, enabled=False):
        return _padded_in_float32(query, key, value, own, mode)


def _padded_in_float32(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: torch.Tensor | None, mode: Mode
) -> _Results:
    """Sequences side by side, [b, S, H, D] to the same; `own` [b, S] says which tokens are real, None that all are.

    Not torch's scaled_dot_product_attention, which on the CPU makes 0 of a row whose scores are all NaN.
    """

    def quantized(site: str, x: torch.Tensor) -> torch.Tensor:
        if mode.bits is None:
            return x
        codes = fake_quantize_per_token(x, mode.bits, site not in mode.asymmetric)
        return _StraightThrough.apply(x, codes) if x.requires_grad else codes

    dtype = torch.promote_types(query.dtype, torch.float32)
    q = quantized("query", query.transpose(1, 2).to(dtype))
    k = quantized("key", key.transpose(1, 2).to(dtype))
    v = quantized("value", value.transpose(1, 2).to(dtype))
    scores = torch.matmul(q * mode.scaling, k.transpose(2, 3))
    if mode.bias is not None:
        length = scores.shape[-1]
        bias = mode.bias[:, :length, :length].to(dtype)
        # None for queries that are not real: one whose keys are all hidden would be NaN.
        scores = scores + (bias if own is None else torch.where(own[:, None, :, None], bias, 0.0))
    if own is not None:
        # As a float, and stored, or Inductor would compare lengths again for every score.
        hidden = stored(torch.where(own, 0.0, -math.inf))[:, None, None, :]
        scores = scores + hidden
    probs = torch.softmax(scores, -1)
    lse = torch.logsumexp(scores, -1).transpose(1, 2) if mode.return_lse else None
    importance = _received(probs, own, mode.importance)
    if mode.dropout_p:
        probs = torch.dropout(probs, mode.dropout_p, True)
    if own is not None and mode.bits is not None:
        # Keys that are not real meet values of 0; they take a probability that is in the row's range already.
        probs = stored(torch.where(hidden == 0, probs, probs.amax(-1, keepdim=True)))
        v = torch.where(hidden.transpose(2, 3) == 0, v, 0.0)
    out = torch.matmul(quantized("attention_probs", probs), v).transpose(1, 2).to(query.dtype)
    return out, lse, importance


def _received(probs: torch.Tensor, own: torch.Tensor | None, importance: str | None) -> torch.Tensor | None:
    """Probabilities [b, H, S, S] summed over heads and the queries asked for: [b, S]."""
    if importance is None:
        return None
    if importance == "cls":
        return probs[:, :, 0].sum(1)
    if own is None:
        return probs.sum((1, 2))
    # Queries that are not real count 0. They are copies of one that is, so no NaN comes in from elsewhere.
    rows = own.to(probs.dtype).repeat(1, probs.shape[1]).unsqueeze(1)
    return torch.matmul(rows, probs.flatten(1, 2)).squeeze(1)


def _is_uniform(query: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> bool:
    """Whether all sequences have the same length: no other lengths up to `max_seqlen` add up to T."""
    return query.shape[0] == (cu_seqlens.shape[0] - 1) * max_seqlen


def _uniform(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, mode: Mode) -> _Results:
    """Sequences of one length, [b * length, H, D] to the same: views, nothing is padded."""
    query, key, value = (x.unflatten(0, (-1, length)) for x in (query, key, value))
    out, lse, importance = (None if x is None else x.flatten(0, 1) for x in _padded(query, key, value, None, mode))
    assert out is not None
    return out, lse, importance


def _ragged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    mode: Mode,
) -> _Results:
    """Sequences of any lengths as one padded batch: no shape depends on data, so it can be traced and never waits for
    a device; Inductor fuses it."""
    token = torch.arange(query.shape[0], device=query.device)
    place = torch.arange(max_seqlen, device=query.device)
    own = place < cu_seqlens.diff().unsqueeze(1)
    tokens = (cu_seqlens[:-1].unsqueeze(1) + torch.where(own, place, 0)).clamp(max=query.shape[0] - 1)
    # An empty sequence keeps one key: rows without any are NaN, and NaN times a gradient of 0 would not be 0.
    results = _padded(query[tokens], key[tokens], value[tokens], own | (place == 0), mode)
    sequence = torch.searchsorted(cu_seqlens[1:], token.to(cu_seqlens.dtype), right=True)
    # Tokens after the last sequence get 0.
    spare = sequence == cu_seqlens.shape[0] - 1
    sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
    place = torch.where(spare, 0, token - cu_seqlens[sequence])
    out, lse, importance = (
        None if x is None else x[sequence, place].masked_fill(spare.view(-1, *[1] * (x.dim() - 2)), 0.0)
        for x in results
    )
    assert out is not None
    return out, lse, importance


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, mode: Mode
) -> AttentionOutput:
    """The whole batch at once, on any device, traced and differentiated as the torch code it is."""
    T, H, _ = query.shape
    out: torch.Tensor
    lse: torch.Tensor | None
    importance: torch.Tensor | None
    if not query.numel():
        out, lse, importance = query + key + value, query.new_empty(T, H), query.sum((1, 2))
    elif _is_uniform(query, cu_seqlens, max_seqlen):
        out, lse, importance = _uniform(query, key, value, max_seqlen, mode)
    else:
        out, lse, importance = _ragged(query, key, value, cu_seqlens, max_seqlen, mode)
    return AttentionOutput(
        out.contiguous(),
        lse.t().contiguous() if mode.return_lse and lse is not None else None,
        importance if mode.importance is not None else None,
    )


def check_cu_seqlens(cu_seqlens: torch.Tensor, T: int, max_seqlen: int) -> None:
    """Raise ValueError unless the offsets fit; waits for the device."""
    low, high = torch.aminmax(cu_seqlens.diff()) if len(cu_seqlens) > 1 else (0, 0)
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != T or low < 0 or high > max_seqlen:
        raise ValueError(
            f"cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])} in steps of {int(low)} to "
            f"{int(high)}, expected 0 to T={T} in steps of 0 to max_seqlen={max_seqlen}"
        )


def outputs(
    query: torch.Tensor, return_lse: bool, importance: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, importance) of the op, uninitialised; empty what is not asked for."""
    T, H, D = query.shape
    lse = query.new_empty((H, T) if return_lse else 0, dtype=torch.float32)
    return query.new_empty(T, H, D), lse, query.new_empty(T if importance else 0, dtype=torch.float32)


def run(
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
    """The op on the CPU."""
    T, H, _ = query.shape
    check_cu_seqlens(cu_seqlens, T, max_seqlen)
    out, lse, received = outputs(query, return_lse, importance)
    if not out.numel():
        return out, lse, received.zero_()
    mode = Mode(scaling, bits, asymmetric, bias, return_lse, importance)
    if runs_natively(query.dtype, bits, asymmetric) and native.available():
        _native((query, key, value), cu_seqlens, mode, out, lse, received)
        return out, lse, received
    targets = (out, lse.t(), received)
    if _is_uniform(query, cu_seqlens, max_seqlen):
        size = _sequences_at_a_time(H, max_seqlen) * max_seqlen
        for first in range(0, T, size):
            rows = slice(first, first + size)
            results = _uniform(query[rows], key[rows], value[rows], max_seqlen, mode)
            for target, result in zip(targets, results, strict=True):
                if result is not None:
                    target[rows] = result
        return out, lse, received
    # From the longest to the shortest, so that neighbours pad each other little: with copies of their own first token,
    # so that NaN stays in its sequence.
    lengths, order = cu_seqlens.diff().sort(descending=True)
    lengths = lengths[lengths > 0].unsqueeze(1)
    starts = cu_seqlens[order[: len(lengths)]].unsqueeze(1)
    first = 0
    while first < len(lengths):
        longest = int(lengths[first])
        group = slice(first, first + _sequences_at_a_time(H, longest))
        place = torch.arange(longest)
        own = place < lengths[group]
        tokens = starts[group] + torch.where(own, place, 0)
        q, k, v = (x.index_select(0, tokens.flatten()).unflatten(0, own.shape) for x in (query, key, value))
        results = _padded(q, k, v, None if bool(own.all()) else own, mode)
        real = own.flatten().nonzero().flatten()
        for target, result in zip(targets, results, strict=True):
            if result is not None:
                target.index_copy_(0, tokens[own], result.flatten(0, 1).index_select(0, real))
        first = group.stop
    return out, lse, received


def runs_natively(dtype: torch.dtype, bits: int | None, asymmetric: Sequence[str]) -> bool:
    """Whether the native kernels, where there are any, take attention like this."""
    return dtype == torch.float32 and bits is not None and set(asymmetric) <= {"attention_probs"}


def _native(
    heads: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    mode: Mode,
    out: torch.Tensor,
    lse: torch.Tensor,
    received: torch.Tensor,
) -> None:
    T, H, D = out.shape
    query, key, value = (x if x.stride()[1:] == (D, 1) else x.contiguous() for x in heads)
    cu_seqlens = cu_seqlens.contiguous()
    bias = None if mode.bias is None else mode.bias.float()
    by_head = out.new_zeros(H, T) if mode.importance else None
    op = native_attention(T, H, D, mode, bias, out, lse, by_head)
    op.query, op.key, op.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
    op.query_stride, op.key_stride, op.value_stride = query.stride(0), key.stride(0), value.stride(0)
    native.function("attention")(op, cu_seqlens.data_ptr(), len(cu_seqlens) - 1)
    if by_head is not None:
        torch.sum(by_head, 0, out=received)


def native_attention(
    T: int,
    H: int,
    D: int,
    mode: Mode,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    by_head: torch.Tensor | None,
) -> native.Attention:
    """Arguments of the native kernel but for query, key and value; it points to the tensors given, all float32."""
    op = native.Attention(T=T, H=H, D=D, queries=T, scaling=mode.scaling, bits=mode.bits)
    op.probs_symmetric = "attention_probs" not in mode.asymmetric
    op.first_query_only = mode.importance == "cls"
    op.out, op.lse, op.importance, op.bias = map(native.pointer, (out, lse, by_head, bias))
    if bias is not None:
        op.bias_head = bias.stride(0) if bias.shape[0] > 1 else 0
        op.bias_query, op.bias_key = bias.stride()[1:]
    return op


def _sequences_at_a_time(H: int, length: int) -> int:
    return max(1, CPU_SCORES // (H * length * length))


def check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    bits: int | None,
    asymmetric: Sequence[str],
    bias: torch.Tensor | None,
    importance: str | None,
    scaling: float | None,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """What `attention` and `attention_eager` accept, of query and bias `dtypes`."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor, dtypes, ndim=3)
        if tensor.shape != query.shape or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected the same as query: {query.dtype} "
                f"{tuple(query.shape)}"
            )
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32,), ndim=1)
    check_device(query=query, key=key, value=value, cu_seqlens=cu_seqlens, bias=bias)
    check_choice("bits", bits, (None, 8, 4))
    check_choice("importance", importance, IMPORTANCE)
    if not (scaling is None or isinstance(scaling, int | float)):
        raise TypeError(f"scaling={scaling!r}, accepted: None or a number")
    unknown = sorted(set(asymmetric) - set(SITES))
    if unknown:
        raise ValueError(f"asymmetric={unknown}, accepted: {', '.join(SITES)}")
    if not isinstance(max_seqlen, int | torch.SymInt) or cu_seqlens.shape[0] == 0 or not 0 <= max_seqlen < 2**31:
        raise ValueError(
            f"cu_seqlens has {cu_seqlens.shape[0]} entries and max_seqlen={max_seqlen}, expected B + 1 and at least 0"
        )
    if bias is not None:
        check_tensor("bias", bias, dtypes, ndim=3)
        heads, rows, columns = bias.shape
        if heads not in (1, query.shape[1]) or rows != columns or rows < max_seqlen:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected [H or 1, S, S] with H={query.shape[1]} and S at least "
                f"max_seqlen={max_seqlen}"
            )


def attention_eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scaling: float | None = None,
    bits: int | None = None,
    asymmetric: Sequence[str] = ("attention_probs",),
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    importance: str | None = None,
) -> AttentionOutput:
    """`attention` in plain torch, which holds the map [B, H, max_seqlen, max_seqlen] and is differentiable throughout.

    Args:
        query, key, value, cu_seqlens, max_seqlen, scaling, bits, asymmetric, bias, importance: as `attention`; float64
            is accepted too, and D is any on every device.
        dropout_p: share of the probabilities that are set to 0 at random, after importance is taken.

    Returns:
        (output [T, H, D] like query, None, importance float32 (float64 for float64) [T] or None). Gradients reach
        query, key, value and bias, from output and from importance, as if nothing had been quantized.

    Raises:
        TypeError, ValueError: as `attention`; a dropout_p outside [0, 1].
    """
    check_arguments(query, key, value, cu_seqlens, max_seqlen, bits, asymmetric, bias, importance, scaling, FLOATS)
    D = query.shape[2]
    if D == 0:
        raise ValueError("query has D=0, accepted: any above 0")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p={dropout_p}, accepted: 0 to 1")
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, query.shape[0], max_seqlen)
    mode = Mode(D**-0.5 if scaling is None else float(scaling), bits, asymmetric, bias, False, importance, dropout_p)
    return attend(query, key, value, cu_seqlens, max_seqlen, mode)
