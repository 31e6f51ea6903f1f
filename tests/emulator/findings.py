"""What is found wrong while a program runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
POISON = 0xEE  # what memory holds that nobody wrote
KINDS = ("race", "out of bounds", "misaligned", "uninitialised", "order")


class Fault(Exception):
    """The program cannot go on, or does what the emulator does not have."""


@dataclass
class Findings:
    """How often each kind was seen (by threads), and the first of each instruction."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    where: Callable[[], str] = lambda: ""  # the instruction that runs now

    def note(self, kind: str, what: str, count: int = 1) -> None:
        """Note `count` of a kind."""
        self.counts[kind] += count
        where = self.where()
        self.examples.setdefault((kind, where), f"{kind}: {what}, {where}")

    def note_where(self, kind: str, what: str, bad: Array) -> None:
        """Note a kind as often as `bad` is true."""
        if bad.any():
            self.note(kind, what, int(np.count_nonzero(bad)))

    def check_alignment(self, address: Array, size: int, what: str) -> None:
        """Note what does not lie at multiples of its size."""
        self.note_where("misaligned", f"{what} of {size} bytes", address % size != 0)
