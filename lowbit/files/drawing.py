"""Fronts as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

Points = Sequence[tuple[float, float]]


def draw_front(path: str | PathLike[str], found: Points, full: tuple[float, float], labels: Sequence[str]) -> None:
    """Draw score over cost as PNG (or what the suffix says).

    Args:
        path: the file to write.
        found: (cost, score) of each point.
        full: those of the model as it was.
        labels: of the points, of the model, of the cost.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a front needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([cost for cost, _ in found], [score for _, score in found], "o-", label=labels[0])
    axes.plot([full[0]], [full[1]], "s", label=labels[1])
    axes.set_xlabel(labels[2])
    axes.set_ylabel("score")
    axes.legend()
    figure.savefig(path, dpi=110)
