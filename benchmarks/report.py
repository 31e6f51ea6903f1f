"""Render committed benchmark JSON as Markdown tables: `python -m benchmarks.report` writes docs/benchmarks.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
PAGE = Path("docs/benchmarks.md")


def render(report: dict[str, Any]) -> str:
    """One report: the machine, then a table for each case."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        f"## {report['suite']}: {report['model']}",
        "",
        f"Machine: {machine}. Medians of {report['turns']} turns.",
        "",
    ]
    for case, rows in report["results"].items():
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines += [f"| {case} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
        lines += [f"| {name} | {' | '.join(str(row.get(key, '')) for key in columns)} |" for name, row in rows.items()]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    intro = (
        "# Benchmarks\n\nRendered from `benchmarks/results/*.json` by `python -m benchmarks.report`. "
        "GPU: not measured yet.\n"
    )
    PAGE.write_text("\n".join([intro, *(render(report) for report in reports)]))
    print(f"{PAGE}: {len(reports)} suites")


if __name__ == "__main__":
    main()
