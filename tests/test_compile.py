"""torch.compile: the compiled CPU path computes what the eager one does."""

from __future__ import annotations

import copy
import re
import shutil

import pytest
import torch

import lowbit
import lowbit_kernels
from helpers import batch, outputs, outputs_by_module, tiny
from lowbit.cli import doctor

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@needs_compiler
@pytest.mark.parametrize("symmetric", [True, False])
def test_traced_quantization_gives_the_same_codes(symmetric: bool) -> None:
    def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fake = lowbit_kernels.fake_quantize_per_token(x, 8, symmetric)
        return *(t for t in lowbit_kernels.quantize_per_token(x, 8, symmetric) if t is not None), fake

    x = torch.randn(40, 96) * torch.logspace(-30, 30, 40).unsqueeze(1)
    x[0], x[1], x[2] = 0.0, 3.5, -1e-42
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    with torch.no_grad():
        results = torch.compile(run, fullgraph=True)(x)
        for got, expected in zip(results, run(x), strict=True):
            finite = torch.ones(40, dtype=torch.bool)
            finite[3:5] = False  # codes of rows with NaN or infinity are arbitrary, their scale is NaN
            torch.testing.assert_close(got[finite], expected[finite], rtol=2e-7, atol=0)
            if got.is_floating_point():
                assert got[3:5].isnan().flatten(1).any(1).all() if got.dim() > 1 else got[3:5].isnan().all()


@needs_compiler
def test_traced_quantization_of_views() -> None:
    def run(x: torch.Tensor) -> list[torch.Tensor]:
        y = 2 * x  # an intermediate: Inductor chooses its layout
        views = [y[:, 0], y[1:], y[:, 2:, 3:], y.transpose(0, 1), y.transpose(1, 2), y.flip(0)[::2]]
        codes = [lowbit_kernels.quantize_per_token(view)[0] for view in views]
        return codes + [lowbit_kernels.fake_quantize_per_token(view, 8, False) for view in views]

    x = torch.randn(4, 6, 48)
    with torch.no_grad():
        for got, expected in zip(torch.compile(run, fullgraph=True)(x), run(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-7, atol=0)


@needs_compiler
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_whole_model_compiles_as_one_graph(head: str) -> None:
    model = lowbit.quantize(tiny(head), lowbit.TernaryConfig())
    inputs = batch(head)
    (got,), (expected,) = outputs(torch.compile(model, fullgraph=True), inputs), outputs_by_module(model, inputs)
    assert (got - expected).norm() < 0.02 * expected.norm()


@needs_compiler
@pytest.mark.parametrize("split", [False, True])
def test_a_compiled_model_equals_the_eager_one(split: bool) -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    model = lowbit.convert(lowbit.split(model) if split else model)
    compiled = lowbit.compile(copy.deepcopy(model), dynamic=True)
    for rows, length in ((3, 11), (2, 24)):
        inputs = batch(rows=rows, length=length)
        (got,), (expected,) = outputs(compiled, inputs), outputs(model, inputs)
        # Sums round differently, and a code may flip where an activation lies on a tie.
        assert (got - expected).norm() < 0.02 * expected.norm()


@needs_compiler
def test_layers_compile_without_graph_breaks_and_share_one_compilation() -> None:
    clipped = lowbit.TernaryConfig(activation_clip=2.5)  # which is not fused
    model = lowbit.compile(lowbit.quantize(tiny(num_hidden_layers=4), clipped), fullgraph=True)
    torch._dynamo.utils.counters.clear()
    outputs(model, batch())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_compiler
def test_a_compiled_model_saves_and_gives_hidden_states(tmp_path: object) -> None:
    model = lowbit.compile(lowbit.quantize(tiny(), lowbit.TernaryConfig()))
    inputs = batch()
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 3
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(reloaded, inputs), outputs(copy_of(model), inputs)))


def copy_of(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, not compiled."""
    copied = copy.deepcopy(model)
    for layer in copied.bert.encoder.layer:
        layer._compiled_call_impl = None
    return copied


def test_a_missing_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor looks for $CXX or g++ and no other: clang++ alone would end in its own error, after tracing."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        lowbit.compile(lowbit.quantize(tiny(), lowbit.TernaryConfig()))


@pytest.mark.parametrize("given", ["env g++", "g++ -O1", "'g++'"])
def test_a_compiler_that_inductor_cannot_start_is_a_clear_error(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes $CXX for one program; lowbit's own kernels split it as a shell."""
    monkeypatch.setenv("CXX", given)
    with pytest.raises(RuntimeError, match="takes the name or path of one program from CXX.*" + re.escape(repr(given))):
        lowbit.compile(lowbit.quantize(tiny(), lowbit.TernaryConfig()))
    (check,) = doctor._compiler()
    assert check.status == "note" and "lowbit.compile needs a CXX that names one program" in check.hint
