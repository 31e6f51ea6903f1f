"""What the CUDA implementation of every op returns is what its fake implementation says: shapes, strides, dtypes.

Compiled code relies on it. The host code of each implementation runs on CPU tensors, with kernels that do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fake_cuda import fake_cuda, moved
from launches import launchers, record
from lowbit_kernels import packing

Case = tuple[tuple[Any, ...], dict[str, Any]]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def int8(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.int8)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def matrices(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """[rows, columns]: dense, transposed, sliced, expanded; and one without rows."""
    return [
        zeros(rows, columns, dtype=dtype),
        zeros(columns, rows, dtype=dtype).t(),
        zeros(rows, columns + 3, dtype=dtype)[:, 3:],
        zeros(2 * rows, 2 * columns, dtype=dtype)[::2, ::2],
        zeros(1, columns, dtype=dtype).expand(rows, columns),
        zeros(rows, 1, dtype=dtype).expand(rows, columns),
        zeros(0, columns, dtype=dtype),
    ]


def quantize_per_token() -> Iterator[Case]:
    for dtype in (torch.float16, torch.float64):
        for x in (*matrices(6, 32, dtype), zeros(6, 0, dtype=dtype), zeros(2, 5000, dtype=dtype)):
            yield from (((x, 8, symmetric), {}) for symmetric in (True, False))


def quantize_per_tensor() -> Iterator[Case]:
    for x in (*matrices(6, 32, torch.bfloat16), zeros(2, 3, 5), zeros()):
        yield from (((x, 8, symmetric, None, None), {}) for symmetric in (True, False))
        if x.dim() == 2:
            yield from (((x, 8, zero is None, zeros(1), zero), {}) for zero in (None, int32(1)))


def fake_quantize_per_token() -> Iterator[Case]:
    dense = [x for x in matrices(6, 32, torch.float16) if x.numel()]
    heads = zeros(2, 5, 3, 16).transpose(1, 2), zeros(2, 3, 4, 8, 8)[:, 0].transpose(1, 2), zeros(8, 3, 64)[:, 1:, ::2]
    deep = zeros(2, 2, 2, 3, 16).transpose(1, 3), zeros(2, 1, 3, 16).expand(2, 4, 3, 16), zeros(3, 20_000), zeros(7)
    yield from (((x, 8, symmetric), {}) for x in (*dense, *heads, *deep) for symmetric in (True, False))


def queries(T: int) -> Iterator[tuple[torch.Tensor, ...]]:
    yield zeros(T, 3, 2, 16, dtype=torch.float16).unbind(1)  # as one product has them
    yield tuple(zeros(2, T, 16).transpose(0, 1) for _ in range(3))
    yield tuple(zeros(T, 2, 32)[..., ::2] for _ in range(3))
    yield zeros(T, 2, 16), zeros(1, 2, 16).expand(T, 2, 16), zeros(T, 1, 16).expand(T, 2, 16)


def attention() -> Iterator[Case]:
    for T in (20, 0):
        for q, k, v in queries(T):
            given = q, k, v, int32(0, min(T, 5), T), 15, 0.25
            for bits in (None, 8):
                for lse, importance in ((False, None), (True, None), (False, "all"), (True, "cls")):
                    yield (*given, bits, ["attention_probs"], zeros(1, 15, 15), lse, importance), {}


def attention_backward() -> Iterator[Case]:
    for T in (20, 0):
        for q, k, v in queries(T):
            for grad in (zeros(T, 2, 16, dtype=q.dtype), zeros(1, 1, 1, dtype=q.dtype).expand(T, 2, 16)):
                given = grad, q, k, v, zeros(T, 2, 16, dtype=q.dtype), zeros(2, T), int32(0, min(T, 5), T), 15, 0.25
                yield from (((*given, bits, [], None), {}) for bits in (None, 8))


def select_tokens() -> Iterator[Case]:
    for importance in (zeros(20), zeros(40, dtype=torch.float64)[::2], zeros(1).expand(20)):
        for protected in (None, zeros(40, dtype=torch.bool)[::2]):
            yield from (((importance, int32(0, 5, 20), int32(0, 2, 9), protected, 15, n), {}) for n in (9, 12))
    yield (zeros(0), int32(0), int32(0), None, 0, 0), {}


def add_layernorm() -> Iterator[Case]:
    for x in matrices(6, 32, torch.float16):
        for residual in (None, zeros(*x.shape[::-1], dtype=x.dtype).t()):
            for bits, symmetric in ((0, True), (8, True), (8, False)):
                yield (x, residual, zeros(32), zeros(64)[::2], 1e-12, bits, symmetric), {}


def packed_weights(layout: str, N: int = 48) -> tuple[torch.Tensor, tuple[int, ...]]:
    """For K = 256; how the shape of the scales begins."""
    if layout in packing.UNIFORM_CODES:
        shape = (2,) if packing.has_offset(layout) else ()
        return zeros(N, packing.row_bytes(256, layout), dtype=packing.code_dtype(layout)), shape
    return zeros(N, 32 if layout == "binary" else 64, dtype=torch.uint8), (2,) if layout == "split" else ()


def linear(layout: str) -> Iterator[Case]:
    packed, lead = packed_weights(layout)
    for x in (*matrices(20, 256, torch.int8), int8(1, 256), int8(200, 256)):
        M = len(x)
        for dtype in (torch.float16, torch.float64):
            for x_scale in (zeros(M), zeros(1), zeros(1).expand(M)):
                yield (x, packed, zeros(*lead, 48), zeros(96)[::2], x_scale, None, "gelu", dtype), {}
        zero, residual = zeros(M, dtype=torch.int32), zeros(48, M, dtype=torch.float16).t()
        options = {"residual": residual, "out_scale": zeros(1)}
        yield (x, packed, zeros(*lead, 1), None, zeros(M), zero, None, torch.int8), options


def joint_linear() -> Iterator[Case]:
    for layout in packing.CODES_IN_A_BYTE:
        packed, lead = packed_weights(layout)
        for x in matrices(20, 256, torch.int8):
            scale, bias = [zeros(*lead, 48), zeros(*lead, 1)], [zeros(48, dtype=torch.float16), None]
            for count in (1, 2):  # of one linear nothing has to be joined
                given = x, [packed] * count, scale[:count], bias[:count]
                yield (*given, zeros(len(x)), zeros(len(x), dtype=torch.int32), None, torch.float16, layout), {}


def codes_linear() -> Iterator[Case]:
    for layout, lead in (("ternary", ()), ("binary", ()), ("split", (2,))):
        for x in matrices(20, 256, torch.int8):
            for codes in (int8(*lead, 48, 256), int8(*lead, 256, 48).mT):
                yield (x, codes, zeros(*lead, 48), None, zeros(len(x)), None, layout, torch.bfloat16), {}


def weights() -> list[torch.Tensor]:
    return [*matrices(6, 32), *matrices(6, 32, torch.bfloat16), zeros(3, 20_000), zeros(4, 0)]


def ternarize() -> Iterator[Case]:
    for w in weights():
        for per_row in (True, False):
            yield (w, per_row, None, 0), {}
            yield (w, per_row, zeros(*w.shape[::-1]).t(), 3), {}


def rows_or_tensor() -> Iterator[Case]:
    yield from (((w, per_row), {}) for w in weights() for per_row in (True, False))


def table() -> tuple[torch.Tensor, torch.Tensor, int]:
    return zeros(50, 64, dtype=torch.uint8)[:, ::2], zeros(50), 2


def quantized_embedding() -> Iterator[Case]:
    for ids in (zeros(20, dtype=torch.long), zeros(40, dtype=torch.int32)[::2], zeros(0, dtype=torch.long)):
        yield from (((ids, *table(), 128, dtype), {}) for dtype in (torch.float16, torch.float32))


def embedding_layernorm() -> Iterator[Case]:
    for T in (20, 0):
        ids = zeros(2 * T, dtype=torch.long)[::2]
        tables = zeros(1, dtype=torch.long), zeros(128, 2).t(), ids, zeros(64, 128)
        for bits, symmetric, dtype in ((0, True, torch.float32), (8, True, torch.float16), (8, False, torch.bfloat16)):
            yield (ids, *table(), *tables, zeros(128), zeros(128), 1e-12, bits, symmetric, dtype), {}


CASES = {
    "add_layernorm": add_layernorm,
    "attention": attention,
    "attention_backward": attention_backward,
    "binarize": rows_or_tensor,
    "binary_linear": lambda: linear("binary"),
    "codes_linear": codes_linear,
    "embedding_layernorm": embedding_layernorm,
    "fake_quantize_per_token": fake_quantize_per_token,
    "int8_linear": lambda: linear("int8"),
    "joint_linear": joint_linear,
    "quantize_per_tensor": quantize_per_tensor,
    "quantize_per_token": quantize_per_token,
    "quantized_embedding": quantized_embedding,
    "select_tokens": select_tokens,
    "split_linear": lambda: linear("split"),
    "split_ternary": rows_or_tensor,
    "ternarize": ternarize,
    "ternary_linear": lambda: linear("ternary"),
    **{f"uniform{bits}_linear": functools.partial(linear, f"uniform{bits}") for bits in (2, 4, 8)},
}


def on_cuda() -> set[str]:
    """All ops that have a CUDA implementation."""
    launchers()  # define them
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lowbit_kernels::")]
    return {
        name.removeprefix("lowbit_kernels::")
        for name in ops
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    }


def test_no_op_is_left_out() -> None:
    assert on_cuda() == CASES.keys()


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def places(values: Any) -> list[int]:
    """Where the memory of each tensor begins."""
    return [tensor.untyped_storage().data_ptr() for tensor in tensors(values) if tensor.numel()]


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_as_the_fakes_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record(launchers(), monkeypatch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    op = getattr(torch.ops.lowbit_kernels, name).default
    count = 0
    for args, options in CASES[name]():
        count += 1
        got = op._op_dk(torch._C.DispatchKey.CUDA, *args, **options)
        with fake_cuda():
            expected = op(*moved(args), **moved(options))
        case = [tuple(x.shape) + x.stride() for x in tensors((args, options))], args[-2:]
        for real, fake in zip(tensors(got), tensors(expected), strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype) and fake.is_cuda, case
            assert real.stride() == fake.stride() or not real.numel(), case
        assert not {*places(got)} & {*places((args, options))}, f"an output is an input: {case}"
        assert len({*places(got)}) == len(places(got)), f"two outputs are one: {case}"
    assert count > 5
