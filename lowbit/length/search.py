"""Evolutionary search for lengths (Length-Adaptive Transformer, Kim and Cho 2021): score against cost, no training.

A gene is a tuple of whole numbers, one a layer, that never increases: the steps of the ratio or of the number of tokens
that the layer keeps. The first population keeps everything, the least, or a fixed ratio of the layer before, from the
first layer on or from a late one. Then, in each iteration, children of the Pareto front are evaluated: mutations redraw
layers between their neighbours, crossovers are the rounded-up mean of two genes; both stay non-increasing by
construction.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .. import models
from ..config import LengthConfig
from ..files.atomic import write_text
from ..nn.unpadded.heads import reads_first_token_only
from .front import Front, FrontPoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Gene = tuple[int, ...]

_TRIES = 20  # children made for each that is wanted: a small model has few genes, soon all are known


def search_lengths(
    model: PreTrainedModel,
    evaluate: Callable[[LengthConfig], float],
    *,
    cost: Callable[[LengthConfig], float],
    cost_unit: str = "cost",
    population: int = 20,
    first: Sequence[Sequence[float]] = (),
    iterations: int = 30,
    mutations: int = 30,
    crossovers: int = 30,
    mutation_probability: float = 0.5,
    seed: int = 0,
    path: str | PathLike[str] | None = None,
    progress: bool = True,
    unit: str = "ratio",
    step: float | None = None,
    max_tokens: int | None = None,
    **fields: Any,
) -> Front:
    """Configurations of the best score for their cost.

    Args:
        model: says how many layers there are, and whether its head reads the first token only: then what the last layer
            keeps has no effect, and is what the layer before keeps. The model is neither run nor changed here.
        evaluate: quality of the model with a configuration, higher is better: sets it (`lowbit.set_length`) and
            measures. Called at most 2 + 2 * population + len(first) + iterations * (mutations + crossovers) times,
            never twice for one configuration.
        cost: cheap, and always the same for the same configuration: `LatencyTable.latency`, or
            `lambda config: macs(model, config, lengths)`.
        cost_unit: what it counts, for people: "ms", "MACs".
        population: numbers of tokens to start from, about evenly spaced. Each is reached in two ways: every layer drops
            a fixed ratio, or as many layers as possible keep everything and those after them drop a fixed ratio (for
            models whose early layers do not know yet what matters).
        first: what else to start from, as `LengthConfig.keep`, rounded to `step`: those that the model was trained for.
        iterations, mutations, crossovers: rounds, and new configurations of each kind in a round.
        mutation_probability: of redrawing a layer.
        seed: of the search's own random numbers; what `evaluate` draws does not matter to them.
        path: JSON file that keeps every score as soon as it is known. An interrupted search that is called again
            continues and gives what it would have given; with more `iterations`, a finished one goes on.
        progress: show a bar.
        unit: "ratio" or "tokens".
        step: what is kept is a multiple of it: of a ratio 1/20 by default, of tokens 8.
        max_tokens: "tokens" only: the longest sequence there is; None for the longest that the model takes.
        **fields: `min_tokens`, `score`, `protect`, `restore` of all configurations (see `LengthConfig`).

    Raises:
        ValueError: numbers out of range, a store written with other settings or that is no store, a score or cost
            that is not a finite number.
    """
    _check(population, iterations, mutations, crossovers, mutation_probability)
    layers = sum(1 for _ in models.layers(model))
    free = layers - 1 if layers > 1 and reads_first_token_only(model) else layers  # layers whose choice has an effect
    levels, unit_step = _grid(model, unit, step, max_tokens)

    def config_of(gene: Gene) -> LengthConfig:
        # A ratio is divided by the whole number of steps: 3 * 0.05 is not 0.15.
        keep = tuple(level / levels if unit == "ratio" else level * unit_step for level in gene)
        keep += keep[-1:] * (layers - free)
        return LengthConfig(keep, unit=unit, **fields)

    full = (levels,) * free
    full_cost = _finite("cost", cost, config_of(full))
    settings = {
        "layers": layers, "free_layers": free, "levels": levels, "step": unit_step, "seed": seed,
        "config": {**config_of(full).to_dict(), "keep": None}, "full_cost": full_cost,
        "population": population, "mutations": mutations, "crossovers": crossovers,
        "mutation_probability": mutation_probability,
    }  # fmt: skip
    extra = [_gene(keep, layers, levels, 1 / levels if unit == "ratio" else unit_step)[:free] for keep in first]
    if extra:
        settings["first"] = [list(gene) for gene in extra]
    store = _Store(None if path is None else Path(path), settings)
    found: dict[Gene, FrontPoint] = {}
    generator = random.Random(seed)
    most = 2 + 2 * population + len(extra) + iterations * (mutations + crossovers)
    with tqdm(total=most, desc="search_lengths", disable=not progress) as bar:

        def visit(gene: Gene) -> None:
            config = config_of(gene)
            if gene not in store.scores:
                store.add(gene, _finite("evaluate", evaluate, config))
            # Known scores take the same way as new ones: that is all that resuming needs.
            found[gene] = FrontPoint(config, _finite("cost", cost, config), store.scores[gene])
            bar.update()

        for gene in dict.fromkeys([*_first_population(free, levels, population), *extra]):
            visit(gene)
        for _ in range(iterations):
            for gene in _children(found, levels, mutations, crossovers, mutation_probability, generator):
                visit(gene)
    points = tuple(found[gene] for gene in _pareto(found))
    return Front(points, full_cost, found[full].score, cost_unit)


def _check(population: int, iterations: int, mutations: int, crossovers: int, mutation_probability: float) -> None:
    counts = {"population": population, "iterations": iterations, "mutations": mutations, "crossovers": crossovers}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name}={count!r}; accepted: a whole number from 0")
    if not 0 <= mutation_probability <= 1:
        raise ValueError(f"mutation_probability={mutation_probability}; accepted: 0 to 1")


def _grid(model: PreTrainedModel, unit: str, step: float | None, max_tokens: int | None) -> tuple[int, float]:
    """(levels, step): a layer keeps 1 to `levels` steps."""
    if unit == "ratio":
        step = 1 / 20 if step is None else step
        if not 0 < step <= 1 or abs(1 / step - round(1 / step)) > 1e-6 or max_tokens is not None:
            raise ValueError(
                f"step={step}, max_tokens={max_tokens} with unit='ratio'; accepted: 1 / whole number, None"
            )
        return round(1 / step), step
    if unit != "tokens":
        raise ValueError(f"unit={unit!r}; accepted: 'ratio', 'tokens'")
    step = 8 if step is None else step
    most = model.config.max_position_embeddings if max_tokens is None else max_tokens
    if step < 1 or step != int(step) or most < 1:
        raise ValueError(f"step={step}, max_tokens={most} with unit='tokens'; accepted: whole numbers from 1")
    return math.ceil(most / step), int(step)


def _finite(name: str, function: Callable[[LengthConfig], float], config: LengthConfig) -> float:
    value = float(function(config))
    if not math.isfinite(value):
        raise ValueError(f"{name} returned {value} for {config}; accepted: a finite number")
    return value


# ------------------------------------------------------------------------------------------------------------- genes


def _first_population(layers: int, levels: int, population: int) -> list[Gene]:
    """Everything, the least, and for evenly spaced sums of what layers keep an early and a late way to drop tokens.

    Low sums come out higher: no layer keeps less than a step.
    """
    genes = [(levels,) * layers, (1,) * layers]
    least = 1 / levels
    for index in range(population):
        total = layers * (least + (1 - least) * (index + 1) / (population + 1))
        for untouched in (0, layers * (index + 1) // (population + 1)):
            genes.append((levels,) * untouched + _fixed_ratio(layers - untouched, levels, total - untouched))
    return list(dict.fromkeys(genes))


def _fixed_ratio(layers: int, levels: int, total: float) -> Gene:
    """Each layer keeps the same ratio of the layer before, at least a step; `total` is the sum of what they keep."""
    low, high = 0.0, 1.0
    for _ in range(50):
        ratio = (low + high) / 2
        too_many = sum(ratio**layer for layer in range(1, layers + 1)) > total
        low, high = (low, ratio) if too_many else (ratio, high)
    return tuple(max(1, round(levels * low**layer)) for layer in range(1, layers + 1))


def _gene(keep: Sequence[float], layers: int, levels: int, step: float) -> Gene:
    """The nearest steps of what layers keep.

    Raises:
        ValueError: another number of layers, or more in a layer than in the one before.
    """
    if len(keep) != layers or list(keep) != sorted(keep, reverse=True):
        raise ValueError(f"first: {tuple(keep)}; accepted: {layers} numbers, one a layer, none above the one before")
    return tuple(min(levels, max(1, round(share / step))) for share in keep)


def _pareto(found: dict[Gene, FrontPoint]) -> list[Gene]:
    """By ascending cost, those with a better score than all that cost as much or less."""
    front: list[Gene] = []
    for gene in sorted(found, key=lambda gene: (found[gene].cost, -found[gene].score, gene)):
        if not front or found[gene].score > found[front[-1]].score:
            front.append(gene)
    return front


def _children(
    found: dict[Gene, FrontPoint],
    levels: int,
    mutations: int,
    crossovers: int,
    mutation_probability: float,
    generator: random.Random,
) -> list[Gene]:
    """New genes made of the front's; fewer than asked for where hardly any are left."""
    parents = _pareto(found)

    def mutate() -> Gene:
        return _mutation(generator.choice(parents), levels, mutation_probability, generator)

    def cross() -> Gene:
        return _crossover(generator.choice(parents), generator.choice(parents))

    children: dict[Gene, None] = {}  # a set that keeps its order
    for make, count in ((mutate, mutations), (cross, crossovers)):
        wanted = len(children) + count
        for _ in range(count * _TRIES):
            if len(children) == wanted:
                break
            gene = make()
            if gene not in found:
                children[gene] = None
    return list(children)


def _mutation(gene: Gene, levels: int, probability: float, generator: random.Random) -> Gene:
    child: list[int] = []
    for layer, level in enumerate(gene):
        if generator.random() < probability:
            lowest = gene[layer + 1] if layer + 1 < len(gene) else 1
            level = generator.randint(lowest, child[-1] if child else levels)
        child.append(level)
    return tuple(child)


def _crossover(first: Gene, second: Gene) -> Gene:
    return tuple((a + b + 1) // 2 for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------------- store


class _Store:
    """Scores by gene; in a JSON file where there is a path, replaced as a whole with every score."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.scores: dict[Gene, float] = {}
        if path is None:
            return
        if not path.exists():
            self._write()  # a path that cannot be written is found out before hours of evaluations
            return
        try:
            values = json.loads(path.read_text())
            written, scores = values["settings"], values["scores"]
            self.scores = {tuple(map(int, gene.split())): float(score) for gene, score in scores.items()}
            names = sorted(written.keys() | settings.keys())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a store of search_lengths ({error!r})") from error
        other = [name for name in names if written.get(name) != settings.get(name)]
        if other:
            changes = ", ".join(f"{name}={written.get(name)} (now {settings.get(name)})" for name in other)
            raise ValueError(f"{path} was written by a search with {changes}; give another path or the same settings")

    def add(self, gene: Gene, score: float) -> None:
        self.scores[gene] = score
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        scores = {" ".join(map(str, gene)): score for gene, score in self.scores.items()}
        write_text(self.path, json.dumps({"settings": self.settings, "scores": scores}, indent=1))
