"""What is derived from packed weights, kept as long as they live and are not edited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class Derived:
    """A cache keyed by tensors: entries die with the first of them, and in-place edits of any are noticed.

    Except edits through `.data` or a NumPy view, which leave no trace. Inference tensors have no version to notice
    edits by: nothing is kept for them.
    """

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def get(self, tensors: Sequence[torch.Tensor], key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """The value for these tensors and this key; made anew where there is none or a tensor has changed."""
        made_from: list[object] = [key]
        for tensor in tensors:
            if tensor.is_inference():
                return make()
            made_from += tensor._version, tensor.data_ptr()
        entry = self._kept.get(tensors[0])
        if entry is None or entry[0] != made_from:
            entry = self._kept[tensors[0]] = made_from, make()
        return entry[1]

    def values(self) -> list[Any]:
        """All values kept now."""
        return [value for _, value in self._kept.values()]

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
