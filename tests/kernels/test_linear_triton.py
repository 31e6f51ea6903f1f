"""The Triton linear kernel equals the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from lowbit_kernels import reference

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lowbit_kernels import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["ternary", "binary", "split"]
TILES = list(
    dict.fromkeys((kind, tile) for kind in KINDS for arch in (80, 90, 100) for tile in linear.shipped_tiles(kind, arch))
)


def random_packed(kind: str, N: int, K: int) -> torch.Tensor:
    planes = [torch.randint(0, 2, (N, K), dtype=torch.int8) * 2 - 1 for _ in range(2)]
    if kind == "ternary":
        return reference.pack_ternary(torch.randint(-1, 2, (N, K), dtype=torch.int8))
    return reference.pack_binary(planes[0]) if kind == "binary" else reference.pack_split(*planes)


def random_case(kind: str, M: int, N: int, K: int, per_row: bool = True, per_token: bool = True) -> tuple:
    """(x, packed, scale, bias, x_scale)."""
    scale = torch.rand(*((2,) if kind == "split" else ()), N if per_row else 1) + 0.1
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    x_scale = (torch.rand(M) if per_token else torch.rand(1)) / 100 + 1e-3
    return x, random_packed(kind, N, K), scale, torch.randn(N), x_scale


def launch(
    kind, x, packed, scale, bias, x_scale, zero=None, activation=None, out_dtype=torch.float32, tile=None, concat=False
):
    tensors = (None if t is None else t.to(DEVICE) for t in (x, packed, scale, bias, x_scale, zero))
    return linear.launch(*tensors, activation, out_dtype, kind, tile, concat=concat).cpu()


def definition(kind, x, packed, scale, bias, x_scale, zero=None, activation=None) -> torch.Tensor:
    function = getattr(reference, f"{kind}_linear")
    keywords = {"x_scale": x_scale, "x_zero_point": zero, "activation": activation, "out_dtype": torch.float64}
    return function(x, packed, scale, bias, **keywords)


def integer_sums(kind, x, packed, tile=None, concat=None) -> list[torch.Tensor]:
    """The accumulators themselves: unit scales leave the integers as they are. A pair is read one plane at a time."""
    one = torch.ones(1)
    if kind != "split":
        return [launch(kind, x, packed, one, None, one, tile=tile, concat=concat)]
    scales = torch.eye(2).unsqueeze(-1)
    return [launch(kind, x, packed, scale, None, one, tile=tile, concat=concat) for scale in scales]


def expected_sums(kind, x, packed) -> list[torch.Tensor]:
    codes = getattr(reference, f"unpack_{kind}")(packed, x.shape[1])
    return [(x.long() @ plane.long().t()).float() for plane in (codes if kind == "split" else [codes])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 2, 3, 15, 16, 17, 31, 33, 127, 129])
def test_integer_sums_are_exact_for_ragged_M(M: int, kind: str) -> None:
    x, packed, *_ = random_case(kind, M, 70, 300)
    x[0] = -128
    for got, expected in zip(integer_sums(kind, x, packed), expected_sums(kind, x, packed), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (64, 128), (3, 127), (65, 129), (2, 255), (33, 257), (5, 768), (4, 0)])
def test_integer_sums_are_exact_for_ragged_weights(N: int, K: int, kind: str) -> None:
    x, packed, *_ = random_case(kind, 5, N, K)
    for got, expected in zip(integer_sums(kind, x, packed), expected_sums(kind, x, packed), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
@pytest.mark.parametrize("concat", [False, True])
def test_every_tile_gives_the_same_integers(concat: bool, kind: str, tile: linear.Tile) -> None:
    x, packed, *_ = random_case(kind, 131, 67, 520)
    for got, expected in zip(integer_sums(kind, x, packed, tile, concat), expected_sums(kind, x, packed), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("per_token", "per_row", "with_zero"), itertools.product([True, False], repeat=3))
def test_equals_definition(kind: str, per_token: bool, per_row: bool, with_zero: bool) -> None:
    for K in (70, 300):
        x, packed, scale, bias, x_scale = random_case(kind, 9, 33, K, per_row, per_token)
        zero = torch.randint(-300, 300, x_scale.shape, dtype=torch.int32) if with_zero else None
        arguments = x, packed, scale, bias, x_scale, zero
        got, expected = launch(kind, *arguments).double(), definition(kind, *arguments)
        # Four roundings of terms no larger than this.
        size = (128 + 300 * with_zero) * K * 2 * 1.1 * float(x_scale.max()) + float(bias.abs().max())
        assert (got - expected).abs().max() <= 4 * 2.0**-24 * size
        assert expected.abs().max() > size / 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_far_zero_point_does_not_overflow(kind: str) -> None:
    x = 1e4 + torch.rand(3, 130) * 1e-2
    q, x_scale, zero = reference.quantize_per_token(x, symmetric=False)
    _, packed, scale, bias, _ = random_case(kind, 3, 9, 130)
    arguments = q, packed, scale, bias, x_scale, zero
    got, expected = launch(kind, *arguments).double(), definition(kind, *arguments)
    assert (got - expected).abs().max() <= 6 * 2.0**-24 * 1e4 * 130 * 2.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activation_equals_definition(kind: str, activation: str) -> None:
    arguments = random_case(kind, 9, 33, 200)
    got, expected = launch(kind, *arguments, activation=activation), definition(kind, *arguments, activation=activation)
    before = definition(kind, *arguments).abs().max()
    assert before > 5  # saturated tails included
    # Four roundings of what is summed before the activation, whose slope is at most 1.13.
    atol = 4 * 2.0**-24 * 1.13 * float(before + 2 * arguments[3].abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=atol)
    huge = launch(kind, *arguments[:4], arguments[4] * 1e30, activation=activation)
    assert huge.isfinite().all() and (huge > -0.18).all()  # the least value of GELU is -0.17


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_dtype_only_rounds_the_result(dtype: torch.dtype) -> None:
    arguments = random_case("ternary", 9, 33, 200)
    got, full = launch("ternary", *arguments, out_dtype=dtype), launch("ternary", *arguments)
    assert got.dtype == dtype
    # The interpreter truncates to bfloat16, hence a whole ulp for it.
    torch.testing.assert_close(
        got.double(), full.double(), rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-11, atol=0
    )


def test_nan_scale_marks_its_token() -> None:
    x, packed, scale, bias, x_scale = random_case("ternary", 4, 9, 130)
    x_scale[1] = float("nan")
    for activation in (None, "gelu", "gelu_tanh"):
        y = launch("ternary", x, packed, scale, bias, x_scale, activation=activation)
        assert y.isnan().all(1).tolist() == [False, True, False, False] and not y[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: str) -> None:
    x, packed, scale, bias, x_scale = random_case(kind, 8, 12, 300)
    zero = torch.randint(-9, 9, (8,), dtype=torch.int32)
    wide_x, wide_w = torch.cat([x, x], 1)[::2, :300], torch.cat([packed, packed], 1)[::2, : packed.shape[1]]
    strided = wide_x, wide_w, scale[..., ::2], bias[::2], x_scale[::2], zero[::2]
    assert torch.equal(launch(kind, *strided), launch(kind, *[tensor.contiguous() for tensor in strided]))
    transposed = x.t().contiguous().t()
    assert torch.equal(
        launch(kind, transposed, packed, scale, bias, x_scale), launch(kind, x, packed, scale, bias, x_scale)
    )


def test_nothing_outside_the_output_is_written() -> None:
    x, packed, scale, bias, x_scale = random_case("ternary", 3, 5, 130)
    assert launch("ternary", x[:0], packed, scale, bias, x_scale[:0]).shape == (0, 5)
    assert launch("ternary", x, packed[:0], scale[:0], bias[:0], x_scale).shape == (3, 0)
    canvas = torch.full((20, 40), 7.0, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    tile = linear.choose_tile("ternary", 3, 5, 130, None)
    linear._linear_kernel[(1, 1)](
        x.to(DEVICE), packed.to(DEVICE), one, None, one, None, None, canvas[2:, 3:],
        3, 5, 130, packed.shape[1], 130, packed.shape[1], 40, 0, 0, 1,
        LAYOUT=0, ACTIVATION=0, HAS_BIAS=False, HAS_ZERO=False, CONCAT=False,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_B=tile.block_b, INTERPRET=linear.INTERPRET,
    )  # fmt: skip
    expected = torch.full((20, 40), 7.0)
    expected[2:5, 3:8] = expected_sums("ternary", x, packed)[0]
    assert torch.equal(canvas.cpu(), expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="the dispatcher takes CUDA tensors to the kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_dispatches_to_the_kernel(kind: str) -> None:
    arguments = [tensor.to(DEVICE) for tensor in random_case(kind, 9, 33, 200)]
    op = getattr(torch.ops.lowbit_kernels, f"{kind}_linear").default
    got = op(*arguments, None, None, torch.float32)
    assert torch.equal(got, linear.launch(*arguments, None, None, torch.float32, kind))
