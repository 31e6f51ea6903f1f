"""The rehearsal of the GPU run: what fake tensors know, what a capture refuses, gradients, and what must be there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_model, gpu_parts, gpu_warm, results
from benchmarks.gpu_timing import Clock
from benchmarks.rehearsal import autograd, cost, required, stage
from benchmarks.rehearsal.cuda import fake_cuda
from benchmarks.rehearsal.tensors import fake_tensors, value_of
from lowbit_kernels._triton import INTERPRET
from lowbit_kernels.ahead import Binary

pytestmark = pytest.mark.skipif(INTERPRET or torch.cuda.is_available(), reason="for machines without a GPU")


def test_masks_and_lengths_are_known_and_the_rest_passes_every_check() -> None:
    real = gpu_model.batch(32, 128, True, "cpu")["attention_mask"]
    with fake_tensors() as values, fake_cuda(values):
        mask = gpu_model.batch(32, 128, True)["attention_mask"]
        assert mask.device.type == "cuda" and mask.is_cuda
        states = torch.randn(32, 128, 8, device="cuda")
        tokens, lengths = states[mask.bool()], mask.sum(1).tolist()
        assert not bool(torch.isnan(states).any()) and bool(torch.isfinite(states).all()) and float(states.sum()) == 0.0
        states[0, 0, 0] = 1.0
        written = torch.zeros(4, dtype=torch.long, device="cuda")
        written[1:3] = 7  # through a view
        assert written.tolist() == [0, 7, 7, 0]
        written += torch.randint(9, (2**21,), device="cuda")[:4]  # nobody knows them
        assert value_of(written) is None
        assert value_of(torch.empty(3, device="cuda")) is None
    assert tokens.shape == (int(real.sum()), 8) and lengths == real.sum(1).tolist()


def test_a_capture_refuses_what_waits_for_the_device() -> None:
    with fake_tensors() as values, fake_cuda(values):
        x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x + 1
        for waits in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.nonzero(), torch.cuda.synchronize):
            with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(graph):
                waits()
        assert x.sum().item() == 4.0  # not while nothing is captured
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")  # nothing stays replaced


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(a, b)
        return a * b, a + b

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ctx.saved_tensors
        return g * b + h, g * a + h


def test_gradients_are_those_of_torch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    x = torch.randn(5, 8, requires_grad=True)
    leaves = [x, *model.parameters()]

    def loss() -> torch.Tensor:
        y = model(x)
        product, total = _Both.apply(y, y.flip(0))
        u, v, w, z = torch.cat([product, total, y]).unbind(1)
        return (u * v + w).sum() + (z * model[0].bias[0]).mean()

    expected = torch.autograd.grad(loss(), leaves)
    torch.testing.assert_close(autograd.grad(loss(), leaves), expected)
    autograd.backward(loss())
    autograd.backward(loss())
    torch.testing.assert_close(x.grad, 2 * expected[0])


def test_smoke_launches_every_kernel_and_a_part_ends_with_its_planned_time(tmp_path: Path) -> None:
    smoke = stage.walk(cost.Notes("smoke"), tmp_path)
    assert (smoke.state, required.unlaunched(smoke.binaries)) == ("ok", [])
    fewer = [binary for binary in smoke.binaries if binary.kernel != "_select_kernel"]
    assert required.unlaunched(fewer) == ["lowbit_kernels.prune.gpu._select_kernel"]
    rows = results.read(tmp_path / "gpu-smoke.json")
    assert results.count(rows) == (smoke.timings, 0) and rows["machine"]["gpu"].startswith("none")
    ceilings = stage.walk(cost.Notes("ceilings"), tmp_path)
    assert ceilings.timings == 3 and not ceilings.binaries
    linear = stage.walk(cost.Notes("linear"), tmp_path, seconds=cost.START_SECONDS + 1)
    assert linear.state == "time was up" and cost.START_SECONDS + 1 <= linear.seconds() < cost.START_SECONDS + 2


def test_what_a_run_lacks_is_named(tmp_path: Path) -> None:
    head = {"model": "m", "machine": {}, "method": "m"}
    case = {"HF SDPA": {"ms": 1.0}, "lowbit ternary, fused": {"note": "WRONG: cosine similarity 0.1"}}
    report = {"suite": "gpu-model", **head, "results": {"BERT-base, batch 1, length 128": case}}
    results.write(report, tmp_path)
    problems = required.problems(tmp_path)
    missing = "gpu-model lacks 'ms' of {!r} in 'BERT-base, batch 1, length 128'"
    assert missing.format("lowbit ternary, fused") in problems and missing.format("HF SDPA") not in problems
    assert missing.format("HF SDPA, compiled, graph") in problems
    assert "gpu-model: 1 wrong rows" in problems and any(text.startswith("linear left no report") for text in problems)


def test_the_plan_counts_binaries_once_and_divides_them_by_the_cores() -> None:
    binaries = [Binary("module", "kernel", str(i), {}, {}) for i in range(32)]
    smoke = cost.Notes("smoke", binaries=set(binaries))
    load = 32 * cost.BINARY_LOAD_SECONDS
    assert smoke.seconds() == pytest.approx(cost.START_SECONDS + 32 * cost.BINARY_SECONDS / cost.PROCESSES + load)
    model = cost.Notes("model", earlier=frozenset(binaries[:16]), binaries=set(binaries))
    assert len(model.new()) == 16 and model.seconds() == pytest.approx(cost.START_SECONDS + load)
    model.bench(5, 200, 100)
    spent = 0.205 + 7 * 100 * cost.OPERATION_SECONDS
    assert model.seconds() == pytest.approx(cost.START_SECONDS + load + spent) and model.timings == 1
    model.compile("layer", 8.0)
    model.compile("layer", 8.0)
    assert model.seconds() == pytest.approx(cost.START_SECONDS + load + spent + 8.0)


def test_what_is_walked_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Binary] = []

    class Compilers:
        def __init__(self, arch: int, processes: int) -> None:
            self.arch = arch

        def submit(self, binary: Binary) -> None:
            submitted.append(binary)

        def futures(self) -> list[Any]:
            def fails(timeout: float) -> None:
                raise RuntimeError("does not compile")

            done = SimpleNamespace(result=lambda timeout: None, done=lambda: True, cancelled=lambda: False)
            good = SimpleNamespace(**vars(done), exception=lambda: None)
            bad = SimpleNamespace(**{**vars(done), "result": fails}, exception=lambda: RuntimeError())
            return [good, bad, good]

        def close(self) -> None:
            submitted.append(Binary("closed", "", "", {}, {}))

    monkeypatch.setattr(gpu_warm, "Compilers", Compilers)
    monkeypatch.setitem(gpu_parts.PARTS, "linear", lambda folder, clock: gpu_parts.smoke(folder, clock))
    assert gpu_warm.compile_part("linear", 90, 1, Clock(60)) == (2, 1)
    assert submitted[-1].module == "closed" and len(set(submitted)) > 30
