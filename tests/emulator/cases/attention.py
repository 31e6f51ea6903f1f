"""Attention of ragged batches, float and quantized, its gradient, and the choice of tokens by importance."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from lowbit_kernels import reference
from lowbit_kernels.prune import gpu as prune_gpu
from lowbit_kernels.varlen_attention import backward_gpu as varlen_attention_backward_gpu
from lowbit_kernels.varlen_attention import cpu as varlen_attention_cpu
from lowbit_kernels.varlen_attention import gpu as varlen_attention_gpu

from ..trial import Case, Tensors, Trial, guarded, off_by

# Of results that lie between the extremes of the values: float32 sums and exponentials, or one rounding of the output
# and of the probabilities.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
PROBS, ALL = ("attention_probs",), varlen_attention_cpu.SITES


@dataclass(frozen=True)
class Form:
    """One launch on sequences of the given lengths, slices of one projection."""

    lengths: tuple[int, ...]
    D: int
    dtype: torch.dtype
    bits: int | None = None
    asymmetric: tuple[str, ...] = PROBS
    bias: bool = False
    importance: str | None = None


RAGGED = (70, 0, 30, 1)
FORMS = {
    "fp16": Form(RAGGED, 64, torch.float16),
    "fp16, 8 bits": Form(RAGGED, 64, torch.float16, 8),
    "bf16 D=128": Form((33, 0, 40), 128, torch.bfloat16),
    "bf16 D=128, 8 bits, all asymmetric": Form((33, 0, 40), 128, torch.bfloat16, 8, ALL),
    "fp16 D=16, short": Form((20, 0, 32), 16, torch.float16),
    "fp16 D=16, short, 8 bits": Form((20, 0, 32), 16, torch.float16, 8),
    "fp16, long": Form((150,), 64, torch.float16),
    "fp16, long, 4 bits": Form((150,), 64, torch.float16, 4),
    "fp32": Form((20, 0, 5), 32, torch.float32),
    "fp32, 8 bits": Form((20, 0, 5), 32, torch.float32, 8),
    "fp16, bias, importance": Form((40, 0, 25), 32, torch.float16, bias=True, importance="all"),
    "fp16, bias, importance, 8 bits": Form((40, 0, 25), 32, torch.float16, 8, bias=True, importance="all"),
    "fp16, importance to the first": Form((40, 0, 25), 64, torch.float16, importance="cls"),
}
HEADS = 2


def _draw(form: Form) -> Trial:
    x = guarded(torch.randn(sum(form.lengths), 3, HEADS, form.D).to(form.dtype))
    query, key, value = x.unbind(1)
    cu_seqlens = guarded(torch.tensor([0, *itertools.accumulate(form.lengths)], dtype=torch.int32))
    longest = max(form.lengths)
    bias = guarded(torch.randn(HEADS, longest, longest)) if form.bias else None
    scaling = form.D**-0.5
    options = {"bits": form.bits, "asymmetric": form.asymmetric, "bias": bias, "importance": form.importance}
    want, lse, importance = reference.attention(
        query.double(), key.double(), value.double(), cu_seqlens, longest, scaling=scaling, return_lse=True, **options
    )

    def launch() -> Tensors:
        return varlen_attention_gpu.launch(
            query, key, value, cu_seqlens, longest, scaling, form.bits, form.asymmetric, bias, True, form.importance
        )

    def wrong(outputs: Tensors) -> int:
        out, got_lse, received = outputs
        scale, rounding = float(value.double().abs().max()), ROUNDING[form.dtype]
        found = off_by(got_lse, lse, 2e-5 + 1e-6 * lse.abs())
        if form.importance is not None:
            found += off_by(received, importance, 2e-5 * (1 + importance.abs()))
        if form.bits is None:
            return found + off_by(out, want, rounding * scale)
        # Rounding takes a few probabilities to the next code, which moves a row by a step.
        step = 1 / (2 ** (form.bits - 1) - 1)
        found += off_by(out, want, (2 * step + rounding) * scale)
        moved = ((out.double() - want).abs() > rounding * scale).any(-1)
        return found + (int(moved.sum()) if moved.double().mean() > 0.05 else 0)

    return Trial([x, cu_seqlens, bias], launch, wrong)


BACKWARD = {
    "fp16": Form(RAGGED, 64, torch.float16),
    "fp16, 8 bits": Form(RAGGED, 64, torch.float16, 8),
    "bf16 D=128": Form((0, 1, 33), 128, torch.bfloat16),
    "fp32 D=32, bias, 4 bits": Form((33, 2), 32, torch.float32, 4, ALL, bias=True),
}
# Relative to the largest gradient; probabilities and gradients of scores are rounded before they are multiplied.
GRADIENT_ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


def _draw_gradient(form: Form) -> Trial:
    x = guarded(torch.randn(sum(form.lengths), 4, HEADS, form.D).to(form.dtype))
    grad_out, query, key, value = x.unbind(1)
    cu_seqlens = guarded(torch.tensor([0, *itertools.accumulate(form.lengths)], dtype=torch.int32))
    longest, scaling = max(form.lengths), form.D**-0.5
    bias = guarded(torch.randn(HEADS, longest, longest)) if form.bias else None
    options = {"bits": form.bits, "asymmetric": form.asymmetric, "bias": bias, "scaling": scaling}
    wide = [tensor.double() for tensor in (grad_out, query, key, value)]
    out, lse, _ = reference.attention(*wide[1:], cu_seqlens, longest, return_lse=True, **options)
    want = reference.attention_backward(*wide, cu_seqlens, longest, **options)
    out, lse = guarded(out.to(form.dtype)), guarded(lse.float())

    def launch() -> Tensors:
        return varlen_attention_backward_gpu.launch(
            grad_out, query, key, value, out, lse, cu_seqlens, longest, scaling, form.bits, form.asymmetric, bias
        ).unbind(0)

    def wrong(outputs: Tensors) -> int:
        found, rounding = 0, GRADIENT_ROUNDING[form.dtype]
        for name, gradient, definition in zip(("query", "key", "value"), outputs, want, strict=True):
            size = float(definition.abs().amax().clamp(min=0.1))
            if name != "value" or form.bits is None:
                found += off_by(gradient, definition, rounding * size)
                continue
            # Only here the quantized probabilities are multiplied, some of which rounding takes to the next code.
            moved = off_by(gradient, definition, rounding * size)
            found += off_by(gradient, definition, 0.3 * size) + (moved if moved > 0.03 * gradient.numel() else 0)
        return found

    return Trial([x, out, lse, cu_seqlens, bias], launch, wrong)


def _draw_selection(dtype: torch.dtype, protects: bool) -> Trial:
    lengths, room = (70, 0, 33, 1), (40, 0, 5, 1)
    importance = torch.randn(sum(lengths)).to(dtype)
    importance[torch.randperm(len(importance))[:40]] = 0.25  # ties
    importance = guarded(importance)
    protected = guarded(torch.rand(len(importance)) < 0.1) if protects else None
    old, new = (guarded(torch.tensor([0, *itertools.accumulate(own)], dtype=torch.int32)) for own in (lengths, room))
    want, _ = reference.select_tokens(importance, old, new, protected=protected)
    want = torch.cat([want, torch.zeros(2, dtype=torch.int64)])
    return Trial(
        [importance, old, new, protected],
        lambda: [prune_gpu.launch(importance, old, new, protected, max(lengths), sum(room) + 2)],
        lambda got: off_by(got[0], want),
    )


CASES = [Case(f"attention {name}", functools.partial(_draw, form)) for name, form in FORMS.items()]
CASES += [
    Case(f"attention backward {name}", functools.partial(_draw_gradient, form)) for name, form in BACKWARD.items()
]
CASES += [
    Case(f"prune, select tokens, {str(dtype)[6:]}{', some protected' if protects else ''}", make)
    for dtype, protects in ((torch.float32, False), (torch.float16, True))
    for make in (functools.partial(_draw_selection, dtype, protects),)
]
