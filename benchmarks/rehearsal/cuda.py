"""`torch.cuda` of one H200 by its data sheet, which does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .tensors import CAPTURE_ERROR, Values

ARCH = 90
PROPERTIES = SimpleNamespace(
    name="none: a rehearsal, every number is made up",
    multi_processor_count=132,
    shared_memory_per_block_optin=227 * 1024,
    total_memory=139 * 2**30,
    uuid="none",
)
# All that is allocated lies in the pool that outlives everything.
SEGMENT = {"address": -(2**63), "total_size": 2**64, "segment_pool_id": (0, 0)}


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        pass


@contextlib.contextmanager
def _entered(*_: Any, **__: Any) -> Iterator[None]:
    yield


def replacements(values: Values, arch: int) -> dict[str, Any]:
    """Names of `torch.cuda`, and what stands there."""
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(**vars(PROPERTIES), major=major, minor=minor)

    @contextlib.contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        values.capturing = True
        try:
            yield
        finally:
            values.capturing = False

    def synchronize(*_: Any) -> None:
        if values.capturing:
            raise RuntimeError(CAPTURE_ERROR)

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": _entered,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "Stream": _Stream,
        "stream": _entered,
        "current_stream": lambda device=None: _Stream(),
        "synchronize": synchronize,
        "is_current_stream_capturing": lambda: values.capturing,
        "CUDAGraph": _Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "empty_cache": lambda: None,
        "get_allocator_backend": lambda: "native",
        "memory_snapshot": lambda: [SEGMENT],
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 10**6,
        "reset_peak_memory_stats": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda *_, **__: True,
    }


@contextlib.contextmanager
def fake_cuda(values: Values, arch: int = ARCH) -> Iterator[None]:
    """`torch.cuda` replaced by a device of compute capability `arch`."""
    with mock.patch.multiple(torch.cuda, **replacements(values, arch)):
        yield
