"""Tensors without memory on a device without existence, and the few values that a program looks at.

`FakeTensorMode` gives every operation's shape, dtype and device. `Values` computes small integers, truths and lengths
beside it on the CPU, since masks and lengths decide how many tokens there are. Of what nobody knows, all are true and
none of any, and numbers are 0, so that checks pass: a rehearsal finds no wrong number. What a CUDA graph cannot hold
raises while one is captured, as on a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from . import autograd

KNOWN_INTEGERS, KNOWN_FLOATS = 2**20, 2**10  # most elements that are computed
OVERWRITES = ("copy_", "fill_", "zero_", "log_normal_", "normal_", "uniform_", "random_")  # whatever was there
CAPTURE_ERROR = "operation not permitted when stream is capturing"


class Values(TorchDispatchMode):
    """Runs the CUDA side of lowbit's operations on fake tensors, and knows what the small ones hold."""

    def __init__(self) -> None:
        super().__init__()
        self.capturing = False  # a CUDA graph
        self.operations = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _composite(op):  # in inference mode nothing took it apart before
            with self:
                return op.decompose(*args, **kwargs)
        self.operations += op.namespace != "prim"
        on_device = any(x.device.type == "cuda" for x in _tensors(args, kwargs))
        if op.namespace == "lowbit_kernels" and on_device:
            with self:
                return op._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        name = op._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            self._waits(on_device)
            return _look(args[0])
        if name in ("allclose", "equal"):
            self._waits(on_device)
            return True
        if name == "nonzero":
            self._waits(on_device)
            return fake(_places(args[0]), args[0].device)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], self._without_truths(args[1]), *args[2:])
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            self._waits(source.device.type != target.type)
        result = op(*args, **kwargs)
        _compute_beside(op, args, kwargs, result)
        return result

    def _waits(self, waits: bool) -> None:
        if waits and self.capturing:
            raise RuntimeError(CAPTURE_ERROR)

    def _without_truths(self, indices: Any) -> list[torch.Tensor | None]:
        """Indices of which those by truth are by number."""
        numbers: list[torch.Tensor | None] = []
        for index in indices:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                self._waits(index.device.type == "cuda")
                places = _places(index)
                with _really():
                    columns = places.unbind(1)
                numbers += [fake(column, index.device) for column in columns]
            else:
                numbers.append(index)
        return numbers


@functools.cache
def _composite(op: Any) -> bool:
    return op.namespace == "aten" and op._can_decompose()


def _tensors(args: Iterable[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors among arguments and in their lists: what operations of torch take and give."""
    found: list[torch.Tensor] = []
    for x in itertools.chain(args, kwargs.values()):
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += [part for part in x if isinstance(part, torch.Tensor)]
    return found


class _Known(NamedTuple):
    """What a fake tensor holds; kept as its attribute."""

    value: torch.Tensor
    valid: list[
        bool
    ]  # of one element, the same for all that share memory: False once overwritten with what nobody knows


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """What a tensor holds, on the CPU; None where nobody knows."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    known = getattr(tensor, "_known", None)
    return known.value if known is not None and known.valid[0] else None


def fake(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A fake tensor on a device that holds a value."""
    result = torch.empty(value.shape, dtype=value.dtype, device=device)
    result._known = _Known(value, [True])  # type: ignore[attr-defined]
    return result


def _look(tensor: torch.Tensor) -> bool | int | float:
    value = value_of(tensor)
    if value is not None:
        with _really():
            return value.item()
    if tensor.dtype == torch.bool:
        return True
    return 0.0 if tensor.dtype.is_floating_point else 0


def _places(tensor: torch.Tensor) -> torch.Tensor:
    value = value_of(tensor)
    if value is None:
        raise RuntimeError(f"a rehearsal does not know which of {tuple(tensor.shape)} elements are not zero")
    with _really():
        return value.nonzero()


def _compute_beside(op: Any, args: tuple, kwargs: dict, result: Any) -> None:
    """Give the results their values, where they are small and those of the arguments are known."""
    results = [x for x in _tensors((result,), {}) if isinstance(x, FakeTensor)]
    given = _tensors(args, kwargs)
    values = [value_of(x) for x in given]
    name = op._schema.name.removeprefix("aten::")
    if name.startswith(("empty", "new_empty")):
        return  # kernels write what it holds
    small = all(x.numel() <= (KNOWN_FLOATS if x.dtype.is_floating_point else KNOWN_INTEGERS) for x in results)
    if small and name in OVERWRITES and values[0] is None and not any(value is None for value in values[1:]):
        with _really():
            values[0] = torch.empty(given[0].shape, dtype=given[0].dtype)
    if name == "any" and values[0] is None:
        with _really():
            result._known = _Known(torch.zeros(result.shape, dtype=torch.bool), [True])
        return
    if not small or any(value is None for value in values):
        if op._schema.is_mutable and given and isinstance(given[0], FakeTensor) and values[0] is not None:
            given[0]._known.valid[0] = False  # type: ignore[attr-defined]
        return
    remaining = iter(values)

    def real(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return next(remaining)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    real_args, real_kwargs = tree_map(real, (args, kwargs))
    with _really():
        found = _tensors((op(*real_args, **real_kwargs),), {})
        owners = {
            _address(x): fake._known.valid for x, fake in zip(values, given, strict=True) if hasattr(fake, "_known")
        }
        for fake_result, x in zip(results, found, strict=True):
            fake_result.constant = None  # the mode's own, which it would compute on the device
            fake_result._known = _Known(x, owners.get(_address(x), [True]))  # type: ignore[attr-defined]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def _really() -> Iterator[None]:
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


class _Python(TorchFunctionMode):
    """What of torch's Python would look at memory, or ask torch's CPU build which CUDA device is the current one."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.to or "device" in (kwargs or {}):
            args, kwargs = tree_map(_numbered, (args, kwargs))
        if function is torch.Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            return _copy(*args)
        if function is torch.autograd.grad or function is torch.Tensor.backward:
            instead = autograd.grad if function is torch.autograd.grad else autograd.backward
            return instead(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _copy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in memo:
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if parameter else copied
    return memo[id(tensor)]


def _numbered(x: Any) -> Any:
    return torch.device("cuda", 0) if isinstance(x, str | torch.device) and str(x) == "cuda" else x


@contextlib.contextmanager
def _guards_pass() -> Iterator[None]:
    """Let torch's CPU build guard the CUDA device as it guards "meta", which does nothing; it refuses to otherwise."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    before = guards[cuda]
    guards[cuda] = before or guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` but for fake parameters, whose insides it cannot exchange where others refer to them."""
    for child in module.children() if recurse else ():
        child._apply(change)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(change(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return module


@contextlib.contextmanager
def fake_tensors() -> Iterator[Values]:
    """Everything made inside is fake."""
    values = Values()
    FakeTensorMode.cache_clear()  # kept for the process; another user's entries may say other devices
    # In a build of torch for CUDA, the first fake tensor would begin to use the device.
    no_device = mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None)
    apply = mock.patch.object(nn.Module, "_apply", _apply)
    with _guards_pass(), no_device, apply, FakeTensorMode(allow_non_fake_inputs=True), values, _Python():
        yield values
