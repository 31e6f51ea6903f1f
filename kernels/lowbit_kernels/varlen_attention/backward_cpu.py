"""`varlen_attention`: the gradient on the CPU. The formula is in `backward.py`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..quantize.op import fake_quantize_per_token
from .cpu import check_cu_seqlens


def _cpu(
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
    def quantized(site: str, x: torch.Tensor) -> torch.Tensor:
        return x if bits is None else fake_quantize_per_token(x, bits, site not in asymmetric)

    check_cu_seqlens(cu_seqlens, query.shape[0], max_seqlen)
    grads = query.new_zeros(3, *query.shape)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        g, q, k, v, o = (x[start:end].transpose(0, 1).float() for x in (grad_out, query, key, value, out))
        q, k, v = quantized("query", q), quantized("key", k), quantized("value", v)
        scores = torch.matmul(q * scaling, k.mT)
        if bias is not None:
            scores += bias[:, : end - start, : end - start]
        probs = torch.exp(scores - lse[:, start:end].unsqueeze(2))
        grad_probs = torch.matmul(g, v.mT)
        if bits is None:
            delta = (g * o).sum(2, keepdim=True)
        else:
            delta = (probs * grad_probs).sum(2, keepdim=True) / probs.sum(2, keepdim=True)
        grad_scores = probs * (grad_probs - delta) * scaling
        parts = (grad_scores @ k, grad_scores.mT @ q, quantized("attention_probs", probs).mT @ g)
        grads[:, start:end] = torch.stack(parts).transpose(1, 2)
    return grads
