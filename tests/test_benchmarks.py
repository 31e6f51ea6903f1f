"""The benchmark scripts run where there is no GPU, on small shapes: what they measure there is thrown away."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cpu, gpu, gpu_attention, gpu_linear, gpu_model, gpu_training, lengths, report, results, sentences

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


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_is_measured_and_absent_peers_say_why(ragged: bool, tmp_path: Path) -> None:
    case = gpu_attention.Case("BERT-base", 32, 9, ragged, torch.bfloat16)
    rows = gpu_attention.measure(gpu_attention.Batch(case, "cpu"), gpu_attention.RUNNERS, once, once)
    assert list(rows) == list(gpu_attention.RUNNERS)
    here = [name for name in rows if name.startswith(("HF", "lowbit", "SDPA, padded"))]
    assert len(here) == 10 and all({"us", "us with gradients"} == set(rows[name]) for name in here)
    assert all("us" in row or str(row["note"]).startswith("not measured: ") for row in rows.values())
    results.write(gpu_attention.suite(MACHINE, {str(case): gpu_attention.compared(rows)}), tmp_path)


def test_flex_attention_masks_other_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(gpu_attention, "_compiled_flex", lambda: flex_attention)  # compiling takes long
    batch = gpu_attention.Batch(gpu_attention.Case("BERT-base", 5, 40, True, torch.float32), "cpu")
    (row,) = gpu_attention.measure(batch, gpu_attention.SLOW_RUNNERS, once, once).values()
    assert set(row) == {"us"}


def test_attention_that_no_graph_takes_keeps_its_other_time() -> None:
    def refuse(run: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    batch = gpu_attention.Batch(gpu_attention.Case("BERT-base", 32, 5, False, torch.float32), "cpu")
    (row,) = gpu_attention.measure(batch, {"lowbit": gpu_attention.RUNNERS["lowbit"]}, refuse, once).values()
    assert set(row) == {"us, called", "us with gradients, called", "note"} and "capturing" in str(row["note"])


def test_attention_is_compared_with_the_fastest_packed_flash() -> None:
    rows: dict[str, results.Row] = {
        "SDPA, padded": {"us": 40.0, "us with gradients": 90.0},
        "torch varlen_attn": {"us": 20.0, "us with gradients": 60.0},
        "SDPA flash, jagged": {"us, called": 1.0, "note": "no graph"},
        "flash-attn varlen": {"us": 10.0},
        "lowbit": {"us": 15.0, "us with gradients": 45.0},
    }
    assert gpu_attention.compared(rows)["lowbit"] == {
        "us": 15.0,
        "us with gradients": 45.0,
        "us over packed flash": 1.5,
        "us over padded SDPA": 0.38,
        "us with gradients over packed flash": 0.75,
        "us with gradients over padded SDPA": 0.5,
    }
    del rows["torch varlen_attn"], rows["flash-attn varlen"], rows["lowbit"]["us over packed flash"]
    assert "us over packed flash" not in gpu_attention.compared(rows)["lowbit"]


@pytest.mark.parametrize("name", ["SDPA, padded", "lowbit 8 bits, importance", "lowbit, importance of cls"])
def test_wrong_attention_stops_the_benchmark(name: str) -> None:
    batch = gpu_attention.Batch(gpu_attention.Case("BERT-base", 32, 11, True, torch.float32), "cpu")
    right = gpu_attention.RUNNERS[name]

    def wrong(part: str) -> gpu_attention.Runner:
        def bind(batch: gpu_attention.Batch) -> gpu_attention.Attend:
            def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
                output, importance = right.bind(batch)(*tensors)
                if part == "importance" and importance is not None:
                    importance = torch.full_like(importance, float(importance.mean()))  # sums to the same
                # Right but for the gradient.
                other = output * 1.2 - 0.2 * output.detach() if part == "gradients" else output
                return other * 1.2 if part == "output" else other, importance

            return run

        return gpu_attention.Runner(bind, right.padded)

    gpu_attention.measure(batch, {name: wrong("nothing")}, once, once)
    parts = {"output": "output", "gradients": "query", "importance": "cls" if name.endswith("cls") else "all"}
    for part, told in parts.items():
        if part == "importance" and "importance" not in name:
            continue
        with pytest.raises(RuntimeError, match=f"{name} is wrong in BERT-base, batch 32.*: {told} has"):
            gpu_attention.measure(batch, {name: wrong(part)}, once, once)


def test_the_attention_part_measures_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all(len(gpu_attention.cases(slow)) == len(set(gpu_attention.cases(slow))) for slow in (False, True))
    assert set(gpu_attention.cases(True)) < set(gpu_attention.cases(False))  # so that ratios have all their peers
    small = gpu_attention.Case("BERT-base", 2, 7, True, torch.float32)
    monkeypatch.setattr(gpu_attention, "cases", lambda slow: [small, small._replace(ragged=False)][: 1 if slow else 2])
    monkeypatch.setattr(gpu_attention, "Batch", functools.partial(gpu_attention.Batch, device="cpu"))
    monkeypatch.setattr(gpu_attention, "SLOW_RUNNERS", {"slow": gpu_attention.RUNNERS["lowbit"]})
    monkeypatch.setattr(gpu_attention, "RUNNERS", {"SDPA, padded": gpu_attention.RUNNERS["SDPA, padded"]})
    monkeypatch.setattr(gpu, "machine", dict)
    monkeypatch.setattr(gpu, "replay_ms", once)
    gpu.attention(tmp_path, gpu.Clock(5))
    measured = results.read(tmp_path / "gpu-attention.json")["results"]
    assert list(measured) == [
        "BERT-base, batch 2, length 7, ragged, float32",
        "BERT-base, batch 2, length 7, float32",
    ]
    slow, other = measured.values()
    assert slow["slow"]["us over padded SDPA"] > 0 and list(other) == ["SDPA, padded"]


def test_models_that_drop_tokens_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    similar: dict[str, float] = {}

    def cosine(name: str, inputs: gpu_model.Batch, output: torch.Tensor, expected: torch.Tensor) -> None:
        tokens = inputs["attention_mask"].bool()
        similar[name] = float(torch.nn.functional.cosine_similarity(output[tokens], expected[tokens], dim=-1).mean())

    monkeypatch.setattr(gpu_model, "check", cosine)
    built = gpu.built_models(gpu_model.dropping("BERT-base", "cpu", **SMALL))
    with torch.inference_mode():
        rows = gpu_model.compared(gpu_model.measure(built, gpu_model.batch(4, 24, True, "cpu"), once))
    row = rows["lowbit ternary, fused, dropping tokens"]
    assert float(row["times as fast as with all tokens"]) > 0 and 0.7 < float(row["part of the MACs"]) < 0.9
    assert all("CUDA" in str(rows[name]["note"]) for name in rows if "graphs" in name)
    assert list(similar) == ["lowbit ternary, fused", "lowbit ternary, fused, dropping tokens"]
    assert min(similar.values()) > 0.9


def test_the_model_part_begins_with_dropped_tokens_and_measures_nothing_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def builders(names: list[str]) -> dict[str, Callable[[], gpu_model.Built]]:
        def build(name: str) -> gpu_model.Built:
            def run(inputs: gpu_model.Batch) -> torch.Tensor:
                calls.append(name)
                return torch.zeros(1)

            return gpu_model.Built(run)

        return {name: functools.partial(build, name) for name in names}

    usual = {False: ["HF SDPA", "lowbit"], True: ["compiled"]}
    monkeypatch.setattr(gpu_model, "dropping", lambda size: builders(["lowbit", "lowbit, dropping tokens"]))
    monkeypatch.setattr(gpu_model, "models", lambda size, slow: builders(usual[slow]))
    monkeypatch.setattr(gpu_model, "batch", functools.partial(gpu_model.batch, device="cpu"))
    monkeypatch.setattr(gpu_model, "SHAPES", [(32, 384), (1, 16)])
    monkeypatch.setattr(gpu, "median_ms", lambda run: 1.0)
    monkeypatch.setattr(gpu, "machine", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.model(tmp_path, gpu.Clock(5))
    measured = results.read(tmp_path / "gpu-model.json")["results"]
    first = "BERT-base, batch 32, length 384"
    assert list(measured)[:2] == [first, f"{first}, ragged"] and len(measured) == 6
    assert set(measured[first]) == {"HF SDPA", "lowbit", "lowbit, dropping tokens", "compiled"}
    assert measured[first]["lowbit, dropping tokens"]["times as fast as with all tokens"] == 1.0
    assert calls.count("lowbit") == 6 and calls.count("lowbit, dropping tokens") == 2


def test_the_cpu_script_writes_both_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def model(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ids.unsqueeze(-1).float()

    runners = {"float32 eager": model, cpu.HALF: model, "onnxruntime dynamic int8": None}
    monkeypatch.setattr(cpu, "models", lambda names: runners)
    small = [case._replace(count=2, length=9) for case in cpu.ATTENTION_CASES]
    monkeypatch.setattr(cpu, "ATTENTION_CASES", small)
    monkeypatch.setattr("sys.argv", ["cpu", "--results", str(tmp_path), "--turns", "2"])
    cpu.main()
    encoder, attention = (results.read(tmp_path / f"cpu-{name}.json")["results"] for name in ("encoder", "attention"))
    for rows in encoder.values():
        assert list(rows) == list(runners) and "not measured" in rows["onnxruntime dynamic int8"]["note"]
        assert rows[cpu.HALF]["part of the MACs"] == pytest.approx(0.5, abs=0.02)
    assert list(attention) == [str(case) for case in small]
    for rows in attention.values():
        assert rows["SDPA, padded"]["over SDPA, padded"] == 1.0
        assert {"HF eager, importance", "lowbit", "lowbit, importance", "lowbit 8 bits, importance"} <= set(rows)
    assert "| lowbit, importance |" in capsys.readouterr().out


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
    reports = report.committed()
    plots = {r["suite"]: [report.DOCS / f"{name}.png" for name in report.PLOTS.get(r["suite"], {})] for r in reports}
    assert (report.DOCS / "benchmarks.md").read_text() == report.page(reports, plots)
    assert all(path.exists() for paths in plots.values() for path in paths)


def test_plots_and_the_page_of_gpu_results(tmp_path: Path) -> None:
    written = report.plot(REPORT, tmp_path)
    assert [path.name for path in written] == ["gpu-speed-up.png", "gpu-roofline.png"]
    assert all(path.stat().st_size > 1000 for path in written)
    page = report.page([REPORT], {"gpu-linear": written})
    assert (
        "Not measured yet: gpu-attention, gpu-ceilings, gpu-model, gpu-training" in page
        and "| b |  |  |  | no |" in page
    )


def test_runs_of_the_length_examples_become_a_suite(tmp_path: Path) -> None:
    options = {"task": "sst2", "model": "/somewhere/minilm", "ternary": True, "length_steps": 3, "max_train_samples": 0}
    (tmp_path / "options.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="no finished run"):
        lengths.report([tmp_path])
    rows = {
        "all tokens": {"accuracy": 90.0, "times_as_fast": 1.0},
        "2x fewer": {"accuracy": 89.0, "times_as_fast": 1.7},
        "learned": {"accuracy": 88.0, "times_as_fast": 1.5},
        "before": {"accuracy": 90.5},
    }
    measured = {name: {**row, "length_config": {"keep": [1.0]}} for name, row in rows.items()}
    (tmp_path / "results.json").write_text(json.dumps({"teacher": {"accuracy": 91.0}, **measured}))
    written = results.read(results.write(lengths.report([tmp_path]), tmp_path))
    assert written["results"] == {"sst2, minilm, ternary 2-2-8, 3 steps of LengthDrop, all examples": rows}
    assert report.plot(written, tmp_path)[0].stat().st_size > 1000
    (tmp_path / "options.json").write_text(json.dumps(options | {"other_paragraphs": 0.75}))
    (title,) = lengths.report([tmp_path])["results"]
    assert title.endswith(", 75% of the questions put to other paragraphs")


def test_sentence_embeddings_are_means_over_tokens_of_length_1() -> None:
    states, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    got = sentences.pooled(states, mask)
    for row, tokens in enumerate((2, 3)):
        mean = sum(states[row, token] for token in range(tokens)) / tokens
        assert torch.allclose(got[row], mean / mean.square().sum().sqrt(), atol=1e-6)
    output = SimpleNamespace(last_hidden_state=states)
    opposite = SimpleNamespace(last_hidden_state=-states)
    loss = sentences.EmbeddingLoss(weight=3.0)
    assert abs(loss(output, output, {"attention_mask": mask})) < 1e-6
    assert abs(loss(output, opposite, {"attention_mask": mask}) - 6.0) < 1e-5  # 1 - cos of opposite vectors is 2
