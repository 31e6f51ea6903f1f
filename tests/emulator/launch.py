"""Launches of Triton kernels on CPU tensors, compiled for a GPU and executed by the emulator."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from lowbit_kernels import aot, configs

from .assemble import assemble
from .findings import Fault, Findings
from .global_memory import GlobalMemory
from .machine import Block, Kernel
from .parse import parse

_FORMATS = {"f32": "<f", "f64": "<d", "u64": "<Q", "u32": "<I", "u16": "<H", "u8": "<B"}


@dataclass
class Log:
    """What ran and what was found."""

    findings: Findings = field(default_factory=Findings)
    launches: list[str] = field(default_factory=list)  # names of the kernels
    blocks: int = 0
    instructions: int = 0


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
        Fault: what the emulator does not have, a program that cannot go on, a launch that a device would refuse.
    """
    log = Log()
    read_only = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor is not None and tensor.numel()}
    compile_only = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            bound = self.signature.bind(*args, **{name: kwargs[name] for name in kwargs if name in self.arg_names})
            bound.apply_defaults()
            ptx = change(compiled.asm["ptx"])
            log.launches.append(self.__name__)
            values = [bound.arguments[n] for n, kind in compiled.src.signature.items() if kind != "constexpr"]
            blocks = grid(bound.arguments) if callable(grid) else grid
            _check_limits(self.__name__, blocks, compiled.metadata.shared, arch)
            execute(
                ptx,
                values,
                compiled.metadata.shared,
                blocks,
                read_only=read_only,
                early=early,
                seed=seed + len(log.launches),
                log=log,
            )
        return compiled

    before, device_arch, deterministic = (
        driver._active,
        configs.device_arch,
        torch.are_deterministic_algorithms_enabled(),
    )
    driver.set_active(_Driver(arch))
    configs.device_arch = lambda device: arch
    jit.JITFunction.run = run
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        yield log
    finally:
        torch.use_deterministic_algorithms(deterministic)
        jit.JITFunction.run = compile_only
        configs.device_arch = device_arch
        driver._active = before


def _check_limits(name: str, grid: Sequence[int], shared: int, arch: int) -> None:
    """Raise Fault for a launch that the device would refuse."""
    if any(size > limit for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False)):
        raise Fault(f"{name} has a grid of {tuple(grid)}, at most (2^31 - 1, 65535, 65535) can be launched")
    if shared > aot.ARCHITECTURES[arch][0]:
        raise Fault(f"{name} asks for {shared} bytes of shared memory, sm_{arch} has {aot.ARCHITECTURES[arch][0]}")


@functools.lru_cache(maxsize=64)
def _kernel(ptx: str) -> Kernel:
    return assemble(parse(ptx))


def execute(
    ptx: str,
    values: Sequence[Any],
    shared: int = 0,
    grid: Sequence[int] = (1, 1, 1),
    *,
    read_only: Collection[int] = (),
    early: bool = False,
    seed: int = 0,
    log: Log | None = None,
) -> Log:
    """Run PTX on all blocks of a grid.

    Args:
        ptx: one kernel.
        values: of its parameters, tensors for pointers; those that are missing are 0.
        shared: bytes of shared memory a block.
        read_only: addresses of storages that it may only read.
        early, seed: as `emulated`.
        log: what to add to.

    Raises:
        Fault, ValueError: what the emulator does not have, a program that cannot go on, PTX that is no kernel.
    """
    log, kernel = log or Log(), _kernel(ptx)
    memory = GlobalMemory([value for value in values if isinstance(value, torch.Tensor)], read_only, log.findings)
    if len(values) > len(kernel.parameters):
        raise ValueError(f"{len(values)} values for the {len(kernel.parameters)} parameters of {kernel.name}")
    # Triton adds pointers to scratch memory, which these kernels do not use.
    padded = itertools.chain(values, itertools.repeat(0))
    arguments = {
        name: _bytes(value, kind) for (name, kind), value in zip(kernel.parameters.items(), padded, strict=False)
    }
    x, y, z = (*grid, 1, 1)[:3]
    places = list(itertools.product(range(x), range(y), range(z)))
    random.Random(seed).shuffle(places)
    with np.errstate(all="ignore"):
        for place in places:
            block = Block(kernel, memory, arguments, shared, place, (x, y, z), early, log.findings)
            block.run()
            log.blocks += 1
            log.instructions += block.count
    return log


def _bytes(value: Any, kind: str) -> bytes:
    """A parameter as it lies in memory."""
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if kind.startswith("f"):
        return struct.pack(_FORMATS[kind], value)
    size = struct.calcsize(_FORMATS[kind])
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
