"""Long inputs on a CPU: time and memory of a packed BERT-base, fused and module by module, beside float32.

    python -m benchmarks.cpu_long --results benchmarks/results

Each row of a turn is a process of its own, so that peaks of memory do not meet. Half of the rows are half full.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .results import Row, write

CASES = ((16, 128), (16, 512), (4, 512))  # batch, length; of 512 positions there are no more
RUNNERS = ("float32 SDPA", "lowbit ternary 2-2-8", "lowbit ternary 2-2-8, module by module")
TURNS = 3


def measure(runner: str, batch: int, length: int, layers: int = 12) -> dict[str, float]:
    """Milliseconds of the faster of two calls, and MB that memory grows by at its peak, in this process."""
    import torch
    from transformers import BertConfig, BertModel

    import lowbit

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()
    if runner != RUNNERS[0]:
        lowbit.quantize(model, lowbit.TernaryConfig())
    if runner == RUNNERS[2]:
        for module in model.modules():  # a hook wants to see each of them run
            module.register_forward_hook(lambda *_: None)
    ids = torch.randint(1000, 20000, (batch, length))
    mask = torch.ones_like(ids)
    mask[::2, length // 2 :] = 0
    with torch.inference_mode():
        model(ids[:1, :16])  # kernels are compiled, layers tried
        before, times = _megabytes("VmRSS"), []
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(2):
            begin = time.perf_counter()
            model(input_ids=ids, attention_mask=mask)
            times.append(time.perf_counter() - begin)
    return {"ms": min(times) * 1e3, "MB": _megabytes("VmHWM") - before}


def _megabytes(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6


def run(turns: int, layers: int) -> dict[str, dict[str, Row]]:
    """All cases: medians of the turns, and ratios to float32 within a turn."""
    results: dict[str, dict[str, Row]] = {}
    for batch, length in CASES:
        found: dict[str, list[dict[str, float]]] = {runner: [] for runner in RUNNERS}
        for turn in range(turns):
            for runner in RUNNERS:
                call = f"measure({runner!r}, {batch}, {length}, {layers})"
                program = f"import json; from benchmarks.cpu_long import measure; print(json.dumps({call}))"
                output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
                found[runner].append(json.loads(output.stdout.splitlines()[-1]))
                print(f"batch {batch}, length {length}, turn {turn}: {runner}: {found[runner][-1]}", flush=True)
        rows: dict[str, Row] = {}
        for runner, turns_of in found.items():
            row: Row = {}
            for name, digits in (("ms", 0), ("MB", 0)):
                ratios = [own[name] / base[name] for own, base in zip(turns_of, found[RUNNERS[0]], strict=True)]
                row[name] = round(statistics.median(own[name] for own in turns_of), digits)
                row[f"{name}, times float32"] = round(statistics.median(ratios), 2)
            rows[runner] = row
        results[f"batch {batch}, length {length}"] = rows
    return results


def main() -> None:
    from .cpu import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "suite": "cpu-long",
        "model": "BERT-base in evaluation mode, half of the rows half full",
        "machine": machine(),
        "method": f"medians of {options.turns} turns, each row in a process of its own; MB beyond the loaded model",
        "results": run(options.turns, options.layers),
    }
    print(write(report, options.results))


if __name__ == "__main__":
    main()
