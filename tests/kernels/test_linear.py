"""The CPU linears: integer sums bit for bit, results within derived bounds of float64, and the kept expansions."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys

import pytest
import torch

import lowbit_kernels
from lowbit_kernels import packing, reference
from lowbit_kernels.linear import cpu as linear_cpu

KINDS = ["ternary", "binary", "split"]
ROWS = [1, 2, 3, 15, 16, 17, 31, 33, 127, 129]


@pytest.fixture(autouse=True)
def empty_cache():
    lowbit_kernels.keep_expanded(False)
    lowbit_kernels.keep_expanded(True)


def random_codes(kind: str, N: int, K: int) -> list[torch.Tensor]:
    if kind == "ternary":
        return [torch.randint(-1, 2, (N, K), dtype=torch.int8)]
    return [torch.randint(0, 2, (N, K), dtype=torch.int8) * 2 - 1 for _ in range(2 if kind == "split" else 1)]


def pack(kind: str, codes: list[torch.Tensor]) -> torch.Tensor:
    return getattr(packing, f"pack_{kind}")(*codes)


def random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def random_scale(kind: str, N: int, per_row: bool = True) -> torch.Tensor:
    return torch.rand(*((2,) if kind == "split" else ()), N if per_row else 1) + 0.1


def op(kind: str):
    return getattr(lowbit_kernels, f"{kind}_linear")


def definition(kind: str, *arguments, **keywords) -> torch.Tensor:
    """The reference in float64 whatever the output dtype."""
    return getattr(reference, f"{kind}_linear")(*arguments, **{**keywords, "out_dtype": torch.float64})


def magnitude(x, codes, scale, bias, x_scale, zero=None) -> torch.Tensor:
    """The sum of the absolute values of all terms of an output: what float32 rounding errors are relative to."""
    scale = scale if scale.dim() == 2 else scale.unsqueeze(0)
    zero = torch.zeros_like(x_scale) if zero is None else zero
    total = torch.zeros(x.shape[0], codes[0].shape[0], dtype=torch.float64)
    for plane, plane_scale in zip(codes, scale, strict=True):
        shifted = zero.double().abs().unsqueeze(-1) * plane.long().sum(1).abs()
        total += ((x.long() @ plane.long().t()).abs() + shifted) * plane_scale.double()
    return total * x_scale.double().unsqueeze(-1) + (0 if bias is None else bias.double().abs())


def expand(packed: torch.Tensor, K: int, kind: str) -> linear_cpu.Expanded:
    return linear_cpu.expand([packed], [torch.ones(2, 1) if kind == "split" else torch.ones(1)], K, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 3, 100, 128, 130, 768])
@pytest.mark.parametrize("N", [1, 3, 8, 17, 64])
def test_integer_sums_are_exact(N: int, K: int, kind: str) -> None:
    codes = random_codes(kind, N, K)
    expanded = expand(pack(kind, codes), K, kind)
    for M in ROWS:  # one prepacked weight serves every M
        x = random_int8(M, K)
        x[0] = -128
        expected = x.long() @ torch.cat(codes).long().t()
        assert torch.equal(linear_cpu.accumulate(x, expanded).double(), expected.double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [0, 1, 2, 127, 130])
def test_integer_sums_are_exact_without_onednn(K: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cpu, "_has_onednn", lambda: False)
    for M, N in itertools.product((0, 1, 3, 17, 33), (0, 1, 2, 17)):
        codes = random_codes(kind, N, K)
        expanded = expand(pack(kind, codes), K, kind)
        assert not expanded.prepacked
        x = random_int8(M, K)
        expected = x.long() @ torch.cat(codes).long().t()
        assert torch.equal(linear_cpu.accumulate(x, expanded).double(), expected.double())


def test_sums_stay_exact_up_to_the_last_prepacked_K() -> None:
    for K in (2**17 - 1, 2**17):
        codes = torch.ones(2, K, dtype=torch.int8)
        codes[1, ::2] = -1
        expanded = expand(packing.pack_ternary(codes), K, "ternary")
        assert expanded.prepacked == (K < 2**17 and linear_cpu._has_onednn())
        x = torch.full((2, K), -128, dtype=torch.int8)
        x[1, 0] = -127  # one below 2^24: an odd number
        assert torch.equal(linear_cpu.accumulate(x, expanded).double(), (x.long() @ codes.long().t()).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("per_token", "per_row"), itertools.product([True, False], repeat=2))
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_definition(kind: str, per_token: bool, per_row: bool, with_zero: bool, with_bias: bool) -> None:
    for M, N, K in ((1, 5, 70), (17, 33, 300), (33, 64, 768)):
        codes, x = random_codes(kind, N, K), random_int8(M, K)
        scale, x_scale = random_scale(kind, N, per_row), torch.rand(M if per_token else 1)
        zero = torch.randint(-300, 300, x_scale.shape, dtype=torch.int32) if with_zero else None
        bias = torch.randn(N) if with_bias else None
        arguments = x, pack(kind, codes), scale, bias
        got = op(kind)(*arguments, x_scale=x_scale, x_zero_point=zero)
        assert got.dtype == torch.float32
        expected = definition(kind, *arguments, x_scale=x_scale, x_zero_point=zero)
        # Rounded: product by scale, sum of planes, product by x_scale, sum with bias: half an ulp (2^-24) each.
        bound = 4 * 2.0**-24 * magnitude(x, codes, scale, bias, x_scale, zero)
        assert ((got - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_far_zero_point_does_not_overflow(kind: str) -> None:
    x = 1e4 + torch.rand(3, 130) * 1e-2  # a narrow range far from 0: zero points of about 2^28
    q, x_scale, zero = lowbit_kernels.quantize_per_token(x, symmetric=False)
    assert zero.abs().max() > 2**26
    codes, scale = random_codes(kind, 9, 130), random_scale(kind, 9)
    arguments = q, pack(kind, codes), scale
    got = op(kind)(*arguments, x_scale=x_scale, x_zero_point=zero)
    expected = definition(kind, *arguments, x_scale=x_scale, x_zero_point=zero)
    assert ((got - expected).abs() <= 6 * 2.0**-24 * magnitude(q, codes, scale, None, x_scale, zero)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activation_equals_definition(kind: str, activation: str) -> None:
    x, packed, scale = random_int8(9, 200), pack(kind, random_codes(kind, 12, 200)), random_scale(kind, 12)
    arguments = x, packed, scale, torch.randn(12)
    keywords = {"x_scale": torch.rand(9) / 500, "activation": activation}
    torch.testing.assert_close(
        op(kind)(*arguments, **keywords).double(), definition(kind, *arguments, **keywords), rtol=1e-5, atol=1e-6
    )
    plain = definition(kind, *arguments, x_scale=keywords["x_scale"])
    assert plain.min() < -1 and plain.max() > 1  # both tails of the activation were seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_residual_is_added_in_float32_before_rounding(kind: str, dtype: torch.dtype) -> None:
    packed, scale, bias = pack(kind, random_codes(kind, 6, 140)), random_scale(kind, 6), torch.randn(6)
    arguments = random_int8(2, 5, 140), packed, scale, bias
    keywords = {"x_scale": torch.rand(2, 5) / 100, "activation": "gelu"}
    residual = torch.randn(2, 12, 5).to(dtype).mT[..., ::2]
    got = op(kind)(*arguments, **keywords, residual=residual)
    assert torch.equal(got, op(kind)(*arguments, **keywords) + residual.float())
    expected = definition(kind, *arguments, **keywords, residual=residual)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(op(kind)(*arguments, **keywords, residual=residual, out_dtype=dtype), got.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_out_scale_gives_the_codes_of_quantize_per_tensor(kind: str) -> None:
    arguments = random_int8(17, 140), pack(kind, random_codes(kind, 33, 140)), random_scale(kind, 33), torch.randn(33)
    keywords = {"x_scale": torch.rand(17) / 100, "activation": "gelu", "residual": torch.randn(17, 33)}
    y = op(kind)(*arguments, **keywords)
    for out_scale in (y.abs().max() / 500, y.abs().max() / 127, torch.tensor(1.0)):
        out_scale = out_scale.reshape(1)
        got = op(kind)(*arguments, **keywords, out_scale=out_scale)
        assert got.dtype == torch.int8
        assert torch.equal(got, lowbit_kernels.quantize_per_tensor(y, scale=out_scale)[0])
        # float32 and float64 may round a tie to neighbours, nothing else
        expected = definition(kind, *arguments, **keywords, out_scale=out_scale)
        away = (y.double() / out_scale - expected.double()).abs() - (y.double() / out_scale - got.double()).abs()
        assert (got == expected).float().mean() > 0.99 and (away[got != expected].abs() < 1e-3).all()
    assert op(kind)(*arguments, **keywords, out_scale=y.abs().max().reshape(1) / 500).abs().max() == 127  # saturated


def test_int8_results_are_0_where_there_is_no_number() -> None:
    packed, scale = pack("ternary", random_codes("ternary", 6, 130)), random_scale("ternary", 6)
    x, x_scale = random_int8(3, 130), torch.tensor([1.0, float("nan"), 1.0])
    residual = torch.zeros(3, 6)
    residual[2, 0], residual[2, 1], residual[2, 2] = float("nan"), float("inf"), -float("inf")
    keywords = {"x_scale": x_scale, "residual": residual}
    got = lowbit_kernels.ternary_linear(x, packed, scale, **keywords, out_scale=torch.tensor([0.5]))
    assert torch.equal(got, reference.ternary_linear(x, packed, scale, **keywords, out_scale=torch.tensor([0.5])))
    assert got[1].tolist() == [0] * 6 and got[2, :3].tolist() == [0, 127, -127] and got[0].any()
    for useless in (0.0, 1e-39, float("nan"), float("inf")):
        got = lowbit_kernels.ternary_linear(x, packed, scale, **keywords, out_scale=torch.tensor([useless]))
        assert not got.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float_input_is_quantized_per_token_and_keeps_its_dtype(kind: str, dtype: torch.dtype) -> None:
    x, packed = torch.randn(2, 5, 140).to(dtype), pack(kind, random_codes(kind, 6, 140))
    scale, bias = random_scale(kind, 6), torch.randn(6).to(dtype)
    got = op(kind)(x, packed, scale, bias)
    assert got.dtype == dtype and got.shape == (2, 5, 6)
    q, x_scale, _ = reference.quantize_per_token(x)
    expected = definition(kind, q, packed, scale, bias, x_scale=x_scale)
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 2.0**-20
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=1e-5)
    assert op(kind)(x, packed, scale, out_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_with_nan_gives_nan_in_its_token_only(kind: str) -> None:
    x = torch.randn(4, 130)
    x[1, 7], x[2, 0] = float("nan"), float("inf")
    y = op(kind)(x, pack(kind, random_codes(kind, 5, 130)), random_scale(kind, 5), torch.zeros(5), activation="gelu")
    assert y.isnan().all(1).tolist() == [False, True, True, False]
    assert not y[[0, 3]].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 130), (2, 0, 130), (130,), (1, 1, 1, 130)])
def test_leading_dimensions_are_kept(kind: str, shape: tuple[int, ...]) -> None:
    packed, scale = pack(kind, random_codes(kind, 5, 130)), random_scale(kind, 5)
    x = torch.randn(shape)
    assert op(kind)(x, packed, scale).shape == (*shape[:-1], 5)
    per_token = op(kind)(random_int8(*shape), packed, scale, x_scale=torch.rand(shape[:-1]))
    assert per_token.shape == (*shape[:-1], 5)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_weights_give_empty_or_bias(kind: str) -> None:
    assert op(kind)(torch.randn(3, 9), pack(kind, random_codes(kind, 0, 9)), random_scale(kind, 1)).shape == (3, 0)
    bias = torch.randn(4)
    y = op(kind)(torch.randn(3, 0), pack(kind, random_codes(kind, 4, 0)), random_scale(kind, 4), bias)
    assert torch.equal(y, bias.expand(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: str) -> None:
    packed, scale = pack(kind, random_codes(kind, 6, 300)), random_scale(kind, 12)[..., ::2]
    x, bias = random_int8(300, 8).t()[::2], torch.randn(12)[::2]
    x_scale, zero = torch.rand(8)[::2], torch.randint(-9, 9, (8,), dtype=torch.int32)[::2]
    wide = torch.cat([packed, packed], 1)[:, : packed.shape[1]]
    got = op(kind)(x, wide, scale, bias, x_scale=x_scale, x_zero_point=zero)
    x, scale, bias, x_scale, zero = (tensor.contiguous() for tensor in (x, scale, bias, x_scale, zero))
    assert torch.equal(got, op(kind)(x, packed, scale, bias, x_scale=x_scale, x_zero_point=zero))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_linear_is_the_packed_linear(kind: str) -> None:
    codes, x, scale = random_codes(kind, 7, 150), random_int8(2, 5, 150), random_scale(kind, 7)
    keywords = {"x_scale": torch.rand(2, 5), "x_zero_point": torch.randint(-99, 99, (2, 5), dtype=torch.int32)}
    stacked, bias = torch.stack(codes) if kind == "split" else codes[0], torch.randn(7)
    got = lowbit_kernels.codes_linear(x, stacked, scale, bias, **keywords, layout=kind, out_dtype=torch.float32)
    assert torch.equal(got, op(kind)(x, pack(kind, codes), scale, bias, **keywords))


# --- kept expansions -------------------------------------------------------------------------------------------------


def sums(kind: str, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    scale = torch.ones(2, 1) if kind == "split" else torch.ones(1)
    return op(kind)(x, packed, scale, x_scale=torch.ones(1))


def test_an_expansion_lives_as_long_as_its_packed_tensor(torch_products: None) -> None:
    x, packed = random_int8(3, 130), packing.pack_ternary(random_codes("ternary", 6, 130)[0])
    assert lowbit_kernels.expanded_bytes() == 0
    sums("ternary", x, packed)
    sums("ternary", x, packed)
    assert lowbit_kernels.expanded_bytes() == 6 * 130
    del packed
    gc.collect()
    assert lowbit_kernels.expanded_bytes() == 0


def test_without_keeping_nothing_stays_and_results_are_the_same() -> None:
    x, packed = random_int8(3, 130), packing.pack_ternary(random_codes("ternary", 6, 130)[0])
    kept = sums("ternary", x, packed)
    lowbit_kernels.keep_expanded(False)
    assert lowbit_kernels.expanded_bytes() == 0
    assert torch.equal(sums("ternary", x, packed), kept)
    assert lowbit_kernels.expanded_bytes() == 0


def test_changed_bytes_change_the_result() -> None:
    x = random_int8(3, 130)
    old, new = (packing.pack_ternary(random_codes("ternary", 6, 130)[0]) for _ in range(2))
    expected = sums("ternary", x, new)
    edited = old.clone()
    assert not torch.equal(sums("ternary", x, edited), expected)
    edited.copy_(new)
    assert torch.equal(sums("ternary", x, edited), expected)
    swapped = torch.nn.Parameter(old.clone(), requires_grad=False)
    sums("ternary", x, swapped)
    swapped.data = new
    assert torch.equal(sums("ternary", x, swapped), expected)


def test_the_same_bytes_may_be_read_by_every_layout() -> None:
    x, packed = random_int8(3, 100), pack("split", random_codes("split", 6, 100))
    packed[packed & (packed >> 1) & 0x55 != 0] = 0x5A  # code 3 is not ternary
    for kind in (*KINDS, *KINDS):
        scale = torch.ones(2, 1) if kind == "split" else torch.ones(1)
        assert torch.equal(sums(kind, x, packed).double(), definition(kind, x, packed, scale, x_scale=torch.ones(1)))


def test_inference_tensors_are_not_kept() -> None:
    with torch.inference_mode():
        packed = packing.pack_ternary(torch.ones(2, 5, dtype=torch.int8))
        ones = torch.ones(1, 5, dtype=torch.int8)
        assert sums("ternary", ones, packed).tolist() == [[5, 5]]
        packed.fill_(0x55)
        assert sums("ternary", ones, packed).tolist() == [[0, 0]]
        assert lowbit_kernels.expanded_bytes() == 0


# --- op and refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_op_passes_opcheck(kind: str) -> None:
    packed, scale = pack(kind, random_codes(kind, 6, 130)), random_scale(kind, 6)
    zero = torch.randint(-9, 9, (4,), dtype=torch.int32)
    for bias, zero_point, activation in ((None, None, None), (torch.randn(6), zero, "gelu")):
        arguments = random_int8(4, 130), packed, scale, bias, torch.rand(4), zero_point, activation, torch.bfloat16
        torch.library.opcheck(getattr(torch.ops.lowbit_kernels, f"{kind}_linear").default, arguments)
    arguments = (*arguments[:-1], torch.int8)
    keywords = {"residual": torch.randn(4, 6).half(), "out_scale": torch.ones(1)}
    torch.library.opcheck(getattr(torch.ops.lowbit_kernels, f"{kind}_linear").default, arguments, keywords)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_pass_through_the_public_function(kind: str) -> None:
    packed = pack(kind, random_codes(kind, 6, 130)).to("meta")
    y = op(kind)(torch.empty(2, 3, 130, device="meta", dtype=torch.bfloat16), packed, random_scale(kind, 6).to("meta"))
    assert y.is_meta and y.shape == (2, 3, 6) and y.dtype == torch.bfloat16
    x, one = torch.empty(2, 3, 130, device="meta"), torch.ones(1, device="meta")
    codes = op(kind)(x, packed, random_scale(kind, 6).to("meta"), residual=x[..., :6], out_scale=one)
    assert codes.is_meta and codes.shape == (2, 3, 6) and codes.dtype == torch.int8


X, SCALE = torch.ones(2, 130, dtype=torch.int8), torch.ones(6)
PACKED = packing.pack_ternary(torch.ones(6, 130, dtype=torch.int8))
GOOD = {"x": X, "packed": PACKED, "scale": SCALE, "x_scale": torch.ones(2)}
BAD_INPUT = [
    ({"x": X.int()}, TypeError, "x has dtype torch.int32"),
    ({"x": X[0, 0]}, ValueError, "x is a scalar"),
    ({"x": X[:, :128]}, ValueError, "K=128 columns, which needs 32 packed bytes a row, got 64"),
    ({"x": X.to("meta")}, ValueError, "one device"),
    ({"packed": PACKED.view(torch.int8)}, TypeError, "packed has dtype torch.int8"),
    ({"packed": PACKED[0]}, ValueError, "packed has shape"),
    ({"scale": SCALE[:5]}, ValueError, "scale has shape"),
    ({"scale": SCALE.double()}, TypeError, "scale has dtype"),
    ({"scale": torch.ones(2, 6)}, ValueError, "scale has shape"),
    ({"scale": 0.5}, TypeError, "scale must be a tensor"),
    ({"bias": torch.ones(5)}, ValueError, "bias has shape"),
    ({"bias": torch.ones(6, dtype=torch.int8)}, TypeError, "bias has dtype"),
    ({"x_scale": None}, ValueError, "pass its x_scale"),
    ({"x_scale": torch.ones(3)}, ValueError, "x_scale has shape"),
    ({"x_scale": torch.ones(2).half()}, TypeError, "x_scale has dtype"),
    ({"x_scale": 0.1}, TypeError, "x_scale must be a tensor"),
    ({"x": X.float()}, ValueError, "belong to int8 x"),
    ({"x_zero_point": torch.ones(2)}, TypeError, "x_zero_point has dtype"),
    ({"x_zero_point": torch.ones(1, dtype=torch.int32)}, ValueError, "one shape"),
    ({"x_zero_point": 3}, TypeError, "x_zero_point must be a tensor"),
    ({"activation": "relu"}, ValueError, "accepted: None, 'gelu', 'gelu_tanh'"),
    ({"out_dtype": torch.int8}, ValueError, "out_dtype"),
    ({"residual": torch.ones(6)}, ValueError, r"residual has shape \(6,\), expected \(2, 6\)"),
    ({"residual": torch.ones(2, 6).int()}, TypeError, "residual has dtype"),
    ({"residual": torch.ones(2, 6, device="meta")}, ValueError, "one device"),
    ({"out_scale": torch.ones(6)}, ValueError, r"out_scale has shape \(6,\), expected \(1,\)"),
    ({"out_scale": torch.ones(1).half()}, TypeError, "out_scale has dtype"),
    ({"out_scale": 0.1}, TypeError, "out_scale must be a tensor"),
    ({"out_scale": torch.ones(1), "out_dtype": torch.float16}, ValueError, "int8: pass one of them"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUT)
def test_bad_input_is_refused_by_name(change: dict, error: type[Exception], message: str) -> None:
    lowbit_kernels.ternary_linear(**GOOD)
    with pytest.raises(error, match=message):
        lowbit_kernels.ternary_linear(**{**GOOD, **change})


def test_split_scale_must_have_two_planes() -> None:
    for scale in (torch.ones(6), torch.ones(1, 6), torch.ones(2, 5)):
        with pytest.raises(ValueError, match="scale has shape"):
            lowbit_kernels.split_linear(X, PACKED, scale, x_scale=torch.ones(2))


def test_cpu_works_without_triton_and_the_kernel_says_what_is_missing() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch, lowbit_kernels
packed = lowbit_kernels.pack_ternary(torch.ones(2, 5, dtype=torch.int8))
x = torch.ones(1, 5, dtype=torch.int8)
assert lowbit_kernels.ternary_linear(x, packed, torch.ones(1), x_scale=torch.ones(1)).tolist() == [[5, 5]]
assert lowbit_kernels.quantize_per_token(torch.ones(1, 2))[0].tolist() == [[127, 127]]
for name in lowbit_kernels.__all__:
    getattr(lowbit_kernels, name)
try:
    from lowbit_kernels.linear import gpu
    gpu.launch(x, packed, torch.ones(1), None, torch.ones(1), None, None, torch.float32, "ternary")
except RuntimeError as error:
    assert "pip install triton" in str(error), error
else:
    raise AssertionError
"""
    path = ":".join(path for path in sys.path if path)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env={"PYTHONPATH": path})


def test_another_scale_at_the_address_of_one_that_is_gone_is_noticed() -> None:
    codes, scale = lowbit_kernels.ternarize(torch.randn(64, 128))
    packed, x = lowbit_kernels.pack_ternary(codes), torch.randn(4, 128)
    for factor in range(2, 40):
        other = scale * factor  # freed at the end of the turn: the next one often lies where it lay
        alone = lowbit_kernels.ternary_linear(x, packed.clone(), other)
        assert torch.equal(lowbit_kernels.ternary_linear(x, packed, other), alone)
        del other
