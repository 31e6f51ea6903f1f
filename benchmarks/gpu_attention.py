"""Attention beside its peers, alone: the packed batch of lowbit and flash kernels, the padded one of Hugging Face.

Random query, key and value of BERT's heads (64 numbers each), contiguous, each runner in the layout it works in;
packing and padding are not timed, nor is flex_attention's block mask, which serves all layers. Each output, importance
and gradient is checked first, at real tokens. `importance` is the attention that every token receives: out of the map
with Hugging Face's eager attention, which is the usual way, without a map with lowbit. benchmarks/cpu.py measures some
of the runners too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lowbit_kernels import AttentionOutput
from lowbit_kernels import attention as packed_attention

from . import gpu_model
from .gpu_timing import check_alive
from .results import Row, WrongResult, failure, reason, wrong

HEADS = {"BERT-base": 12, "BERT-large": 16}
HEAD_DIM = 64
CHECKED = 4  # sequences of a batch, in float64
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.005, torch.bfloat16: 0.03}
TOLERANCE_8_BITS = 0.1
TOLERANCE_IMPORTANCE = 0.3  # of how it differs between tokens, which is little: sums in bfloat16 have 8 bits
PACKED_FLASH = ("torch varlen_attn", "SDPA flash, jagged", "flash-attn varlen")
PADDED = "SDPA, padded"

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]  # query, key, value -> output, importance
Median = Callable[[Callable[[], Any]], float]  # milliseconds


class Case(NamedTuple):
    """What is measured; gradients for the batches of training."""

    size: str
    count: int
    length: int
    ragged: bool
    dtype: torch.dtype = torch.float16

    @property
    def backward(self) -> bool:
        return self.count == 32

    def __str__(self) -> str:
        ragged = ", ragged" if self.ragged else ""
        return f"{self.size}, batch {self.count}, length {self.length}{ragged}, {str(self.dtype).split('.')[1]}"


def cases(slow: bool) -> list[Case]:
    """Most telling first; those of runners that compile for long, or of all others."""
    if slow:
        return [Case("BERT-base", 32, 384, ragged) for ragged in (True, False)]
    trained = [Case(size, 32, length, ragged) for size in HEADS for length in (384, 128) for ragged in (True, False)]
    coarse = [Case("BERT-base", 32, 384, ragged, torch.bfloat16) for ragged in (True, False)]
    others = [
        Case("BERT-base", *shape) for shape in ((1, 128, False), (8, 128, False), (8, 128, True), (256, 384, True))
    ]
    return list(dict.fromkeys([*trained, *coarse, *others]))


class Batch:
    """The same random sequences padded, [B, S, H, D], and packed, [T, H, D]: query, key, value, and a gradient."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        ids = gpu_model.batch(case.count, case.length, case.ragged, device)
        self.case, self.mask = case, ids["attention_mask"].bool()
        self.lengths = self.mask.sum(1)
        self.cu_seqlens = torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int()
        shape = (4, *self.mask.shape, HEADS[case.size], HEAD_DIM)
        padded = torch.randn(shape, device=device, dtype=case.dtype) * self.mask[:, :, None, None]
        *self.padded, self.padded_grad = padded.unbind(0)
        *self.packed, self.packed_grad = padded[:, self.mask].unbind(0)

    @functools.cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        """What the first sequences give, in float64 and at real tokens: output, gradients, and each importance."""
        leaves = [x[:CHECKED].double().requires_grad_() for x in self.padded]
        query, key, value = (x.transpose(1, 2) for x in leaves)
        own = self.mask[:CHECKED]
        scores = (query @ key.transpose(2, 3) / math.sqrt(HEAD_DIM)).masked_fill(~own[:, None, None], -math.inf)
        probs = scores.softmax(-1)
        output = (probs @ value).transpose(1, 2)
        gradients = torch.autograd.grad(output, leaves, self.padded_grad[:CHECKED].double())
        received = {"all": (probs * own[:, None, :, None]).sum((1, 2)), "cls": probs[:, :, 0].sum(1)}
        tensors = {"output": output, **dict(zip(("query", "key", "value"), gradients, strict=True)), **received}
        return {name: x.detach()[own] for name, x in tensors.items()}

    def checked(self, x: torch.Tensor, padded: bool) -> torch.Tensor:
        """The real tokens of the sequences in `expected`."""
        own = self.mask[:CHECKED]
        return (x[:CHECKED][own] if padded else x[: int(own.sum())]).detach().double()


@dataclass(frozen=True)
class Runner:
    """`bind` does what is not timed; it raises where the runner does not run here."""

    bind: Callable[[Batch], Attend]
    padded: bool = False


def _lowbit(bits: int | None = None, **extras: Any) -> Runner:
    def bind(batch: Batch) -> Attend:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, Any]:
            result = packed_attention(query, key, value, batch.cu_seqlens, batch.case.length, bits=bits, **extras)
            return (result.output, result.importance) if isinstance(result, AttentionOutput) else (result, None)

        return run

    return Runner(bind)


def _eager(importance: bool) -> Runner:
    def bind(batch: Batch) -> Attend:
        from transformers.models.bert.modeling_bert import eager_attention_forward

        module = torch.nn.Identity().eval()  # asked for nothing but whether it trains
        real = batch.mask.to(batch.case.dtype)
        hidden = torch.zeros_like(real).masked_fill(~batch.mask, torch.finfo(real.dtype).min)[:, None, None]

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            query, key, value = (x.transpose(1, 2) for x in tensors)
            output, probs = eager_attention_forward(module, query, key, value, hidden, HEAD_DIM**-0.5, dropout=0.0)
            return output, torch.einsum("bhqk,bq->bk", probs.detach(), real) if importance else None

        return run

    return Runner(bind, padded=True)


def _sdpa(batch: Batch) -> Attend:
    mask = batch.mask[:, None, None] if batch.case.ragged else None

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in tensors)
        return sdpa(query, key, value, attn_mask=mask).transpose(1, 2), None

    return run


def _flash(batch: Batch) -> Attend:
    if batch.case.ragged:
        raise ValueError("the flash backend takes no mask")
    attend = _sdpa(batch)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend(*tensors)

    return run


def _jagged(batch: Batch) -> Attend:
    offsets, shortest = batch.cu_seqlens.long(), int(batch.lengths.min())

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, None]:
        query, key, value = (
            torch.nested.nested_tensor_from_jagged(
                x, offsets, min_seqlen=shortest, max_seqlen=batch.case.length
            ).transpose(1, 2)
            for x in tensors
        )
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(query, key, value).transpose(1, 2).values(), None

    return run


def _varlen(batch: Batch) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = batch.cu_seqlens, batch.case.length
    return lambda query, key, value: (varlen_attn(query, key, value, ends, ends, longest, longest), None)


def _flash_attn(batch: Batch) -> Attend:
    from flash_attn import flash_attn_varlen_func

    ends, longest = batch.cu_seqlens, batch.case.length
    return lambda query, key, value: (flash_attn_varlen_func(query, key, value, ends, ends, longest, longest), None)


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(batch: Batch) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    device, T = batch.mask.device, int(batch.lengths.sum())
    document = torch.arange(len(batch.lengths), device=device).repeat_interleave(batch.lengths)
    same = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, T, T, device=str(device))

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, None]:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in tensors)
        return _compiled_flex()(query, key, value, block_mask=same).squeeze(0).transpose(0, 1), None

    return run


RUNNERS = {
    "HF eager": Runner(_eager(False).bind, padded=True),
    "HF eager, importance": Runner(_eager(True).bind, padded=True),
    PADDED: Runner(_sdpa, padded=True),
    "SDPA flash, padded": Runner(_flash, padded=True),
    "SDPA flash, jagged": Runner(_jagged),
    "torch varlen_attn": Runner(_varlen),
    "flash-attn varlen": Runner(_flash_attn),
    "lowbit": _lowbit(),
    "lowbit, lse": _lowbit(return_lse=True),
    "lowbit, importance": _lowbit(importance="all"),
    "lowbit, importance of cls": _lowbit(importance="cls"),
    "lowbit 8 bits": _lowbit(8),
    "lowbit 8 bits, importance": _lowbit(8, importance="all"),
    "lowbit 8 bits, importance of cls": _lowbit(8, importance="cls"),
}
SLOW_RUNNERS = {"flex_attention, compiled": Runner(_flex)}


def forward(runner: Runner, batch: Batch) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
    """The call that is timed, without gradients; raises where the runner does not run here."""
    attend, inputs = runner.bind(batch), batch.padded if runner.padded else batch.packed

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            return attend(*inputs)

    return run


def backward(runner: Runner, batch: Batch) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The same with the gradients of query, key and value."""
    attend, inputs = runner.bind(batch), batch.padded if runner.padded else batch.packed
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = batch.padded_grad if runner.padded else batch.packed_grad
    return lambda: torch.autograd.grad(attend(*leaves)[0], leaves, grad)


def check(name: str, runner: Runner, batch: Batch, found: dict[str, torch.Tensor | None]) -> None:
    """Raise WrongResult unless what was `found`, by the names of `Batch.expected`, is right at real tokens."""
    for part, x in found.items():
        if x is None:
            continue
        expected, got = batch.expected[part], batch.checked(x, runner.padded)
        tolerance, size = TOLERANCE_8_BITS if "8 bits" in name else TOLERANCE[batch.case.dtype], expected.norm()
        if part in ("all", "cls"):
            tolerance, size = TOLERANCE_IMPORTANCE, (expected - expected.mean()).norm()
        error = float((got - expected).norm() / size) if got.shape == expected.shape else math.inf
        if not error < tolerance:
            raise WrongResult(f"{part} has relative error {error:.4f}")


def check_forward(name: str, runner: Runner, batch: Batch, result: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """`check` the output and the importance of a forward pass."""
    check(name, runner, batch, {"output": result[0], "cls" if name.endswith("cls") else "all": result[1]})


def measure(batch: Batch, runners: dict[str, Runner], replay: Median, called: Median) -> Iterator[tuple[str, Row]]:
    """Rows of microseconds; a runner that cannot run says why, one that computes something else is not timed."""
    for name, runner in runners.items():
        row = _forward_row(name, runner, batch, replay, called)
        yield name, _with_gradients(name, runner, batch, row, replay, called) if _runs(row) else row


def _runs(row: Row) -> bool:
    return any(column.startswith("us") for column in row)


def _forward_row(name: str, runner: Runner, batch: Batch, replay: Median, called: Median) -> Row:
    try:
        run = forward(runner, batch)
        check_forward(name, runner, batch, run())
    except Exception as error:  # a peer that is not installed, say, or does not take this batch
        check_alive()
        return failure(name, error)
    return _timed("us", run, replay, called)


def _with_gradients(name: str, runner: Runner, batch: Batch, row: Row, replay: Median, called: Median) -> Row:
    if not batch.case.backward:
        return row
    try:
        run = backward(runner, batch)
        check(name, runner, batch, dict(zip(("query", "key", "value"), run(), strict=True)))
    except Exception as error:  # a peer without gradients, say
        check_alive()
        note = wrong(error) if isinstance(error, WrongResult) or name.startswith("lowbit") else reason(error)
        return row | {"note": f"gradients {note}"}
    return _timed("us with gradients", run, replay, called) | row


def _timed(column: str, run: Callable[[], Any], replay: Median, called: Median) -> Row:
    """On the device, or as Python calls it where no graph takes the call."""
    try:
        return {column: round(1000 * replay(run), 2)}
    except Exception as error:  # a peer that waits for the device, say
        check_alive()
        return {f"{column}, called": round(1000 * called(run), 2), "note": f"no graph: {reason(error)}"}


def compared(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows with their times over the fastest flash attention on the packed batch, and over padded SDPA."""
    for column in ("us", "us with gradients"):
        measured = {name: float(row[column]) for name, row in rows.items() if column in row}
        flash = min((measured[name] for name in PACKED_FLASH if name in measured), default=None)
        for peer, base in (("packed flash", flash), ("padded SDPA", measured.get(PADDED))):
            for name, value in measured.items() if base else ():
                rows[name][f"{column} over {peer}"] = round(value / base, 2)
    return rows


def head(machine: dict[str, Any]) -> dict[str, Any]:
    """The report around results."""
    return {
        "suite": "gpu-attention",
        "model": "attention of BERT-base (12 heads) and BERT-large (16 heads), 64 numbers a head",
        "machine": machine,
        "method": "medians in a CUDA graph, inputs in cache as after a projection; packed flash is the fastest of "
        + ", ".join(PACKED_FLASH),
    }
