"""What the results of a run must hold: the rows that the targets are stated for, and a launch of every kernel."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lowbit_kernels import configs
from lowbit_kernels.ahead import Binary
from lowbit_kernels.aot import MODULES

from .. import gpu_linear, report
from ..gpu import PARTS, WITHOUT_JSON
from ..results import count, read

SIZES = ("BERT-base", "BERT-large")
MODEL_CASES = [(1, 128, ""), (8, 128, ""), (32, 128, ""), (32, 128, ", ragged"), (32, 384, "")]
MODEL_RUNNERS = ("HF SDPA", "lowbit ternary, fused", "lowbit ternary, fused, graphs")
COMPILED_CASES = [(1, 128, ""), (32, 128, ""), (32, 128, ", ragged")]
LINEAR_RUNNERS = ("torch bf16", "torch._int_mm, quantizing x", "lowbit ternary, x int8", "lowbit binary, x int8")
ATTENTION_RUNNERS = ("SDPA, padded", "lowbit", "lowbit, importance", "lowbit 8 bits", "HF eager, importance")

Row = tuple[str, str, str, str]  # suite, case, runner, column


def rows() -> Iterator[Row]:
    """All that the targets need."""
    for size in SIZES:
        for batch, length, ragged in MODEL_CASES:
            case = f"{size}, batch {batch}, length {length}{ragged}"
            yield from (("gpu-model", case, runner, "ms") for runner in MODEL_RUNNERS)
        for batch, length, ragged in COMPILED_CASES:
            case = f"{size}, batch {batch}, length {length}{ragged}"
            yield "gpu-model", case, "HF SDPA, compiled, graph", "ms"
        for ragged in ("", ", ragged"):
            case = f"{size}, batch 32, length 384{ragged}, float16"
            yield from (("gpu-attention", case, runner, "us") for runner in ATTENTION_RUNNERS)
            yield "gpu-attention", case, "lowbit", "us with gradients"
    yield "gpu-model", "BERT-base, batch 32, length 384", "lowbit ternary, fused, graphs, dropping tokens", "ms"
    yield "gpu-model", "BERT-base, batch 32, length 128", "lowbit ternary, fused, graphs", "J/batch"
    for N, K in gpu_linear.BERT_BASE + gpu_linear.BERT_LARGE:
        for M in gpu_linear.TOKENS:
            yield from (("gpu-linear", f"M={M} N={N} K={K}", runner, "us") for runner in LINEAR_RUNNERS)
            yield "gpu-linear", f"M={M} N={N} K={K}", "lowbit ternary, x int8", "of roofline"
    yield "gpu-ceilings", "ceilings", "torch", "int8_top_per_s"
    for runner in ("fine-tuning bf16", "lowbit ternary", "lowbit binary", "lowbit split pair"):
        yield "gpu-training", "batch 32, length 128", runner, "ms/step"


def problems(folder: Path) -> list[str]:
    """What the JSON in a folder lacks, or has that is wrong; each is validated, and rendered as the docs are."""
    reports = {}
    found = []
    for part in PARTS:
        if part in WITHOUT_JSON:
            continue
        try:
            reports[f"gpu-{part}"] = read(folder / f"gpu-{part}.json")
        except (OSError, ValueError) as error:
            found.append(f"{part} left no report: {error}")
    for suite, content in reports.items():
        if wrong := count(content)[1]:
            found.append(f"{suite}: {wrong} wrong rows")
        report.plot(content, folder)
    report.page(list(reports.values()), {})
    for suite, case, runner, column in rows():
        if column not in reports.get(suite, {}).get("results", {}).get(case, {}).get(runner, {}):
            found.append(f"{suite} lacks {column!r} of {runner!r} in {case!r}")
    return found


def unlaunched(binaries: Iterable[Binary]) -> list[str]:
    """Kernels of the package of which none was launched."""
    launched = {(binary.module, binary.kernel) for binary in binaries}
    modules = [importlib.import_module(f"lowbit_kernels.{name}") for name in MODULES]
    kernels = {
        (value.__module__, n) for module in modules for n, value in vars(module).items() if n.endswith("_kernel")
    }
    return [f"{module}.{name}" for module, name in sorted(kernels - launched)]


def tuned(folder: Path) -> int:
    """Entries of the table that the tuner has written."""
    return sum(len(configs.read(path)) for path in folder.glob("sm_*.json"))
