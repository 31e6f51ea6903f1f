"""The quantizers compute what the papers define, and their gradients are straight through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lowbit
from helpers import batch, outputs, tiny
from lowbit.nn import PackedLinear
from lowbit.quantizers import WEIGHT_QUANTIZERS, ActivationQuantizer, dequantize_weight, weight_codes


def quantize_weight(weight: torch.Tensor, name: str, granularity: str) -> torch.Tensor:
    return dequantize_weight(weight, *weight_codes(weight, name, granularity))


def twn_float64(weight: torch.Tensor) -> torch.Tensor:
    """TernaryBERT eq. 4 for one tensor, entry by entry."""
    values = weight.double().flatten().tolist()
    threshold = 0.7 * sum(abs(v) for v in values) / len(values)
    kept = [abs(v) for v in values if abs(v) > threshold]
    scale = sum(kept) / len(kept) if kept else 0.0
    quantized = [scale * ((v > 0) - (v < 0)) if abs(v) > threshold else 0.0 for v in values]
    return torch.tensor(quantized, dtype=torch.float64).view(weight.shape)


def bwn_float64(weight: torch.Tensor) -> torch.Tensor:
    values = weight.double().flatten().tolist()
    scale = sum(abs(v) for v in values) / len(values)
    return torch.tensor([scale if v >= 0 else -scale for v in values], dtype=torch.float64).view(weight.shape)


DEFINITIONS = {"twn": twn_float64, "bwn": bwn_float64}


@pytest.mark.parametrize("name", WEIGHT_QUANTIZERS)  # a new one needs a definition here
@pytest.mark.parametrize("granularity", ["per_row", "per_tensor"])
def test_weight_quantizer_equals_its_definition(name: str, granularity: str) -> None:
    weight = torch.randn(7, 33) * torch.rand(7, 1) * 3
    weight[2] = 0.0
    expected = (
        torch.stack([DEFINITIONS[name](row) for row in weight])
        if granularity == "per_row"
        else DEFINITIONS[name](weight)
    )
    torch.testing.assert_close(quantize_weight(weight, name, granularity).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_weight_gradient_is_the_incoming_gradient(name: str) -> None:
    weight = torch.randn(5, 9, requires_grad=True)
    incoming = torch.randn(5, 9)
    quantize_weight(weight, name, "per_row").backward(incoming)
    assert torch.equal(weight.grad, incoming)


def test_split_pair_is_the_sum_of_its_planes_and_both_get_the_gradient() -> None:
    weight = torch.randn(2, 5, 9, requires_grad=True)
    quantized = quantize_weight(weight, "bwn", "per_row")
    expected = sum(torch.stack([bwn_float64(row) for row in plane]) for plane in weight.detach())
    torch.testing.assert_close(quantized.double(), expected, rtol=1e-5, atol=1e-7)
    incoming = torch.randn(5, 9)
    quantized.backward(incoming)
    assert torch.equal(weight.grad, torch.stack([incoming, incoming]))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_symmetric_activation_equals_its_definition(bits: int, granularity: str) -> None:
    x = torch.randn(3, 4, 10)
    largest = x.double().abs().amax(-1, keepdim=True) if granularity == "per_token" else x.double().abs().amax()
    step = largest / (2 ** (bits - 1) - 1)
    expected = torch.round(x.double() / step) * step
    close_enough(ActivationQuantizer(bits, True, granularity)(x), expected, x, step)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_asymmetric_activation_is_within_half_a_step_on_a_grid_of_2_to_the_bits(bits: int, granularity: str) -> None:
    x = torch.rand(3, 4, 50) * 5 - 0.3
    low, high = x.double().amin(-1, keepdim=True), x.double().amax(-1, keepdim=True)
    if granularity == "per_tensor":
        low, high = low.amin(), high.amax()
    step = (high - low) / (2**bits - 1)
    quantized = ActivationQuantizer(bits, False, granularity)(x)
    # The zero point is an integer, so the ends of the range may be off by one more half step.
    assert ((quantized.double() - x.double()).abs() <= step * (1 + 1e-4)).all()
    inside = (x > low + step) & (x < high - step)
    assert ((quantized.double() - x.double()).abs() <= step * (0.5 + 1e-3))[inside].all()
    assert len(quantized[0, 0].unique()) <= 2**bits


def close_enough(actual: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, step: torch.Tensor) -> None:
    """Equal up to float32 rounding, except where x/step is a tie to within float32 and may round either way."""
    distance_to_tie = ((x.double() / step) % 1 - 0.5).abs()
    clear = distance_to_tie > 1e-4
    assert clear.float().mean() > 0.9
    assert ((actual.double() - expected).abs() <= 1e-5 * step.clamp(min=1e-12) * 127)[clear].all()


def test_activation_gradient_is_one_inside_the_clip_and_zero_where_it_is_reached() -> None:
    x = torch.tensor([[-3.0, -2.5, -1.0, 0.0, 2.4, 2.5, 9.0]], requires_grad=True)
    incoming = torch.arange(1.0, 8.0).view(1, 7)
    quantized = ActivationQuantizer(8, True, clip=2.5)(x)
    quantized.backward(incoming)
    assert quantized.abs().max().item() == pytest.approx(2.5, rel=1e-6)
    assert x.grad.tolist() == [[0.0, 0.0, 3.0, 4.0, 5.0, 0.0, 0.0]]


def test_a_token_does_not_depend_on_its_batch() -> None:
    quantizer = ActivationQuantizer(8, False)
    x = torch.randn(4, 16)
    assert torch.equal(quantizer(x)[1], quantizer(torch.cat([x, 100 * torch.randn(3, 16)]))[1])


def test_nan_stays_visible() -> None:
    x = torch.randn(2, 8)
    x[0, 3] = float("nan")
    quantized = ActivationQuantizer(8, True)(x)
    assert quantized[0].isnan().all()
    assert not quantized[1].isnan().any()


def absmean(weight: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """BitNet b1.58: a quantizer that a user adds."""
    scale = weight.float().abs().mean(-1 if granularity == "per_row" else (0, 1)).view(-1)
    return (weight / scale.clamp(min=1e-8).unsqueeze(-1)).round().clamp(-1, 1).to(torch.int8), scale


def test_a_packed_checkpoint_loads_without_its_quantizer_and_a_prepared_one_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WEIGHT_QUANTIZERS, "absmean", (2, absmean))
    model, inputs = tiny(), batch()
    dense = model.bert.encoder.layer[1].output.dense.weight.detach().double()
    lowbit.prepare(model, lowbit.TernaryConfig(weight_quantizer="absmean")).save_pretrained(tmp_path / "prepared")
    lowbit.convert(model).save_pretrained(tmp_path / "packed")
    scale = dense.abs().mean(1, keepdim=True)
    expected = (dense / scale).round().clamp(-1, 1) * scale
    torch.testing.assert_close(model.bert.encoder.layer[1].output.dense.dequantize().double(), expected)

    monkeypatch.delitem(WEIGHT_QUANTIZERS, "absmean")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(outputs(loaded, inputs)[0], outputs(model, inputs)[0])
    with pytest.raises(ValueError, match=r"'absmean' with weight_bits=2; .*'twn'; a quantizer of your own goes into"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "prepared")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (lambda w, g: (absmean(w, g)[0].float(), absmean(w, g)[1]), r"codes torch.float32 \[3, 5\]"),
        (lambda w, g: (absmean(w, g)[0] * 2, absmean(w, g)[1]), r"with \[-2, 2\]"),
        (lambda w, g: absmean(w, "per_row"), r"'per_tensor': codes torch.int8 \[3, 5\], scale torch.float32 \[3\]"),
        (lambda w, g: (absmean(w, g)[0], absmean(w, g)[1].view(-1, 1)), r"scale torch.float32 \[3, 1\]"),
    ],
)
def test_a_quantizer_that_returns_something_else_is_refused(
    wrong: Callable, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WEIGHT_QUANTIZERS, "mine", (2, wrong))
    with pytest.raises(ValueError, match=f"weight_quantizer='mine' returns .*{found}.*; needed: codes torch.int8"):
        lowbit.prepare(tiny(), lowbit.TernaryConfig(weight_quantizer="mine"))
    with pytest.raises(ValueError, match="'mine' with weight_bits=1"):
        PackedLinear.from_float(torch.nn.Linear(8, 4), lowbit.BinaryConfig(weight_quantizer="mine"))
