"""What is derived from packed weights, kept as long as they live and are not edited."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Entry:
    tensors: list[tuple[weakref.ref[torch.Tensor], int, int]]  # with version and address
    key: tuple[object, ...]
    value: Any

    def made_from(self, tensors: Sequence[torch.Tensor], key: tuple[object, ...]) -> bool:
        if self.key != key or len(self.tensors) != len(tensors):
            return False
        for tensor, (reference, version, address) in zip(tensors, self.tensors, strict=True):
            # By identity too: the address of a tensor that is gone may belong to another one.
            if reference() is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        return True


def outlives_capture(value: Any) -> bool:
    """Whether CUDA memory allocated just now may be kept beyond a graph capture.

    Not while one is under way (its content does not exist before a replay), nor out of a private memory pool, as in the
    warm-up of torch.compile's CUDA graphs: the pool takes its memory back unasked.
    """
    if torch.cuda.is_current_stream_capturing() or torch.cuda.get_allocator_backend() != "native":
        return False
    parts = value if isinstance(value, tuple) else (value,)
    address = next(part for part in parts if isinstance(part, torch.Tensor)).data_ptr()
    segments = [part for part in torch.cuda.memory_snapshot() if 0 <= address - part["address"] < part["total_size"]]
    return any(tuple(segment["segment_pool_id"]) == (0, 0) for segment in segments)


class Derived:
    """A cache keyed by tensors: entries die with the first of them, and in-place edits of any are noticed.

    Except edits through `.data` or a NumPy view, which leave no trace. Inference tensors have no version to notice
    edits by: nothing is kept for them.
    """

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def get(self, tensors: Sequence[torch.Tensor], key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """The value for these tensors and this key; made anew where there is none or a tensor has changed."""
        entry = self._kept.get(tensors[0])
        if entry is not None and entry.made_from(tensors, key):
            return entry.value
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        made_from = [(weakref.ref(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors]
        with torch.inference_mode(False):  # or what is derived from it in turn could not be kept
            value = make()
        if tensors[0].is_cuda:
            if not outlives_capture(value):
                return value
            # Other streams read the value as soon as it is kept, and nothing else would make them wait for this one.
            torch.cuda.current_stream(tensors[0].device).synchronize()
        self._kept[tensors[0]] = _Entry(made_from, key, value)
        return value

    def of(self, tensors: Iterable[torch.Tensor]) -> list[Any]:
        """The values kept now that have one of these as their first tensor."""
        return [entry.value for tensor in tensors if (entry := self._kept.get(tensor)) is not None]

    def values(self) -> list[Any]:
        """All values kept now."""
        return [entry.value for entry in self._kept.values()]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
