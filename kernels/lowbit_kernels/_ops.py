"""The op namespace `lowbit_kernels` and the checks that every op shares.

Ops are defined with `torch.library.Library.define/impl` rather than `custom_op`: a third of the overhead per call,
and a BERT-base forward makes about a hundred calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import native

# name -> (schema, library that defines the op, library with its implementations). With torch, not in this module: a
# second import (sys.modules emptied, importlib.reload) finds the ops of the first.
_OPS: dict[str, tuple[str, torch.library.Library, torch.library.Library]]
_OPS = vars(torch.ops.lowbit_kernels).setdefault("_registered", {})


def define(
    schema: str, *, cpu: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> Any:
    """Define an op and its implementations; returns the resolved overload.

    An op that an earlier import has defined stays, since models, compiled code and cached overloads point to it. Its
    implementations are replaced.

    Raises:
        RuntimeError: an earlier import has defined it with other arguments or results.
    """
    name = schema.split("(")[0]
    implementations = torch.library.Library("lowbit_kernels", "IMPL")
    if name in _OPS:
        earlier, definition, replaced = _OPS[name]
        if earlier != schema:
            raise RuntimeError(
                f"an earlier import of lowbit_kernels in this process, of another version, has defined {earlier}; "
                f"this one defines {schema}: restart Python"
            )
        replaced._destroy()
    else:
        definition = torch.library.Library("lowbit_kernels", "FRAGMENT")
        definition.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _OPS[name] = schema, definition, implementations
    implementations.impl(name, cpu, "CPU")
    if cuda is not None:
        implementations.impl(name, _on_device_of_first(cuda), "CUDA")
    torch.library.register_fake(f"lowbit_kernels::{name}", fake, lib=implementations)
    return getattr(torch.ops.lowbit_kernels, name).default


def _on_device_of_first(cuda: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""

    @functools.wraps(cuda)
    def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device(first.device):
            return cuda(first, *args, **kwargs)

    return run


def check_tensor(name: str, tensor: object, dtypes: tuple[torch.dtype, ...], ndim: int | None = None) -> None:
    """Raise TypeError or ValueError unless `tensor` is dense, of one of the dtypes and, where given, the rank."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, accepted: strided (dense); call .to_dense()")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} has dtype {tensor.dtype}, accepted: {accepted}")
    if ndim is not None and tensor.dim() != ndim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {ndim} dimensions")


def check_device(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"tensors must share one device, got {listed}; move them with .to(device)")


def check_choice(name: str, value: object, accepted: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `accepted`."""
    # `in` alone lets 8.0 and one-element tensors through, which an op's schema refuses with a RuntimeError.
    if not (value is None or isinstance(value, int | str | torch.dtype)) or value not in accepted:
        raise ValueError(f"{name}={value!r}, accepted: {', '.join(map(repr, accepted))}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}, accepted: True, False")


def traced_on_cpu(x: torch.Tensor, natively: bool = False) -> bool:
    """Whether torch.compile or torch.export is tracing a CPU op that no native kernel takes (`natively`: one would).

    Such ops that are elementwise or reductions then run as the plain torch code of their
    CPU path instead of as one opaque op, and Inductor fuses them with their neighbours: worth a third of a BERT
    forward. Exported programs run without us, so there native kernels take nothing.
    """
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not natively or torch.compiler.is_exporting() or not native.available()


def stored(x: torch.Tensor) -> torch.Tensor:
    """Make Inductor store a result that it would compute again wherever it is read, for every vector of a row.

    `x` must be the result of an elementwise op: of a view, Inductor would reinterpret the base.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x


SINGLE = (torch.float32, torch.float16, torch.bfloat16)  # what float32 arithmetic serves without loss
FLOATS = (*SINGLE, torch.float64)
