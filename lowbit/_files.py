"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file aside, then rename it: a failure leaves the old one."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.tmp")
    aside.write_text(text)
    os.replace(aside, target)
