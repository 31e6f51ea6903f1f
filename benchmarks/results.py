"""What a benchmark suite writes: one JSON of one shape for all suites, checked when written and when read.

    {"suite": "gpu-linear",                         also the name of the file
     "model": "what was measured, in words",
     "machine": {"gpu": "...", "torch": "..."},     what the figures hold for
     "method": "medians of 15 turns",
     "results": {case: {runner: {column: number or text}}}}

A runner that could not run has the one column "note": why it was not measured. Long suites are written case by case,
so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import json
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
    lines = str(error).strip().splitlines() or [""]
    return f"not measured: {type(error).__name__}: {lines[0][:120]}"
