"""Parts that fail, instead of those of the run: what `benchmarks.gpu` makes of them."""

from __future__ import annotations

import sys
from pathlib import Path

from .. import gpu

_REPORT = """
import json
rows = {{"a": {{"us": 1.0}}, "b": {{"note": "WRONG: relative error 0.3"}}, "c": {{"note": "not measured: no peer"}}}}
report = dict(suite="gpu-{part}", model="m", machine={{}}, method="m", results={{"case": rows}})
open("{folder}/gpu-{part}.json", "w").write(json.dumps(report))
"""
# Goes on in a process of its own, and shows that it does.
_CHILD = """
import pathlib, time
while True:
    pathlib.Path('{folder}/alive').write_text(str(time.time()))
    time.sleep(0.05)
"""
PROGRAMS = {
    "hangs": f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {_CHILD!r}])\ntime.sleep(60)",
    "raises": "raise RuntimeError('an illegal memory access')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "wrong": _REPORT,
    "slow": "raise SystemExit(3)",
    "right": "print('fine')",
}
# Part -> state, rows, wrong rows, failed; of what hangs, how the state begins.
EXPECTED = {
    "hangs": ("ended after", 0, 0, True),
    "raises": ("failed, exit code 1", 0, 0, True),
    "killed": ("failed, exit code -9", 0, 0, True),
    "wrong": ("ok", 3, 1, False),
    "slow": ("time was up", 0, 0, False),
    "right": ("ok", 0, 0, False),
}


def command(part: str, folder: Path, seconds: float) -> list[str]:
    """In place of `gpu.command`."""
    return [sys.executable, "-c", PROGRAMS[part].format(part=part, folder=folder)]


def walk(folder: Path) -> list[gpu.Outcome]:
    """All of them in one run."""
    return gpu.run(dict.fromkeys(PROGRAMS, 1), folder, budget=9, grace=0.5, command=command)


def problems(outcomes: list[gpu.Outcome]) -> list[str]:
    """What is not as it should be."""
    found = []
    for outcome in outcomes:
        state, *rest = EXPECTED[outcome.part]
        if not outcome.state.startswith(state) or rest != [outcome.rows, outcome.wrong, outcome.failed]:
            found.append(f"failures: expected {EXPECTED[outcome.part]}, got {outcome}")
    if len(outcomes) != len(EXPECTED):
        found.append(f"failures: {len(outcomes)} parts ended of {len(EXPECTED)}")
    return found
