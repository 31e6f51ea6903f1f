"""The Triton weight kernels follow the definitions (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import math
import os

import pytest
import torch

from launches import work_of
from lowbit_kernels import reference
from lowbit_kernels.split import cpu as split_cpu
from lowbit_kernels.split import gpu as split_gpu
from lowbit_kernels.weights import gpu as weights_gpu
from lowbit_kernels.weights import op as weights_op

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 129), (2, 5000), (150, 129), (0, 4), (4, 0), (2, weights_gpu.MAX_HELD + 3)]
GRANULARITIES = ["per_row", "per_tensor"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def assert_close(got: tuple, expected: tuple, flips: int) -> None:
    """Scales to float32 sums; `flips` weights on the threshold may take the other code."""
    rtol = 1e-5 if flips == 0 else 1e-3
    torch.testing.assert_close(got[1].cpu(), expected[1], rtol=rtol, atol=0, equal_nan=True)
    assert (got[0].cpu() != expected[0]).sum() <= flips


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ternarize(shape: tuple[int, int], granularity: str, dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    got = weights_gpu.launch_ternarize(w.to(DEVICE), granularity == "per_row", None, 10)
    assert_close(got, reference.ternarize(w, granularity=granularity), flips=2)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_loss_aware(shape: tuple[int, int], granularity: str, iterations: int) -> None:
    w, v = torch.randn(shape), torch.rand(shape) ** 4 + 1e-3
    got = weights_gpu.launch_ternarize(w.to(DEVICE), granularity == "per_row", v.to(DEVICE), iterations)
    expected = reference.ternarize(w, granularity=granularity, curvature=v, iterations=iterations)
    assert_close(got, expected, flips=2 if iterations else 0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_binarize(shape: tuple[int, int], granularity: str) -> None:
    w = torch.randn(shape)
    got = weights_gpu.launch_binarize(w.to(DEVICE), granularity == "per_row")
    assert_close(got, reference.binarize(w, granularity=granularity), flips=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("one_sided", [False, True])
def test_split(shape: tuple[int, int], granularity: str, one_sided: bool) -> None:
    w = torch.randn(shape)
    if one_sided and w.numel() > 200:
        w = torch.where(torch.rand(shape) < 0.9, 0.6, 4 * w.sign())  # A would be negative
    w1, w2 = (half.cpu() for half in split_gpu.launch_split(w.to(DEVICE), granularity == "per_row"))
    expected = reference.split_ternary(w, granularity=granularity)
    for got, want in zip((w1, w2), expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((w1.double() + w2.double()), w.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_zero_and_bad_rows(bad: float) -> None:
    w, v = torch.randn(4, 300), torch.rand(4, 300) + 0.1
    w[2, 7] = bad
    if bad == 0:
        w[2] = 0
    for granularity in GRANULARITIES:
        per_row = granularity == "per_row"
        device_w, device_v = w.to(DEVICE), v.to(DEVICE)
        got = weights_gpu.launch_ternarize(device_w, per_row, None, 10)
        assert_close(got, reference.ternarize(w, granularity=granularity), flips=1)
        got = weights_gpu.launch_ternarize(device_w, per_row, device_v, 4)
        assert_close(got, reference.ternarize(w, granularity=granularity, curvature=v, iterations=4), flips=1)
        got = weights_gpu.launch_binarize(device_w, per_row)
        assert_close(got, reference.binarize(w, granularity=granularity), flips=0)


def test_per_tensor_sums_are_deterministic() -> None:
    w = torch.randn(200, 300, device=DEVICE)
    first, second = (weights_gpu.launch_ternarize(w, False, None, 10) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


LAUNCHES = {
    "ternary rows": (lambda w: weights_gpu.launch_ternarize(w, True, None, 10), ["_held_row_kernel"]),
    "binary rows": (lambda w: weights_gpu.launch_binarize(w, True), ["_held_row_kernel"]),
    "ternary tensor": (
        lambda w: weights_gpu.launch_ternarize(w, False, None, 10),
        ["_sums_chunk_kernel", "_sums_chunk_kernel", "_ternary_chunk_kernel"],
    ),
    "binary tensor": (
        lambda w: weights_gpu.launch_binarize(w, False),
        ["_binary_chunk_kernel", "_binary_scale_kernel"],
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_training_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch, expected = LAUNCHES[name]
    w = torch.randn(300, 768)
    assert work_of(lambda: launch(w), [weights_gpu], monkeypatch) == (expected, [])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_splitting_does_not_wait_for_the_device(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(30, 768)
    ternary = weights_op.ternarize(w, granularity=granularity)
    for module in (split_cpu, split_gpu):
        monkeypatch.setattr(module, "_ternarize", lambda *_: ternary)
    launched, computed = work_of(lambda: split_gpu.launch_split(w, granularity == "per_row"), [split_gpu], monkeypatch)
    if granularity == "per_row":
        assert (launched, computed) == (["_split_row_kernel"], [])
    else:
        assert launched == ["_split_kernel"] and not {"_local_scalar_dense", "nonzero"} & set(computed)
