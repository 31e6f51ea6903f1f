"""The Triton quantizers give the bytes of the CPU path (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from launches import work_of
from lowbit_kernels import fake_quantize_per_token, quantize_per_tensor, quantize_per_token
from lowbit_kernels.quantize import gpu as quantize_gpu

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = [(bits, symmetric) for bits in (8, 4) for symmetric in (True, False)]
# The interpreter warns where NaN arises, which is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def assert_same(got: tuple, expected: tuple) -> None:
    """Equal bytes where the scale is a number; NaN in the same places."""
    (q, scale, zero), (q0, scale0, zero0) = ([None if t is None else t.cpu() for t in side] for side in (got, expected))
    torch.testing.assert_close(scale, scale0, rtol=0, atol=0, equal_nan=True)
    fine = scale0.isfinite()
    rows = fine if fine.shape == q0.shape[:1] else slice(None) if bool(fine.all()) else slice(0)
    assert torch.equal(q[rows], q0[rows])
    if zero0 is not None:
        assert torch.equal(zero[fine], zero0[fine])


def rows_of_all_kinds(K: int) -> torch.Tensor:
    x = torch.randn(14, K) * torch.logspace(-44, 37, 14).unsqueeze(1)
    extra = torch.randn(9, K)
    extra[0] = 0
    extra[1] = -2.7
    extra[2] = 3e38
    extra[3] += 1e5
    extra[4] = 1 + torch.randint(0, 3, (K,)) * 2.0**-23
    extra[5, K // 2] = float("nan")
    extra[6, K - 1] = float("inf")
    extra[7] = 3e38 * extra[7].sign()
    extra[8] = torch.arange(K) - K / 2 + 0.5  # ties
    return torch.cat([x, extra])


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("K", [1, 2, 127, 129, 768, 5000])
def test_per_token_equals_cpu(K: int, bits: int, symmetric: bool) -> None:
    x = rows_of_all_kinds(K)
    got = quantize_gpu.launch_per_token(x.to(DEVICE), bits, symmetric)
    assert_same((*got[:2], None if symmetric else got[2]), quantize_per_token(x, bits, symmetric))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    x = torch.randn(65, 12).to(dtype).t()
    for symmetric in (True, False):
        got = quantize_gpu.launch_per_token(x.to(DEVICE), 8, symmetric)
        assert_same((*got[:2], None if symmetric else got[2]), quantize_per_token(x, 8, symmetric))


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("n", [1, 100, quantize_gpu.CHUNK, 3 * quantize_gpu.CHUNK + 17])
@pytest.mark.parametrize("kind", ["normal", "nan", "constant"])
def test_per_tensor_equals_cpu(kind: str, n: int, bits: int, symmetric: bool) -> None:
    x = torch.randn(n) if kind != "constant" else torch.full((n,), -0.7)
    if kind == "nan":
        x[n // 2] = float("nan")
    got = quantize_gpu.launch_per_tensor(x.to(DEVICE), bits, symmetric, None, None)
    assert_same((*got[:2], None if symmetric else got[2]), quantize_per_tensor(x, bits, symmetric))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    q, scale, _ = quantize_gpu.launch_per_token(torch.zeros(shape, device=DEVICE), 8, True)
    assert q.shape == shape and not scale.any() and len(scale) == shape[0]


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The bits, with one kind of NaN and one of zero: the CPU path leaves -0 where a negative value rounds to 0."""
    x = (x.cpu() + 0.0).nan_to_num(nan=12345.0)
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("K", [1, 2, 64, 129, 768, 5000, quantize_gpu.MAX_HELD + 1])
def test_fake_quantization_gives_the_bits_of_the_cpu_and_of_the_codes(K: int, bits: int, symmetric: bool) -> None:
    x = rows_of_all_kinds(K) if K <= 5000 else torch.randn(3, K)
    got = quantize_gpu.launch_fake_per_token(x.to(DEVICE), bits, symmetric)
    q, scale, zero = quantize_per_token(x, bits, symmetric)
    from_codes = (q.float() - (0 if zero is None else zero.float().unsqueeze(1))) * scale.unsqueeze(1)
    assert torch.equal(bits_of(got), bits_of(from_codes))
    assert torch.equal(bits_of(got), bits_of(fake_quantize_per_token(x, bits, symmetric)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantization_of_views(dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.randn(3, 5, 4, 33).to(dtype)
    views = [
        x.transpose(1, 2),  # what attention passes
        x.transpose(2, 3),  # rows that are not contiguous
        x[:, 1:4, ::2, :20],
        x[0, 0, 0],
        x[:1].expand(4, 5, 4, 33),
        x.view(3, 5, 2, 2, 33).transpose(1, 3),
    ]
    for view in views:
        got = quantize_gpu.launch_fake_per_token(view.to(DEVICE), 8, symmetric)
        expected = fake_quantize_per_token(view, 8, symmetric)
        if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates, hence a whole ulp
            torch.testing.assert_close(got, expected, rtol=2.0**-7, atol=0)
        else:
            assert torch.equal(bits_of(got), bits_of(expected))
        assert got.stride() == torch.empty_like(view).stride() and got.dtype == dtype


def test_fake_quantization_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 4, 64).transpose(1, 2)
    work = work_of(lambda: quantize_gpu.launch_fake_per_token(x, 8, False), [quantize_gpu], monkeypatch)
    assert work == (["_fake_kernel"], [])
