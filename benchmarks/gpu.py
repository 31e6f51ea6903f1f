"""The GPU run: device, ceilings, correctness on the device, attention, tuning, models, linears, training steps.

    make gpu RESULTS=DIR            all parts            make gpu ONLY=linear    one part

No network, the current Python. Parts share the minutes of `--minutes` (default 9) and begin nothing once their share
is over; slow peers (those that compile or tune themselves) come last. Each part writes its JSON before the next begins,
the long ones after every case, so a run that is cut off keeps what it has; a part that fails does not stop the others,
but the exit code is 1. A peer that does not run here is in the tables as not measured, with the reason.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import gpu_attention, gpu_linear, gpu_model, gpu_training
from .results import Row, read, write

torch._dynamo.config.recompile_limit = 64  # several models share the code of a layer; beyond 8 it would run eagerly


def median_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a call as Python makes it, caches flushed between calls."""
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=30, return_mode="median")


def replay_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a call in a CUDA graph: what the device needs, without Python."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=20, return_mode="median")


class Clock:
    """When a part has to stop beginning things."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()


def machine() -> dict[str, Any]:
    """Device, driver and versions: what the figures hold for."""
    import transformers
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def ceilings(folder: Path, clock: Clock) -> None:
    """Copy bandwidth and matrix rates on random data; the rooflines of the linears are drawn from them."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    i, j = (torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8) for _ in range(2))
    operations = 2 * 8192**3
    row: Row = {
        "copy_tb_per_s": round(2 * source.numel() * 4 / copy_ms / 1e9, 3),
        "bf16_tflop_per_s": round(operations / median_ms(lambda: a @ b) / 1e9, 1),
        "int8_top_per_s": round(operations / median_ms(lambda: torch._int_mm(i, j.t())) / 1e9, 1),
    }
    write(
        {
            "suite": "gpu-ceilings",
            "model": "copy of 2 GB, products of 8192 x 8192 matrices",
            "machine": machine(),
            "method": "median of triton.testing.do_bench",
            "results": {"ceilings": {"torch": row}},
        },
        folder,
    )


def tests(folder: Path, clock: Clock) -> None:
    """The kernel tests, which take the CUDA device where there is one; in parallel, since most of it is compiling.

    Raises:
        RuntimeError: a test failed, or time was up.
    """
    command = [sys.executable, "-m", "pytest", "-v", "tests/kernels", "-k", "triton"]  # -v: failures as they come
    command.append("--continue-on-collection-errors")  # of tests that need packages which are not there
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(16, os.cpu_count() or 1))]
    log = folder / "gpu-tests.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=file, timeout=clock.left(), check=False).returncode
        except subprocess.TimeoutExpired:
            code = "time was up"
    lines = log.read_text().strip().splitlines()
    print(*[line for line in lines[:-15] if "FAILED" in line][:30], *lines[-15:], sep="\n", flush=True)
    if code:
        raise RuntimeError(f"kernel tests on the device: {code}, see {log}")


def attention(folder: Path, clock: Clock) -> None:
    """Attention beside its peers, the batches of training first; at last the peer that compiles itself."""
    results: dict[str, dict[str, Row]] = {}
    for slow in (False, True):
        for case in tqdm(gpu_attention.cases(slow), desc="attention, slow peer" if slow else "attention"):
            if clock.left() < 0:
                return
            batch = gpu_attention.Batch(case)
            runners = gpu_attention.SLOW_RUNNERS if slow else gpu_attention.RUNNERS
            measured = gpu_attention.measure(batch, runners, replay_ms, median_ms)
            results[str(case)] = gpu_attention.compared(results.get(str(case), {}) | measured)
            write(gpu_attention.suite(machine(), results), folder)


def tune(folder: Path, clock: Clock) -> None:
    """Time tiles of BERT-base's ternary linears, which the parts after this one take.

    Raises:
        RuntimeError: nothing could be timed.
    """
    from lowbit_kernels import configs
    from lowbit_kernels.tune import main as tuner_main

    shapes = [f"{N},{K}" for N, K in gpu_linear.BERT_BASE]
    if code := tuner_main(["--layout", "ternary", "--shapes", *shapes, "--minutes", str(clock.left() / 60)]):
        raise RuntimeError(f"python -m lowbit_kernels.tune ended with {code}")
    configs.reload()


def linear(folder: Path, clock: Clock) -> None:
    """Every linear beside its peers: first everyone who is ready at once, then those who compile or tune themselves."""
    path = folder / "gpu-ceilings.json"
    if not path.exists():
        ceilings(folder, clock)
    limits = read(path)["results"]["ceilings"]["torch"]
    results: dict[str, dict[str, Row]] = {}
    for slow in (False, True):
        for N, K in tqdm(gpu_linear.BERT_BASE + gpu_linear.BERT_LARGE, desc="linear, slow peers" if slow else "linear"):
            if clock.left() < 0:
                return
            weight, built = gpu_linear.build(N, K, slow)
            for M in gpu_linear.TOKENS:
                case = f"M={M} N={N} K={K}"
                measured = gpu_linear.measure(weight, built, M, replay_ms, median_ms, limits)
                results[case] = gpu_linear.compared(results.get(case, {}) | measured)
            write(gpu_linear.suite(machine(), results), folder)


def model(folder: Path, clock: Clock) -> None:
    """BERT-base with and without dropped tokens, then whole models at every shape, uniform and ragged."""
    results: dict[str, dict[str, Row]] = {}
    stages: list[tuple[Any, ...]] = [(gpu_model.dropping, ("BERT-base",), [gpu_model.DROPPING_SHAPE])]
    stages += [
        (functools.partial(gpu_model.models, slow=slow), gpu_model.SIZES, gpu_model.SHAPES) for slow in (False, True)
    ]
    for builders, sizes, shapes in stages:
        for size in sizes:
            built = built_models(builders(size))
            for count, length in tqdm(shapes, desc=size):
                for ragged in (False, True) if count > 1 else (False,):
                    if clock.left() < 0:
                        return
                    case = f"{size}, batch {count}, length {length}{', ragged' if ragged else ''}"
                    rows = results.get(case, {})
                    with torch.inference_mode():
                        inputs = gpu_model.batch(count, length, ragged)
                        rest = {name: runner for name, runner in built.items() if name not in rows}
                        measured = gpu_model.measure(rest, inputs, median_ms)
                    results[case] = gpu_model.compared(rows | measured)
                    write(gpu_model.suite(machine(), results), folder)
            del built
            torch.cuda.empty_cache()


def built_models(builders: dict[str, Callable[[], gpu_model.Built]]) -> dict[str, gpu_model.Built]:
    """The runners; one that cannot be built raises, when it is run, what kept it from being built."""

    def failing(error: Exception) -> gpu_model.Built:
        def run(inputs: gpu_model.Batch) -> torch.Tensor:
            raise error

        return gpu_model.Built(run)

    built = {}
    for name, build in builders.items():
        try:
            built[name] = build()
        except Exception as error:  # a peer that is not installed, say
            built[name] = failing(error)
    return built


def training(folder: Path, clock: Clock) -> None:
    """A training step, and ternary weight splitting."""
    write(gpu_training.suite(machine(), gpu_training.measure("cuda", median_ms)), folder)


# Each part's share of the time; what one leaves goes to those after it.
PARTS: dict[str, tuple[float, Callable[[Path, Clock], None]]] = {
    "ceilings": (0.02, ceilings),
    "training": (0.05, training),
    "tests": (0.40, tests),
    "attention": (0.12, attention),
    "tune": (0.08, tune),
    "model": (0.20, model),
    "linear": (0.13, linear),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu-*.json")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts (default 9)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none; nothing was measured", file=sys.stderr)
        return 1
    options.results.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LOWBIT_CACHE_DIR", str(options.results / "tiles"))
    print(machine(), flush=True)
    failed, whole = [], Clock(options.minutes)
    names = [options.only] if options.only else list(PARTS)
    for i, name in enumerate(names):
        share = PARTS[name][0] / sum(PARTS[rest][0] for rest in names[i:])
        begin = time.perf_counter()
        try:
            PARTS[name][1](options.results, Clock(max(0.0, whole.left()) * share / 60))
        except (Exception, SystemExit):  # the parts after this one can still be measured
            traceback.print_exc()
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - begin:.0f} s{', FAILED' if name in failed else ''}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
