"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

_PREFIX = ".saving-"


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file aside, then rename it: a failure leaves the old one, and of two writers one wins."""
    target = Path(path)
    with staging(target.parent) as folder:
        aside = folder / target.name
        aside.write_text(text)
        os.replace(aside, target)


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A hidden folder inside `target` to write into, gone afterwards, as are those of processes that were killed.

    Its writer holds a lock on it, which ends with the process.
    """
    with contextlib.ExitStack() as stack:
        with exclusive(target):  # between making a folder and locking it, it looks abandoned
            for left in target.glob(f"{_PREFIX}*"):
                if _abandoned(left):
                    shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(exclusive(folder))
        yield folder


def _abandoned(folder: Path) -> bool:
    """Whether no process holds the folder's lock; False where nothing can be said."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


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
