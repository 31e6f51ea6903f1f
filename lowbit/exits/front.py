"""Speed beside accuracy: what each threshold of a criterion costs, and what it gets right.

One pass over texts that were set apart notes the answers of all exits (`exit_scores`); every criterion is then judged
on these, since who leaves where depends on them only. Thresholds that are chosen here must be reported on other texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..files.atomic import write_text
from ..files.drawing import draw_front
from . import criteria
from .criteria import Criterion, Entropy
from .passage import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Callable[[torch.Tensor, torch.Tensor], float]  # of logits [N, C] and labels [N]: higher is better


class Scores(NamedTuple):
    """The answers of all exits to N texts."""

    logits: torch.Tensor  # float32 [exits, N, C], the model's own head last
    wrong: torch.Tensor | None  # float32 [ramps, N], of a certainty head
    labels: torch.Tensor  # [N, ...]
    layers: tuple[int, ...]  # behind which the exits are


class ExitPoint(NamedTuple):
    criterion: Any
    layers: float  # run for a text, mean
    score: float


@torch.inference_mode()
def exit_scores(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> Scores:
    """Run all layers, and note what every exit answers.

    Args:
        model: with exits; it is in eval mode afterwards.
        batches: what the model reads, with labels.

    Raises:
        ValueError: a model without exits, or no batch.
    """
    if not hasattr(model, "exits"):
        raise ValueError(f"{type(model).__name__} has no exits; add and train them first: lowbit.add_exits(model)")
    model.eval()
    logits, wrong, labels = [], [], []
    for batch in batches:
        labels.append(batch["labels"].cpu())
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        output: Any = model(**inputs, exits=Passage(model, None), return_dict=True)
        logits.append(torch.cat([output["exit_logits"], output.logits[None]]).float().cpu())
        if "exit_wrong" in output:
            wrong.append(output["exit_wrong"].float().sigmoid().cpu())
    if not logits:
        raise ValueError("no batches to look at")
    layers = (*model.exits.layers, model.config.num_hidden_layers)  # type: ignore[union-attr,operator]
    return Scores(torch.cat(logits, 1), torch.cat(wrong, 1) if wrong else None, torch.cat(labels), layers)


def leave(scores: Scores, criterion: Criterion | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model with this criterion answers: logits [N, C]; the layer that each text leaves behind, int64 [N]."""
    logits, here = scores.logits[-1].clone(), torch.ones(scores.logits.shape[1], dtype=torch.bool)
    layers = torch.full((len(here),), scores.layers[-1])
    memory = None
    for number, own in enumerate(scores.logits[:-1] if criterion is not None else ()):
        assert criterion is not None
        leaves, memory = criterion(own, None if scores.wrong is None else scores.wrong[number], memory)
        now = leaves & here
        logits[now], layers[now] = own[now], scores.layers[number]
        here &= ~leaves
    return logits, layers


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the labels that are the argmax."""
    return float((logits.argmax(-1) == labels.reshape(-1)).double().mean())


@dataclass(frozen=True)
class ExitFront:
    """Result of `exit_front`: the criteria that no other beats in both layers and score.

    Attributes:
        points: ascending in layers and in score.
        full_layers, full_score: of the model from which nobody leaves.
    """

    points: tuple[ExitPoint, ...]
    full_layers: int
    full_score: float

    def for_loss(self, most: float) -> ExitPoint:
        """The point with the fewest layers whose score is at most `most` below the full model's.

        Raises:
            ValueError: there is none.
        """
        fitting = [point for point in self.points if point.score >= self.full_score - most]
        if not fitting:
            best = max((point.score for point in self.points), default=-math.inf)
            raise ValueError(f"no criterion loses at most {most:g} of {self.full_score:g}; the best found has {best:g}")
        return min(fitting, key=lambda point: point.layers)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file."""
        points = [{"criterion": criteria.to_dict(c), "layers": layers, "score": s} for c, layers, s in self.points]
        values = {"full_layers": self.full_layers, "full_score": self.full_score, "points": points}
        write_text(path, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ExitFront:
        """Read what `save` wrote; ValueError for any other file."""
        try:
            values = json.loads(Path(path).read_text())
            points = [
                ExitPoint(criteria.from_dict(p["criterion"]), float(p["layers"]), float(p["score"]))
                for p in values["points"]
            ]
            return cls(tuple(points), int(values["full_layers"]), float(values["full_score"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a front written by ExitFront.save ({error!r})") from error

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw score over layers as PNG (or what the suffix says); needs matplotlib."""
        found = [(point.layers, point.score) for point in self.points]
        labels = ("with exits", "all layers", "layers run for a text, mean")
        draw_front(path, found, (self.full_layers, self.full_score), labels)


def exit_front(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    tried: Sequence[Criterion] | None = None,
    score: Score = accuracy,
) -> ExitFront:
    """Which criteria are worth having, judged on texts that neither trained the ramps nor are reported on.

    Args:
        model: with exits; it is in eval mode afterwards.
        batches: as of `exit_scores`.
        tried: criteria; None: `Entropy` at 40 thresholds, at which equal shares of all the ramps' answers lie below.
        score: of logits and labels, higher is better.

    Raises:
        ValueError: a model without exits, no batch, or a criterion that cannot judge this head.
    """
    scores = exit_scores(model, batches)
    for criterion in tried or ():
        criterion.check(model.config.num_labels, model.config.problem_type, scores.wrong is not None)
    if tried is None:
        Entropy(0.0).check(model.config.num_labels, model.config.problem_type, False)
        found = criteria.entropy(scores.logits[:-1]).flatten().double()
        tried = [Entropy(float(t)) for t in torch.quantile(found, torch.linspace(0, 1, 40, dtype=torch.float64))]
    points = []
    for criterion in tried:
        logits, layers = leave(scores, criterion)
        points.append(ExitPoint(criterion, float(layers.double().mean()), score(logits, scores.labels)))
    return ExitFront(_best(points), scores.layers[-1], score(scores.logits[-1], scores.labels))


def _best(points: Iterable[ExitPoint]) -> tuple[ExitPoint, ...]:
    kept: list[ExitPoint] = []
    for point in sorted(points, key=lambda point: (point.layers, -point.score)):
        if not kept or point.score > kept[-1].score:
            kept.append(point)
    return tuple(kept)
