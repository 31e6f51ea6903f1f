"""The GPU run, first version: device, ceilings, correctness on the device, linears beside their peers.

    make gpu RESULTS=DIR            all parts            make gpu ONLY=linear    one part

No network, the current Python. Each part writes its JSON before the next begins, so a run that is cut off keeps what it
has. A peer that cannot be imported here is reported as not measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit_kernels import (
    binarize,
    binary_linear,
    pack_binary,
    pack_split,
    pack_ternary,
    quantize_per_token,
    split_linear,
    ternarize,
    ternary_linear,
)

SHAPES = [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096)]  # (N, K): BERT-base, -large
TOKENS = (1, 16, 128, 512, 2048, 8192)


def median_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds on the device."""
    from triton.testing import do_bench

    return round(do_bench(run, warmup=5, rep=30, return_mode="median"), 5)


def device() -> dict[str, Any]:
    """Device, driver and versions."""
    import triton

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver.stdout.strip(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def ceilings() -> dict[str, Any]:
    """Copy bandwidth and matrix rates, on random data."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    i, j = (torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8) for _ in range(2))
    operations = 2 * 8192**3
    return {
        "copy_tb_per_s": round(2 * source.numel() * 4 / copy_ms / 1e9, 3),
        "bf16_tflop_per_s": round(operations / median_ms(lambda: a @ b) / 1e9, 1),
        "int8_top_per_s": round(operations / median_ms(lambda: torch._int_mm(i, j.t())) / 1e9, 1),
    }


def tests() -> dict[str, Any]:
    """The kernel tests, which take the CUDA device where there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-k", "triton", "-x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit_code": result.returncode, "tail": result.stdout.strip().splitlines()[-15:]}


def importable(name: str) -> bool:
    """Whether a peer can be imported, tried in a process of its own: some abort on import."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def linear_runners(M: int, N: int, K: int, peers: dict[str, bool]) -> dict[str, Callable[[], torch.Tensor] | None]:
    """The same product by everyone: x [M, K] times a weight [N, K]."""
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(N, K, device="cuda")
    codes, scale = ternarize(weight)
    signs, sign_scale = binarize(weight)
    ternary, binary = pack_ternary(codes), pack_binary(signs)
    pair, pair_scale = pack_split(signs, signs), torch.stack([sign_scale, sign_scale])
    q, q_scale, _ = quantize_per_token(x)
    half = weight.bfloat16()
    given = {"x_scale": q_scale, "out_dtype": torch.bfloat16}
    # Correct before it is timed: the integer sums against float64 on the same codes.
    expected = (q.double() @ codes.double().T) * q_scale.double()[:, None] * scale.double()
    error = (ternary_linear(q, ternary, scale, **given).double() - expected).norm() / expected.norm()
    if not error < 1e-2:
        raise RuntimeError(f"ternary_linear is wrong at M={M}, N={N}, K={K}: relative error {error:.2e}")
    runners: dict[str, Callable[[], torch.Tensor] | None] = {
        "torch bf16": lambda: x @ half.T,
        "torch._int_mm": (lambda: torch._int_mm(q, codes.T)) if M > 16 else None,
        "lowbit ternary": lambda: ternary_linear(q, ternary, scale, **given),
        "lowbit ternary, quantizing x": lambda: ternary_linear(x, ternary, scale),
        "lowbit binary": lambda: binary_linear(q, binary, sign_scale, **given),
        "lowbit split": lambda: split_linear(q, pair, pair_scale, **given),
    }
    if peers["bitsandbytes"]:
        import bitsandbytes as bnb

        int8 = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
        int8.weight = bnb.nn.Int8Params(weight.half().cpu(), has_fp16_weights=False)
        int8 = int8.cuda()
        halves = x.half()
        runners["bitsandbytes LLM.int8"] = lambda: int8(halves)
    return runners


def linear() -> dict[str, Any]:
    """Milliseconds and ratios to bf16 at every shape."""
    peers = {name: importable(name) for name in ("bitsandbytes", "torchao", "gemlite")}
    cases = []
    for N, K in SHAPES:
        for M in TOKENS:
            runners = linear_runners(M, N, K, peers)
            times = {name: median_ms(run) if run else "not measured" for name, run in runners.items()}
            times |= {name: "not measured" for name in ("torchao", "gemlite")}
            cases.append({"M": M, "N": N, "K": K, "ms": times})
            print(cases[-1], flush=True)
    return {"peers": peers, "cases": cases}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "device": device,
    "ceilings": ceilings,
    "tests": tests,
    "linear": linear,
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
    for name in [options.only] if options.only else PARTS:
        print(f"== {name}", flush=True)
        report = PARTS[name]()
        (options.results / f"gpu-{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        if name != "linear":
            print(json.dumps(report, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
