"""Render the committed JSON of all suites: `python -m benchmarks.report` writes docs/benchmarks.md and its plots."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .gpu import PARTS, WITHOUT_JSON
from .results import read

RESULTS = Path("benchmarks/results")
NOTES = Path("benchmarks/notes.md")  # what was measured by hand, and what was tried before
DOCS = Path("docs")
OWN_PAGES = ("features", "methods", "reliability", "transformers-suite")  # their scripts render them
GPU_SUITES = tuple(f"gpu-{part}" for part in sorted(PARTS) if part not in WITHOUT_JSON)

Report = dict[str, Any]


def render(report: Report) -> str:
    """One report: the machine, then a table for each case."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    method = report["method"][0].upper() + report["method"][1:]
    lines = [f"## {report['suite']}: {report['model']}", "", f"Machine: {machine}. {method}.", ""]
    for case, rows in report["results"].items():
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines += [f"| {case} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
        lines += [f"| {name} | {' | '.join(str(row.get(key, '')) for key in columns)} |" for name, row in rows.items()]
        lines.append("")
    return "\n".join(lines)


def latency_bars(report: Report, axes: Any, column: str) -> None:
    """A group of bars a runner, one bar a case."""
    cases = list(report["results"])
    names = list(dict.fromkeys(name for rows in report["results"].values() for name in rows))
    height = 0.8 / len(cases)
    for i, case in enumerate(cases):
        values = [report["results"][case].get(name, {}).get(column, 0) for name in names]
        axes.barh([y + i * height for y in range(len(names))], values, height, label=case)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(column)
    axes.legend()


def _shape(case: str) -> tuple[int, int, int]:
    M, N, K = map(int, re.findall(r"\d+", case))
    return M, N, K


def speed_up_by_tokens(report: Report, axes: Any) -> None:
    """Median speed-up over bfloat16 of each runner's shapes, by number of tokens."""
    points: dict[str, dict[int, list[float]]] = {}
    for case, rows in report["results"].items():
        for name, row in rows.items():
            if "times as fast as bf16" in row:
                points.setdefault(name, {}).setdefault(_shape(case)[0], []).append(row["times as fast as bf16"])
    for name, by_tokens in points.items():
        tokens = sorted(by_tokens)
        axes.plot(tokens, [sorted(by_tokens[M])[len(by_tokens[M]) // 2] for M in tokens], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("times as fast as bf16")
    axes.legend(fontsize=7)


def roofline(report: Report, axes: Any) -> None:
    """Fraction of its own roofline that each runner reaches, by number of tokens."""
    points: dict[str, list[tuple[int, float]]] = {}
    for case, rows in report["results"].items():
        for name, row in rows.items():
            if "of roofline" in row:
                points.setdefault(name, []).append((_shape(case)[0], row["of roofline"]))
    for name, values in points.items():
        axes.scatter(*zip(*values, strict=True), s=12, label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("fraction of the roofline")
    axes.legend()


def speed_against_accuracy(report: Report, axes: Any) -> None:
    """Each run's metric over its speed beside all tokens kept."""
    for case, rows in report["results"].items():
        timed = [row for name, row in rows.items() if name != "before"]
        points = sorted((row["times_as_fast"], row.get("f1", row.get("accuracy"))) for row in timed)
        axes.plot(*zip(*points, strict=True), marker="o", label=case.split(";")[0])  # what follows is of the machine
    axes.set_xlabel("times as fast as without lengths")
    axes.set_ylabel("accuracy or F1, %")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))


PLOTS: dict[str, dict[str, Callable[[Report, Any], None]]] = {
    "cpu-encoder": {"cpu-latency": lambda report, axes: latency_bars(report, axes, "median_ms")},
    "cpu-lengths": {"cpu-lengths": speed_against_accuracy},
    "gpu-linear": {"gpu-speed-up": speed_up_by_tokens, "gpu-roofline": roofline},
    "gpu-model": {"gpu-latency": lambda report, axes: latency_bars(report, axes, "ms")},
}


def plot(report: Report, folder: Path) -> list[Path]:
    """Write the PNG plots of a suite; none where it has none."""
    from matplotlib.figure import Figure

    written = []
    for name, draw in PLOTS.get(report["suite"], {}).items():
        figure = Figure(figsize=(9, 6), layout="constrained")
        draw(report, figure.subplots())
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=110)
    return written


def page(reports: list[Report], plots: dict[str, list[Path]]) -> str:
    """docs/benchmarks.md: results, then notes; GPU suites without results are said to be not measured."""
    present = {report["suite"] for report in reports}
    missing = [suite for suite in GPU_SUITES if suite not in present]
    sources = "`benchmarks/results/*.json` and `benchmarks/notes.md`"
    intro = ["# Benchmarks", "", f"Rendered from {sources} by `python -m benchmarks.report`."]
    if missing:
        intro += ["", f"Not measured yet: {', '.join(missing)} (`make gpu` on a machine with a GPU)."]
    parts = ["\n".join(intro), ""]
    for report in reports:
        parts += [render(report), *(f"![{path.stem}]({path.name})\n" for path in plots.get(report["suite"], []))]
    return "\n".join([*parts, NOTES.read_text()])


def committed() -> list[Report]:
    """All that docs/benchmarks.md shows."""
    return [read(path) for path in sorted(RESULTS.glob("*.json")) if path.stem not in OWN_PAGES]


def main() -> None:
    reports = committed()
    plots = {report["suite"]: plot(report, DOCS) for report in reports}
    (DOCS / "benchmarks.md").write_text(page(reports, plots))
    print(f"{DOCS / 'benchmarks.md'}: {len(reports)} suites, {sum(map(len, plots.values()))} plots")


if __name__ == "__main__":
    main()
