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


WALK_SECONDS = 30.0  # assumed: of a part by gpu_warm, which finds what to compile


@dataclass
class Notes:
    """What one part did, and the seconds that it takes on a machine of `PROCESSES` cores."""

    part: str
    earlier: frozenset[Binary] = frozenset()  # what parts before it have compiled
    binaries: set[Binary] = field(default_factory=set)
    timings: int = 0
    operations: int = 0
    state: str = "ok"
    compiled: set[object] = field(default_factory=set)  # by torch.compile
    _seconds: float = 0.0  # of timings, compilers of torch, and energy

    def bench(self, warmup: float, rep: float, operations: int) -> None:
        """do_bench of a call of so many operations; `warmup` and `rep` in milliseconds."""
        self.timings += 1
        self.wait((warmup + rep) / 1000 + BENCH_CALLS * operations * OPERATION_SECONDS)

    def bench_graph(self, rep: float, operations: int) -> None:
        """do_bench_cudagraph, whose graph holds what Python could call in `rep` milliseconds."""
        self.timings += 1
        calls = GRAPH_CALLS * operations * OPERATION_SECONDS + rep / 1000
        self.wait(calls + GRAPH_REPLAYS * rep / 1000)

    def compile(self, what: object, seconds: float) -> None:
        """torch.compile, once for what is equal."""
        if what not in self.compiled:
            self.compiled.add(what)
            self.wait(seconds)

    def wait(self, seconds: float) -> None:
        """Whatever else takes time."""
        self._seconds += seconds

    def new(self) -> set[Binary]:
        """Binaries that no part before it has launched."""
        return self.binaries - self.earlier

    def seconds(self) -> float:
        """So far."""
        own = START_SECONDS + self._seconds + self.operations * OPERATION_SECONDS
        own += len(self.binaries) * BINARY_LOAD_SECONDS
        # gpu_warm compiles those of its parts; what smoke and the tuner launch is compiled by as many processes, too.
        return own + (0.0 if self.part in WARMED else len(self.new()) * BINARY_SECONDS / PROCESSES)


WARMED = ("model", "linear", "attention", "training")


def warm_seconds(notes: Iterable[Notes]) -> float:
    """What compiling ahead takes: a walk through the longest part, and all that is new in those that are warmed."""
    new = sum(len(part.new()) for part in notes if part.part in WARMED)
    return START_SECONDS + WALK_SECONDS + new * BINARY_SECONDS / PROCESSES
