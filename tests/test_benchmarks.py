"""The benchmark scripts run where there is no GPU, on small shapes: what they measure there is thrown away."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    cpu,
    gpu,
    gpu_attention,
    gpu_linear,
    gpu_model,
    gpu_parts,
    gpu_smoke,
    gpu_timing,
    gpu_training,
    lengths,
    report,
    results,
    sentences,
)
from benchmarks.rehearsal import failures

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
    rows = gpu_linear.compared(dict(gpu_linear.measure(weight, {**built, **slow}, 33, once, once, CEILINGS)))
    assert set(rows) == set(runners) and not set(built) & set(slow)
    assert all("us" in row or row["note"].startswith("not measured: ") for row in rows.values())
    assert all("us" in rows[name] for name in rows if name.startswith(("torch bf16", "lowbit")))
    assert rows["torch bf16"]["times as fast as bf16"] == 1.0
    results.write({**gpu_linear.head(MACHINE), "results": {"M=33 N=48 K=256": rows}}, tmp_path)


def test_a_wrong_linear_is_marked_and_not_timed() -> None:
    weight, built = gpu_linear.build(48, 256, device="cpu")
    names = ("torch bf16", "lowbit binary, x int8", "lowbit split pair, x int8")
    wrong: dict[str, gpu_linear.Bind | str] = {}
    for name in names:
        right = built[name]
        assert not isinstance(right, str)
        wrong[name] = lambda x, right=right: lambda: right(x)() * 1.1
    rows = dict(gpu_linear.measure(weight, {**wrong, "right": built["torch bf16"]}, 5, once, once, CEILINGS))
    assert all(str(rows[name]["note"]).startswith("WRONG: relative error 0.") for name in names)
    assert all(set(rows[name]) == {"note"} for name in names) and "us" in rows["right"]


def test_a_peer_that_does_not_run_is_not_measured_and_our_own_is_wrong() -> None:
    def fails(x: torch.Tensor) -> gpu_linear.Run:
        raise RuntimeError("out of resource: shared memory")

    weight = gpu_linear.Weight(48, 256, "cpu")
    rows = dict(gpu_linear.measure(weight, {"peer": fails, "lowbit": fails}, 5, once, once, CEILINGS))
    assert rows["peer"]["note"] == "not measured: RuntimeError: out of resource: shared memory"
    assert rows["lowbit"]["note"] == "WRONG: does not run: RuntimeError: out of resource: shared memory"
    assert results.count({"results": {"a": rows, "b": {"c": {"us": 1.0}}}}) == (3, 1)


def test_a_device_that_an_error_left_unusable_ends_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def peer(x: torch.Tensor) -> gpu_linear.Run:
        raise ImportError("no such peer")

    weight = gpu_linear.Weight(48, 256, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert len(list(gpu_linear.measure(weight, {"peer": peer}, 5, once, once, CEILINGS))) == 1
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(gpu_linear.measure(weight, {"peer": peer}, 5, once, once, CEILINGS))


def test_a_peer_that_no_graph_takes_keeps_its_other_time() -> None:
    def refuse(run: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    weight, built = gpu_linear.build(48, 256, device="cpu")
    ((_, row),) = gpu_linear.measure(weight, {"torch bf16": built["torch bf16"]}, 5, refuse, once, CEILINGS)
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
    tiers = gpu_model.models("BERT-base", device="cpu", **SMALL)
    builders = tiers["first"] | tiers["compiled"] | tiers["more"]
    del builders["bitsandbytes LLM.int8"]
    # fp16 arithmetic of peers on a CPU is too coarse to compare with
    monkeypatch.setattr(gpu_model, "check", lambda name, inputs, output, expected: None)
    with torch.inference_mode():
        inputs = gpu_model.batch(4, 24, True, "cpu")
        rows = gpu_model.compared(dict(gpu_model.measure(gpu_model.build(builders), inputs, once)))
    assert all("ms" in rows[name] for name in ("HF SDPA", "HF eager", "lowbit ternary", "lowbit ternary, fused"))
    assert "CUDA" in rows["lowbit ternary, fused, graphs"]["note"] and "note" in rows["HF SDPA, compiled, graph"]
    results.write({**gpu_model.head(MACHINE), "results": {"BERT-base, batch 4, length 24, ragged": rows}}, tmp_path)


def test_the_targets_models_come_first_and_nothing_is_measured_twice() -> None:
    plan = gpu_model.plan()
    assert len(plan) == len(set(plan))
    assert [str(case) for _, case in plan[:6]] == [
        f"{size}, batch {batch}" for size in ("BERT-base", "BERT-large")
        for batch in ("1, length 128", "32, length 128", "32, length 128, ragged")
    ]  # fmt: skip
    tiers = [tier for tier, _ in plan]
    assert tiers[:14] == ["first"] * 6 + ["compiled"] * 6 + ["dropping"] * 2 and tiers[-3:] == ["slow"] * 3


def test_what_there_is_no_time_to_compile_has_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_models(monkeypatch)
    gpu_parts.model(tmp_path, gpu_timing.Clock(19))  # compiled layers want 20 seconds
    rows = results.read(tmp_path / "gpu-model.json")["results"]["BERT-base, batch 1, length 128"]
    assert rows["compiled"] == rows["slow"] == {"note": gpu_parts.NO_TIME} and "ms" in rows["HF eager"]
    monkeypatch.setattr(
        gpu_attention, "cases", lambda slow: [gpu_attention.Case("BERT-base", 2, 7, False)][: int(slow)]
    )
    gpu_parts.attention(tmp_path, gpu_timing.Clock(19))
    (rows,) = results.read(tmp_path / "gpu-attention.json")["results"].values()
    assert rows == {"flex_attention, compiled": {"note": gpu_parts.NO_TIME}}
    built: dict[str, Any] = {"torchao": lambda x: pytest.fail("compiled"), "gemlite": "not measured: not there"}
    monkeypatch.setattr(gpu_linear, "build", lambda N, K, slow: (None, built if slow else {}))
    monkeypatch.setattr(
        gpu_linear, "measure", lambda weight, built, *_: [(name, {"note": built[name]}) for name in built]
    )
    results.write(
        {"suite": "gpu-ceilings", **{k: {} for k in ("machine", "results")}, "model": "", "method": ""}
        | {"results": {"ceilings": {"torch": {"copy_tb_per_s": 1.0}}}},
        tmp_path,
    )
    gpu_parts.linear(tmp_path, gpu_timing.Clock(19))
    rows = results.read(tmp_path / "gpu-linear.json")["results"]["M=1 N=768 K=768"]
    assert rows == {"torchao": {"note": gpu_parts.NO_TIME}, "gemlite": {"note": "not measured: not there"}}


def test_every_runner_gets_the_same_batch() -> None:
    once_more = [gpu_model.batch(32, 128, True, "cpu") for _ in range(2)]
    assert torch.equal(once_more[0]["input_ids"], once_more[1]["input_ids"])
    assert torch.equal(once_more[0]["attention_mask"], once_more[1]["attention_mask"])


@pytest.mark.parametrize("ragged", [False, True])
def test_attention_is_measured_and_absent_peers_say_why(ragged: bool, tmp_path: Path) -> None:
    case = gpu_attention.Case("BERT-base", 32, 9, ragged, torch.bfloat16)
    rows = dict(gpu_attention.measure(gpu_attention.Batch(case, "cpu"), gpu_attention.RUNNERS, once, once))
    assert list(rows) == list(gpu_attention.RUNNERS)
    here = [name for name in rows if name.startswith(("HF", "lowbit", "SDPA, padded"))]
    assert len(here) == 10 and all({"us", "us with gradients"} == set(rows[name]) for name in here)
    assert all("us" in row or str(row["note"]).startswith("not measured: ") for row in rows.values())
    results.write({**gpu_attention.head(MACHINE), "results": {str(case): gpu_attention.compared(rows)}}, tmp_path)


def test_flex_attention_masks_other_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(gpu_attention, "_compiled_flex", lambda: flex_attention)  # compiling takes long
    batch = gpu_attention.Batch(gpu_attention.Case("BERT-base", 5, 40, True, torch.float32), "cpu")
    ((_, row),) = gpu_attention.measure(batch, gpu_attention.SLOW_RUNNERS, once, once)
    assert set(row) == {"us"}


def test_attention_that_no_graph_takes_keeps_its_other_time() -> None:
    def refuse(run: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    batch = gpu_attention.Batch(gpu_attention.Case("BERT-base", 32, 5, False, torch.float32), "cpu")
    ((_, row),) = gpu_attention.measure(batch, {"lowbit": gpu_attention.RUNNERS["lowbit"]}, refuse, once)
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
def test_wrong_attention_is_marked(name: str) -> None:
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

    def row_of(part: str) -> results.Row:
        ((_, row),) = gpu_attention.measure(batch, {name: wrong(part)}, once, once)
        return row

    assert set(row_of("nothing")) == {"us", "us with gradients"}
    parts = {"output": "output", "importance": "cls" if name.endswith("cls") else "all"}
    for part, told in parts.items():
        if part == "importance" and "importance" not in name:
            continue
        row = row_of(part)
        assert set(row) == {"note"} and str(row["note"]).startswith(f"WRONG: {told} has relative error")
    row = row_of("gradients")
    assert set(row) == {"us", "note"} and str(row["note"]).startswith("gradients WRONG: query has relative error")
    assert results.count({"results": {"case": {name: row}}}) == (1, 1)


def test_the_attention_part_measures_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert all(len(gpu_attention.cases(slow)) == len(set(gpu_attention.cases(slow))) for slow in (False, True))
    assert set(gpu_attention.cases(True)) < set(gpu_attention.cases(False))  # so that ratios have all their peers
    small = gpu_attention.Case("BERT-base", 2, 7, True, torch.float32)
    monkeypatch.setattr(gpu_attention, "cases", lambda slow: [small, small._replace(ragged=False)][: 1 if slow else 2])
    monkeypatch.setattr(gpu_attention, "Batch", functools.partial(gpu_attention.Batch, device="cpu"))
    monkeypatch.setattr(gpu_attention, "SLOW_RUNNERS", {"slow": gpu_attention.RUNNERS["lowbit"]})
    monkeypatch.setattr(gpu_attention, "RUNNERS", {"SDPA, padded": gpu_attention.RUNNERS["SDPA, padded"]})
    monkeypatch.setattr(gpu_parts, "machine", dict)
    monkeypatch.setattr(gpu_parts, "replay_ms", once)
    gpu_parts.attention(tmp_path, gpu_timing.Clock(300))
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
    built = gpu_model.build(gpu_model.dropping("BERT-base", "cpu", **SMALL))
    with torch.inference_mode():
        rows = gpu_model.compared(dict(gpu_model.measure(built, gpu_model.batch(4, 24, True, "cpu"), once)))
    row = rows["lowbit ternary, fused, dropping tokens"]
    assert float(row["times as fast as with all tokens"]) > 0 and 0.7 < float(row["part of the MACs"]) < 0.9
    assert all("CUDA" in str(rows[name]["note"]) for name in rows if "graphs" in name)
    assert list(similar) == ["lowbit ternary, fused", "lowbit ternary, fused, dropping tokens"]
    assert min(similar.values()) > 0.9


def fake_models(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of models: the names of those that ran, in order."""
    calls: list[str] = []

    def builders(names: list[str]) -> gpu_model.Builders:
        def build(name: str) -> gpu_model.Built:
            def run() -> torch.Tensor:
                calls.append(name)
                return torch.zeros(1)

            return gpu_model.Built(lambda inputs: run)

        return {name: functools.partial(build, name) for name in names}

    tiers = {"first": ["HF SDPA", "lowbit"], "compiled": ["compiled"], "more": ["HF eager"], "slow": ["slow"]}
    monkeypatch.setattr(gpu_model, "models", lambda size: {tier: builders(names) for tier, names in tiers.items()})
    monkeypatch.setattr(gpu_model, "dropping", lambda size: builders(["lowbit", "lowbit, dropping tokens"]))
    monkeypatch.setattr(gpu_model, "batch", functools.partial(gpu_model.batch, device="cpu"))
    monkeypatch.setattr(gpu_parts, "model_ms", lambda run: 1.0)
    monkeypatch.setattr(gpu_parts, "machine", dict)
    monkeypatch.setattr(gpu_model, "mean_watts", lambda run: 100.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def test_the_model_part_measures_nothing_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = fake_models(monkeypatch)
    gpu_parts.model(tmp_path, gpu_timing.Clock(300))
    measured = results.read(tmp_path / "gpu-model.json")["results"]
    assert next(iter(measured)) == "BERT-base, batch 1, length 128"
    assert len(measured) == len(gpu_model.FIRST + gpu_model.REST) == calls.count("HF SDPA") == calls.count("lowbit")
    dropped = measured["BERT-base, batch 32, length 384"]
    assert dropped["lowbit, dropping tokens"]["times as fast as with all tokens"] == 1.0
    assert set(dropped) == {"HF SDPA", "lowbit", "lowbit, dropping tokens"}
    assert set(measured["BERT-base, batch 1, length 128"]) == {"HF SDPA", "lowbit", "compiled", "HF eager", "slow"}
    with_energy = [case for case, rows in measured.items() if "J/batch" in rows["HF SDPA"]]
    assert len(with_energy) == 4 and all("length 128" in case and "ragged" not in case for case in with_energy)


def test_time_is_looked_at_after_every_row_and_what_was_measured_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_models(monkeypatch)

    class ThreeRows(gpu_timing.Clock):
        def left(self) -> float:
            path = tmp_path / "gpu-model.json"
            return 1.0 if not path.exists() or results.count(results.read(path))[0] < 3 else 0.0

    with pytest.raises(gpu_timing.TimeUp):
        gpu_parts.model(tmp_path, ThreeRows(0))
    measured = results.read(tmp_path / "gpu-model.json")["results"]
    assert [len(rows) for rows in measured.values()] == [2, 1]


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
    with pytest.raises(results.WrongResult, match="cosine similarity"):
        gpu_model.check("other", inputs, torch.randn(2, 8, 64), states)


def test_training_steps_are_measured(tmp_path: Path) -> None:
    suite = results.Suite(tmp_path, gpu_training.head(MACHINE), gpu_training.compared)
    for case, name, row in gpu_training.measure("cpu", once, **SMALL):
        suite.add(case, name, row)
    measured = results.read(tmp_path / "gpu-training.json")["results"]
    assert list(measured) == ["batch 32, length 32", "ternary weight splitting"]
    assert all(float(row["ms/step"]) > 0 for row in measured["batch 32, length 32"].values())
    assert measured["batch 32, length 32"]["fine-tuning bf16"]["over fine-tuning"] == 1.0


def test_a_student_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError("no split today")

    monkeypatch.setattr(gpu_training.lowbit, "split", refuse)
    rows = {name: row for _, name, row in gpu_training.measure("cpu", lambda run: 1.0, **SMALL)}
    assert rows["lowbit split pair"] == {"note": "WRONG: does not run: RuntimeError: no split today"}
    assert rows["lowbit binary"] == {"ms/step": 1.0} and rows["all linears"] == {"ms": 1.0}


# --- one launch of every kernel ----------------------------------------------------------------------------------


def test_smoke_compares_codes_and_floats() -> None:
    expected = {"0": torch.arange(-100, 100, dtype=torch.int8), "1": torch.ones(200)}
    right = {name: x.clone() for name, x in expected.items()}
    assert gpu_smoke.compare(expected, right, 1e-3) is None
    right["0"][7] += 1  # a tie
    right["1"][9] += 1e-3
    assert gpu_smoke.compare(expected, right, 1e-3) is None
    for name, other, told in (
        ("0", expected["0"].flip(0), "differs in 100.0%"),
        ("0", expected["0"].long(), "torch.int64"),
        ("1", torch.full((200,), 1.01), "relative error"),
        ("1", torch.full((200,), float("nan")), "relative error"),
        ("1", torch.ones(100), "expected torch.float32 (200,)"),
    ):
        assert told in str(gpu_smoke.compare(expected, {**expected, name: other}, 1e-3))
    assert "outputs" in str(gpu_smoke.compare(expected, {"0": expected["0"]}, 1e-3))


@pytest.mark.parametrize("name", gpu_smoke.CHECKS)
def test_smoke_runs_on_the_cpu_and_a_wrong_kernel_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_smoke.row_of(name, "cpu") == {"result": "as on the CPU"}
    right = gpu_smoke.CHECKS[name]
    calls: list[str] = []

    def second_is_wrong(device: str) -> gpu_smoke.Outputs:
        calls.append(device)
        outputs = right(device)
        last = list(outputs)[-1]
        return outputs if len(calls) == 1 else {**outputs, last: -outputs[last].detach() - 1}

    monkeypatch.setitem(gpu_smoke.CHECKS, name, second_is_wrong)
    assert str(gpu_smoke.row_of(name, "cpu")["note"]).startswith("WRONG: output ")


def test_a_kernel_that_ends_its_process_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_smoke.sys, "executable", "false")
    row = gpu_smoke.isolated("pack", 60, tmp_path / "smoke-pack.log")
    assert str(row["note"]).startswith("WRONG: exit code 1") and (tmp_path / "smoke-pack.log").exists()
    monkeypatch.undo()
    assert "not done after 0 s" in str(gpu_smoke.isolated("pack", 0.01, tmp_path / "log")["note"])


# --- parts of a run ----------------------------------------------------------------------------------------------


def test_parts_that_fail_hang_or_are_wrong_take_no_other_with_them(tmp_path: Path, capsys: Any) -> None:
    outcomes = failures.walk(tmp_path)
    assert failures.problems(outcomes) == []
    written = (tmp_path / "alive").read_text()
    time.sleep(0.3)
    assert (tmp_path / "alive").read_text() == written  # what the part has started has ended with it
    assert "an illegal memory access" in capsys.readouterr().out
    assert "fine" in (tmp_path / "logs" / "right.log").read_text()
    told = gpu.table(outcomes).splitlines()
    assert len(told) == 2 + len(outcomes) and told[4].split() == ["wrong", "0", "3", "1", "ok"]
    assert len(failures.problems([outcome._replace(wrong=2) for outcome in outcomes])) == len(outcomes)


def test_rows_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    assert gpu.run_part("wrong", tmp_path, 20, command=failures.command).wrong == 1
    writes_nothing = [sys.executable, "-c", ""]
    outcome = gpu.run_part("wrong", tmp_path, 20, command=lambda *_: writes_nothing)
    assert (outcome.state, outcome.rows, outcome.wrong) == ("ok", 0, 0)


def test_what_a_part_leaves_of_its_time_goes_to_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, float] = {}

    def run_part(part: str, folder: Path, seconds: float, grace: float, command: gpu.Command) -> gpu.Outcome:
        given[part] = seconds
        return gpu.Outcome(part, 0.0, "ok", 0, 0, False)

    monkeypatch.setattr(gpu, "run_part", run_part)
    gpu.run({"a": 1, "b": 1, "c": 2}, tmp_path, 240)
    assert given == pytest.approx({"a": 60, "b": 80, "c": 240}, abs=1)


@pytest.mark.parametrize(("outcome", "code"), [({}, 0), ({"wrong": 1}, 1), ({"failed": True}, 1)])
def test_the_exit_code_says_whether_all_is_right(
    outcome: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ended = gpu.Outcome("linear", 1.0, "ok", 9, 0, False)._replace(**outcome)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "linear.log").write_text("an error")
    monkeypatch.setattr(gpu, "run_part", lambda part, *_: ended)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    assert gpu.main(["--results", str(tmp_path), "--only", "linear"]) == code
    assert "linear " in capsys.readouterr().out


def test_every_part_has_a_share_and_a_function() -> None:
    assert list(gpu.PARTS) == list(gpu_parts.PARTS) and sum(gpu.PARTS.values()) == gpu.BUDGET
    assert (gpu.NO_GPU, gpu.TIME_UP) == (gpu_parts.NO_GPU, gpu_parts.TIME_UP)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    assert gpu.main(["--results", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "nothing was measured" in told.err and told.out.count("==") == 1  # no part after the first
    assert not list(tmp_path.glob("*.json"))


def test_a_machine_without_nvidia_smi_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA Fake", major=9, minor=0, multi_processor_count=132, uuid="1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "/nowhere")
    machine = gpu_timing.machine()
    assert (machine["gpu"], machine["capability"], machine["driver"]) == ("NVIDIA Fake", "sm_90", "unknown")
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.01))
    assert gpu_timing.mean_watts(lambda: calls.append(1)) is None and len(calls) < 100


def test_power_is_read_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    field = SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=612_500))
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetFieldValues=lambda device, fields: [field] if (device, fields) == ("GPU-1", [186]) else [],
        NVML_FI_DEV_POWER_INSTANT=186,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_timing.mean_watts(lambda: time.sleep(0.01), seconds=0.1) == 612.5


def test_a_capture_that_fails_is_followed_by_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")

    def refuse(run: Callable[[], Any], **_: Any) -> float:
        raise RuntimeError("operation not permitted when stream is capturing")

    ended: list[bool] = []
    monkeypatch.setattr(testing, "do_bench_cudagraph", refuse)
    monkeypatch.setattr(gpu_timing, "_end_capture", lambda: ended.append(True))
    with pytest.raises(RuntimeError, match="capturing"):
        gpu_timing.replay_ms(lambda: None)
    assert ended == [True]

    def dead() -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(gpu_timing, "_end_capture", dead)
    with pytest.raises(RuntimeError, match="capturing"):  # the first error, not what came of it
        gpu_timing.replay_ms(lambda: None)


PYTEST_LOG = """
[gw3] [  1%] PASSED tests/kernels/test_a.py::test_triton_x[a b]
[gw3] [  2%] SKIPPED tests/kernels/test_a.py::test_triton_y
[gw1] [  3%] FAILED tests/kernels/test_b.py::test_triton_z[1 2]
tests/kernels/test_c.py::test_triton_w[3 4] PASSED                       [ 50%]
ERROR tests/kernels/test_d.py - ModuleNotFoundError: No module named 'x'
FAILED tests/kernels/test_b.py::test_triton_z[1 2] - assert 1 == 2
ERROR tests/kernels/test_b.py::test_triton_v - fixture
"""


def test_results_of_tests_are_read_from_their_log() -> None:
    assert gpu_parts.test_results(PYTEST_LOG) == {
        "tests/kernels/test_a.py": {"passed": 1, "skipped": 1},
        "tests/kernels/test_b.py": {"failed": 1, "note": "WRONG: test_triton_z[1 2]"},
        "tests/kernels/test_c.py": {"passed": 1},
        "tests/kernels/test_d.py": {"error": 1, "note": "WRONG: cannot be collected"},
    }


def test_tests_that_are_cut_off_keep_what_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = "tests/kernels/test_a.py::test_triton_x PASSED"
    endless = [sys.executable, "-uc", f"import time; print({line!r}); time.sleep(60)"]
    monkeypatch.setattr(gpu_parts, "pytest_command", lambda: endless)
    monkeypatch.setattr(gpu_parts, "machine", dict)
    with pytest.raises(gpu_timing.TimeUp):
        gpu_parts.tests(tmp_path, gpu_timing.Clock(1))
    report_of_tests = results.read(tmp_path / "gpu-tests.json")
    assert report_of_tests["results"] == {"tests": {"tests/kernels/test_a.py": {"passed": 1}}}
    assert "time was up" in report_of_tests["method"]
    monkeypatch.setattr(gpu_parts, "pytest_command", lambda: [sys.executable, "-c", "raise SystemExit(4)"])
    with pytest.raises(RuntimeError, match="ran no test"):
        gpu_parts.tests(tmp_path, gpu_timing.Clock(60))


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
        "Not measured yet: gpu-attention, gpu-ceilings, gpu-model, gpu-smoke, gpu-tests, gpu-training" in page
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
