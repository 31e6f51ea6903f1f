"""Everything that a run on a GPU asks of the machine, replaced; parts of the run walk on it in this process."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from lowbit_kernels import configs
from lowbit_kernels.ahead import Binary, recording

from .. import gpu_parts
from ..gpu_timing import WATTS_SECONDS, Clock, TimeUp
from . import cost
from .cuda import ARCH, fake_cuda
from .tensors import Values, fake_tensors

MADE_UP_MS = 1.0  # what every timing gives: no time is measured
MADE_UP_WATTS = 1.0
TEST_LINE = "tests/kernels/test_made_up.py::test_triton_nothing PASSED"


class Inline(Executor):
    """Runs at once what is submitted: fake tensors are of one thread."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class NoCompilers:
    """In place of `ahead.Compilers`: everything compiles."""

    def __init__(self, arch: int, processes: int | None = None) -> None:
        self.arch = arch

    def submit(self, binary: Binary) -> Future[None]:
        return Inline().submit(lambda: None)

    def close(self) -> None:
        pass


def _timers(notes: cost.Notes, values: Values) -> dict[str, Any]:
    def operations(run: Callable[[], Any]) -> int:
        before = values.operations
        run()
        return values.operations - before

    def do_bench(run: Callable[[], Any], warmup: float = 25, rep: float = 100, **_: Any) -> float:
        notes.bench(warmup, rep, operations(run))
        return MADE_UP_MS

    def do_bench_cudagraph(run: Callable[[], Any], rep: float = 20, **_: Any) -> float:
        number = operations(run)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            run()
        notes.bench_graph(rep, number)
        return MADE_UP_MS

    return {"do_bench": do_bench, "do_bench_cudagraph": do_bench_cudagraph}


def _shapes(args: Any, kwargs: Any) -> tuple[Any, ...]:
    given = [*args, *kwargs.values()]
    return tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in given)


def _compile(notes: cost.Notes) -> Callable[..., Any]:
    """In place of torch.compile: the same thing uncompiled, whose shapes are noted."""

    def compile(model: Any, **_: Any) -> Any:
        @functools.wraps(model.forward if isinstance(model, torch.nn.Module) else model)
        def run(*args: Any, **kwargs: Any) -> Any:
            notes.compile((id(model), _shapes(args, kwargs)), cost.MODEL_COMPILE_SECONDS)
            return model(*args, **kwargs)

        return run

    return compile


def _compile_module(notes: cost.Notes) -> Callable[..., Any]:
    """In place of nn.Module.compile; modules of one class and size share what is compiled."""

    def compile(module: torch.nn.Module, **_: Any) -> None:
        size = sum(parameter.numel() for parameter in module.parameters())
        forward = module.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            notes.compile((type(module), size, _shapes(args, kwargs)), cost.LAYER_COMPILE_SECONDS)
            return forward(*args, **kwargs)

        module.forward = noted  # type: ignore[method-assign]

    return compile


def _smoke(notes: cost.Notes) -> Callable[..., Any]:
    from ..gpu_smoke import row_of

    def isolated(name: str, seconds: float, log: Path) -> Any:
        notes.timings += 1
        if notes.timings % cost.PROCESSES == 1:  # as many processes at a time as there are cores
            notes.wait(cost.START_SECONDS)
        return row_of(name)

    return isolated


@contextlib.contextmanager
def stage(notes: cost.Notes, noted: Callable[[Binary], object] | None = None, arch: int = ARCH) -> Iterator[Values]:
    """Everything inside runs as if there were a device; `noted` is called with the binary of every launch."""
    import triton.testing

    from lowbit_kernels import tune

    from .. import gpu_model, gpu_smoke, gpu_warm

    def note(binary: Binary) -> None:
        notes.binaries.add(binary)
        notes.operations = values.operations
        if noted is not None:
            noted(binary)

    def watts(run: Callable[[], Any]) -> float:
        run()
        notes.wait(WATTS_SECONDS)
        return MADE_UP_WATTS

    with contextlib.ExitStack() as replaced:
        values = replaced.enter_context(fake_tensors())
        replaced.enter_context(fake_cuda(values, arch))
        replaced.enter_context(recording(arch, note))
        replacements: list[tuple[Any, dict[str, Any]]] = [
            (triton.testing, _timers(notes, values)),
            (torch, {"compile": _compile(notes)}),
            (torch.nn.Module, {"compile": _compile_module(notes)}),
            (gpu_model, {"mean_watts": watts}),
            (gpu_smoke, {"ThreadPoolExecutor": Inline, "isolated": _smoke(notes)}),
            (gpu_parts, {"pytest_command": lambda: [sys.executable, "-c", f"print({TEST_LINE!r})"]}),
            (gpu_warm, {"run": lambda arch, folder, clock: notes.wait(clock.left())}),
            (tune, {"time": SimpleNamespace(monotonic=notes.seconds)}),
            (tune.ahead, {"Compilers": NoCompilers}),
        ]
        for where, what in replacements:
            replaced.enter_context(mock.patch.multiple(where, **what))
        configs.device_arch.cache_clear()
        try:
            yield values
        finally:
            configs.device_arch.cache_clear()
            notes.operations = values.operations


class PlannedClock(Clock):
    """A part's clock that goes by the seconds of its notes."""

    def __init__(self, notes: cost.Notes, seconds: float) -> None:
        self.notes, self.seconds = notes, seconds

    def left(self) -> float:
        return self.seconds - self.notes.seconds()


def walk(
    notes: cost.Notes,
    folder: Path,
    seconds: float = math.inf,
    noted: Callable[[Binary], object] | None = None,
    arch: int = ARCH,
) -> cost.Notes:
    """Walk a part of the run until its planned seconds are over; its JSON, with made-up numbers, goes to `folder`."""
    with stage(notes, noted, arch):
        if notes.part == "tests":
            notes.wait(cost.TEST_SECONDS)
        try:
            gpu_parts.PARTS[notes.part](folder, PlannedClock(notes, seconds))
        except TimeUp:
            notes.state = "time was up"
    return notes
