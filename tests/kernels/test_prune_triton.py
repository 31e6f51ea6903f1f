"""The Triton selection equals the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import itertools
import math
import os
import random

import pytest
import torch

from lowbit_kernels import reference
from lowbit_kernels.prune import gpu as prune_gpu

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW = [0.0, -0.0, 1.0, 0.5, 1e-40, -2.0, math.nan, -math.nan, math.inf, -math.inf]  # so that most are tied


def cu(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def check(
    importance: torch.Tensor, lengths: list[int], room: list[int], protected: torch.Tensor | None, surplus: int | None
) -> None:
    """`surplus` entries more than needed; None: the launcher finds the number and the longest sequence itself."""
    expected, _ = reference.select_tokens(importance, cu(lengths), cu(room), protected=protected)
    given = (None, None) if surplus is None else (max(lengths, default=0) + surplus, len(expected) + surplus)
    got = prune_gpu.launch(
        importance.to(DEVICE), cu(lengths).to(DEVICE), cu(room).to(DEVICE),
        None if protected is None else protected.to(DEVICE), *given,
    )  # fmt: skip
    assert got.dtype == torch.int64 and got.tolist() == expected.tolist() + [0] * (surplus or 0)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_equals_definition(dtype: torch.dtype, seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 2, 3, draw.randint(4, 70)]) for _ in range(draw.randint(1, 4))]
    T = sum(lengths) + draw.randint(0, 2)  # and tokens of no sequence
    if seed % 2:
        # Out of a subnormal bfloat16 the interpreter makes 0.
        few = [value for value in FEW if value != 1e-40 or dtype != torch.bfloat16]
        importance = torch.tensor([draw.choice(few) for _ in range(T)], dtype=dtype)
    else:
        importance = torch.randn(T, dtype=torch.float64).to(dtype)
    protected = torch.rand(T) < draw.random() if seed % 3 else None
    check(importance, lengths, [draw.randint(0, n) for n in lengths], protected, draw.choice([None, 0, 1, 100]))


@pytest.mark.parametrize("room", [0, 1, 2, 5, 8, 9, 10])
@pytest.mark.parametrize("flags", [0, 1, 4, 10])
def test_every_split_of_the_room_between_protected_and_others(flags: int, room: int) -> None:
    protected = torch.zeros(10, dtype=torch.bool)
    protected[torch.randperm(10)[:flags]] = True
    for importance in (torch.randn(10), torch.ones(10)):
        check(importance, [10], [room], protected, 0)


def test_the_longest_sequence() -> None:
    importance = torch.randn(8192)
    importance[torch.randint(8192, (4000,))] = 0.25
    got = prune_gpu.launch(importance.to(DEVICE), cu([8192]).to(DEVICE), cu([3000]).to(DEVICE), None, 8192, 3000)
    # Not by `reference`, which compares every pair.
    order = sorted(range(1, 8192), key=lambda j: (-importance[j].item(), j))
    assert got.tolist() == [0, *sorted(order[:2999])]


def test_nothing_to_select() -> None:
    check(torch.rand(0), [], [], None, 3)
    check(torch.rand(0), [0, 0], [0, 0], None, 3)
    check(torch.rand(4), [4], [0], None, None)
