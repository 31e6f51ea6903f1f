"""The benchmark scripts run where there is no GPU, on small shapes: what they measure there is thrown away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_linear, gpu_model, gpu_training, report, results

SMALL = {
    "vocab_size": 20001,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
}
CEILINGS = {"copy_tb_per_s": 4.0, "bf16_tflop_per_s": 800.0, "int8_top_per_s": 1500.0}
MACHINE = {"gpu": "none"}


def once(run: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def test_linears_are_measured_and_absent_peers_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = ("torch bf16", "torch._int_mm", "lowbit", "gemlite")  # the others take minutes to import or compile
    runners = {name: build for name, build in gpu_linear.RUNNERS.items() if name.startswith(kept)}
    monkeypatch.setattr(gpu_linear, "RUNNERS", runners)
    weight, built = gpu_linear.build(48, 256, device="cpu")
    _, slow = gpu_linear.build(48, 256, slow=True, device="cpu")
    rows = gpu_linear.compared(gpu_linear.measure(weight, {**built, **slow}, 33, once, once, CEILINGS))
    assert set(rows) == set(runners) and not set(built) & set(slow)
    assert all("us" in row or row["note"].startswith("not measured: ") for row in rows.values())
    assert all("us" in rows[name] for name in rows if name.startswith(("torch bf16", "lowbit")))
    assert rows["torch bf16"]["times as fast as bf16"] == 1.0
    results.write(gpu_linear.suite(MACHINE, {"M=33 N=48 K=256": rows}), tmp_path)


def test_a_wrong_linear_stops_the_benchmark() -> None:
    weight, built = gpu_linear.build(48, 256, device="cpu")
    for name in ("torch bf16", "lowbit binary, x int8", "lowbit split pair, x int8"):
        right = built[name]
        assert not isinstance(right, str)
        wrong: dict[str, gpu_linear.Bind | str] = {name: lambda x, right=right: lambda: right(x)() * 1.1}
        with pytest.raises(RuntimeError, match=f"{name} is wrong"):
            gpu_linear.measure(weight, wrong, 5, once, once, CEILINGS)


def test_a_peer_that_no_graph_takes_keeps_its_other_time() -> None:
    def refuse(run: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    weight, built = gpu_linear.build(48, 256, device="cpu")
    row = gpu_linear.measure(weight, {"torch bf16": built["torch bf16"]}, 5, refuse, once, CEILINGS)["torch bf16"]
    assert "us" not in row and row["us, called"] > 0 and "capturing" in str(row["note"])


def test_roofline_counts_bytes_and_operations() -> None:
    # 1 token: bound by 768 * 768 * 2 bits, x and output; many tokens: bound by operations.
    assert gpu_linear.roofline_us("lowbit ternary, x int8", 1, 768, 768, CEILINGS) == pytest.approx(
        (768 * 768 / 4 + 768 + 1536) / 4e6
    )
    assert gpu_linear.roofline_us("torch bf16", 8192, 3072, 768, CEILINGS) == pytest.approx(
        2 * 8192 * 3072 * 768 / 800e6
    )


def test_models_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builders = gpu_model.models("BERT-base", device="cpu", **SMALL)
    del builders["bitsandbytes LLM.int8"]
    # fp16 arithmetic of peers on a CPU is too coarse to compare with
    monkeypatch.setattr(gpu_model, "check", lambda name, inputs, output, expected: None)
    built = gpu.built_models(builders)
    with torch.inference_mode():
        rows = gpu_model.compared(gpu_model.measure(built, gpu_model.batch(4, 24, True, "cpu"), once))
    assert "ms" in rows["lowbit ternary, fused"] and "CUDA" in rows["lowbit ternary, fused, graphs"]["note"]
    results.write(gpu_model.suite(MACHINE, {"BERT-base, batch 4, length 24, ragged": rows}), tmp_path)


def test_ragged_batches_fill_about_40_percent() -> None:
    mask = gpu_model.batch(4000, 128, True, "cpu")["attention_mask"].float()
    assert 0.36 < float(mask.mean()) < 0.46
    assert float(mask[0].sum()) == 128 and float(mask.sum(1).min()) >= 4


def test_a_different_output_is_noticed() -> None:
    inputs = gpu_model.batch(2, 8, True, "cpu")
    states = torch.randn(2, 8, 64)
    elsewhere = states + (~inputs["attention_mask"].bool()).unsqueeze(-1) * 9.0
    gpu_model.check("same where it counts", inputs, elsewhere, states)
    with pytest.raises(RuntimeError, match="other is wrong"):
        gpu_model.check("other", inputs, torch.randn(2, 8, 64), states)


def test_training_steps_are_measured(tmp_path: Path) -> None:
    measured = gpu_training.measure("cpu", once, **SMALL)
    path = results.write(gpu_training.suite(MACHINE, measured), tmp_path)
    assert results.read(path)["results"] == measured


def test_parts_share_the_time_and_a_failing_one_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    given: dict[str, float] = {}

    def part(name: str) -> Callable[[Path, gpu.Clock], None]:
        def run(folder: Path, clock: gpu.Clock) -> None:
            given[name] = clock.left()
            if name == "b":
                raise SystemExit(2)

        return run

    monkeypatch.setattr(gpu, "PARTS", {"a": (0.25, part("a")), "b": (0.25, part("b")), "c": (0.5, part("c"))})
    monkeypatch.setattr(gpu, "machine", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu", "--results", str(tmp_path), "--minutes", "4"])
    assert gpu.main() == 1
    assert given == pytest.approx({"a": 60, "b": 80, "c": 240}, abs=1)  # what one leaves goes to those after it
    assert "== b: 0 s, FAILED" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", "--results", str(tmp_path / "results")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    assert "nothing was measured" in capsys.readouterr().err and not (tmp_path / "results").exists()


REPORT = {
    "suite": "gpu-linear",
    "model": "m",
    "machine": {"gpu": "none"},
    "method": "guessed",
    "results": {
        "M=1 N=2 K=3": {"a": {"us": 1.5, "times as fast as bf16": 1.0, "of roofline": 0.5}, "b": {"note": "no"}}
    },
}


@pytest.mark.parametrize(
    "change",
    [
        {"suite": None},
        {"results": []},
        {"results": {"c": {"a": {}}}},
        {"results": {"c": {"a": {"us": None}}}},
        {"results": {"c": ["a"]}},
        {"more": 1},
    ],
)
def test_reports_of_another_shape_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report has the fields|must be|expected columns"):
        results.write({**REPORT, **change}, tmp_path)
    assert not list(tmp_path.iterdir())
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps({**REPORT, **change}))
    with pytest.raises(ValueError, match=r"damaged\.json"):
        results.read(path)


def test_committed_results_are_valid_and_the_page_is_theirs() -> None:
    reports = [results.read(path) for path in sorted(report.RESULTS.glob("*.json"))]
    plots = {r["suite"]: [report.DOCS / f"{name}.png" for name in report.PLOTS.get(r["suite"], {})] for r in reports}
    assert (report.DOCS / "benchmarks.md").read_text() == report.page(reports, plots)
    assert all(path.exists() for paths in plots.values() for path in paths)


def test_plots_and_the_page_of_gpu_results(tmp_path: Path) -> None:
    written = report.plot(REPORT, tmp_path)
    assert [path.name for path in written] == ["gpu-speed-up.png", "gpu-roofline.png"]
    assert all(path.stat().st_size > 1000 for path in written)
    page = report.page([REPORT], {"gpu-linear": written})
    assert "Not measured yet: gpu-ceilings, gpu-model, gpu-training" in page and "| b |  |  |  | no |" in page
