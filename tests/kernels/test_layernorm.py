"""Residual addition + LayerNorm equals its definition, and its codes are those of the rounded result."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit_kernels import add_layernorm, quantize_per_token, reference
from lowbit_kernels.layernorm import gpu as layernorm_gpu

MODES = [(bits, symmetric) for bits in (8, 4) for symmetric in (True, False)]
SHAPES = [(1, 1), (3, 127), (2, 3, 768), (129,), (5, 1024), (300, 1001)]
# Half a unit in the last place, and the float32 arithmetic before it.
TOLERANCE = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Random x, residual, weight and bias."""
    x = torch.randn(shape) * 2 + torch.randn(*shape[:-1], 1)
    return x.to(dtype), torch.randn(shape).to(dtype), torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1])


def assert_codes(result: tuple, bits: int, symmetric: bool) -> None:
    """Codes, scale and zero point are the definition's for the y beside them."""
    y, *got = result
    for a, b in zip(got, reference.quantize_per_token(y, bits, symmetric), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight, bias = inputs(shape, dtype)
    for second in (residual, None):
        got = add_layernorm(x, second, weight, bias, 1e-5)
        assert got.dtype == dtype and got.shape == x.shape
        # In float64, as 2^-8 of what is compared in bfloat16 would itself be rounded.
        expected = reference.add_layernorm(x.double(), second, weight, bias, 1e-5)
        torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype] + 1e-6, atol=3e-5)


def test_eps_counts() -> None:
    x = torch.tensor([[0.001, -0.001]])
    got = add_layernorm(x, None, torch.ones(2), torch.zeros(2), 3e-6)
    torch.testing.assert_close(got, torch.tensor([[0.5, -0.5]]), rtol=1e-6, atol=0)


def test_the_variance_does_not_cancel() -> None:
    x = torch.randint(0, 8, (4, 768)).float()
    got = add_layernorm(x + 2.0**17, None, torch.ones(768), torch.zeros(768))
    torch.testing.assert_close(
        got, reference.add_layernorm(x, None, torch.ones(768), torch.zeros(768)), rtol=0, atol=0.02
    )


@pytest.mark.parametrize(("bits", "symmetric"), MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_codes_are_those_of_the_rounded_result(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    x, residual, weight, bias = inputs((2, 37, 129), dtype)
    result = add_layernorm(x, residual, weight, bias, bits=bits, symmetric=symmetric)
    assert_codes(result, bits, symmetric)
    assert torch.equal(result[0], add_layernorm(x, residual, weight, bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parameters_of_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    x, residual, weight, bias = inputs((6, 4, 33), dtype)
    expected = add_layernorm(x, residual, weight.half().float(), bias.bfloat16().float(), bits=8)
    x = x.transpose(0, 2).contiguous().transpose(0, 2)
    parameters = weight.half().repeat_interleave(2)[::2].requires_grad_(), bias.bfloat16()
    got = add_layernorm(x, residual, *parameters, bits=8)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.is_contiguous() and not a.requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 7), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, residual, weight, bias = inputs(shape)
    assert add_layernorm(x, residual, weight, bias).shape == shape
    y, codes, scale, zero_point = add_layernorm(x, residual, weight, bias, bits=8, symmetric=False)
    assert y.shape == codes.shape == shape and scale.shape == zero_point.shape == shape[:-1]
    assert not scale.any() and not zero_point.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_bad_value_shows_in_its_row_only(symmetric: bool, bad: float) -> None:
    x, residual, weight, bias = inputs((5, 40))
    residual[2, 17] = bad
    y, codes, scale, _ = add_layernorm(x, residual, weight, bias, bits=8, symmetric=symmetric)
    assert y.isnan().all(1).tolist() == scale.isnan().tolist() == [False, False, True, False, False]
    good = [0, 1, 3, 4]
    assert torch.equal(codes[good], quantize_per_token(y[good], 8, symmetric)[0])


def test_a_result_beyond_half_precision_makes_the_scale_nan() -> None:
    x, _, weight, bias = inputs((2, 40), torch.float16)
    y, _, scale, _ = add_layernorm(x, None, weight, bias + 7e4, bits=8)
    assert y.isinf().any(1).all() and scale.isnan().all()


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_op_satisfies_torch_library(bits: int, symmetric: bool) -> None:
    op = torch.ops.lowbit_kernels.add_layernorm.default
    x, residual, weight, bias = inputs((6, 33))
    torch.library.opcheck(op, (x, residual, weight, bias, 1e-12, bits, symmetric))
    torch.library.opcheck(op, (x.t().contiguous().t().half(), None, weight, bias, 1e-12, bits, symmetric))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_without_native_kernels(symmetric: bool, dtype: torch.dtype, torch_products: None) -> None:
    """In float32 as plain code, which fuses; else as the op, since Inductor would skip the rounding before codes."""
    x, residual, weight, bias = inputs((3, 50, 96), dtype)

    def run(x: torch.Tensor) -> tuple:
        return add_layernorm(x * 2, residual, weight, bias, 1e-5, bits=8, symmetric=symmetric)

    calls = []
    torch._dynamo.reset()

    def backend(graph: torch.fx.GraphModule, example: list) -> object:
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._inductor.compile(graph, example)

    got = torch.compile(run, fullgraph=True, backend=backend)(x)
    assert any("lowbit_kernels" in call for call in calls) == (dtype != torch.float32)
    assert_codes(got, 8, symmetric)
    expected = reference.add_layernorm(x.double() * 2, residual, weight, bias, 1e-5)
    torch.testing.assert_close(got[0].double(), expected, rtol=TOLERANCE[dtype] + 1e-6, atol=3e-5)


def test_rows_too_long_for_registers_are_refused_by_the_gpu() -> None:
    with pytest.raises(ValueError, match="K=8193 values, accepted on CUDA: up to 8192"):
        layernorm_gpu.launch(torch.ones(1, 8193), None, torch.ones(8193), torch.ones(8193), 1e-12, 0, True)


def test_bad_input_is_refused() -> None:
    x, residual, weight, bias = inputs((2, 3))
    with pytest.raises(TypeError, match=r"x has dtype .*float64"):
        add_layernorm(x.double(), None, weight, bias)
    with pytest.raises(ValueError, match="scalar"):
        add_layernorm(torch.tensor(1.0), None, weight, bias)
    with pytest.raises(TypeError, match=r"residual has dtype .*float16, accepted: float32"):
        add_layernorm(x, residual.half(), weight, bias)
    with pytest.raises(ValueError, match=r"residual has shape \(1, 3\), expected that of x \(2, 3\)"):
        add_layernorm(x, residual[:1], weight, bias)
    with pytest.raises(ValueError, match=r"weight has shape \(1,\), expected \(3,\)"):
        add_layernorm(x, residual, weight[:1], bias)
    with pytest.raises(TypeError, match="bias must be a tensor, got NoneType"):
        add_layernorm(x, residual, weight, None)
    with pytest.raises(ValueError, match="eps=-1"):
        add_layernorm(x, residual, weight, bias, -1)
    with pytest.raises(ValueError, match="bits=2, accepted: None, 8, 4"):
        add_layernorm(x, residual, weight, bias, bits=2)
    with pytest.raises(ValueError, match="one device"):
        add_layernorm(x, residual, weight.to("meta"), bias)
