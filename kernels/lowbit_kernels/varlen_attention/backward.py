"""The gradient of `attention` (varlen_attention) in query, key and value; the map is computed again, never stored.

    P = exp(scaling * q k + bias - lse)     dV = P^T dO      dP = dO v^T      dS = P * (dP - delta)
    dQ = scaling * dS k                     dK = scaling * dS^T q             delta_i = sum_j P_ij dP_ij = dO_i . out_i

(FlashAttention-2, Dao 2023, algorithm 2.) With bits, q, k and v are the quantized values, dV = q(P)^T dO, and
gradients pass through the quantizers as they are (straight-through). There `out` is made of q(P), so that delta has to
be found in P, as a weighted mean: where scores are large, exp(score - lse) sums to 1 only as far as a float32 lse says.

Two kernels, so that no sums of two programs meet and every run gives the same bytes: one keeps queries, goes over the
keys and writes dQ and delta; the other keeps keys, goes over the queries and writes dK and dV. With bits the first goes
over the keys twice, and also writes the scale and zero point of each row of probabilities: they depend on the whole
row, which is a column of the second kernel's block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._ops import SINGLE, check_choice, check_device, check_tensor, define
from .backward_cpu import _cpu
from .backward_gpu import launch
from .cpu import SITES
from .shared_gpu import HEAD_DIMS


def _fake(grad_out: torch.Tensor, query: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(3, *query.shape)


attention_backward_op = define(
    "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "Tensor cu_seqlens, SymInt max_seqlen, float scaling, int? bits, str[] asymmetric, Tensor? bias) -> Tensor",
    cpu=_cpu,
    cuda=launch,
    fake=_fake,
)


def attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scaling: float,
    bits: int | None = None,
    asymmetric: Sequence[str] = ("attention_probs",),
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `attention` in query, key and value, straight through the quantizers; none in the bias.

    Args:
        grad_out: gradient of `out`.
        query, key, value, cu_seqlens, max_seqlen, scaling, bits, asymmetric, bias: as they were given to `attention`.
            D is 16, 32, 64 or 128 on CUDA, any on the CPU.
        out, lse: what `attention` returned: [T, H, D] (not read with bits) and float32 [H, T].

    Returns:
        (grad_query, grad_key, grad_value), each [T, H, D] like query, contiguous; 0 for tokens after the last sequence.
        NaN stays in its sequence and head.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or names that do not fit; cu_seqlens that do not (on the CPU).
    """
    check_tensor("query", query, SINGLE, ndim=3)
    for name, tensor in (("grad_out", grad_out), ("key", key), ("value", value), ("out", out)):
        check_tensor(name, tensor, SINGLE, ndim=3)
        if tensor.shape != query.shape or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected the same as query: {query.dtype} "
                f"{tuple(query.shape)}"
            )
    T, H, D = query.shape
    check_tensor("lse", lse, (torch.float32,), ndim=2)
    if lse.shape != (H, T):
        raise ValueError(f"lse has shape {tuple(lse.shape)}, expected [H, T] = {(H, T)}")
    check_tensor("cu_seqlens", cu_seqlens, (torch.int32,), ndim=1)
    if cu_seqlens.shape[0] == 0 or max_seqlen < 0:
        raise ValueError(
            f"cu_seqlens has {cu_seqlens.shape[0]} entries and max_seqlen={max_seqlen}, expected B + 1 and at least 0"
        )
    if bias is not None:
        check_tensor("bias", bias, SINGLE, ndim=3)
        if bias.shape[0] not in (1, H) or min(bias.shape[1:]) < max_seqlen:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}, expected [1 or H={H}, S, S], S at least max_seqlen={max_seqlen}"
            )
    check_device(
        query=query, grad_out=grad_out, key=key, value=value, out=out, lse=lse, cu_seqlens=cu_seqlens, bias=bias
    )
    check_choice("bits", bits, (None, 8, 4))
    unknown = sorted(set(asymmetric) - set(SITES))
    if unknown:
        raise ValueError(f"asymmetric={unknown}, accepted: {', '.join(SITES)}")
    if D == 0 or (query.device.type == "cuda" and D not in HEAD_DIMS):
        raise ValueError(f"query has D={D}, accepted: {', '.join(map(str, HEAD_DIMS))} on CUDA, any above 0 on the CPU")
    grads = attention_backward_op(
        grad_out.detach(), query.detach(), key.detach(), value.detach(), out.detach(), lse.detach(), cu_seqlens,
        max_seqlen, scaling, bits, list(asymmetric), None if bias is None else bias.detach(),
    )  # fmt: skip
    grad_query, grad_key, grad_value = grads.unbind(0)
    return grad_query, grad_key, grad_value
