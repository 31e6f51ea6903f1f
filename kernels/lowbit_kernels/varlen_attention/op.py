"""Attention without padding: the sequences of a batch lie one after the other, no key is masked but by its sequence.

    out[i] = sum_j probs[i, j] value[j],   probs[i] = softmax_j(scaling * query[i] . key[j])     i, j in one sequence
    bits     out[i] = sum_j q(probs[i])_j q(value[j]),   probs[i] = softmax_j(scaling * q(query[i]) . q(key[j]))

Shapes [T, H, D], each head for itself; sequence b holds the tokens cu_seqlens[b] to cu_seqlens[b + 1]. `q` is
`fake_quantize_per_token`, with the sites and defaults of `lowbit.nn.attention` (released TernaryBERT and BinaryBERT).
A row of probabilities takes its range from the keys of its own sequence. In a padded batch the probability 0 of masked
keys counts too, which moves the range where every own probability is far from 0: a sequence then depends on how far its
batch is padded. Here it never does.

Without bits, one pass over the keys (online softmax: Milakov & Gimelshein 2018, FlashAttention). With bits, two: the
first finds the largest and the smallest score m, n and l = sum_j exp(s_j - m), and so the range of the probabilities,
from exp(n - m) / l to 1 / l; the second computes the same scores again, quantizes and multiplies. Scores are products
of int8 codes, exact, and cheap enough to do twice: the map would be T * S * H floats to write and read. Rows are
quantized where they are loaded, so a key is quantized once for every block of queries, which at BERT's lengths are few.

    lse[i] = log sum_j exp(scores[i, j])        importance[j] = sum_i exp(scores[i, j] - lse[i]), over heads too

Importance sums columns where attention sums rows: a second kernel goes over the queries for each block of keys, one
product instead of two or three. Every sum is that of one program in one order: no atomics, the same bytes each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._ops import SINGLE, check_flag, define, traced_on_cpu
from . import cpu as attention_cpu
from .backward import attention_backward_op
from .cpu import AttentionOutput, Mode, attend, check_arguments, check_cu_seqlens, outputs, runs_natively
from .gpu import launch
from .shared_gpu import HEAD_DIMS


def _fake(
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
    return outputs(query, return_lse, importance)


_op = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, SymInt max_seqlen, float scaling, int? bits, "
    "str[] asymmetric, Tensor? bias=None, bool return_lse=False, str? importance=None) -> (Tensor, Tensor, Tensor)",
    cpu=attention_cpu.run,
    cuda=launch,
    fake=_fake,
)


class _Attention(torch.autograd.Function):
    """The op with gradients to query, key and value; the backward pass computes the scores again from lse."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        scaling: float,
        bits: int | None,
        asymmetric: list[str],
        bias: torch.Tensor | None,
        importance: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, lse, received = _op(
            query, key, value, cu_seqlens, max_seqlen, scaling, bits, asymmetric, bias, True, importance
        )
        ctx.save_for_backward(query, key, value, out, lse, cu_seqlens, bias)
        ctx.max_seqlen, ctx.scaling, ctx.bits, ctx.asymmetric = max_seqlen, scaling, bits, asymmetric
        ctx.mark_non_differentiable(lse, received)
        return out, lse, received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:

        query, key, value, out, lse, cu_seqlens, bias = ctx.saved_tensors
        # The op itself: shapes were checked forward, and Dynamo refuses the checks in a backward pass.
        gradients = attention_backward_op(
            grads[0], query, key, value, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scaling, ctx.bits, ctx.asymmetric,
            bias,
        ).unbind(0)  # fmt: skip
        return *gradients, None, None, None, None, None, None, None


def attention(
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
    return_lse: bool = False,
    importance: str | None = None,
) -> Any:  # a tensor or AttentionOutput, by the arguments
    """Bidirectional attention within each sequence of a batch without padding.

    Args:
        query, key, value: float32, float16 or bfloat16 [T, H, D], one dtype; any strides (those of a joint projection
            [T, 3, H, D], say). D is 16, 32, 64 or 128 on CUDA, any on the CPU.
        cu_seqlens: int32 [B + 1], from 0 to T: sequence b holds the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
        max_seqlen: no sequence is longer.
        scaling: of the scores; default D ** -0.5.
        bits: 8 or 4 quantizes query, key, value and the probabilities per token and head, None nothing.
        asymmetric: what is quantized with a zero point, out of "query", "key", "attention_probs", "value".
        bias: float [H or 1, S, S] with S >= max_seqlen, any strides; bias[h, i, j] is added to the score of query i
            and key j of every sequence. -inf hides a key.
        return_lse: return the logarithm of the sum of every query's exponentials too.
        importance: return the attention that each token receives too: "all" sums the probabilities (before they are
            quantized) over the heads and the queries of its sequence, "cls" over the heads for the first query alone.

    Returns:
        [T, H, D] like query, contiguous; where lse or importance are asked for, AttentionOutput(output, lse float32
        [H, T] or None, importance float32 [T] or None). NaN stays in its sequence and, but for importance, head.
        `output` is differentiable in query, key and value, as if nothing had been quantized; the others are not.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or names that do not fit; a bias that wants a gradient, which
            only `attention_eager` gives; cu_seqlens that do not fit (CPU; on CUDA, where a check would stall the
            device, rows outside every sequence or beyond max_seqlen are undefined, but for importance: 0).
    """
    check_arguments(query, key, value, cu_seqlens, max_seqlen, bits, asymmetric, bias, importance, scaling, SINGLE)
    check_flag("return_lse", return_lse)
    D = query.shape[2]
    if D == 0 or (query.device.type == "cuda" and D not in HEAD_DIMS):
        raise ValueError(f"query has D={D}, accepted: {', '.join(map(str, HEAD_DIMS))} on CUDA, any above 0 on the CPU")
    scaling = D**-0.5 if scaling is None else float(scaling)
    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if bias is not None:
        if bias.requires_grad and torch.is_grad_enabled():
            raise ValueError("bias requires a gradient, which attention does not give: use attention_eager")
        bias = bias.detach()
    if not differentiated:
        query, key, value = query.detach(), key.detach(), value.detach()
    if traced_on_cpu(query, natively=runs_natively(query.dtype, bits, asymmetric)) or (
        differentiated and query.device.type == "cpu"
    ):
        if not torch.compiler.is_compiling():
            check_cu_seqlens(cu_seqlens, query.shape[0], max_seqlen)
        mode = Mode(scaling, bits, asymmetric, bias, return_lse, importance)
        out, lse, received = attend(query, key, value, cu_seqlens, max_seqlen, mode)
    elif differentiated:
        out, lse, received = _Attention.apply(
            query, key, value, cu_seqlens, max_seqlen, scaling, bits, list(asymmetric), bias, importance
        )
    else:
        out, lse, received = _op(
            query, key, value, cu_seqlens, max_seqlen, scaling, bits, list(asymmetric), bias, return_lse, importance
        )
    if not return_lse and importance is None:
        return out
    return AttentionOutput(
        out,
        lse.detach() if return_lse and lse is not None else None,
        received.detach() if importance is not None and received is not None else None,
    )
