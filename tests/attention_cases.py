"""Random inputs of attention and its gradient, on any device, with what the forward pass would have kept for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from lowbit_kernels import reference
from lowbit_kernels.varlen_attention.cpu import SITES

PROBS, ALL = ("attention_probs",), SITES
MODES = [(None, ()), (8, PROBS), (8, ()), (8, ALL), (4, PROBS), (4, ALL), (4, ("query", "value"))]


def joint(lengths: list[int], H: int, D: int, dtype: torch.dtype = torch.float32) -> tuple:
    """grad_out, query, key, value as slices of one tensor, cu_seqlens, max_seqlen."""
    x = torch.randn(sum(lengths), 4, H, D).to(dtype)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return *x.unbind(1), cu_seqlens, max(lengths, default=0)


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """`x.to(device)` with the strides of x, in place of which `.to` gives a slice those of a dense tensor."""
    whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def kept(arguments: tuple, bias: torch.Tensor | None = None, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` in the dtype of the query and `lse` in float32, by the definition; NaN after the last sequence."""
    _, query, key, value, cu_seqlens, _ = arguments
    out = torch.full(query.shape, float("nan"), dtype=torch.float64)
    lse = torch.full((query.shape[1], len(query)), float("nan"), dtype=torch.float64)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        for head in range(query.shape[1] if end > start else 0):
            own = (x[start:end, head] for x in (query, key, value))
            shift = None if bias is None else bias[head % len(bias), : end - start, : end - start].double()
            out[start:end, head], lse[head, start:end] = reference.attention_of_one(*own, bias=shift, **options)
    return out.to(query.dtype), lse.float()


def assert_gradients(
    run: Callable, arguments: tuple, rounding: float, bias: torch.Tensor | None = None, **options: object
) -> tuple[torch.Tensor, ...]:
    """`run` gives the gradients of the definition but for rounding, in the inputs' dtype; returns them.

    The quantized probabilities are multiplied only for the value's gradient, where one may be rounded to the next code.
    """
    grad_out, query, key, value, *rest = arguments
    got = run(grad_out, query, key, value, *kept(arguments, bias, **options), *rest, bias=bias, **options)
    wide = (x.double() for x in arguments[:4])
    expected = reference.attention_backward(*wide, *rest, bias=bias, **options)
    for name, gradient, definition in zip(("query", "key", "value"), got, expected, strict=True):
        assert gradient.dtype == query.dtype and gradient.shape == query.shape
        error = (gradient.double() - definition).abs() / definition.abs().amax().clamp(min=0.1)  # 0 for a single token
        if name == "value" and options.get("bits") is not None:
            assert error.amax() <= 0.3 and (error <= rounding).double().mean() >= 0.97, (name, error.max())
        else:
            assert error.amax() <= rounding, (name, error.max())
    return got
