"""`make rehearse`: walk `make gpu` on a machine without a GPU, and say what is wrong with it before there is one.

Every part runs its real code at the real sizes on tensors without memory (`benchmarks.rehearsal`). Launches of Triton
kernels are noted by the binary that each would take; timers call once and give a made-up constant; numbers are not
checked, for there are none. What this shows: that every part ends, that its JSON is valid, is rendered and has the rows
that the targets need, how many binaries are compiled, and a plan of seconds, which is no measurement.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from . import gpu, gpu_parts
from .rehearsal import cost, failures, required
from .rehearsal.stage import walk
from .results import count, read


def walk_all(folder: Path) -> tuple[list[cost.Notes], list[str]]:
    """Every part, with the seconds that `gpu.run` would give it; what failed, in words."""
    notes: list[cost.Notes] = []
    problems = []
    left, names = gpu.BUDGET, list(gpu.PARTS)
    for i, name in enumerate(names):
        share = max(0.0, left) * gpu.PARTS[name] / sum(gpu.PARTS[rest] for rest in names[i:])
        part, begin = cost.Notes(name, frozenset().union(*(before.binaries for before in notes))), time.process_time()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the tuner's table, whose times are made up
                walk(part, folder, share)
        except Exception as error:
            part.state = "failed"
            problems.append(f"{name}: {type(error).__name__}: {error}")
        notes.append(part)
        left -= part.seconds()
        print(f"walked {name} in {time.process_time() - begin:.0f} CPU seconds", flush=True)
    return notes, problems


def table(notes: list[cost.Notes], folder: Path) -> str:
    """One line a part; seconds by the model of `rehearsal.cost`."""
    lines = [f"{'part':10}  {'planned s':>9}  {'share s':>7}  {'new binaries':>12}  {'timings':>7}  {'rows':>5}  state"]
    for part in notes:
        path = folder / f"gpu-{part.part}.json"
        rows = count(read(path))[0] if path.exists() else 0
        lines.append(
            f"{part.part:10}  {part.seconds():9.0f}  {gpu.PARTS[part.part]:7.0f}  {len(part.new()):12}  "
            f"{part.timings:7}  {rows:5}  {part.state}"
        )
    total, new = sum(part.seconds() for part in notes), sum(len(part.new()) for part in notes)
    return "\n".join([*lines, f"{'all':10}  {total:9.0f}  {gpu.BUDGET:7.0f}  {new:12}"])


def collect() -> list[str]:
    """What keeps pytest from collecting the kernel tests with the options of the run; none is run."""
    command = [*gpu_parts.pytest_command(), "-n", "0", "--collect-only", "-q"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (ended.stdout.strip().splitlines() or [""])[-1]
    return [] if ended.returncode == 0 else [f"tests: pytest ended with {ended.returncode}: {last}"]


def main() -> int:
    logging.disable(logging.ERROR)  # what fake tensors say of operations that a part expects to fail
    warnings.simplefilter("ignore")
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["LOWBIT_CACHE_DIR"] = str(folder / "tiles")
        notes, found = walk_all(folder)
        print(f"\nNo GPU: seconds are a plan for {cost.PROCESSES} cores (rehearsal/cost.py), not measured.\n")
        print(table(notes, folder))
        found += required.problems(folder)
        found += [f"smoke launches no {kernel}" for kernel in required.unlaunched(notes[0].binaries)]
        if not required.tuned(folder / "tiles"):
            found.append("tune has written no table")
        # The tuner, which comes last, takes what is left, and at least its share.
        taken, most = sum(part.seconds() for part in notes[:-1]), gpu.BUDGET - gpu.PARTS["tune"]
        if taken > most or taken + notes[-1].seconds() > gpu.BUDGET + gpu.GRACE:
            found.append(f"all but tune are planned for {taken:.0f} s, of {most:.0f}")
        if (ahead := cost.warm_seconds(notes)) > gpu.PARTS["warm"]:
            found.append(f"compiling ahead takes {ahead:.0f} s, its share is {gpu.PARTS['warm']} s")
    with tempfile.TemporaryDirectory() as name:
        print("\nParts that fail:\n")
        outcomes = failures.walk(Path(name))
        print(gpu.table(outcomes))
        found += failures.problems(outcomes)
    found += collect()
    print(
        *(["", "WRONG:", *found] if found else ["", f"All as it should be, {time.process_time() - begin:.0f} CPU s."]),
        sep="\n",
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
