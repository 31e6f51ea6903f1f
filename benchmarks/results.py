"""What a benchmark suite writes: one JSON of one shape for all suites, checked when written and when read.

    {"suite": "gpu-linear",                         also the name of the file
     "model": "what was measured, in words",
     "machine": {"gpu": "...", "torch": "..."},     what the figures hold for
     "method": "medians of 15 turns",
     "results": {case: {runner: {column: number or text}}}}

A runner that could not run has the one column "note": why it was not measured; one that computed something else has a
note that begins with WRONG. Long suites are written row by row (`Suite`), so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIELDS = {"suite": str, "model": str, "machine": dict, "method": str, "results": dict}
Row = dict[str, float | int | str]


def validate(report: Any) -> dict[str, Any]:
    """The report itself.

    Raises:
        ValueError: it has not the shape above; says where.
    """
    if not isinstance(report, dict) or set(report) != set(FIELDS):
        found = sorted(report) if isinstance(report, dict) else type(report).__name__
        raise ValueError(f"a report has the fields {', '.join(FIELDS)}; found {found}")
    for name, kind in FIELDS.items():
        if not isinstance(report[name], kind):
            raise ValueError(f"{name} must be {kind.__name__}, is {type(report[name]).__name__}")
    for case, rows in report["results"].items():
        for runner, row in rows.items() if isinstance(rows, dict) else [("?", None)]:
            values = row.values() if isinstance(row, dict) and row else [None]
            if any(isinstance(value, bool) or not isinstance(value, int | float | str) for value in values):
                raise ValueError(f"results, {case}, {runner}: expected columns of numbers and texts, found {row}")
    return report


def write(report: dict[str, Any], folder: Path) -> Path:
    """Validate and write `folder/<suite>.json`, aside first and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{validate(report)['suite']}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(report, indent=2) + "\n")
    unfinished.replace(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """A report of a committed file.

    Raises:
        ValueError: not JSON, or not of the shape above; names the file.
    """
    try:
        return validate(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def reason(error: Exception) -> str:
    """The note of a runner that an error kept from running."""
    return f"not measured: {_line(error)}"


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


WRONG = "WRONG: "


class WrongResult(Exception):
    """A runner computed something else than it should."""


def wrong(error: Exception) -> str:
    """The note of a runner that is wrong; of our own that does not run, too."""
    return WRONG + (str(error) if isinstance(error, WrongResult) else f"does not run: {_line(error)}")


def failure(name: str, error: Exception) -> Row:
    """The row of a runner that raised: not measured where it is a peer, wrong where it is lowbit's."""
    return {"note": wrong(error) if isinstance(error, WrongResult) or name.startswith("lowbit") else reason(error)}


def count(report: dict[str, Any]) -> tuple[int, int]:
    """How many rows a report has, and how many of them are wrong."""
    notes = [str(row.get("note", "")) for rows in report["results"].values() for row in rows.values()]
    return len(notes), sum(WRONG in note for note in notes)


Rows = dict[str, Row]


@dataclass
class Suite:
    """A suite that is being measured: its file holds every row as soon as it is there.

    `head` is the report without results; `compared` adds the columns that come from other rows of a case.
    """

    folder: Path
    head: dict[str, Any]
    compared: Callable[[Rows], Rows] = lambda rows: rows
    results: dict[str, Rows] = field(default_factory=dict)

    def add(self, case: str, runner: str, row: Row) -> None:
        """Keep a row and write the file."""
        self.results.setdefault(case, {})[runner] = row
        self.results[case] = self.compared(self.results[case])
        write({**self.head, "results": self.results}, self.folder)
