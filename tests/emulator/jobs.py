"""What worker processes are given: numbers of cases, which they look up themselves."""

from __future__ import annotations

from . import trial
from .cases import CASES


def run_case(index: int, arch: int, seed: int) -> trial.Result:
    """Run `CASES[index]`."""
    return trial.run(CASES[index], arch, seed)
