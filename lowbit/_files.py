"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file aside, then rename it: a failure leaves the old one, and of two writers one wins."""
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as folder:
        aside = Path(folder) / target.name
        aside.write_text(text)
        os.replace(aside, target)


@contextlib.contextmanager
def exclusive(folder: str | PathLike[str]) -> Iterator[None]:
    """Let one process or thread at a time change a folder; without effect where the system has no such locks."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
