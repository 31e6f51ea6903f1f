"""Every launch at the largest sizes that models have fits CUDA's limits. Tensors are on the meta device: no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launches import Launch, kernels_of, launchers, record
from lowbit_kernels import (
    attention_backward,
    configs,
    embedding,
    fused_embedding,
    layernorm,
    linear_triton,
    packing,
    prune,
    quantize,
    varlen_attention,
    weights,
)

LIMITS = 2**31 - 1, 65_535, 65_535  # of the axes x, y, z
TABLES = {"XLM-R": (250_002, 768), "XLM-R large": (250_002, 1024), "mBERT": (119_547, 768)}
TOKENS = 8_000_000


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def int8(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int8)


@pytest.fixture(params=[80, 90])
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    monkeypatch.setattr(configs, "device_arch", lambda device: request.param)
    return record(launchers(), monkeypatch)


def launch_tables() -> None:
    """Of words, as they are quantized, trained, split and read."""
    for shape in (*TABLES.values(), (1, 250_002 * 768), (64, weights.MAX_HELD + 1)):
        w = empty(*shape)
        for per_row in (True, False):
            weights.launch_ternarize(w, per_row, None, 0)
            weights.launch_ternarize(w, per_row, w, 2)
            weights.launch_binarize(w, per_row)
            weights.launch_split(w, per_row)
        quantize.launch_per_token(w, 8, True)
        quantize.launch_per_tensor(w, 8, True, None, None)
        quantize.launch_fake_per_token(w, 8, True)
        packing.launch_pack(int8(*shape), "ternary")
    rows, K = TABLES["XLM-R"]
    codes = empty(rows, 192, dtype=torch.uint8), empty(rows)
    ids = empty(TOKENS, dtype=torch.int64)
    embedding.launch(ids, *codes, 2, K, torch.float16)
    types, positions, norm = (empty(2, K), empty(512, K)), empty(512, dtype=torch.int64), empty(K)
    arguments = (ids, *codes, 2, ids, types[0], positions, types[1], norm, norm, 1e-12, 8, True, torch.float16)
    fused_embedding.launch(*arguments)


def launch_linears() -> None:
    """A layer's, for many tokens; and a decoder, which has a row for every word."""
    layer = [(TOKENS, 3072, 768), (TOKENS, 768, 3072), (TOKENS, 1, 768)]
    for M, N, K in (*layer, (1, 250_002, 768), (4096, 250_002, 768)):
        scale, zero = empty(M), empty(M, dtype=torch.int32)
        for layout, row_bytes, lead in (("ternary", K // 4, ()), ("binary", K // 8, ()), ("split", K // 4, (2,))):
            packed, own = empty(N, row_bytes, dtype=torch.uint8), empty(*lead, N)
            linear_triton.launch(int8(M, K), packed, own, None, scale, zero, "gelu", torch.float16, layout)


def launch_tokens() -> None:
    """What is done to each token of a large batch."""
    x = empty(TOKENS, 768, dtype=torch.float16)
    quantize.launch_per_token(x, 8, True)
    quantize.launch_fake_per_token(x.view(-1, 12, 64), 8, True)
    layernorm.launch(x, x, empty(768), empty(768), 1e-12, 8, True)


def launch_attention() -> None:
    """In many short sequences, in few long ones, and in one among many that is long."""
    for sequences, longest in ((TOKENS // 8, 8), (TOKENS // 512, 512), (TOKENS // 8192, 8192), (10_000, 8192)):
        query = empty(TOKENS, 16, 64, dtype=torch.float16)
        starts = empty(sequences + 1, dtype=torch.int32)
        for bits in (None, 8):
            rest: Any = (starts, longest, 0.125, bits, [], None)
            varlen_attention.launch(query, query, query, *rest, True, "all")
            attention_backward.launch(query, query, query, query, query, empty(16, TOKENS), *rest)
        prune.launch(empty(TOKENS), starts, starts, None, longest, TOKENS // 2)


CASES = launch_tables, launch_linears, launch_tokens, launch_attention


@pytest.mark.parametrize("launch", CASES)
def test_grids_are_within_the_limits(launch: Any, launched: list[Launch]) -> None:
    launch()
    assert launched
    beyond = {
        (name, grid)
        for name, grid, *_ in launched
        if any(size > limit for size, limit in zip(grid, LIMITS, strict=False))
    }
    assert not beyond


def test_every_kernel_is_among_them(launched: list[Launch]) -> None:
    for launch in CASES:
        launch()
    kernels = {name for module in launchers() for name in kernels_of(module)}
    assert {launch.name for launch in launched} == kernels


def test_more_rows_than_a_grid_has_are_refused(launched: list[Launch]) -> None:
    M = 2**23 + 1
    packed, scale = empty(768, 192, dtype=torch.uint8), empty(768)
    with pytest.raises(ValueError, match=r"x has M=8388609 rows, the GPU kernels take up to 8388480 of them"):
        linear_triton.launch(int8(M, 768), packed, scale, None, empty(M), None, None, torch.float16, "ternary")
    assert launched == []


@pytest.mark.parametrize("M", [1, 200])
@pytest.mark.parametrize(("arch", "hip", "said"), [(75, None, r"Some GPU \(7.5\)"), (94, "6.2", r"Some GPU \(ROCm\)")])
def test_devices_without_the_instructions_are_refused(
    arch: int, hip: str | None, said: str, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = record([linear_triton], monkeypatch)
    monkeypatch.setattr(configs, "device_arch", lambda device: arch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    packed, scale = empty(768, 192, dtype=torch.uint8), empty(768)
    with pytest.raises(RuntimeError, match=r"capability 8.0 \(Ampere\) and later, .*" + said + r".* to the CPU"):
        linear_triton.launch(int8(M, 768), packed, scale, None, empty(M), None, None, torch.float16, "ternary")
    assert launched == []
