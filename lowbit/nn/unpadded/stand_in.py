"""Modules that stand in for one of transformers': the same children, tensors and hooks under the same names."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from torch import nn

SHARED = (
    "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


class StandIn(nn.Module, ABC):
    """Takes the place of `original` in a model.

    Both have one table of children, of parameters, of buffers and of hooks: what is replaced, moved or hooked in one is
    so in the other.

    Args:
        original: the module of transformers.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name in SHARED:
            setattr(self, name, getattr(original, name))
        self._original = [original]  # in a list: its parameters are ours already
        self._had = {*self._buffers}
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        """The module that this one stands in for; to be run by its `forward`, since hooks are run by ours."""
        original = self._original[0]
        if self.is_replica:
            original = copy.copy(original)
            original.__dict__.update({name: self.__dict__[name] for name in SHARED})
        original.training = self.training
        return original

    @property
    def is_replica(self) -> bool:
        """Whether this is a copy that torch.nn.DataParallel made for one forward pass on one of several devices."""
        return bool(self.__dict__.get("_is_replica", False))

    @abstractmethod
    def prevented(self) -> str | None:
        """Why the modules of the original run in place of ours, in words; None where ours do."""

    def _replicate_for_data_parallel(self) -> StandIn:
        self.prevented()  # found out by trying, which replicas would do in every forward pass
        return super()._replicate_for_data_parallel()  # type: ignore[no-any-return]

    def leave(self) -> nn.Module:
        """The original, to be put back: without buffers of ours, with the configuration and mode of now."""
        original = self._original[0]
        for name in {*self._buffers} - self._had:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        if "config" in self.__dict__:
            original.config = self.config
        original.training = self.training
        return original

    def __getattr__(self, name: str) -> Any:
        """What only the original has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None or name.startswith("__"):
                raise
            return getattr(original[0], name)
