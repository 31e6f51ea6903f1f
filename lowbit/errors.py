"""Exceptions of the package's own; everything else is a plain ValueError or TypeError. And what several raise."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, of another version, or not what its config.json says."""


def check_import(value: object, kind: type, owner: str) -> None:
    """Raise ValueError where `value` is a `kind` that another import of lowbit in this process made.

    Python makes all classes anew where sys.modules was emptied or a module is reloaded; old objects are none of these.
    """
    if not isinstance(value, kind) and (kind.__module__, kind.__qualname__) in {
        (base.__module__, base.__qualname__) for base in type(value).__mro__
    }:
        raise ValueError(
            f"{owner} was made by an earlier import of lowbit in this process (sys.modules was emptied, or a module "
            "reloaded) and does not fit this one: restart Python, or make or load it again"
        )
