"""Run the cases and the mutations, print both tables, exit with 1 where something is wrong.

python -m emulator [--arch 90] [--only linear] [--mutations | --no-mutations] [--seed 1]
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from . import mutations, trial
from .cases import CASES
from .findings import KINDS
from .jobs import run_case, run_mutations

ARCHITECTURES = (80, 90)


def report(results: list[trial.Result]) -> str:
    """A line a case and architecture; what is wrong with it is below."""
    width = max((len(result.name) for result in results), default=0)
    columns = ("runs", "launches", "instructions", "wrong values", *KINDS)
    lines = [f"{'kernel':{width}}  target  {'  '.join(columns)}"]
    for result in results:
        counts = (result.runs, result.launches, result.instructions, result.wrong, *(result.findings[k] for k in KINDS))
        cells = (f"{count:{len(column)}}" for count, column in zip(counts, columns, strict=True))
        lines.append(f"{result.name:{width}}  sm_{result.arch:<3}  {'  '.join(cells)}")
        lines += [f"    STOPPED: {result.fault}"] if result.fault else []
        lines += [f"    {example}" for example in result.examples[:5]]
    runs, bad = sum(result.runs for result in results), sum(not result.clean for result in results)
    return "\n".join([*lines, f"{runs} runs, {bad} of {len(results)} lines with something wrong"])


def report_mutations(outcomes: list[mutations.Outcome]) -> str:
    """A line a kind of mutation, then those that were not noticed."""
    width = max(len(outcome.kind) for outcome in outcomes)
    columns = ("tried", "noticed", "wrong values", *KINDS, "stopped")
    lines = [f"{'mutation':{width}}  {'  '.join(columns)}"]
    for outcome in outcomes:
        counts = (outcome.tried, outcome.noticed, *(outcome.by[column] for column in columns[2:]))
        cells = (f"{count:{len(column)}}" for count, column in zip(counts, columns, strict=True))
        kind = mutations.BY_KIND[outcome.kind]
        end = "" if outcome.good else f"  TOO FEW, at least {kind.share:.0%} expected"
        if kind.invisible:
            end = f"  cannot be noticed: {kind.invisible}"
        lines.append(f"{outcome.kind:{width}}  {'  '.join(cells)}{end}")
    tried, noticed = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("tried", "noticed"))
    lines.append(f"{noticed} of {tried} noticed; not noticed:")
    return "\n".join([*lines, *(f"    {outcome.kind}: {text}" for outcome in outcomes for text in outcome.missed)])


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for, print the tables, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m emulator", description="Execute the compiled kernels.")
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="only cases, and mutations of cases, with this in their name")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and of the order of blocks")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--mutations", action="store_true", help="only the mutations")
    choice.add_argument("--no-mutations", action="store_true", help="only the cases")
    options = parser.parse_args(arguments)
    archs = options.arch or ARCHITECTURES
    cases, changes = [], []
    if not options.mutations:
        cases = [(i, arch, options.seed) for i, case in enumerate(CASES) if options.only in case.name for arch in archs]
    if not options.no_mutations:
        bases = [i for i, (name, arch) in enumerate(mutations.BASES) if options.only in name and arch in archs]
        changes = [(base, kind.name) for base in bases for kind in mutations.KINDS]
    if not cases and not changes:
        parser.error(f"no case has {options.only!r} in its name; those that there are: tests/emulator/cases")
    start, good = time.perf_counter(), True
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_case, *job) for job in cases], [pool.submit(run_mutations, *job) for job in changes]
        if cases:
            results = [job.result() for job in running[0]]
            good &= all(result.clean for result in results)
            print(report(results), flush=True)
        if changes:
            totals = {kind.name: mutations.Outcome(kind.name) for kind in mutations.KINDS}
            for job in running[1]:
                totals[job.result().kind] += job.result()
            outcomes = [outcome for outcome in totals.values() if outcome.tried]
            good &= all(outcome.good for outcome in outcomes)
            print(report_mutations(outcomes))
    print(f"{time.perf_counter() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
