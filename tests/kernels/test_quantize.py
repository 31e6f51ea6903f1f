"""Activation quantization equals its definition bit for bit, and keeps what it promises about errors and NaN."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit_kernels import fake_quantize_per_token, quantize_per_tensor, quantize_per_token, reference

MODES = [(bits, symmetric) for bits in (8, 4) for symmetric in (True, False)]
SHAPES = [(1, 1), (3, 1), (1, 127), (5, 129), (2, 3, 768), (7, 3072), (0, 64), (4, 0), (100, 3001), (129,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SCALES = [1e-42, 1e-38, 1e-30, 1.0, 1e6, 1e37]


def assert_same(got: tuple, expected: tuple) -> None:
    for name, a, b in zip(("codes", "scale", "zero_point"), got, expected, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> torch.Tensor:
    zero = 0 if zero_point is None else zero_point.double().unsqueeze(-1)
    return scale.double().unsqueeze(-1) * (q.double() - zero)


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_per_token_equals_definition(shape: tuple[int, ...], bits: int, symmetric: bool) -> None:
    x = torch.randn(shape) * 3 + torch.randn(*shape[:-1], 1)
    assert_same(quantize_per_token(x, bits, symmetric), reference.quantize_per_token(x, bits, symmetric))


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_float_dtype_and_stride(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    x = torch.randn(33, 2, 9).to(dtype).transpose(0, 2)[::2]
    assert not x.is_contiguous()
    got = quantize_per_token(x, bits, symmetric)
    assert_same(got, reference.quantize_per_token(x, bits, symmetric))
    assert got[0].is_contiguous()


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("size", SCALES)
def test_error_is_at_most_half_a_step(size: float, bits: int, symmetric: bool) -> None:
    x = (torch.randn(20, 257).double() * size).clamp(-1.6e38, 1.6e38).float()
    x[10:] += 3 * size
    q, scale, zero_point = quantize_per_token(x, bits, symmetric)
    assert_same((q, scale, zero_point), reference.quantize_per_token(x, bits, symmetric))
    assert q.min() >= -(2 ** (bits - 1)) + symmetric and q.max() <= 2 ** (bits - 1) - 1
    # Half a step, the float32 roundings of x / scale, and what is flushed below the smallest normal scale. At the top
    # of the asymmetric range both ends may round outwards and the clamp costs one more half step.
    steps = torch.full_like(scale, 0.5 if symmetric else 1.0)
    bound = (steps * scale).double() + x.abs().amax(1).double() * 2**-21 + 256 * 2.0**-126
    assert ((x.double() - dequantize(q, scale, zero_point)).abs() <= bound.unsqueeze(1)).all()


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
def test_constant_rows_keep_their_value(bits: int, symmetric: bool) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, -7e-20, 3e38, -3e38, 1e-45, -1e-40])
    x = values.unsqueeze(1).expand(-1, 130)
    q, scale, zero_point = quantize_per_token(x, bits, symmetric)
    assert_same((q, scale, zero_point), reference.quantize_per_token(x, bits, symmetric))
    torch.testing.assert_close(dequantize(q, scale, zero_point), x.double(), rtol=1e-6, atol=1e-37)
    assert scale[0] == 0


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
def test_nearly_constant_rows_do_not_overflow_the_zero_point(bits: int, symmetric: bool) -> None:
    base = torch.tensor([1.0, 1.999, -1000.0, 2.0**100, -3e38]).unsqueeze(1)
    for ulps in (1, 2, 3, 5, 100):
        x = base * (1 + torch.randint(0, ulps + 1, (5, 64)) * 2.0**-23)
        q, scale, zero_point = quantize_per_token(x, bits, symmetric)
        assert_same((q, scale, zero_point), reference.quantize_per_token(x, bits, symmetric))
        error = (x.double() - dequantize(q, scale, zero_point)).abs()
        assert (error <= (scale.double() + x[:, 0].abs() * 2**-20).unsqueeze(1)).all() or symmetric


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_shows_in_its_row_only(bad: float, bits: int, symmetric: bool) -> None:
    x = torch.randn(5, 40)
    x[2, 17] = bad
    q, scale, zero_point = quantize_per_token(x, bits, symmetric)
    assert scale.isnan().tolist() == [False, False, True, False, False]
    good = [0, 1, 3, 4]
    expected = reference.quantize_per_token(x[good], bits, symmetric)
    assert_same((q[good], scale[good], None if zero_point is None else zero_point[good]), expected)
    assert quantize_per_tensor(x, bits, symmetric)[1].isnan().all()
    given = None if symmetric else torch.zeros(1, dtype=torch.int32)
    assert quantize_per_tensor(x, bits, symmetric, scale=torch.ones(1), zero_point=given)[1].isnan().all()


def test_a_range_beyond_float32_gives_nan() -> None:
    assert quantize_per_token(torch.tensor([[3e38, -3e38]]), 8, False)[1].isnan().all()


def test_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_per_token(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (513, 769), (0, 4), ()])
def test_per_tensor_equals_definition(shape: tuple[int, ...], bits: int, symmetric: bool) -> None:
    x = torch.randn(shape) + 0.7
    assert_same(quantize_per_tensor(x, bits, symmetric), reference.quantize_per_tensor(x, bits, symmetric))


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("scale", [0.013, 0.0, 1e-39, 1e30])
def test_static_scale_saturates(scale: float, bits: int, symmetric: bool) -> None:
    x = torch.cat([torch.randn(50), torch.tensor([1e30, -1e30, 0.0])])
    given = {"scale": torch.tensor([scale])}
    if not symmetric:
        given["zero_point"] = torch.tensor([-37], dtype=torch.int32)
    got = quantize_per_tensor(x, bits, symmetric, **given)
    assert_same(got, reference.quantize_per_tensor(x, bits, symmetric, **given))
    if scale == 0.013:
        assert got[0][50] == 2 ** (bits - 1) - 1


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
def test_ops_satisfy_torch_library(bits: int, symmetric: bool) -> None:
    ops = torch.ops.lowbit_kernels
    x = torch.randn(5, 33)
    static = (torch.tensor([0.1]), None if symmetric else torch.tensor([3], dtype=torch.int32))
    torch.library.opcheck(ops.quantize_per_token.default, (x, bits, symmetric))
    torch.library.opcheck(ops.quantize_per_token.default, (x.half().t(), bits, symmetric))
    torch.library.opcheck(ops.quantize_per_tensor.default, (x.t(), bits, symmetric, None, None))
    torch.library.opcheck(ops.quantize_per_tensor.default, (x, bits, symmetric, *static))


def test_bad_input_is_refused() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match="int64"):
        quantize_per_token(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="bits=3, accepted: 8, 4"):
        quantize_per_token(x, bits=3)
    with pytest.raises(ValueError, match="scalar"):
        quantize_per_token(torch.tensor(1.0))
    with pytest.raises(ValueError, match="zero_point without scale"):
        quantize_per_tensor(x, zero_point=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="static"):
        quantize_per_tensor(x, symmetric=False, scale=torch.ones(1))
    with pytest.raises(ValueError, match="static"):
        quantize_per_tensor(x, scale=torch.ones(2))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantization_is_what_the_codes_stand_for(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """Bit for bit, on a transposed view, with a zero row, a constant row and a NaN row, across chunks."""
    x = (torch.randn(5, 300, 7, 64) + 0.5).transpose(1, 2).to(dtype)
    x[1, 2, 3], x[2, 3, 4], x[3, 4, 5, 6] = 0.0, 2.5, math.nan
    codes, scale, zero_point = quantize_per_token(x, bits, symmetric)
    values = codes.float() if zero_point is None else codes.float() - zero_point.float().unsqueeze(-1)
    expected = (values * scale.unsqueeze(-1)).to(dtype)
    actual = fake_quantize_per_token(x, bits, symmetric)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert actual.stride() == x.stride()
