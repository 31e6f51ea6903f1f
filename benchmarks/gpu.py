"""The GPU run: device, ceilings, correctness on the device, tuning, linears, whole models, training steps.

    make gpu RESULTS=DIR            all parts            make gpu ONLY=linear    one part

No network, the current Python, under nine minutes. Each part writes its JSON before the next begins, the long ones
after every case, so a run that is cut off keeps what it has; a part that fails does not stop the others, but the exit
code is 1. A peer that does not run here is in the tables as not measured, with the reason.
"""

from __future__ import annotations

import argparse
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

from . import gpu_linear, gpu_model, gpu_training
from .results import Row, read, write

torch._dynamo.config.recompile_limit = 64  # several models share the code of a layer; beyond 8 it would run eagerly


def median_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds on the device."""
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=30, return_mode="median")


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


def ceilings(folder: Path) -> None:
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


def tests(folder: Path) -> None:
    """The kernel tests, which take the CUDA device where there is one.

    Raises:
        RuntimeError: a test failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-k", "triton"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "gpu-tests.log").write_text(result.stdout + result.stderr)
    print(*result.stdout.strip().splitlines()[-15:], sep="\n", flush=True)
    if result.returncode:
        raise RuntimeError("kernel tests failed on the device, see gpu-tests.log")


def tune(folder: Path) -> None:
    """Time tiles for what the committed tables lack; at most two minutes."""
    from lowbit_kernels import tune as tuner

    tuner.main(["--output", str(folder / "tuned.json"), "--minutes", "2"])


def linear(folder: Path) -> None:
    """Every linear beside its peers."""
    path = folder / "gpu-ceilings.json"
    if not path.exists():
        ceilings(folder)
    limits = read(path)["results"]["ceilings"]["torch"]
    results: dict[str, dict[str, Row]] = {}
    for N, K in tqdm(gpu_linear.BERT_BASE + gpu_linear.BERT_LARGE, desc="linear"):
        weight, built = gpu_linear.build(N, K)
        for M in gpu_linear.TOKENS:
            results[f"M={M} N={N} K={K}"] = gpu_linear.measure(weight, built, M, median_ms, limits)
            write(gpu_linear.suite(machine(), results), folder)


def model(folder: Path) -> None:
    """Whole models at every shape, uniform and ragged."""
    results: dict[str, dict[str, Row]] = {}
    with torch.inference_mode():
        for size in gpu_model.SIZES:
            built = built_models(gpu_model.models(size))
            for count, length in tqdm(gpu_model.SHAPES, desc=size):
                for ragged in (False, True) if count > 1 else (False,):
                    case = f"{size}, batch {count}, length {length}{', ragged' if ragged else ''}"
                    results[case] = gpu_model.measure(built, gpu_model.batch(count, length, ragged), median_ms)
                    write(gpu_model.suite(machine(), results), folder)
            torch.cuda.empty_cache()


def built_models(builders: dict[str, Callable[[], gpu_model.Built]]) -> dict[str, gpu_model.Built]:
    """The runners; one that cannot be built raises, when it is run, what kept it from being built."""

    def failing(error: Exception) -> gpu_model.Built:
        def run(inputs: gpu_model.Batch) -> torch.Tensor:
            raise error

        return gpu_model.Built(run, "")

    built = {}
    for name, build in builders.items():
        try:
            built[name] = build()
        except Exception as error:  # a peer that is not installed, say
            built[name] = failing(error)
    return built


def training(folder: Path) -> None:
    """A training step, and ternary weight splitting."""
    write(gpu_training.suite(machine(), gpu_training.measure("cuda", median_ms)), folder)


PARTS: dict[str, Callable[[Path], None]] = {
    "ceilings": ceilings,
    "tests": tests,
    "tune": tune,
    "linear": linear,
    "model": model,
    "training": training,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu-*.json")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none; nothing was measured", file=sys.stderr)
        return 1
    options.results.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    failed = []
    for name in [options.only] if options.only else PARTS:
        begin = time.perf_counter()
        try:
            PARTS[name](options.results)
        except Exception:  # the parts after this one can still be measured
            traceback.print_exc()
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - begin:.0f} s{', FAILED' if name in failed else ''}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
