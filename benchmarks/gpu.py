"""The GPU run, in a time that is fixed before: correctness, whole models, linears, attention, training, tests, tiles.

    make gpu RESULTS=DIR BUDGET=480         all parts            make gpu RESULTS=DIR ONLY=linear         one part

No network, the current Python. Each part is a process of its own, in a group of its own that is ended at the part's
limit: one that fails, hangs or leaves the device unusable takes no other with it. Parts share the seconds of BUDGET by
`PARTS`; what one leaves goes to those after it, and each begins nothing once its share is over. Rows are written as
they come, so a run that is cut off keeps what it has. A peer that does not run here is in the tables as not measured,
with the reason; a number that is wrong is marked, and nothing stops.

Exit code 1 where a part failed, was ended at its limit, or has a wrong row. docs/gpu-run.md says more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .results import count, read

BUDGET = 480.0
GRACE = 15.0  # seconds beyond its share in which a part may end what it has begun
NO_GPU = 4  # exit codes of benchmarks.gpu_parts
TIME_UP = 3

# In this order, with their shares of the budget. That there is a wrong kernel is known first; then what the targets are
# stated for; what can be done again elsewhere, last.
PARTS = {
    "smoke": 45,
    "warm": 60,
    "model": 130,
    "ceilings": 10,
    "linear": 50,
    "attention": 45,
    "training": 25,
    "tests": 75,
    "tune": 40,
}


# No network; and nothing waits for a C++ compiler, since CPUs only compute what the device is compared with.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LOWBIT_CPU": "torch"}
WITHOUT_JSON = ("warm", "tune")  # binaries and a table of tiles


class Outcome(NamedTuple):
    """How a part ended."""

    part: str
    seconds: float
    state: str
    rows: int
    wrong: int
    failed: bool


Command = Callable[[str, Path, float], list[str]]


def command(part: str, folder: Path, seconds: float) -> list[str]:
    """What runs a part for at most so many seconds."""
    return [sys.executable, "-m", "benchmarks.gpu_parts", part, "--results", str(folder), "--seconds", f"{seconds:.1f}"]


def run_part(part: str, folder: Path, seconds: float, grace: float = GRACE, command: Command = command) -> Outcome:
    """Run a part, its output into a log, and end whatever it leaves running."""
    log, report = folder / "logs" / f"{part}.log", folder / f"gpu-{part}.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    earlier, begin = _changed(report), time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(part, folder, seconds), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=seconds + grace)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    rows, wrong = _count(report) if _changed(report) != earlier else (0, 0)
    states = {0: "ok", TIME_UP: "time was up", NO_GPU: "no CUDA device", None: f"ended after {seconds + grace:.0f} s"}
    state = states.get(code, f"failed, exit code {code}")
    return Outcome(part, time.perf_counter() - begin, state, rows, wrong, code not in (0, TIME_UP))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Of a part, pytest's workers and compilers included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _count(path: Path) -> tuple[int, int]:
    try:
        return count(read(path))
    except ValueError:  # the part is told to have failed anyway
        return 0, 0


def run(
    parts: dict[str, float], folder: Path, budget: float, grace: float = GRACE, command: Command = command
) -> list[Outcome]:
    """Run the parts one after the other within `budget` seconds (and one grace), and say how each ended as it ends."""
    end, outcomes, names = time.perf_counter() + budget, [], list(parts)
    for i, part in enumerate(names):
        left = max(0.0, end - time.perf_counter())
        share = left * parts[part] / sum(parts[name] for name in names[i:])
        print(f"== {part}: {share:.0f} s", flush=True)
        outcome = run_part(part, folder, share, grace, command)
        outcomes.append(outcome)
        if outcome.failed:
            print(*tail(folder / "logs" / f"{part}.log"), sep="\n")
        print(f"   {outcome.state}, {outcome.seconds:.0f} s, {outcome.rows} rows, {outcome.wrong} wrong", flush=True)
        if outcome.state == "no CUDA device":
            break
    return outcomes


def tail(log: Path, lines: int = 12) -> list[str]:
    """The end of a log."""
    return ["   | " + line[:200] for line in log.read_text(errors="replace").strip().splitlines()[-lines:]]


def table(outcomes: list[Outcome]) -> str:
    """One line a part, and the rows that are wrong by name in the JSON."""
    lines = [f"{'part':10}  {'seconds':>7}  {'rows':>5}  {'wrong':>5}  state"]
    lines += [f"{o.part:10}  {o.seconds:7.0f}  {o.rows:5}  {o.wrong:5}  {o.state}" for o in outcomes]
    return "\n".join([*lines, f"{'all':10}  {sum(o.seconds for o in outcomes):7.0f}"])


def _stop(*_: object) -> None:
    raise SystemExit(143)  # so that the group of the part that runs is ended


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu-*.json, logs and tiles")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all parts (default {BUDGET:.0f})")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("LOWBIT_CACHE_DIR", str(options.results.resolve() / "tiles"))
    outcomes = run({options.only: 1} if options.only else dict(PARTS), options.results, options.budget)
    print(table(outcomes))
    if outcomes[-1].state == "no CUDA device":
        print("make gpu needs a CUDA device, and torch sees none; nothing was measured", file=sys.stderr)
    return 1 if any(outcome.failed or outcome.wrong for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
