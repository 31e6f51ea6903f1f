"""Model surgery: random programs of verbs, edits, saves and calls, each against a twin without any fast path.

The programs, and what is asked of them, are those of `tests/surgery.py`.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .soak_checkpoints import quiet

TESTS = str(Path(__file__).parents[1] / "tests")
PROGRAMS = 5_000
PROCESSES = 2
# What a step comes to; "unfit": the model has no such part, "end": nothing to compare is left, as behind what a file
# cannot say.
OUTCOMES = ("equal", "refused", "random", "dropped", "unfit", "end")
Result = dict[str, Any]


def surgery() -> Any:
    """The module of that name among the tests, by which its classes are pickled too."""
    if TESTS not in sys.path:
        sys.path.append(TESTS)
    import surgery

    return surgery


def run(case: int, seed: int) -> Result:
    """What the steps of one program came to, by the kind of step; in words what is wrong, if anything."""
    module = surgery()
    program = module.draw(seed, case)
    steps: list[tuple[str, str]] = []
    try:
        outcomes = module.check(program)
        steps = [(_kind(module, name), outcome) for name, outcome in (each.rsplit(": ", 1) for each in outcomes)]
        return {"family": program.family, "steps": steps, "failure": None}
    except Exception as error:
        return {"family": program.family, "steps": steps, "failure": f"case {case}: {program}: {error!r:.500}"}


def _kind(module: Any, name: str) -> str:
    """Verbs by their names, edits by their first word: many differ in the place only."""
    return name if name in module.VERBS else f"edit: {next(k for k, names in module.GROUPS.items() if name in names)}"


def programs(count: int, seed: int, progress: Callable[[int], None]) -> Result:
    """`count` programs, in processes side by side."""
    rows: dict[str, Counter[str]] = {}
    families: Counter[str] = Counter()
    failures: list[str] = []
    with multiprocessing.get_context("fork").Pool(PROCESSES, _begin) as pool:
        for result in pool.imap_unordered(_of, ((case, seed) for case in range(count)), chunksize=20):
            families[result["family"]] += 1
            failures += [result["failure"]] if result["failure"] else []
            for kind, outcome in result["steps"]:
                rows.setdefault(kind, Counter())[outcome] += 1
            progress(1)
    return {
        "programs": count, "rows": {kind: rows[kind] for kind in sorted(rows)},
        "families": dict(sorted(families.items())), "failures": sorted(failures),
    }  # fmt: skip


def _of(arguments: tuple[int, int]) -> Result:
    return run(*arguments)


def _begin() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as END_AT_ONCE of soak_running
    torch.set_num_threads(1)
    quiet()
