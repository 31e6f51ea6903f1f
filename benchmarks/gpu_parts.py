"""The parts of the GPU run, each in a process of its own that `benchmarks.gpu` starts and ends.

    python -m benchmarks.gpu_parts linear --results DIR --seconds 60

Exit code 0: all done. 1: an error. 3: time was up before all was done. 4: torch sees no CUDA device. Rows that are
wrong say so in the part's JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from .gpu_timing import Clock, TimeUp, machine, median_ms, model_ms, replay_ms
from .results import WRONG, Row, Suite, read

DONE, ERROR, TIME_UP, NO_GPU = 0, 1, 3, 4
SLOW_SECONDS = 20.0  # that have to be left to begin with peers that compile themselves, which cannot be stopped
NO_TIME = "not measured: no time was left to compile it"


def smoke(folder: Path, clock: Clock) -> None:
    """One launch of every kernel, beside the CPU."""
    from . import gpu_smoke

    gpu_smoke.run(folder, clock, machine())


def warm(folder: Path, clock: Clock) -> None:
    """Compile, in as many processes as there are cores, what the parts after this one launch."""
    from lowbit_kernels import configs

    from . import gpu_warm

    gpu_warm.run(configs.device_arch(torch.device("cuda", 0)) or 0, folder, clock)


def model(folder: Path, clock: Clock) -> None:
    """Whole models: the sizes that targets are stated for, with dropped tokens, then everything else."""
    from . import gpu_model

    torch._dynamo.config.recompile_limit = 64  # several models share the code of a layer; beyond 8 it would run eagerly
    suite = Suite(folder, gpu_model.head(machine()), gpu_model.compared)

    @functools.cache
    def tiers(size: str) -> dict[str, gpu_model.Builders]:
        return gpu_model.models(size)

    @functools.cache
    def built(size: str, tier: str) -> dict[str, gpu_model.Built]:
        return gpu_model.build(gpu_model.dropping(size) if tier == "dropping" else tiers(size)[tier])

    for tier, case in gpu_model.plan():
        clock.check()
        if clock.left() < gpu_model.TIER_SECONDS.get(tier, 0.0):
            for name in tiers(case.size)[tier]:
                suite.add(str(case), name, {"note": NO_TIME})
            continue
        rows = suite.results.get(str(case), {})
        runners = {name: item for name, item in built(case.size, tier).items() if name not in rows}
        with torch.inference_mode():
            inputs = gpu_model.batch(case.count, case.length, case.ragged)
            power = not case.ragged and (case.count, case.length) in gpu_model.POWER
            for name, row in gpu_model.measure(runners, inputs, model_ms, power):
                suite.add(str(case), name, row)
                clock.check()


def ceilings(folder: Path, clock: Clock) -> None:
    """Copy bandwidth and matrix rates on random data; the rooflines of the linears are drawn from them."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), 50)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    i, j = (torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8) for _ in range(2))
    operations = 2 * 8192**3
    row: Row = {
        "copy_tb_per_s": round(2 * source.numel() * 4 / copy_ms / 1e9, 3),
        "bf16_tflop_per_s": round(operations / median_ms(lambda: a @ b, 50) / 1e9, 1),
        "int8_top_per_s": round(operations / median_ms(lambda: torch._int_mm(i, j.t()), 50) / 1e9, 1),
    }
    head = {
        "suite": "gpu-ceilings",
        "model": "copy of 2 GB, products of 8192 x 8192 matrices",
        "machine": machine(),
        "method": "median of triton.testing.do_bench",
    }
    Suite(folder, head).add("ceilings", "torch", row)


def linear(folder: Path, clock: Clock) -> None:
    """Every linear beside its peers, most tokens first; at last the peers that compile or tune themselves."""
    from . import gpu_linear

    path = folder / "gpu-ceilings.json"
    if not path.exists():
        ceilings(folder, clock)
    limits = read(path)["results"]["ceilings"]["torch"]
    suite = Suite(folder, gpu_linear.head(machine()), gpu_linear.compared)
    for slow in (False, True):
        weights = {shape: gpu_linear.build(*shape, slow) for shape in gpu_linear.BERT_BASE + gpu_linear.BERT_LARGE}
        for M in gpu_linear.TOKENS:
            for (N, K), (weight, built) in weights.items():
                if slow and clock.left() < SLOW_SECONDS:
                    built = {name: bind if isinstance(bind, str) else NO_TIME for name, bind in built.items()}
                for name, row in gpu_linear.measure(weight, built, M, replay_ms, median_ms, limits):
                    suite.add(f"M={M} N={N} K={K}", name, row)
                    clock.check()


def attention(folder: Path, clock: Clock) -> None:
    """Attention beside its peers, the batches of training first; at last the peer that compiles itself."""
    from . import gpu_attention

    suite = Suite(folder, gpu_attention.head(machine()), gpu_attention.compared)
    for slow in (False, True):
        for case in gpu_attention.cases(slow):
            clock.check()
            if slow and clock.left() < SLOW_SECONDS:
                for name in gpu_attention.SLOW_RUNNERS:
                    suite.add(str(case), name, {"note": NO_TIME})
                continue
            runners = gpu_attention.SLOW_RUNNERS if slow else gpu_attention.RUNNERS
            for name, row in gpu_attention.measure(gpu_attention.Batch(case), runners, replay_ms, median_ms):
                suite.add(str(case), name, row)
                clock.check()


def training(folder: Path, clock: Clock) -> None:
    """A training step, and ternary weight splitting."""
    from . import gpu_training

    suite = Suite(folder, gpu_training.head(machine()), gpu_training.compared)
    for case, name, row in gpu_training.measure("cuda", model_ms):
        suite.add(case, name, row)
        clock.check()


def tests(folder: Path, clock: Clock) -> None:
    """The kernel tests, which take the CUDA device where there is one; in parallel, since most of it is compiling.

    Raises:
        RuntimeError: no test ran.
        TimeUp: not all of them did. Processes still run then: `benchmarks.gpu` ends the whole group.
    """
    log = folder / "logs" / "pytest.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(pytest_command(), stdout=file, stderr=file, env=environment)
        try:
            code: int | None = process.wait(timeout=max(0.0, clock.left()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
    results = test_results(log.read_text())
    head = {
        "suite": "gpu-tests",
        "model": "tests/kernels on the device",
        "machine": machine(),
        "method": "pytest -k triton" + ("" if code is not None else "; time was up before all tests had run"),
    }
    suite = Suite(folder, head)
    for file_name, row in results.items():
        suite.add("tests", file_name, row)
    if code is None:
        raise TimeUp
    if not results:
        raise RuntimeError(f"pytest ended with {code} and ran no test, see {log}")


def pytest_command() -> list[str]:
    """Runs the kernel tests; one line a test, so that a run that is cut off tells what it did."""
    command = [sys.executable, "-m", "pytest", "-v", "tests/kernels", "-k", "triton", "-p", "no:cacheprovider"]
    command.append("--continue-on-collection-errors")  # of tests that need packages which are not there
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    return command


OUTCOME = "(PASSED|FAILED|ERROR|SKIPPED)"
TEST_LINES = (  # of pytest -v with and without pytest-xdist, and of what could not be collected
    re.compile(rf"\[gw\d+\].* {OUTCOME} (?P<file>\S+\.py)::(?P<test>.+)"),
    re.compile(rf"(?P<file>\S+\.py)::(?P<test>.+?) {OUTCOME}"),
    re.compile(r"(ERROR) (?P<file>\S+\.py)(?P<test>)(?: - |$)"),
)


def test_results(log: str) -> dict[str, Row]:
    """Passed, failed and skipped tests of each file out of pytest's log; a file with failures is wrong."""
    counts: dict[str, Counter[str]] = {}
    first: dict[str, str] = {}
    for line in log.splitlines():
        match = next(filter(None, (pattern.match(line) for pattern in TEST_LINES)), None)
        if match is None:
            continue
        outcome = next(part for part in match.groups() if part in ("PASSED", "FAILED", "ERROR", "SKIPPED"))
        counts.setdefault(match["file"], Counter())[outcome.lower()] += 1
        if outcome in ("FAILED", "ERROR"):
            first.setdefault(match["file"], match["test"].strip() or "cannot be collected")
    rows: dict[str, Row] = {name: dict(sorted(count.items())) for name, count in sorted(counts.items())}
    for name, test in first.items():
        rows[name]["note"] = f"{WRONG}{test}"
    return rows


def tune(folder: Path, clock: Clock) -> None:
    """Time tiles of BERT-base's ternary linears; the table is in the results' folder.

    Raises:
        RuntimeError: the tuner ended with an error.
    """
    from lowbit_kernels.tune import main as tuner_main

    from . import gpu_linear

    shapes = [f"{N},{K}" for N, K in gpu_linear.BERT_BASE]
    arguments = ["--layout", "ternary", "--shapes", *shapes, "--minutes", str(clock.left() / 60)]
    if code := tuner_main(arguments):
        raise RuntimeError(f"python -m lowbit_kernels.tune ended with {code}")
    clock.check()


PARTS: dict[str, Callable[[Path, Clock], None]] = {
    part.__name__: part for part in (smoke, warm, model, ceilings, linear, attention, training, tests, tune)
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu-*.json and logs")
    parser.add_argument("--seconds", type=float, required=True, help="begin nothing after so many seconds")
    options = parser.parse_args(arguments)
    clock, begin = Clock(options.seconds), time.perf_counter()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none", file=sys.stderr)
        return NO_GPU
    try:
        PARTS[options.part](options.results, clock)
    except TimeUp:
        print(f"time was up after {time.perf_counter() - begin:.0f} s")
        return TIME_UP
    return DONE


if __name__ == "__main__":
    sys.exit(main())
