"""The scripts that compare lowbit with other libraries, run transformers' own tests and time the start."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from benchmarks import features, results, startup, transformers_suite
from helpers import batch, outputs, tiny
from lowbit_kernels import archive

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    monkeypatch.setattr(features, "SHAPE", shape)


LOWBIT_CELLS = {
    "one call on a model in memory": "yes",
    "`from_pretrained(quantization_config=...)`": "yes",
    "classifier left in float": "yes",
    "quantized in memory: saved and loaded again": "yes, equal bits",
    "`copy.deepcopy`": "yes, equal bits",
    "`.half()`": "yes",
    "weights can be trained quantized": "yes",
    "asked for bits that there are not": "refused: ValueError",
    "NaN in a weight": f"refused: ValueError: {features.QUERY}.weight holds NaN",
}


@pytest.mark.parametrize("feature", LOWBIT_CELLS)
def test_cells_of_lowbit(feature: str, small: None) -> None:
    assert features.PROBES[feature](features.LIBRARIES["lowbit"]).startswith(LOWBIT_CELLS[feature])


def test_probes_tell_a_float_model_from_a_quantized_one(small: None) -> None:
    """A library that leaves the model as it is gets no good cell for it."""
    idle = features.Library(
        "torch", "torch", "", lambda model: model, None, lambda model, bits: model, lambda model: model, lambda model: 1
    )
    with pytest.raises(AssertionError, match="still float"):
        features.in_place(idle)
    assert features.embeddings(idle) == "no, float"
    assert features.PROBES["NaN in a weight"](idle) == "accepted"
    with pytest.raises(features.Missing):
        features.at_load(idle)


def test_same_refuses_another_result() -> None:
    x = torch.tensor([[1.0, 2.0]])
    assert features.same(x, x.clone()) == "yes, equal bits"
    assert features.same(x + 1e-3, x) == "yes, to 5e-04"
    with pytest.raises(AssertionError, match="another one"):
        features.same(x + 1, x)


def test_a_probe_that_raises_dies_or_hangs_is_a_cell() -> None:
    library = features.LIBRARIES["lowbit"]

    def raises(library: Any) -> str:
        raise KeyError("x")

    def dies(library: Any) -> str:
        os._exit(7)

    def hangs(library: Any) -> str:
        import time

        time.sleep(60)
        return "yes"

    assert features.run(raises, library) == "no: KeyError: 'x'"
    assert features.run(dies, library) == "no: the process died (7)"
    assert features.run(hangs, library, limit=0.5).startswith("not finished")


def test_a_library_that_is_not_there_or_needs_a_gpu() -> None:
    def library(module: str, distribution: str) -> features.Library:
        return features.Library(module, distribution, "", None, None, *(lambda *_: None,) * 3)

    assert set(features.column(library("nowhere", "nowhere"), ["x"]).values()) == {"not installed"}
    broken = features.column(library("nowhere", "torch"), ["x"])
    assert broken["x"] == "does not import" and broken["import without a GPU"].startswith("no: ModuleNotFoundError")
    assert features.cell(AssertionError("Torch not compiled with CUDA enabled")).startswith("needs CUDA, not measured")


def test_startup_measures_time_and_memory(tmp_path: Path) -> None:
    times = startup.timed(lambda: sum(range(300_000)))
    assert times["cpu s"] > 0 and times["s"] > 0
    if startup.MEMORY.exists():
        model = torch.nn.Linear(1, 1)

        def grows() -> torch.nn.Module:
            torch.ones(20_000_000)  # 80 MB, freed at once
            model.weight = torch.nn.Parameter(torch.ones(2_500_000, 1))
            return model

        memory = startup.peaks(grows)
        assert memory["model MB"] == pytest.approx(10, rel=0.01) and 70 < memory["peak MB"] < 110


def test_a_saved_base_model_is_loaded(tmp_path: Path) -> None:
    """transformers' own tests found this: `model.bert.save_pretrained` used to write what could not be read."""
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.base_model.save_pretrained(tmp_path)
    again = type(model.base_model).from_pretrained(tmp_path)
    inputs = batch()
    for one, other in zip(outputs(again, inputs), outputs(model.base_model, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("at_a_time", [1, 700, 10**6])
def test_files_are_expanded_in_parts(at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(archive, "_AT_A_TIME", at_a_time)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_wrong_code_is_found_in_any_row() -> None:
    table = lowbit.nn.PackedEmbedding(10_000, 8, 2)
    table.weight.zero_()
    table.weight_scale.fill_(1.0)
    assert table.problems() is None
    table.weight[9_999, 31] = 3
    assert table.problems() == "ternary codes must be 0, 1 or 2, found 3"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.classifier.bias[1] = value
    with pytest.raises(ValueError, match=r"classifier\.bias holds NaN or infinity"):
        lowbit.prepare(model, lowbit.TernaryConfig())


def test_stages_of_the_suite() -> None:
    config = transformers_suite.ModelTester(None).get_config()  # type: ignore[arg-type]
    for stage, kind in (
        ("float", torch.nn.Linear),
        ("prepared", lowbit.nn.QuantLinear),
        ("packed", lowbit.nn.PackedLinear),
    ):
        model = transformers_suite.staged("BertForSequenceClassification", stage)(config)
        assert type(model.bert.pooler.dense) is kind
        with torch.device("meta"):
            model = transformers_suite.staged("BertModel", stage)(config)
        assert type(model.pooler.dense) is torch.nn.Linear


def test_outcomes_are_grouped_by_reason() -> None:
    outcomes = {
        "float": {"test_a": "passes", "test_b": "skipped: <class 'x.BertModel'> has no RoPE", "test_c": "passes"},
        "prepared": {"test_a": "passes", "test_b": "skipped: the model has no RoPE", "test_c": "passes"},
        "packed": {"test_a": "passes", "test_b": "skipped: the model has no RoPE", "test_c": "KeyError: x"},
    }
    grouped = transformers_suite.grouped(outcomes)
    assert set(grouped) == {"passes", "skipped: the model has no RoPE", transformers_suite.UNEXPLAINED}
    report = {"suite": "x", "model": "m", "machine": {}, "method": "", "results": grouped}
    page = transformers_suite.render(results.validate(report))
    assert "| packed | 1 | 1 | 1 |" in page and "KeyError: x" in page


def test_the_suite_refuses_other_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--source"):
        transformers_suite.generic_tests(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_modeling_common.py").touch()
    (tmp_path / "PKG-INFO").write_text("Version: 1.0\n")
    with pytest.raises(ValueError, match=r"holds transformers 1\.0"):
        transformers_suite.generic_tests(tmp_path)


@pytest.mark.skipif("TRANSFORMERS_SOURCE" not in os.environ, reason="TRANSFORMERS_SOURCE: unpacked source archive")
def test_two_of_transformers_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.transformers_suite", "--source", os.environ["TRANSFORMERS_SOURCE"]]
    wanted = ["--only", "test_save_load", "test_resize_tokens_embeddings"]
    path = tmp_path / "outcomes.json"
    subprocess.run([*command, *wanted, "--stage", "packed", "--out", str(path)], check=True)
    lines = json.loads(path.read_text())
    assert lines["test_save_load"] == "passes" and not lines["test_resize_tokens_embeddings"].startswith("passes")


@pytest.mark.parametrize(
    ("suite", "page", "render"),
    [
        ("transformers-suite", "docs/transformers-suite.md", transformers_suite.render),
        ("features", "docs/features.md", features.render),
    ],
)
def test_pages_are_rendered_from_what_was_measured(suite: str, page: str, render: Any) -> None:
    report = results.read(RESULTS / f"{suite}.json")
    assert (RESULTS.parents[1] / page).read_text() == render(report)


def test_every_difference_to_transformers_tests_is_explained() -> None:
    report = results.read(RESULTS / "transformers-suite.json")
    assert transformers_suite.UNEXPLAINED not in report["results"]
    assert not math.isclose(len(report["results"][transformers_suite.PASSED]), 0)
