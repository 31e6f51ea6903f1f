"""What a rehearsal notes of a run, and the seconds that it expects of it: a plan, no measurement.

The constants are stated, not found on a GPU, and none is written into results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lowbit_kernels.ahead import Binary

PROCESSES = 16  # cores of the machine that is planned for
# CPU seconds: 1.3 of a linear's tile with Triton 3.7 on a server's core, most other kernels take less.
BINARY_SECONDS = 1.5
BINARY_LOAD_SECONDS = 0.01  # of one that is in Triton's cache on disk: it is read and handed to the driver
START_SECONDS = 12.0  # assumed: Python, torch and transformers from a cold disk, and the first use of the device
# Of Python and the dispatcher, for an operation of torch or a launch: a fused BERT-base has about 500 and takes 13 ms.
OPERATION_SECONDS = 30e-6
LAYER_COMPILE_SECONDS = 8.0  # assumed: Inductor for one layer and one shape
MODEL_COMPILE_SECONDS = 90.0  # assumed: Inductor with max-autotune for a model and one shape
BENCH_CALLS = 7  # of do_bench besides the time asked for: one, five to estimate, one to warm up
GRAPH_CALLS = 7  # of do_bench_cudagraph before it captures
GRAPH_REPLAYS = 10
# The kernel tests: 1,314 binaries of 0.4 CPU seconds, counted on a simulated device, and the start of pytest's workers.
TEST_SECONDS = 1314 * 0.4 / PROCESSES + 2 * START_SECONDS


@dataclass
class Notes:
    """What one part did."""

    part: str
    binaries: list[Binary] = field(default_factory=list)
    timings: int = 0
    seconds: float = 0.0  # of timings, compilers of torch, and energy
    operations: int = 0
    compiled: set[object] = field(default_factory=set)  # by torch.compile

    def bench(self, warmup: float, rep: float, operations: int) -> None:
        """do_bench of a call of so many operations; `warmup` and `rep` in milliseconds."""
        self.timings += 1
        self.seconds += (warmup + rep) / 1000 + BENCH_CALLS * operations * OPERATION_SECONDS

    def bench_graph(self, rep: float, operations: int) -> None:
        """do_bench_cudagraph, whose graph holds what Python could call in `rep` milliseconds."""
        self.timings += 1
        calls = GRAPH_CALLS * operations * OPERATION_SECONDS + rep / 1000
        self.seconds += calls + GRAPH_REPLAYS * rep / 1000

    def compile(self, what: object, seconds: float) -> None:
        """torch.compile, once for what is equal."""
        if what not in self.compiled:
            self.compiled.add(what)
            self.seconds += seconds


WARMED = ("model", "linear", "attention", "training")  # parts whose binaries are compiled before


def new_binaries(notes: Iterable[Notes]) -> dict[str, int]:
    """Part -> how many binaries it is the first to launch."""
    seen: set[Binary] = set()
    found = {}
    for part in notes:
        found[part.part] = len(set(part.binaries) - seen)
        seen |= set(part.binaries)
    return found


def expected_seconds(notes: list[Notes]) -> dict[str, float]:
    """Part -> seconds on a machine of `PROCESSES` cores."""
    new = new_binaries(notes)
    ahead = sum(new[part] for part in WARMED if part in new) * BINARY_SECONDS / PROCESSES
    found = {}
    for part in notes:
        own = START_SECONDS + part.seconds + part.operations * OPERATION_SECONDS
        loads = len(set(part.binaries)) * BINARY_LOAD_SECONDS
        if part.part == "smoke":  # a start of Python for each check, as many at a time as there are cores
            own += -(-part.timings // PROCESSES) * START_SECONDS + new["smoke"] * BINARY_SECONDS / PROCESSES
        elif part.part == "warm":  # walks the parts once, each in a process of its own
            own += ahead + START_SECONDS
        elif part.part == "tests":
            own += TEST_SECONDS
        elif part.part not in WARMED:  # tiles are compiled in as many processes while others are timed
            own += new[part.part] * BINARY_SECONDS / PROCESSES
        found[part.part] = own + loads
    return found
