"""What a launcher does on the device, seen without one: which kernels it launches, and what torch computes besides."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit_kernels

# Allocations and views; everything else is work on the device or waits for it.
FREE = ("empty", "new_empty", "empty_like", "view", "_unsafe_view", "unsqueeze", "detach", "unbind", "select", "alias")


class Launch(NamedTuple):
    name: str  # of the kernel
    grid: tuple[int, ...]
    kernel: Any
    args: tuple[Any, ...]


class _Recorder:
    """In place of a kernel."""

    def __init__(self, name: str, kernel: Any, launched: list[Launch]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **_: self.launched.append(Launch(self.name, grid, self.kernel, args))


def launchers() -> list[ModuleType]:
    """Every module of `lowbit_kernels` but the tools that need Triton when they are imported."""
    names = [found.name for found in pkgutil.iter_modules(lowbit_kernels.__path__)]
    return [importlib.import_module(f"lowbit_kernels.{name}") for name in names if name not in ("aot", "tune")]


def kernels_of(module: ModuleType) -> list[str]:
    """Names of the kernels that a module launches."""
    return [name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")]


def record(modules: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The kernels of the modules do nothing from now on; what is launched appears in the list."""
    launched: list[Launch] = []
    for module in modules:
        for name in kernels_of(module):
            monkeypatch.setattr(module, name, _Recorder(name, getattr(module, name), launched))
    return launched


class _Computing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = op._schema.name.removeprefix("aten::")
        if op.namespace == "aten" and name not in FREE:
            self.seen.append(name)
        return op(*args, **(kwargs or {}))


def work_of(
    run: Callable[[], object], modules: list[ModuleType], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """(kernels launched, torch ops that compute) while `run()` runs; the kernels of the modules do nothing."""
    launched = record(modules, monkeypatch)
    with _Computing() as computing:
        run()
    return [launch.name for launch in launched], computing.seen
