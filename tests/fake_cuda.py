"""CUDA tensors without a GPU, on which models run and are traced by the path that real ones take. Two kinds:

fake_cuda        torch's own fake tensors: device, shape, strides and dtype, no values; ops run their fake
                 implementations. For tracing, and for what is known of results.
simulated_cuda   tensors that are computed on the CPU and say that they are on a GPU; ops run their CPU
                 implementations. Whatever would wait for the device is noted.
"""

from __future__ import annotations

import ctypes
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
M = TypeVar("M", bound=torch.nn.Module)

_CUDA, _META = 1, 14  # of c10::DeviceType


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Everything inside is fake, and nothing asks for a device."""
    with _device_guard(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
    FakeTensorMode.cache_clear()  # it is kept for the process


@contextmanager
def _device_guard() -> Iterator[None]:
    """Indexing a CUDA tensor makes its device the current one, which a build of torch without CUDA refuses to do.

    Meanwhile it does for CUDA what it does for the meta device: nothing. (FakeTensorMode sees to that in CUDA builds.)
    """
    if torch.version.cuda is not None:
        yield
        return
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    assert guards[_META] is not None
    before, guards[_CUDA] = guards[_CUDA], guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A fake CUDA tensor of the same shape, strides and dtype; inside of `fake_cuda`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


class Simulated(torch.Tensor):
    """Says that it is on a GPU; `inner`, on the CPU, holds the values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device | str = "cuda:0") -> Simulated:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device(device)
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:  # torch's takes no subclasses; that of CUDA tensors copies them first
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _compute(op, args, kwargs or {})


def _compute(op: Any, args: tuple, kwargs: dict) -> Any:
    """Run an op on the CPU; its results are on the GPU that its arguments are on, or that they name."""
    given: dict[int, Simulated] = {}

    def unwrap(value: Any) -> Any:
        if isinstance(value, Simulated):
            given[id(value.inner)] = value
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs))
    devices = {each.device for each in given.values() if each.dim()}
    assert len(devices) < 2 or op is aten.copy_.default, f"{op} of tensors on {devices}"
    device = kwargs.get("device")
    if device is None:
        device = next(iter(devices or {each.device for each in given.values()}), torch.device("cpu"))
    result = op(*inner_args, **inner_kwargs)
    if torch.device(device).type != "cuda":
        return result

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return given[id(value)] if id(value) in given else Simulated(value, device)

    return tree_map(wrap, result)


Wait = tuple[str, str, str]  # what is waited for, in which file, in which function


class _Waits(TorchDispatchMode):
    """Notes what waits for the device: looks at values, and copies from and to memory that is not pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Wait] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kind := _kind_of_wait(op, args, kwargs):
            self.found[(kind, *_place())] += 1
        return _compute(op, args, kwargs)


def _kind_of_wait(op: Any, args: tuple, kwargs: dict) -> str | None:
    name = op._schema.name.removeprefix("aten::")
    first = args[0] if args else None
    if not any(isinstance(each, Simulated) for each in tree_leaves((args, kwargs))):
        to = kwargs.get("device")
        copied = isinstance(first, torch.Tensor) and to is not None and torch.device(to).type == "cuda"
        return "copy to the device" if copied else None
    if name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"):
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
        return "index by a mask" if masks else None
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name == "copy_":
        source, target = args[1].device, args[0].device
    elif name == "_to_copy" and kwargs.get("device") is not None:
        source, target = args[0].device, torch.device(kwargs["device"])
    else:
        return None
    if source.type == target.type:
        return None
    return "copy to the host" if target.type == "cpu" else "copy to the device"


def _place() -> tuple[str, str]:
    """File and function of the innermost frame that is lowbit's or transformers'."""
    for frame in reversed(traceback.extract_stack()):
        folder, _, file = frame.filename.rpartition("/")
        if any(f"/{package}" in f"{folder}/" for package in ("lowbit/", "lowbit_kernels/", "transformers/")):
            return file, frame.name
    return "", ""


@contextmanager
def simulated_cuda() -> Iterator[Counter[Wait]]:
    """Tensors made inside on "cuda" are simulated; what waits for the device is counted."""
    waits = _Waits()
    with pytest.MonkeyPatch.context() as patch, _device_guard(), waits:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)  # what `torch.zeros(device="cuda")` calls
        yield waits.found


def moved(value: Any, to: Callable[[torch.Tensor], torch.Tensor] = like) -> Any:
    """Tensors, and lists, tuples and dicts of them, on the other device; anything else as it is."""
    return tree_map(lambda each: to(each) if isinstance(each, torch.Tensor) else each, value)


def move(model: M, to: Callable[[torch.Tensor], torch.Tensor] = like) -> M:
    """The model, with its tensors on the other device; shared ones stay shared.

    Its modules and what is known of them stay: what a model finds out by running has to be found out before.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.is_cuda:
                    continue
                if id(tensor) not in made:
                    new = to(tensor.detach())
                    parameter = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if parameter else new
                table[name] = made[id(tensor)]
    return model
