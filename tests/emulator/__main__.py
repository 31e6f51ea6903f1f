"""Run the cases and the mutations, print both tables, exit with 1 where something is wrong.

    python -m emulator [--arch 90] [--only linear] [--no-mutations | --mutations]
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from . import trial
from .cases import CASES
from .jobs import run_case

ARCHITECTURES = (80, 90)


def report(results: list[trial.Result]) -> str:
    """A line a case and architecture; what is wrong with it is below."""
    width = max(len(result.name) for result in results)
    columns = "runs  launches  instructions  wrong values  races  out of bounds  misaligned  uninitialised  order"
    lines = [f"{'kernel':{width}}  target  {columns}"]
    for r in results:
        counts = (r.findings[kind] for kind in ("race", "out of bounds", "misaligned", "uninitialised", "order"))
        a, b, c, d, e = counts
        lines.append(
            f"{r.name:{width}}  sm_{r.arch:<3}  {r.runs:4}  {r.launches:8}  {r.instructions:12}  {r.wrong:12}  {a:5}  "
            f"{b:13}  {c:10}  {d:13}  {e:5}"
        )
        lines += [f"    {text}" for text in ([f"FAULT: {r.fault}"] if r.fault else []) + r.examples[:5]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m emulator", description="Execute the compiled kernels.")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and of the order of blocks")
    options = parser.parse_args(arguments)
    chosen = [i for i, case in enumerate(CASES) if options.only in case.name]
    work = [(i, arch, options.seed) for i in chosen for arch in options.arch or ARCHITECTURES]
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(run_case, *zip(*work, strict=True)))
    print(report(results))
    return int(not all(result.clean for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
