"""CUDA tensors without a GPU: they have device, shape, strides and dtype, and no values.

torch's own fake tensors, on which models run and are traced by the path that real CUDA tensors take, with the fake
implementations of ops in place of kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

M = TypeVar("M", bound=torch.nn.Module)

_CUDA, _META = 1, 14  # of c10::DeviceType


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Everything inside is fake, and nothing asks for a device."""
    with _device_guard(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@contextmanager
def _device_guard() -> Iterator[None]:
    """Indexing a CUDA tensor makes its device the current one, which a build of torch without CUDA refuses to do.

    Meanwhile it does for CUDA what it does for the meta device: nothing. (FakeTensorMode sees to that in CUDA builds.)
    """
    if torch.version.cuda is not None:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[_META] is not None
    before, guards[_CUDA] = guards[_CUDA], guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A fake CUDA tensor of the same shape, strides and dtype; inside of `fake_cuda`."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def moved(value: Any) -> Any:
    """Tensors, and lists, tuples and dicts of them, as fake CUDA tensors; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return like(value)
    if isinstance(value, list | tuple):
        return type(value)(map(moved, value))
    return {name: moved(each) for name, each in value.items()} if isinstance(value, dict) else value


def move(model: M) -> M:
    """The model, with fake CUDA tensors for its own; shared ones stay shared. Its modules and what is known of them
    stay: what a model finds out by running has to be found out before."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and not isinstance(tensor, torch._subclasses.FakeTensor):
                    table[name] = made.setdefault(id(tensor), like(tensor))
    return model
