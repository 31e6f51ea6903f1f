"""Binaries compiled before they are launched, in many processes at once, and on machines without a GPU.

    with recording(90) as binaries:
        run()                                       nothing is launched; what would have to be compiled is noted
    for done in compile_all(binaries, 90): ...      Triton's cache on disk holds it afterwards

Triton itself finds out what a launch specializes on (types, alignment, ones, options), so a launch on the device finds
what was compiled here. Tensors may be of any device and without memory: no kernel looks at them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch

# Key of Triton's caches in the process, which hold binaries by number of the device: no device has this one.
_DEVICE = 1 << 20
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Binary:
    """What Triton compiles for a launch; equal where one binary serves both launches."""

    module: str
    kernel: str
    key: str  # of Triton's cache in the process: specialization and options
    source: dict[str, Any] = field(compare=False)  # of ASTSource
    options: dict[str, Any] = field(compare=False)

    def compile(self, arch: int) -> None:
        """Compile for compute capability `arch` into Triton's cache on disk, unless it is there."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        triton.compile(ASTSource(kernel, **self.source), target=GPUTarget("cuda", arch, 32), options=self.options)


class _Driver:
    """Stands in for Triton's driver of a device of compute capability `arch`."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return _DEVICE + self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class _Pointer:
    """What Triton asks of a tensor: its type, and the last bits of its address. Memory begins at multiples of 16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset

    def key(self) -> tuple[torch.dtype, int]:
        return self.dtype, self._offset % 16


@contextlib.contextmanager
def recording(arch: int, noted: Callable[[Binary], object] | None = None) -> Iterator[list[Binary]]:
    """Note the binary of every launch, in order, for compute capability `arch` (10 * major + minor), and run none.

    Args:
        arch: as `configs.device_arch`.
        noted: called with each, as it is launched.

    Raises:
        ValueError: from a launch whose grid is beyond what CUDA takes.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    binaries: list[Binary] = []
    earlier: dict[object, Binary] = {}  # launches with the same arguments; Triton needs half a millisecond for each
    replaced, compile_one, active = JITFunction.run, JITFunction._do_compile, driver._active
    run = getattr(replaced, "run", replaced)  # inside of another `recording`, too

    def note(
        self: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        source = {"signature": signature, "constexprs": constexprs, "attrs": attrs}
        binaries.append(Binary(self.__module__, self.__name__, key, source, dict(options.__dict__)))
        if noted is not None:
            noted(binaries[-1])

    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        stand_ins = [_Pointer(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        values = tuple(x.key() if isinstance(x, _Pointer) else x for x in stand_ins)
        key = id(self), tuple(map(type, values)), values, *options.items()
        if key in earlier:
            binaries.append(earlier[key])
            if noted is not None:
                noted(earlier[key])
        else:
            run(self, *stand_ins, grid=grid, warmup=True, **options)
            earlier[key] = binaries[-1]
        if any(not 0 < blocks <= most for blocks, most in zip(grid, _MOST_BLOCKS, strict=False)):
            raise ValueError(f"{self.__name__} has a grid of {tuple(grid)} blocks, CUDA takes {_MOST_BLOCKS}")

    launch.run = run  # type: ignore[attr-defined]
    try:
        JITFunction.run, JITFunction._do_compile = launch, note
        driver.set_active(_Driver(arch))
        yield binaries
    finally:
        JITFunction.run, JITFunction._do_compile = replaced, compile_one
        driver._active = active


class Compilers:
    """Processes that compile; each binary once."""

    def __init__(self, arch: int, processes: int | None = None) -> None:
        self.arch = arch
        self._pool = ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn"))
        self._pending: dict[Binary, Future[None]] = {}

    def submit(self, binary: Binary) -> Future[None]:
        """Begin to compile; the future has the error where it does not compile."""
        if binary not in self._pending:
            self._pending[binary] = self._pool.submit(binary.compile, self.arch)
        return self._pending[binary]

    def futures(self) -> list[Future[None]]:
        """Of all that was submitted."""
        return list(self._pending.values())

    def close(self) -> None:
        """Begin nothing more; what is being compiled is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def compile_all(binaries: Iterable[Binary], arch: int, processes: int | None = None) -> list[Future[None]]:
    """Compile all of them and wait; futures hold the errors of those that do not compile."""
    compilers = Compilers(arch, processes)
    try:
        futures = [compilers.submit(binary) for binary in dict.fromkeys(binaries)]
        for future in futures:
            future.exception()
        return futures
    finally:
        compilers.close()
