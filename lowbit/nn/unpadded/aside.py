"""Modules to try things on: copies that share the tensors of a model that others may be calling meanwhile."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from .stand_in import SHARED

HOOKS = {name for name in SHARED if "hooks" in name}
Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def trying(module: Module) -> Iterator[Module]:
    """A copy of a module, in eval mode and without hooks, to be run without gradients and autocast.

    It shares tensors and configuration, and nothing else: what is done to it does not reach the module, which other
    threads may be running.

    Raises:
        Exception: whatever an attribute that cannot be copied raises.
    """
    memo: dict[int, Any] = {}
    for each in _with_originals(module):
        for name, value in each.__dict__.items():
            if name in HOOKS:
                memo[id(value)] = OrderedDict()
            elif name == "_hf_hook" or isinstance(value, PreTrainedConfig):
                memo[id(value)] = value
            else:
                _share_tensors(value, memo)
    made = copy.deepcopy(module, memo)
    for each in made.modules():
        each.__dict__["training"] = False
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield made


def _with_originals(module: nn.Module) -> Iterator[nn.Module]:
    """All modules, and those of transformers that some of them stand in for."""
    for each in module.modules():
        yield each
        yield from each.__dict__.get("_original", ())


def _share_tensors(value: Any, memo: dict[int, Any]) -> None:
    if torch.is_tensor(value):
        memo[id(value)] = value
    elif isinstance(value, dict):
        for inner in value.values():
            _share_tensors(inner, memo)
    elif isinstance(value, list | tuple):
        for inner in value:
            _share_tensors(inner, memo)
