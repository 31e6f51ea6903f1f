"""torch.jit.trace and both ONNX exporters end in one clear error with a packed model, torch.compile and export do not.

The exporter that is built on torch.export needs a package that is not installed here: what it does before it converts
anything is done by its own parts, its flag and its ways to capture a model.
"""

from __future__ import annotations

import copy
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.onnx._internal.exporter import _capture_strategies, _flags
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import lowbit
from helpers import HEADS, batch, tiny
from lowbit.nn import PackedEmbedding, PackedLinear
from lowbit.nn._packed import refuse_tracing

MESSAGE = r"take no packed model.*lowbit\.export\(model.*AOTInductor.*model\.dequantize\(\)"
CONFIGS = {
    "ternary": lowbit.TernaryConfig(),
    "binary": lowbit.BinaryConfig(),
    "float activations": lowbit.TernaryConfig(activation_bits=None),
    "float embeddings": lowbit.TernaryConfig(embedding_bits=None),
    "8-bit tables": lowbit.TernaryConfig(embedding_bits=8, position_embedding_bits=8),
}


def traced(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path) -> None:
    torch.jit.trace(module, inputs, strict=False)


def exported_by_tracing(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path) -> None:
    torch.onnx.export(module, inputs, str(folder / "model.onnx"), dynamo=False)


def captured(strategy: type) -> Callable[..., None]:
    """What the exporter on torch.export does with a module, by one of its ways; it raises the first one's error."""

    @_flags.set_onnx_exporting_flag
    def capture(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path) -> None:
        result = strategy()(module, inputs, {}, dynamic_shapes=None)
        if not result.success:
            raise result.exception

    return capture


TRACERS = {
    "torch.jit.trace": traced,
    "torch.onnx.export, TorchScript": exported_by_tracing,
    **{f"torch.onnx.export, {kind.__name__}": captured(kind) for kind in _capture_strategies.CAPTURE_STRATEGIES},
}
pytestmark = pytest.mark.filterwarnings("ignore")  # what tracers say of transformers' code


class ByName(torch.nn.Module):
    """The old exporter passes every argument by position, which not every forward of transformers takes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, return_dict=False)[0]


def inputs_of(head: str) -> tuple[torch.Tensor, ...]:
    given = batch(head)
    return given["input_ids"], given["attention_mask"]


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_refused(head: str, tracer: str, tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(head), lowbit.TernaryConfig())
    with pytest.raises(Exception, match=MESSAGE):
        TRACERS[tracer](ByName(model), inputs_of(head), tmp_path)
    assert not (tmp_path / "model.onnx").exists()
    model(*inputs_of(head))  # and runs on


@pytest.mark.parametrize("form", ["packed", "fused", "split", "shorter", "distilbert"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_every_form_is_refused(form: str, tracer: str, tmp_path: Path) -> None:
    if form == "distilbert":
        sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 150, "max_position_embeddings": 40}
        config = DistilBertConfig(vocab_size=101, **sizes)
        model = lowbit.quantize(DistilBertForSequenceClassification(config).eval(), lowbit.TernaryConfig())
    else:
        model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
        model = lowbit.convert(lowbit.split(model) if form == "split" else model, fused=form == "fused").eval()
    if form == "shorter":
        lowbit.set_length(model, lowbit.LengthConfig((0.8, 0.5)))
    with pytest.raises(Exception, match=MESSAGE):
        TRACERS[tracer](ByName(model), inputs_of("BertForSequenceClassification"), tmp_path)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_is_refused_with_a_runtime_error(config: str, tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), CONFIGS[config])
    for tracer in (traced, exported_by_tracing):
        with pytest.raises(RuntimeError, match=MESSAGE):
            tracer(ByName(model), inputs_of("BertForSequenceClassification"), tmp_path)


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_modules_by_themselves_are_refused(kind: str, tracer: str, tmp_path: Path) -> None:
    module: Any = PackedLinear.from_float(torch.nn.Linear(64, 5))
    inputs = torch.randn(2, 64)
    if kind == "embedding":
        module, inputs = PackedEmbedding.from_float(torch.nn.Embedding(10, 64)), torch.tensor([[1, 2]])
    with pytest.raises(Exception, match=MESSAGE):
        TRACERS[tracer](module, (inputs,), tmp_path)


def test_the_advice_can_be_followed(tmp_path: Path) -> None:
    inputs = inputs_of("BertForSequenceClassification")
    packed = lowbit.quantize(tiny(), lowbit.TernaryConfig(activation_bits=None))
    with torch.no_grad():
        expected = packed(*inputs).logits
        model = ByName(copy.deepcopy(packed).dequantize().eval())
        assert torch.allclose(torch.jit.trace(model, inputs)(*inputs), expected, atol=1e-4)
    for strategy in _capture_strategies.CAPTURE_STRATEGIES:
        captured(strategy)(model, inputs, tmp_path)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_torch_export_is_not_refused(fused: bool, strict: bool) -> None:
    model = ByName(lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=fused))
    inputs = inputs_of("BertForSequenceClassification")
    with torch.no_grad():
        program = torch.export.export(model, inputs, strict=strict).module()
        assert torch.allclose(program(*inputs), model(*inputs), atol=2e-2)


def test_dynamo_sees_no_break() -> None:
    model = ByName(lowbit.quantize(tiny(), lowbit.TernaryConfig()))
    inputs = inputs_of("BertForSequenceClassification")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(*inputs)
        assert torch.allclose(compiled, model(*inputs), atol=2e-2)


def test_the_check_costs_next_to_nothing() -> None:
    """Beside a call of an empty function, for which a busy machine takes longer too."""

    def nothing() -> None:
        pass

    rounds = [[timeit.timeit(f, number=10_000) for f in (refuse_tracing, nothing)] for _ in range(9)]
    check, empty = (min(times) for times in zip(*rounds, strict=True))
    assert check < 30 * empty
