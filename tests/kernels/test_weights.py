"""Ternary and binary weights equal their definitions; splitting keeps latent and quantized sums in every case."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lowbit_kernels import binarize, reference, split_ternary, ternarize

GRANULARITIES = ["per_row", "per_tensor"]
SHAPES = [(1, 1), (5, 1), (1, 127), (9, 129), (40, 768), (90, 3072), (0, 7), (7, 0)]


def _one_sided(n: int, k: int) -> torch.Tensor:
    """Rows in which the small weights, all of one sign, outweigh the few large ones: A leaves (0, 1)."""
    w = 0.6 + 0.02 * torch.rand(n, k)
    w[:, : max(1, k // 50)] = -31.0 * math.copysign(1.0, torch.randn(()))
    return w * torch.randn(n, 1).sign()


DISTRIBUTIONS = {
    "normal": torch.randn,
    "laplace": lambda n, k: torch.distributions.Laplace(0.01, 1.0).sample((n, k)),
    "heavy-tailed": lambda n, k: torch.distributions.StudentT(1.5).sample((n, k)),
    "sparse": lambda n, k: torch.randn(n, k) * (torch.rand(n, k) < 0.1),
    "constant": lambda n, k: torch.full((n, k), -0.3),
    "zero": torch.zeros,
    "positive": torch.rand,
    "one-sided": _one_sided,
    "tiny": lambda n, k: torch.randn(n, k) * 1e-30,
}


def threshold_gap(w: torch.Tensor, granularity: str) -> torch.Tensor:
    """How far each weight is from the TWN threshold, relative to it: float32 sums may move it by a few ulps."""
    magnitude = w.double().abs()
    threshold = 0.7 * (magnitude.mean(1, keepdim=True) if granularity == "per_row" else magnitude.mean())
    return (magnitude - threshold).abs() / threshold.clamp(min=1e-300)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ternarize_equals_definition(shape: tuple[int, int], granularity: str, dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    codes, scale = ternarize(w, granularity=granularity)
    expected, expected_scale = reference.ternarize(w, granularity=granularity)
    sure = threshold_gap(w, granularity) > 1e-5
    assert codes.dtype == torch.int8 and codes.shape == w.shape
    assert torch.equal(codes[sure], expected[sure])
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5 if bool(sure.all()) else 1e-2, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_aware_equals_definition(shape: tuple[int, int], granularity: str) -> None:
    w, v = torch.randn(shape), torch.rand(shape) ** 4
    got, expected = (f(w, granularity=granularity, curvature=v, iterations=6) for f in (ternarize, reference.ternarize))
    # A weight next to the threshold may change sides in any round, so compare scale closely and codes nearly.
    torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=0)
    assert (got[0] != expected[0]).sum() <= max(1, w.numel() // 10_000)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_loss_aware_lowers_the_weighted_error_every_round(granularity: str) -> None:
    w, v = torch.randn(16, 300), torch.rand(16, 300) ** 4

    def error(codes: torch.Tensor, scale: torch.Tensor) -> float:
        return float((v * (w - codes * scale.unsqueeze(1)).double() ** 2).sum())

    rounds = [error(*ternarize(w, granularity=granularity, curvature=v, iterations=i)) for i in range(11)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(rounds))
    assert rounds[-1] < error(*ternarize(w, granularity=granularity))


def test_a_row_without_curvature_is_weighted_evenly() -> None:
    w, v = torch.randn(3, 50), torch.rand(3, 50)
    v[1] = 0
    codes, scale = ternarize(w, curvature=v)
    even = ternarize(w, curvature=torch.ones(3, 50))
    assert torch.equal(codes[1], even[0][1]) and scale[1] == even[1][1] > 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_binarize_equals_definition(shape: tuple[int, int], granularity: str, dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    codes, scale = binarize(w, granularity=granularity)
    expected, expected_scale = reference.binarize(w, granularity=granularity)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)


def test_sign_of_zero_is_plus_one() -> None:
    assert binarize(torch.tensor([[0.0, -0.0, 1.0, -1.0]]))[0].tolist() == [[1, 1, 1, -1]]


def test_zero_rows_have_scale_zero() -> None:
    w = torch.randn(3, 200)
    w[1] = 0
    for codes, scale in (ternarize(w), ternarize(w, curvature=torch.rand(3, 200))):
        assert scale[1] == 0 and not codes[1].any() and (scale[[0, 2]] > 0).all()
    assert binarize(w)[1][1] == 0


def test_strided_weights() -> None:
    w = torch.randn(129, 2, 40).permute(2, 1, 0)[:, 1]
    assert not w.is_contiguous()
    for granularity in GRANULARITIES:
        for quantize in (ternarize, binarize):
            got, expected = quantize(w, granularity=granularity), quantize(w.contiguous(), granularity=granularity)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_weight_shows_in_the_scale(bad: float) -> None:
    w, v = torch.randn(3, 70), torch.rand(3, 70)
    w[1, 5] = bad
    for codes, scale in (ternarize(w), ternarize(w, curvature=v), binarize(w)):
        assert scale.isnan().tolist() == [False, True, False]
        assert codes.abs().max() <= 1
    halves = split_ternary(w)
    assert any(bool(binarize(half)[1][1].isnan()) for half in halves)
    for scale in (ternarize(w, granularity="per_tensor")[1], binarize(w, granularity="per_tensor")[1]):
        assert scale.isnan().all()
    v[2, 3] = math.nan
    assert ternarize(w, curvature=v)[1].isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (6, 3), (3, 5), (30, 129), (7, 768)])
def test_split_keeps_latent_and_quantized_weights(name: str, shape: tuple[int, int], granularity: str) -> None:
    w = DISTRIBUTIONS[name](*shape)
    w1, w2 = split_ternary(w, granularity=granularity)
    codes, scale = ternarize(w, granularity=granularity)
    (codes1, scale1), (codes2, scale2) = (reference.binarize(half, granularity=granularity) for half in (w1, w2))
    kept = codes != 0
    size = w.double().abs().max() if granularity == "per_tensor" else w.double().abs().amax(1, keepdim=True)
    assert ((w1.double() + w2.double() - w.double()).abs() <= size * 2**-22).all()
    # On codes: both halves agree where w is kept and cancel where it is 0 (rows whose scale is 0 are 0 anyhow).
    counts = (scale > 0).unsqueeze(1).expand_as(kept)
    assert torch.equal((codes1 + codes2)[counts], 2 * codes[counts])
    assert torch.allclose(scale1.double(), scale.double() / 2, rtol=1e-6, atol=0)
    assert torch.allclose(scale2.double(), scale.double() / 2, rtol=1e-6, atol=0)
    quantized = codes1 * scale1.double().unsqueeze(1) + codes2 * scale2.double().unsqueeze(1)
    expected = codes * scale.double().unsqueeze(1)
    assert ((quantized - expected).abs() <= 2e-6 * scale.double().unsqueeze(1)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["normal", "one-sided"])
def test_split_equals_definition(name: str, granularity: str) -> None:
    w = DISTRIBUTIONS[name](6, 150)
    got, expected = (f(w, granularity=granularity) for f in (split_ternary, reference.split_ternary))
    for half, expected_half in zip(got, expected, strict=True):
        torch.testing.assert_close(half, expected_half, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_row", [True, False])
def test_ops_satisfy_torch_library(per_row: bool) -> None:
    ops = torch.ops.lowbit_kernels
    for w in (torch.randn(4, 33), torch.randn(33, 4).half().t()):
        torch.library.opcheck(ops.ternarize.default, (w, per_row, None, 10))
        torch.library.opcheck(ops.ternarize.default, (w, per_row, torch.rand(4, 33), 3))
        torch.library.opcheck(ops.binarize.default, (w, per_row))
        torch.library.opcheck(ops.split_ternary.default, (w, per_row))


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="int32"):
        ternarize(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="2 dimensions"):
        binarize(torch.randn(3))
    with pytest.raises(ValueError, match="granularity='row', accepted: 'per_row', 'per_tensor'"):
        split_ternary(torch.randn(2, 2), granularity="row")
    with pytest.raises(ValueError, match="curvature has shape"):
        ternarize(torch.randn(2, 3), curvature=torch.ones(3))


def test_no_gradient_runs_through_codes_and_scales() -> None:
    w = torch.nn.Parameter(torch.randn(3, 40))
    for outputs in (ternarize(w), ternarize(w, curvature=w.detach().abs()), binarize(w), split_ternary(w)):
        assert not any(output.requires_grad for output in outputs)
