"""What worker processes are given: numbers of cases, which they look up themselves."""

from __future__ import annotations

from . import mutations, trial
from .cases import CASES


def run_case(index: int, arch: int, seed: int) -> trial.Result:
    """Run `CASES[index]`."""
    return trial.run(CASES[index], arch, seed)


def run_mutations(base: int, kind: str) -> mutations.Outcome:
    """Try a kind of mutation on `mutations.BASES[base]`."""
    return mutations.run(base, mutations.BY_KIND[kind])
