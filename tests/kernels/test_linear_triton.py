"""The Triton linear kernel equals the definition (on a GPU, or run with TRITON_INTERPRET=1)."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

from launches import work_of
from lowbit_kernels import reference

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from lowbit_kernels import linear as ops
from lowbit_kernels import linear_triton as linear
from lowbit_kernels import packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["ternary", "binary", "split"]
TILES = list(
    dict.fromkeys((kind, tile) for kind in KINDS for arch in (80, 90, 100) for tile in linear.shipped_tiles(kind, arch))
)
SMALL_TILE = linear.Tile(16, 64, 64, 4, 3, split_k=1)
BOTH = [None, SMALL_TILE]  # for a few tokens: the kernel for them, and the one with tensor cores


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
    kind, x, packed, scale, bias, x_scale, zero=None, activation=None, out_dtype=torch.float32, tile=None, concat=False,
    residual=None, out_scale=None,
):  # fmt: skip
    tensors = (None if t is None else t.to(DEVICE) for t in (x, packed, scale, bias, x_scale, zero))
    last = {"residual": residual, "out_scale": out_scale}
    last = {name: None if t is None else t.to(DEVICE) for name, t in last.items()}
    return linear.launch(*tensors, activation, out_dtype, kind, tile, concat=concat, **last).cpu()


def definition(kind, x, packed, scale, bias, x_scale, zero=None, activation=None, residual=None) -> torch.Tensor:
    function = getattr(reference, f"{kind}_linear")
    keywords = {"x_scale": x_scale, "x_zero_point": zero, "activation": activation, "out_dtype": torch.float64}
    return function(x, packed, scale, bias, **keywords, residual=residual)


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
@pytest.mark.parametrize("M", [1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 127, 129])
def test_integer_sums_are_exact_for_ragged_M(M: int, kind: str) -> None:
    x, packed, *_ = random_case(kind, M, 70 if M > linear.SMALL_M else 5, 300)  # up to there, a program a row
    x[0] = -128
    for got, expected in zip(integer_sums(kind, x, packed), expected_sums(kind, x, packed), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (64, 128), (3, 127), (65, 129), (2, 255), (33, 257), (5, 768), (4, 0)])
def test_integer_sums_are_exact_for_ragged_weights(N: int, K: int, kind: str) -> None:
    x, packed, *_ = random_case(kind, 5, N, K)
    for rows, tile in ((packed, SMALL_TILE), (packed[:5], None)):
        for got, expected in zip(integer_sums(kind, x, rows, tile), expected_sums(kind, x, rows), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
@pytest.mark.parametrize("concat", [False, True])
def test_every_tile_gives_the_same_integers(concat: bool, kind: str, tile: linear.Tile) -> None:
    x, packed, *_ = random_case(kind, 131, 67, 520)
    for got, expected in zip(integer_sums(kind, x, packed, tile, concat), expected_sums(kind, x, packed), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("tile", [None, *(replace(SMALL_TILE, block_b=1024, split_k=split_k) for split_k in (1, 3))])
def test_the_longest_K_sums_exactly_and_a_longer_one_is_refused(tile: linear.Tile | None) -> None:
    """Devices differ beyond int32: wgmma and dp4a wrap, mma saturates. 64 x 128 x K is below 2^31 up to this K."""
    K = 2**18 - 1
    signs = torch.tensor([1, -1], dtype=torch.int8)[:, None].expand(2, K)
    packed, x = reference.pack_ternary(signs), torch.full((1, K), -128, dtype=torch.int8)
    (got,) = integer_sums("ternary", x, packed, tile)
    assert got.tolist() == [[-128.0 * K, 128.0 * K]]  # 18 bits and 7 zeros: exact in float32
    x, packed = torch.zeros(1, 2**18, dtype=torch.int8), torch.zeros(1, 2**16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="x has K=262144 columns, the GPU kernels take less than 262144"):
        launch("ternary", x, packed, torch.ones(1), None, torch.ones(1), tile=tile)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("per_token", "per_row", "with_zero"), itertools.product([True, False], repeat=3))
def test_equals_definition(kind: str, per_token: bool, per_row: bool, with_zero: bool) -> None:
    for M, N, K in ((9, 33, 70), (9, 33, 300), (3, 5, 300)):
        x, packed, scale, bias, x_scale = random_case(kind, M, N, K, per_row, per_token)
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
    for tile in BOTH:
        got, expected = launch(kind, *arguments, tile=tile).double(), definition(kind, *arguments)
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
    for activation, tile in itertools.product((None, "gelu", "gelu_tanh"), BOTH):
        y = launch("ternary", x, packed, scale, bias, x_scale, activation=activation, tile=tile)
        assert y.isnan().all(1).tolist() == [False, True, False, False] and not y[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: str) -> None:
    x, packed, scale, bias, x_scale = random_case(kind, 8, 12, 300)
    zero = torch.randint(-9, 9, (8,), dtype=torch.int32)
    wide_x, wide_w = torch.cat([x, x], 1)[::2, :300], torch.cat([packed, packed], 1)[::2, : packed.shape[1]]
    strided = wide_x, wide_w, scale[..., ::2], bias[::2], x_scale[::2], zero[::2]
    residual = torch.randn(12, 10).t()[1:9]
    dense = residual[:4].contiguous()
    transposed, misplaced = x.t().contiguous().t(), torch.cat([torch.zeros(1), x.flatten()]).to(torch.int8)[1:]
    for tile in BOTH:
        expected = launch(kind, *[tensor.contiguous() for tensor in strided], residual=dense, tile=tile)
        assert torch.equal(launch(kind, *strided, residual=residual[:4], tile=tile), expected)
        expected = launch(kind, x, packed, scale, bias, x_scale, tile=tile)
        for same in (transposed, misplaced.view(8, 300)):
            assert torch.equal(launch(kind, same, packed, scale, bias, x_scale, tile=tile), expected)
    shifted = torch.cat([packed[0, :1], packed.flatten()])[1:].view_as(packed)  # weights at an odd address
    assert torch.equal(launch(kind, x, shifted, scale, bias, x_scale), launch(kind, x, packed, scale, bias, x_scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "tile"), [(3, None), (9, None), (9, replace(SMALL_TILE, split_k=2))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_is_added_after_the_activation(dtype: torch.dtype, M: int, tile, kind: str) -> None:
    arguments, residual = random_case(kind, M, 5, 600), torch.randn(M, 5).to(dtype)
    plain = launch(kind, *arguments, activation="gelu", tile=tile)
    got = launch(kind, *arguments, activation="gelu", tile=tile, residual=residual)
    # One rounding less where the compiler fuses the last product with the addition.
    torch.testing.assert_close(got, plain + residual.float(), rtol=3e-7, atol=3e-7)
    expected = definition(kind, *arguments, activation="gelu", residual=residual)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "tile"), [(1, None), (8, None), (9, None), (9, replace(SMALL_TILE, split_k=2))], ids=str)
def test_out_scale_gives_the_codes_of_quantize_per_tensor(M: int, tile, kind: str) -> None:
    arguments, residual = random_case(kind, M, 5, 600), torch.randn(M, 5)
    y = launch(kind, *arguments, tile=tile, residual=residual)
    for factor in (1 / 300, 1 / 127, 0.1):
        out_scale = (y.abs().max() * factor).reshape(1)
        got = launch(kind, *arguments, out_dtype=torch.int8, tile=tile, residual=residual, out_scale=out_scale)
        assert torch.equal(got, reference.quantize_per_tensor(y, scale=out_scale)[0])
        assert got.abs().max() == min(127, round(1 / factor))
    ties = torch.arange(M * 5, dtype=torch.float32).view(M, 5) - 10.5  # zero weights leave them as they are
    nothing = arguments[0], arguments[1], arguments[2] * 0, arguments[3] * 0, arguments[4]
    two = torch.tensor([2.0])
    got = launch(kind, *nothing, out_dtype=torch.int8, tile=tile, residual=ties * 2, out_scale=two)
    assert torch.equal(got.double(), torch.round(ties.double()).clamp(-127, 127))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_int8_results_are_0_where_there_is_no_number() -> None:
    x, packed, scale, bias, x_scale = random_case("ternary", 3, 6, 130)
    x_scale[1] = float("nan")
    residual = torch.zeros(3, 6)
    residual[2, 0], residual[2, 1], residual[2, 2] = float("nan"), float("inf"), -float("inf")
    for number, tile in itertools.product((0.01, 0.0, 1e-39, float("nan"), float("inf")), BOTH):
        options = {"residual": residual, "out_scale": torch.tensor([number])}
        got = launch("ternary", x, packed, scale, bias, x_scale, out_dtype=torch.int8, tile=tile, **options)
        expected = reference.ternary_linear(x, packed, scale, bias, x_scale=x_scale, **options)
        assert (got - expected).abs().max() <= 1 and not got[1].any() and bool(got.any()) == (number == 0.01)
        assert got[2, :3].tolist() == ([0, 127, -127] if number == 0.01 else [0, 0, 0])


# --- slices of K -----------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel leaves out shows."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", empty)


def clean() -> bool:
    """The kept workspaces are there and all zeros."""
    kept = list(linear._workspaces.values())
    return len(kept) > 0 and not any(workspace.any() for workspace in kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split_k", [1, 2, 3, 5])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 70, 1300), (3, 1, 513), (8, 33, 100), (9, 65, 1024), (17, 70, 1030)])
def test_slices_give_the_same_bits(M: int, N: int, K: int, split_k: int, kind: str, poisoned: None) -> None:
    x, packed, scale, bias, x_scale = random_case(kind, M, N, K)
    zero = torch.randint(-300, 300, (M,), dtype=torch.int32)
    x_scale[M // 2] = float("nan")
    tile = replace(SMALL_TILE, split_k=split_k)  # K = 100 is one step: slices without any
    for got, expected in zip(integer_sums(kind, x, packed, tile), expected_sums(kind, x, packed), strict=True):
        assert torch.equal(got, expected)
    arguments = x, packed, scale, bias, x_scale, zero
    whole = launch(kind, *arguments, activation="gelu", tile=SMALL_TILE)
    for _ in range(2):  # the second finds what the first has left in the workspace
        sliced = launch(kind, *arguments, activation="gelu", tile=tile)
        torch.testing.assert_close(sliced, whole, rtol=0, atol=0, equal_nan=True)
    assert sliced.isnan().all(1).tolist() == [m == M // 2 for m in range(M)]
    assert clean() or split_k == 1


@pytest.mark.parametrize(("kind", "tile"), TILES, ids=str)
@pytest.mark.parametrize("concat", [False, True])
def test_slices_of_every_tile(concat: bool, tile: linear.Tile, kind: str, poisoned: None) -> None:
    x, packed, *_ = random_case(kind, 131, 67, 1100)
    tile = replace(tile, split_k=3)
    for got, expected in zip(integer_sums(kind, x, packed, tile, concat), expected_sums(kind, x, packed), strict=True):
        assert torch.equal(got, expected)
    assert clean()


def test_slices_are_chosen_for_few_tiles_and_a_long_K(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_workspaces", {})
    monkeypatch.setattr(linear, "_processors", lambda device: 132)
    for K, kept in ((900, 0), (1100, 1)):
        x, packed, *_ = random_case("ternary", 9, 5, K)
        assert torch.equal(integer_sums("ternary", x, packed)[0], expected_sums("ternary", x, packed)[0])
        assert len(linear._workspaces) == kept
    assert clean()


def test_the_rule_for_slices() -> None:
    small, large = SMALL_TILE, replace(SMALL_TILE, block_m=64)
    assert linear.choose_split_k(16, 768, 3072, small, 4, 132) == 6  # 12 tiles, 12 steps: 11 would leave 5 empty
    assert linear.choose_split_k(16, 768, 3072, small, 8, 132) == 6
    assert linear.choose_split_k(16, 768, 768, small, 4, 132) == 1
    assert linear.choose_split_k(4096, 768, 3072, large, 4, 132) == 1
    for M, N, K, tile, per_byte in itertools.product((9, 100), (1, 768), (1024, 1100, 4000), (small, large), (4, 8)):
        split_k = linear.choose_split_k(M, N, K, tile, per_byte, 132)
        tiles, values = -(-N // tile.block_n) * -(-M // tile.block_m), per_byte * tile.block_b
        steps = -(-K // values)
        each = -(-steps // split_k)
        assert 1 <= split_k <= max(1, 132 // tiles) and each * values >= 256 and (split_k - 1) * each < steps


def test_the_workspace_grows_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_workspaces", {})
    device = torch.empty(0, device=DEVICE).device
    first = linear._workspace(device, 10)
    assert linear._workspace(device, first.numel()) is first and not first.any() and first.dtype == torch.int32
    larger = linear._workspace(device, first.numel() + 1)
    assert larger.numel() > first.numel() and not larger.any()
    assert linear._workspace(device, 10) is larger and len(linear._workspaces) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs need a GPU")
def test_streams_graphs_and_pools_have_workspaces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_workspaces", {})
    arguments = [tensor.to(DEVICE) for tensor in random_case("ternary", 16, 768, 3072)]

    def run() -> torch.Tensor:
        return linear.launch(*arguments, None, None, torch.float32, "ternary")

    expected = linear.launch(*arguments, None, None, torch.float32, "ternary", SMALL_TILE)
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
        assert torch.equal(run(), expected) and not linear._workspaces
    assert torch.equal(run(), expected) and len(linear._workspaces) == 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        apart = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(apart, expected) and len(linear._workspaces) == 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = [run(), run()]
    assert len(linear._workspaces) == 2
    for _ in range(3):
        for y in replayed:
            y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed[0], expected) and torch.equal(replayed[1], expected)
    assert clean()


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs programs one after another")
def test_many_launches_of_slices_side_by_side() -> None:
    for kind in KINDS:
        x, packed, *_ = random_case(kind, 33, 770, 4096)
        expected = expected_sums(kind, x, packed)
        for _ in range(100):
            for got, sums in zip(integer_sums(kind, x, packed), expected, strict=True):
                assert torch.equal(got, sums)


def test_nothing_outside_the_output_is_written() -> None:
    x, packed, scale, bias, x_scale = random_case("ternary", 3, 5, 130)
    assert launch("ternary", x[:0], packed, scale, bias, x_scale[:0]).shape == (0, 5)
    assert launch("ternary", x, packed[:0], scale[:0], bias[:0], x_scale).shape == (3, 0)
    canvas = torch.full((20, 40), 7.0, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    tile = SMALL_TILE
    expected = torch.full((20, 40), 7.0)
    expected[2:5, 3:8] = expected_sums("ternary", x, packed)[0]
    arguments = (
        torch.nn.functional.pad(x, (0, 14)).to(DEVICE), packed.to(DEVICE), one, None, one, None, None, None, None,
        canvas[2:, 3:], 3, 5, 144, packed.shape[1], 144, packed.shape[1], 40, 0, 0, 0, 1,
    )  # fmt: skip
    constants = {"LAYOUT": 0, "ACTIVATION": 0, "HAS_BIAS": False, "HAS_ZERO": False, "HAS_RESIDUAL": False}
    constants |= {"HAS_OUT_SCALE": False, "INTERPRET": linear.INTERPRET, "enable_fp_fusion": True}
    linear._linear_kernel[(1, 1)](
        *arguments, None, packed.shape[1], **constants, CONCAT=False, EVEN_K=False, SLICED=False,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_B=tile.block_b,
    )  # fmt: skip
    assert torch.equal(canvas.cpu(), expected)
    canvas[2:5, 3:8] = float("nan")
    linear._small_kernel[(5,)](*arguments, **constants, BLOCK_M=4, BLOCK_W=64, num_warps=1)
    assert torch.equal(canvas.cpu(), expected)


def test_each_tile_has_a_place_in_the_workspace_and_nothing_around_it_is_written() -> None:
    """Two tiles, four slices each. That the first sums of the second start at 5 stands for a slice that came before."""
    tile = SMALL_TILE
    x, packed, *_ = random_case("split", 16, 2 * tile.block_n, 1024)
    sums = tile.block_m * tile.block_n
    size = 2 * (2 * sums + 1)
    around = torch.full((size + 64,), 7, dtype=torch.int32, device=DEVICE)
    around[32:-32] = 0
    around[32 + 2 * sums : 32 + 3 * sums] = 5 * 64  # decoded weights are 64 times the weights
    out = torch.full((18, 2 * tile.block_n), 7.0, device=DEVICE)
    one, scale = torch.ones(1, device=DEVICE), torch.tensor([[1.0], [0.0]], device=DEVICE)
    step = tile.block_b
    linear._linear_kernel[(2, 1, 4)](
        x.to(DEVICE), packed.to(DEVICE), scale, None, one, None, None, None, None, out[1:-1],
        16, 2 * tile.block_n, 1024, 256, 1024, 256, out.stride(0), 0, 0, 0, 1, around[32:], step,
        LAYOUT=2, ACTIVATION=0, HAS_BIAS=False, HAS_ZERO=False, HAS_RESIDUAL=False, HAS_OUT_SCALE=False,
        INTERPRET=linear.INTERPRET, CONCAT=False, EVEN_K=False, SLICED=True,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_B=tile.block_b, enable_fp_fusion=True,
    )  # fmt: skip
    expected = expected_sums("split", x, packed)[0]
    expected[:, tile.block_n :] += 5
    assert torch.equal(out[1:-1].cpu(), expected) and (out[[0, -1]] == 7).all()
    assert (around[:32] == 7).all() and (around[-32:] == 7).all() and not around[32:-32].any()


@pytest.mark.skipif(DEVICE == "cpu", reason="the dispatcher takes CUDA tensors to the kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_the_op_dispatches_to_the_kernel(kind: str) -> None:
    arguments = [tensor.to(DEVICE) for tensor in random_case(kind, 9, 33, 200)]
    op = getattr(torch.ops.lowbit_kernels, f"{kind}_linear").default
    got = op(*arguments, None, None, torch.float32)
    assert torch.equal(got, linear.launch(*arguments, None, None, torch.float32, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_joint_products_are_one_launch_with_the_same_bits(kind: str) -> None:
    cases = [random_case(kind, 9, N, 130) for N in (5, 64, 3)]
    x, _, _, _, x_scale = cases[0]
    packed = [case[1].to(DEVICE) for case in cases]
    scale = [case[2].to(DEVICE) for case in cases]
    scale[1] = scale[1][..., :1]  # one for all rows
    bias = [cases[0][3].to(DEVICE), None, cases[2][3].to(DEVICE)]
    zero = torch.randint(-128, 128, (9,), dtype=torch.int32, device=DEVICE)
    given = x_scale.to(DEVICE), zero, "gelu", torch.float32, kind
    for _ in range(2):
        joint = ops._joint_cuda(x.to(DEVICE), packed, scale, bias, *given)
        alone = [linear.launch(x.to(DEVICE), *weight, *given) for weight in zip(packed, scale, bias, strict=True)]
        assert torch.equal(joint, torch.cat(alone, 1))
        bias[0] += 1.0  # edits are noticed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_zero", [False, True])
def test_unpacked_codes_give_the_bits_of_packed_ones(kind: str, with_zero: bool) -> None:
    x, packed, scale, bias, x_scale = random_case(kind, 9, 33, 300)
    zero = torch.randint(-300, 300, x_scale.shape, dtype=torch.int32) if with_zero else None
    codes = getattr(reference, f"unpack_{kind}")(packed, 300)
    codes = torch.stack(codes) if kind == "split" else codes
    tensors = (None if t is None else t.to(DEVICE) for t in (x, codes.to(torch.int8), scale, bias, x_scale, zero))
    got = ops._codes_cuda(*tensors, kind, torch.float32).cpu()
    assert torch.equal(got, launch(kind, x, packed, scale, bias, x_scale, zero))


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_codes_take_one_launch_more(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, scale, bias, x_scale = random_case(kind, 4, 33, 768)
    codes = torch.ones(*scale.shape, 768, dtype=torch.int8)
    zero = torch.zeros(4, dtype=torch.int32)
    arguments = x, codes, scale, bias, x_scale, zero, kind, torch.float32
    work = work_of(lambda: ops._codes_cuda(*arguments), [linear, packing], monkeypatch)
    assert work == (["_pack_kernel", "_small_kernel"], [])
