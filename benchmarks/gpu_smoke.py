"""One launch of every kernel, each in a process of its own that waits for it, beside the same op on the CPU.

So the kernel that is wrong, or that ends its process, is known by name within the first minute.

    python -m benchmarks.gpu_smoke NAME         one of them: prints its row as JSON
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import lowbit_kernels as kernels

from .gpu_timing import Clock
from .results import WRONG, Row, Suite

CASE = "one launch"
SECONDS = 90.0  # most of one process, the start of Python and torch included
DIFFERENT_CODES = 0.01  # of all: values on a tie between two codes
Outputs = dict[str, torch.Tensor]
Check = Callable[[str], Outputs]  # takes the device

CHECKS: dict[str, Check] = {}


def _check(run: Check) -> Check:
    CHECKS[run.__name__.strip("_").replace("_", " ")] = run
    return run


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _named(outputs: Any) -> Outputs:
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    return {str(i): part for i, part in enumerate(parts) if isinstance(part, torch.Tensor)}


# ------------------------------------------------------------------------------------------------------------- linears


def _linear(layout: str, M: int, N: int, K: int, device: str) -> Outputs:
    codes, scale = kernels.binarize(_random(N, K)) if layout != "ternary" else kernels.ternarize(_random(N, K))
    x, x_scale, x_zero = kernels.quantize_per_token(_random(M, K, seed=1), symmetric=False)
    assert x_zero is not None
    packed = kernels.pack_ternary(codes) if layout == "ternary" else kernels.pack_binary(codes)
    if layout == "split":
        packed, scale = kernels.pack_split(codes, codes.flip(0)), torch.stack([scale, scale / 2])
    given = [part.to(device) for part in (x, packed, scale, _random(N, seed=2))]
    quantized = {"x_scale": x_scale.to(device), "x_zero_point": x_zero.to(device)}
    linear = {"ternary": kernels.ternary_linear, "binary": kernels.binary_linear, "split": kernels.split_linear}[layout]
    return _named(linear(*given, **quantized, activation="gelu", out_dtype=torch.float32))


@_check
def ternary_linear(device: str) -> Outputs:
    return _linear("ternary", 300, 768, 768, device)


@_check
def binary_linear(device: str) -> Outputs:
    return _linear("binary", 300, 768, 768, device)


@_check
def split_linear(device: str) -> Outputs:
    return _linear("split", 300, 768, 768, device)


@_check
def sliced_linear(device: str) -> Outputs:
    return _linear("ternary", 64, 768, 3072, device)


@_check
def ragged_linear(device: str) -> Outputs:
    return _linear("ternary", 71, 70, 300, device)


@_check
def small_linear(device: str) -> Outputs:
    return _linear("ternary", 5, 768, 768, device)


@_check
def linear_of_codes(device: str) -> Outputs:
    codes, scale = kernels.ternarize(_random(768, 300))
    x, x_scale, x_zero = kernels.quantize_per_token(_random(70, 300, seed=1), symmetric=False)
    assert x_zero is not None
    given = [part.to(device) for part in (x, codes, scale)]
    quantized = [x_scale.to(device), x_zero.to(device)]
    return _named(kernels.codes_linear(*given, None, *quantized, "ternary", torch.float32))


# ------------------------------------------------------------------------------------------- packing and quantization


@_check
def pack(device: str) -> Outputs:
    signs = _random(70, 300).sign().to(torch.int8)
    ternary = (signs * (_random(70, 300, seed=1) > 0)).to(torch.int8)
    packed = (
        kernels.pack_ternary(ternary.to(device)),
        kernels.pack_binary(signs.to(device)),
        kernels.pack_split(signs.to(device), signs.flip(0).to(device)),
    )
    return _named(packed)


@_check
def quantize_per_token(device: str) -> Outputs:
    x = _random(300, 768, dtype=torch.float16).to(device)
    return _named(kernels.quantize_per_token(x) + kernels.quantize_per_token(x, symmetric=False))


@_check
def quantize_per_tensor(device: str) -> Outputs:
    return _named(kernels.quantize_per_tensor(_random(300, 768).to(device), symmetric=False))


@_check
def fake_quantize(device: str) -> Outputs:
    return _named(kernels.fake_quantize_per_token(_random(2, 12, 50, 64).to(device), symmetric=False))


@_check
def ternarize(device: str) -> Outputs:
    w, curvature = _random(70, 768).to(device), _random(70, 768, seed=1).abs().to(device)
    by_row, loss_aware = kernels.ternarize(w), kernels.ternarize(w, curvature=curvature)
    return _named(by_row + loss_aware)


@_check
def ternarize_a_tensor(device: str) -> Outputs:
    w, curvature = _random(300, 768).to(device), _random(300, 768, seed=1).abs().to(device)
    whole = kernels.ternarize(w, granularity="per_tensor")
    return _named(whole + kernels.ternarize(w, granularity="per_tensor", curvature=curvature))


@_check
def binarize(device: str) -> Outputs:
    w = _random(70, 768).to(device)
    return _named(kernels.binarize(w) + kernels.binarize(w, granularity="per_tensor"))


@_check
def split_weights(device: str) -> Outputs:
    w = _random(70, 768).to(device)
    return _named(kernels.split_ternary(w) + kernels.split_ternary(w, granularity="per_tensor"))


# ------------------------------------------------------------------------------------------- embeddings and LayerNorm


def _table() -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = kernels.ternarize(_random(1000, 768))
    return kernels.pack_ternary(codes), scale


@_check
def embedding(device: str) -> Outputs:
    packed, scale = _table()
    ids = torch.arange(0, 1000, 7).to(device)
    return _named(kernels.quantized_embedding(ids, packed.to(device), scale.to(device), 2, embedding_dim=768))


@_check
def embedding_layernorm(device: str) -> Outputs:
    packed, scale = _table()
    ids, positions = torch.arange(0, 1000, 7), torch.arange(143)
    tables = [_random(2, 768), positions, _random(512, 768, seed=1), _random(768), _random(768, seed=1)]
    given = [part.to(device) for part in (ids, packed, scale)]
    rest = [part.to(device) for part in (torch.zeros_like(ids), *tables)]
    return _named(kernels.embedding_layernorm(*given, 2, *rest, bits=8, symmetric=False))


@_check
def add_layernorm(device: str) -> Outputs:
    x, residual = (_random(300, 768, seed=seed).to(device) for seed in (0, 1))
    weight, bias = (_random(768, seed=seed).to(device) for seed in (0, 1))
    return _named(kernels.add_layernorm(x, residual, weight, bias, bits=8, symmetric=False))


# ----------------------------------------------------------------------------------------- attention and dropped tokens

ENDS = (0, 128, 129, 200, 384)


def _attention(device: str, gradients: bool = False, **extras: Any) -> Outputs:
    joint = _random(ENDS[-1], 3, 12, 64).to(device).requires_grad_(gradients)
    ends = torch.tensor(ENDS, dtype=torch.int32, device=device)
    result = kernels.attention(*joint.unbind(1), ends, 184, **extras)
    if not gradients:
        return _named(tuple(result) if isinstance(result, tuple) else result)
    return _named(torch.autograd.grad(result, joint, _random(ENDS[-1], 12, 64, seed=1).to(device)))


@_check
def attention(device: str) -> Outputs:
    return _attention(device, return_lse=True)


@_check
def attention_with_importance(device: str) -> Outputs:
    return _attention(device, importance="all")


@_check
def attention_with_importance_of_cls(device: str) -> Outputs:
    return _attention(device, importance="cls")


@_check
def attention_8_bits(device: str) -> Outputs:
    return _attention(device, bits=8, importance="all")


@_check
def attention_gradients(device: str) -> Outputs:
    return _attention(device, gradients=True)


@_check
def attention_8_bits_gradients(device: str) -> Outputs:
    return _attention(device, gradients=True, bits=8)


@_check
def select_tokens(device: str) -> Outputs:
    importance, ends = _random(ENDS[-1]).to(device), torch.tensor(ENDS, dtype=torch.int32, device=device)
    kept = sum(math.ceil(0.5 * (end - begin)) for begin, end in itertools.pairwise(ENDS))
    return _named(kernels.select_tokens(importance, ends, 0.5, max_seqlen=184, num_tokens=kept))


# ------------------------------------------------------------------------------------------------------------- the part


def compare(expected: Outputs, found: Outputs, tolerance: float) -> str | None:
    """What is wrong with what was found, in words: codes differ in more than ties, or floats beyond the tolerance."""
    if set(expected) != set(found):
        return f"outputs {sorted(found)}, expected {sorted(expected)}"
    for name, want in expected.items():
        got = found[name].cpu()
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"output {name} is {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
        difference = (got.double() - want.double()).abs()
        if want.dtype.is_floating_point:
            error = float(difference.norm() / want.double().norm())
            if not error < tolerance:
                return f"output {name} has relative error {error:.2e}, accepted {tolerance:.0e}"
        elif float((difference > 0).double().mean()) > DIFFERENT_CODES:
            return f"output {name} differs in {float((difference > 0).double().mean()):.1%} of its integers"
    return None


def row_of(name: str, device: str = "cuda") -> Row:
    """Run a check on the CPU and on the device."""
    expected = {part: x.detach() for part, x in CHECKS[name]("cpu").items()}
    found = {part: x.detach() for part, x in CHECKS[name](device).items()}
    # 8 bits turn rounding into steps of a code, which attention adds up.
    tolerance = 5e-2 if "8 bits" in name else 1e-3
    problem = compare(expected, found, tolerance)
    return {"note": f"{WRONG}{problem}"} if problem else {"result": "as on the CPU"}


def isolated(name: str, seconds: float, log: Path) -> Row:
    """`row_of` in a process of its own; one that ends by a signal or an error is wrong, and its output is kept."""
    command = [sys.executable, "-m", "benchmarks.gpu_smoke", name]
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"note": f"{WRONG}not done after {seconds:.0f} s"}
    if ended.returncode == 0:
        return json.loads(ended.stdout.splitlines()[-1])
    log.write_text(ended.stderr)
    last = (ended.stderr.strip().splitlines() or [""])[-1]
    return {"note": f"{WRONG}exit code {ended.returncode}: {last[:160]}, see {log.name}"}


def head(machine: dict[str, Any]) -> dict[str, Any]:
    """The report around results."""
    return {
        "suite": "gpu-smoke",
        "model": "one launch of every kernel beside the same op on the CPU",
        "machine": machine,
        "method": "a process a row, CUDA_LAUNCH_BLOCKING=1; floats by relative error, codes but for ties",
    }


def run(folder: Path, clock: Clock, machine: dict[str, Any]) -> None:
    """All checks, as many at a time as there are cores."""
    suite = Suite(folder, head(machine))
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def check(name: str) -> Row:
        return isolated(name, max(0.0, min(SECONDS, clock.left())), logs / f"smoke-{name.replace(' ', '-')}.log")

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pending = {pool.submit(check, name): name for name in CHECKS}
        for future in as_completed(pending):
            suite.add(CASE, pending[future], future.result())


if __name__ == "__main__":
    print(json.dumps(row_of(sys.argv[1])))
