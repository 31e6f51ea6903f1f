"""A case: inputs, a launch on them, and what it should give; running it under the emulator."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .findings import Fault
from .launch import Log, emulated

Tensors = Sequence[torch.Tensor]
GUARD = 4096  # elements before and after an input that belong to nobody
# Half of the distance between neighbouring numbers, relative to them.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Trial:
    """`launch()` reads `inputs` only; `wrong(outputs)` counts the values that differ from what they should be."""

    inputs: Sequence[torch.Tensor | None]
    launch: Callable[[], Tensors]
    wrong: Callable[[Tensors], int]


@dataclass(frozen=True)
class Case:
    """`make()` draws a trial."""

    name: str
    make: Callable[[], Trial]


@dataclass
class Result:
    """What came of a case on one architecture, over its runs."""

    name: str
    arch: int
    runs: int = 0
    launches: int = 0
    wrong: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    fault: str = ""
    instructions: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.wrong or self.findings or self.fault)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with free memory on both sides, so that what runs over its ends meets no other tensor."""
    flat = tensor.new_zeros(tensor.numel() + 2 * GUARD)
    own = flat[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return own.copy_(tensor)


def off_by(got: torch.Tensor, want: torch.Tensor, tolerance: torch.Tensor | float = 0.0) -> int:
    """How many values differ by more than the tolerance; NaN equals NaN."""
    if got.shape != want.shape:
        raise ValueError(f"the result has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    got, want = got.double(), want.double()
    same = ((got - want).abs() <= tolerance) | (got.isnan() & want.isnan()) | (got == want)
    return int((~same).sum())


def run(
    case: Case,
    arch: int,
    seed: int = 0,
    change: Callable[[str], str] = lambda ptx: ptx,
    modes: Sequence[bool] = (False, True),
) -> Result:
    """Run a case with asynchronous work done late, then (True) early, the blocks in another order each time."""
    result = Result(case.name, arch)
    start = time.perf_counter()
    for early in modes:
        torch.manual_seed(zlib.crc32(f"{seed} {case.name}".encode()))
        trial = case.make()
        log = Log()
        result.runs += 1
        try:
            with emulated(arch, trial.inputs, early=early, seed=2 * seed + early, change=change) as log:
                outputs = trial.launch()
            result.wrong += trial.wrong(outputs)
        except Fault as fault:
            result.fault = str(fault)
        result.launches += len(log.launches)
        result.instructions += log.instructions
        result.findings += log.findings.counts
        result.examples += [example for example in log.findings.examples.values() if example not in result.examples]
    result.seconds = time.perf_counter() - start
    return result
