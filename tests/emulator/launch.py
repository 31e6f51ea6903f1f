"""Launches of Triton kernels on CPU tensors, compiled for a GPU and executed by the emulator."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from lowbit_kernels import configs

from .assemble import assemble
from .machine import Block, Kernel
from .memory import Findings, GlobalMemory
from .parse import parse

_FORMATS = {"f32": "<f", "f64": "<d", "u64": "<Q", "u32": "<I", "u16": "<H", "u8": "<B"}


@dataclass
class Log:
    """What ran and what was found."""

    findings: Findings = field(default_factory=Findings)
    launches: list[str] = field(default_factory=list)  # names of the kernels
    blocks: int = 0
    instructions: int = 0
    ptx: list[str] = field(default_factory=list)


class _Driver:
    """In place of Triton's: a device of the given compute capability, which is its number too."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def emulated(
    arch: int,
    inputs: Sequence[torch.Tensor | None] = (),
    *,
    early: bool = False,
    seed: int = 0,
    change: Callable[[str], str] = lambda ptx: ptx,
) -> Iterator[Log]:
    """Within it, launches on CPU tensors are compiled for sm_`arch` as a launch there would be, and executed.

    Memory that torch.empty gives is filled with NaN or the largest integer, so that what nobody wrote shows.

    Args:
        arch: 80, 90, ...; its tiles and code paths are chosen.
        inputs: tensors that the kernels may only read.
        early: complete asynchronous copies and products when they begin, not when they are waited for.
        seed: of the order of the blocks.
        change: a change of the PTX of every launch (`mutations.py`).

    Raises:
        Fault: what the emulator does not have, or a program that cannot go on.
    """
    log, order = Log(), random.Random(seed)
    read_only = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor is not None and tensor.numel()}
    compile_only = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            bound = self.signature.bind(*args, **{name: kwargs[name] for name in kwargs if name in self.arg_names})
            bound.apply_defaults()
            ptx = change(compiled.asm["ptx"])
            log.launches.append(self.__name__)
            log.ptx.append(ptx)
            values = [bound.arguments[n] for n, kind in compiled.src.signature.items() if kind != "constexpr"]
            whole_grid = tuple(grid(bound.arguments) if callable(grid) else grid) + (1, 1)
            _execute(_kernel(ptx), values, compiled.metadata.shared, whole_grid[:3], read_only, early, order, log)
        return compiled

    before, device_arch, deterministic = driver._active, configs.device_arch, torch.are_deterministic_algorithms_enabled()
    driver.set_active(_Driver(arch))
    configs.device_arch = lambda device: arch
    jit.JITFunction.run = run
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        with np.errstate(all="ignore"):
            yield log
    finally:
        torch.use_deterministic_algorithms(deterministic)
        jit.JITFunction.run = compile_only
        configs.device_arch = device_arch
        driver._active = before


@functools.lru_cache(maxsize=64)
def _kernel(ptx: str) -> Kernel:
    return assemble(parse(ptx))


def _execute(
    kernel: Kernel,
    values: list[Any],
    shared: int,
    grid: tuple[int, int, int],
    read_only: set[int],
    early: bool,
    order: random.Random,
    log: Log,
) -> None:
    """Run all blocks of a grid on the values of its parameters."""
    memory = GlobalMemory([value for value in values if isinstance(value, torch.Tensor)], read_only, log.findings)
    arguments = {
        name: _bytes(value, kind)
        # Triton adds pointers to scratch memory, which these kernels do not use.
        for (name, kind), value in zip(kernel.parameters.items(), [*values, 0, 0], strict=True)
    }
    places = list(itertools.product(*(range(size) for size in grid)))
    order.shuffle(places)
    for place in places:
        block = Block(kernel, memory, arguments, shared, place, grid, early, log.findings)
        block.run()
        log.blocks += 1
        log.instructions += block.count


def _bytes(value: Any, kind: str) -> bytes:
    """A parameter as it lies in memory."""
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if kind.startswith("f"):
        return struct.pack(_FORMATS[kind], value)
    size = struct.calcsize(_FORMATS[kind])
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
