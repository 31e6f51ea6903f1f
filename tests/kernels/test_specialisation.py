"""Triton compiles a kernel anew for an integer that is 1, a multiple of 16, or neither: not for every other batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launches import Launch, record
from lowbit_kernels import fused_embedding, prune, quantize
from lowbit_kernels._triton import INTERPRET

pytest.importorskip("triton")
if INTERPRET:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


def kind(value: Any) -> str:
    return "" if not isinstance(value, int) else "1" if value == 1 else "16" if value % 16 == 0 else "int"


def specialised(launch: Launch) -> tuple[str, ...]:
    """What of a launch's integers its binary depends on."""
    parameters = launch.kernel.params[: len(launch.args)]
    return tuple(kind(value) for value, own in zip(launch.args, parameters, strict=True) if not own.do_not_specialize)


def test_the_size_of_a_batch_changes_no_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = record([quantize, prune, fused_embedding], monkeypatch)
    table, positions, norm = torch.zeros(2, 128), torch.zeros(64, 128), torch.ones(128)
    codes = torch.zeros(50, 32, dtype=torch.uint8), torch.ones(50)
    for B, S in ((1, 1), (2, 8), (3, 5), (4, 32), (16, 1), (1, 16)):
        # Not the keys' [B, H, S, D] themselves: torch gives a dimension of size 1 any stride.
        quantize.launch_fake_per_token(torch.zeros(B, S, 2, 64).transpose(1, 2).contiguous(), 8, True)
        starts = torch.arange(B + 1, dtype=torch.int32) * S
        prune.launch(torch.zeros(B * S), starts, starts, None, S, B * S)
        ids, places = torch.zeros(B * S, dtype=torch.long), torch.arange(S)
        arguments = (ids, *codes, 2, ids, table, places, positions, norm, norm, 1e-12, 8, True, torch.float32)
        fused_embedding.launch(*arguments)
    binaries = {(launch.name, specialised(launch)) for launch in launched}
    assert sorted(name for name, _ in binaries) == ["_embedding_layernorm_kernel", "_fake_kernel", "_select_kernel"]
