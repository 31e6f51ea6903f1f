"""Evenly spaced weights, int8 and of 2, 4 and 8 bits between a least and a largest one, against the definition."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lowbit_kernels
from lowbit_kernels import packing, reference
from lowbit_kernels.linear import cpu as linear_cpu
from lowbit_kernels.linear.gpu_uniform import launch_uniform

LAYOUTS = list(packing.UNIFORM_CODES)


@pytest.fixture(autouse=True)
def empty_cache():
    lowbit_kernels.keep_expanded(False)
    lowbit_kernels.keep_expanded(True)


def random_codes(layout: str, N: int, K: int) -> torch.Tensor:
    """All codes of the layout, the extremes in the first row."""
    least, most = packing.UNIFORM_CODES[layout]
    codes = torch.randint(least, most + 1, (N, K), dtype=torch.int8)
    codes[:1] = torch.tensor([least, most], dtype=torch.int8).repeat(K)[:K]
    return codes


def random_scale(layout: str, groups: int) -> torch.Tensor:
    if layout == "int8":
        return torch.rand(groups) + 0.1
    return torch.stack([torch.rand(groups) + 0.1, torch.randn(groups)])


def run(module, layout: str, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *rest, **options):
    if layout == "int8":
        return module.int8_linear(x, packed, scale, *rest, **options)
    return module.uniform_linear(x, packed, scale, *rest, bits=int(layout[-1]), **options)


def bound(x, codes, scale, x_scale, zero) -> torch.Tensor:
    """The sum of the absolute values of all terms of a result: what float32 rounding is relative to."""
    values = (x.long() - (0 if zero is None else zero.long().unsqueeze(-1))).abs().double()
    step, offset = scale if scale.dim() == 2 else (scale, torch.zeros_like(scale))
    shifted = 0 if zero is None else zero.abs().double().unsqueeze(-1) * codes.double().sum(1).abs()
    total = (values @ codes.double().abs().T + shifted) * step.max() + values.sum(1, keepdim=True) * offset.abs().max()
    return total * x_scale.double().unsqueeze(-1) + 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", [1, 31, 63, 64, 65, 127, 128, 129, 300])
def test_packing_is_the_definition_and_its_inverse(layout: str, K: int) -> None:
    codes = random_codes(layout, 5, K)
    packed = lowbit_kernels.pack_uniform(codes, layout)
    assert torch.equal(packed, reference.pack_uniform(codes, layout))
    assert torch.equal(lowbit_kernels.unpack_uniform(packed, K, layout), codes)
    assert torch.equal(reference.unpack_uniform(packed, K, layout), codes)
    assert packed.data_ptr() != codes.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_refuses_what_it_cannot_hold(layout: str) -> None:
    least, most = packing.UNIFORM_CODES[layout]
    for wrong in (least - 1, most + 1):
        if -128 <= wrong <= 127:
            with pytest.raises(ValueError, match=f"codes holds {wrong}, accepted codes: {least} to {most}"):
                lowbit_kernels.pack_uniform(torch.tensor([[0, wrong]], dtype=torch.int8), layout)
    with pytest.raises(TypeError, match="codes"):
        lowbit_kernels.pack_uniform(torch.zeros(1, 4), layout)
    with pytest.raises(ValueError, match="layout='uniform3'"):
        lowbit_kernels.pack_uniform(torch.zeros(1, 4, dtype=torch.int8), "uniform3")
    packed = lowbit_kernels.pack_uniform(torch.zeros(1, 70, dtype=torch.int8), layout)
    with pytest.raises(ValueError, match="bytes a row, K=200 needs"):
        lowbit_kernels.unpack_uniform(packed, 200, layout)


@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 64), (17, 65), (33, 129), (64, 384), (5, 1030)])
def test_linears_agree_with_float64(layout: str, N: int, K: int, with_zero: bool) -> None:
    codes = random_codes(layout, N, K)
    packed = lowbit_kernels.pack_uniform(codes, layout)
    for M, groups in ((1, N), (2, 1), (17, N), (33, 1 if layout == "int8" else max(1, N // 3))):
        scale, bias = random_scale(layout, groups), torch.randn(N)
        x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
        x[0] = -128
        x_scale = torch.rand(M) + 0.1
        zero = torch.randint(-128, 128, (M,), dtype=torch.int32) if with_zero else None
        options = {"x_scale": x_scale, "x_zero_point": zero}
        expected = run(reference, layout, x, packed, scale, bias, **options, out_dtype=torch.float64)
        most = bound(x, codes, scale, x_scale, zero)
        got = run(lowbit_kernels, layout, x, packed, scale, bias, **options)
        assert ((got.double() - expected).abs() / most).max() < 1e-6
        on_gpu = launch_uniform(x, packed, scale, bias, x_scale, zero, None, torch.float32, layout)
        assert ((on_gpu.double() - expected).abs() / most).max() < 1e-6
        from_codes = lowbit_kernels.codes_linear(x, codes, scale, bias, x_scale, zero, layout, torch.float32)
        assert torch.equal(from_codes, got)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_options_of_the_linears_are_those_of_all(layout: str) -> None:
    codes = random_codes(layout, 20, 96)
    packed, scale, bias = lowbit_kernels.pack_uniform(codes, layout), random_scale(layout, 20), torch.randn(20)
    x, residual = torch.randn(2, 3, 96), torch.randn(2, 3, 20)
    for options in (
        {},
        {"activation": "gelu"},
        {"activation": "gelu_tanh", "residual": residual},
        {"residual": residual, "out_scale": torch.tensor([2.0])},
    ):
        got = run(lowbit_kernels, layout, x, packed, scale, bias, **options)
        expected = run(reference, layout, x, packed, scale, bias, **options)
        most = 1 if "out_scale" in options else 1e-5 * expected.abs().max()
        assert got.dtype == expected.dtype
        assert (got.double() - expected.double()).abs().max() <= most
    q, x_scale, _ = lowbit_kernels.quantize_per_token(x.reshape(6, 96))
    arguments = (q, packed, scale, bias, x_scale, None, None, torch.float32)
    torch.library.opcheck(getattr(torch.ops.lowbit_kernels, f"{layout}_linear").default, arguments)


def test_linears_say_what_does_not_fit() -> None:
    packed = lowbit_kernels.pack_uniform(torch.zeros(4, 64, dtype=torch.int8), "uniform4")
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="bits=3, accepted: 2, 4, 8"):
        lowbit_kernels.uniform_linear(x, packed, torch.ones(2, 4), bits=3)
    with pytest.raises(ValueError, match="scale"):
        lowbit_kernels.uniform_linear(x, packed, torch.ones(4), bits=4)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 5\)"):
        lowbit_kernels.uniform_linear(x, packed, torch.ones(2, 5), bits=4)
    with pytest.raises(TypeError, match="packed"):
        lowbit_kernels.int8_linear(x, packed, torch.ones(4))
    with pytest.raises(ValueError, match="packed bytes a row"):
        lowbit_kernels.uniform_linear(torch.randn(2, 65), packed, torch.ones(2, 4), bits=4)
    wide = torch.zeros(1, 2**16, dtype=torch.int8)
    with pytest.raises(ValueError, match="up to 65535"):
        lowbit_kernels.int8_linear(wide, wide, torch.ones(1), x_scale=torch.ones(1))


def test_large_sums_do_not_overflow() -> None:
    K = 2**16 - 1
    x, codes = torch.full((1, K), -128, dtype=torch.int8), torch.full((1, K), -127, dtype=torch.int8)
    got = lowbit_kernels.int8_linear(x, codes, torch.ones(1), x_scale=torch.ones(1))
    assert float(got) == pytest.approx(128 * 127 * K, rel=1e-7)


def test_products_are_exact_where_torchs_int8_products_saturate(monkeypatch) -> None:
    """Without VNNI oneDNN adds two products in 16 bits: large codes are multiplied in halves there."""
    monkeypatch.setattr(linear_cpu, "_saturates", lambda: True)
    codes, x = random_codes("uniform8", 48, 130), torch.randint(-128, 128, (33, 130), dtype=torch.int8)
    expanded = linear_cpu.expand_codes(codes, torch.ones(48))
    assert expanded.odd is not None
    assert int(expanded.weight.abs().max()) <= 64
    assert torch.equal(linear_cpu.accumulate(x, expanded).long(), x.long() @ codes.long().T)
    assert linear_cpu.expand_codes(codes.clamp(-8, 7), torch.ones(48)).odd is None


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_products_are_exact_on_older_instruction_sets(isa: str) -> None:
    """oneDNN is told to use no VNNI, before torch starts."""
    code = (
        "import torch, lowbit_kernels as k; torch.manual_seed(0)\n"
        "codes = torch.randint(-127, 128, (48, 130), dtype=torch.int8); codes[0] = 127; codes[1] = -127\n"
        "x = torch.randint(-128, 128, (33, 130), dtype=torch.int8); x[0] = 127; x[1] = -128\n"
        "y = k.int8_linear(x, codes, torch.ones(1), x_scale=torch.ones(1))\n"
        "assert torch.equal(y.long(), x.long() @ codes.long().T)\n"
        "from lowbit_kernels.decompositions import _product\n"
        "y = _product(x, [codes], [torch.ones(1)], None, 'int8')\n"
        "assert torch.equal(y.long(), x.long() @ codes.long().T)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "LOWBIT_CPU": "torch"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
