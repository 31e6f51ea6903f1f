"""The Pareto front of a search for lengths: kept as JSON, drawn, and asked for a budget."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from ..config import LengthConfig
from ..files.atomic import write_text
from ..files.drawing import draw_front


class FrontPoint(NamedTuple):
    config: LengthConfig
    cost: float
    score: float


def times_less(budget: str) -> float:
    """The number of a budget like "2x"; ValueError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x", budget) if isinstance(budget, str) else None
    if match is None or float(match[1]) < 1:
        raise ValueError(f"budget={budget!r}; accepted: '<number>x' with a number from 1, as in '2x' or '1.5x'")
    return float(match[1])


@dataclass(frozen=True)
class Front:
    """Result of `lowbit.length.search_lengths`: the configurations that no other beats in both cost and score.

    Attributes:
        points: ascending in cost and in score.
        full_cost, full_score: of the model that keeps all tokens.
        cost_unit: what cost is counted in, for people.
    """

    points: tuple[FrontPoint, ...]
    full_cost: float
    full_score: float
    cost_unit: str

    def for_budget(self, budget: str) -> LengthConfig:
        """The configuration with the best score among those that cost at most `full_cost` over the budget.

        Args:
            budget: "<number>x", at least 1: "2x" is half of the full model's cost.

        Raises:
            ValueError: another text, or no configuration is cheap enough.
        """
        limit = self.full_cost / times_less(budget)
        affordable = [point for point in self.points if point.cost <= limit]
        if not affordable:
            cheapest = min((point.cost for point in self.points), default=math.inf)
            raise ValueError(
                f"no configuration costs at most {limit:g} {self.cost_unit} ({budget} of {self.full_cost:g}); "
                f"the cheapest found costs {cheapest:g} ({self.full_cost / cheapest:.2f}x)"
            )
        return max(affordable, key=lambda point: point.score).config

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file."""
        points = [{"config": config.to_dict(), "cost": cost, "score": score} for config, cost, score in self.points]
        values = {
            "full_cost": self.full_cost, "full_score": self.full_score, "cost_unit": self.cost_unit, "points": points
        }  # fmt: skip
        write_text(path, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Front:
        """Read what `save` wrote; ValueError for any other file."""
        try:
            values = json.loads(Path(path).read_text())
            points = [FrontPoint(LengthConfig.from_dict(p["config"]), p["cost"], p["score"]) for p in values["points"]]
            return cls(tuple(points), values["full_cost"], values["full_score"], values["cost_unit"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a front written by Front.save ({error!r})") from error

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw score over cost as PNG (or what the suffix says); needs matplotlib."""
        found = [(point.cost, point.score) for point in self.points]
        labels = ("found", "all tokens kept", f"cost ({self.cost_unit})")
        draw_front(path, found, (self.full_cost, self.full_score), labels)
