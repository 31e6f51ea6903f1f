"""ELM: an evolutionary search for the layer map, each map scored by a short distillation with it.

Jiao et al. 2021 (arXiv 2012.06153). A gene has for each student layer a teacher layer, or 0 where it is not taught.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ..files.atomic import write_text
from .layer_maps import LayerMap, resolve

Gene = tuple[int, ...]


@dataclass(frozen=True)
class Evolution:
    """How maps are searched.

    Args:
        population: maps in a generation; the better half are parents of the next one.
        generations: how many there are.
        mutation: chance of each layer of a child to be drawn anew.
        finalists: that many of the best are scored again with other seeds, since one score is mostly noise.
        repeats: how often.
        seed: of the draws.

    Raises:
        ValueError: sizes below 1, fewer than 4 maps, a chance outside of [0, 1].
    """

    population: int = 8
    generations: int = 3
    mutation: float = 0.25
    finalists: int = 2
    repeats: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            self.population < 4
            or min(self.generations, self.finalists, self.repeats) < 1
            or not 0 <= self.mutation <= 1
        ):
            raise ValueError(f"{self}; accepted: a population from 4, other sizes from 1, a mutation of 0 to 1")


def search_layer_map(
    student: int,
    teacher: int,
    score: Callable[[LayerMap, int], float],
    how: Evolution | None = None,
    state: Path | None = None,
) -> LayerMap:
    """The map with the best mean score.

    Args:
        student, teacher: L and N layers.
        score: of a map and a seed, higher is better; a function of these two alone. Uniform and last are tried too.
        how: the search.
        state: JSON file that scores are written to, each when it is known: an interrupted search goes on from there.

    Raises:
        ValueError: a state of another search.
    """
    how = how or Evolution()
    key, known = [student, teacher], {}
    if state is not None and state.is_file():
        found = json.loads(state.read_text())
        if found.get("layers") != key:
            raise ValueError(f"{state} is of a search for {found.get('layers')} layers, not {key}; delete it")
        known = found["scores"]

    most = how.population * how.generations + how.finalists * (how.repeats - 1)
    with tqdm(total=most, desc="layer maps", unit="map") as bar:

        def scored(gene: Gene, seed: int = how.seed) -> float:
            name = f"{' '.join(map(str, gene))} seed {seed}"
            if name not in known:
                known[name] = float(score(_map(gene, teacher), seed))
                if state is not None:
                    write_text(state, json.dumps({"layers": key, "scores": known}, indent=2))
            bar.update()
            return known[name]

        # Drawn again from the seed after an interruption; what was scored is known then, so no more needs to be kept.
        draws = random.Random(how.seed)
        ranked = sorted(_first(student, teacher, how.population, draws), key=scored, reverse=True)
        for _ in range(how.generations - 1):
            parents = ranked[: how.population // 2]
            pool = _filled(parents, how.population, lambda: _child(parents, teacher, how.mutation, draws))  # noqa: B023
            ranked = sorted(pool, key=scored, reverse=True)
        finalists = ranked[: how.finalists]
        seeds = range(how.seed, how.seed + how.repeats)
        best = max(finalists, key=lambda gene: sum(scored(gene, seed) for seed in seeds))
    return _map(best, teacher)


def _map(gene: Gene, teacher: int) -> LayerMap:
    return LayerMap(tuple((layer,) if layer else () for layer in gene), teacher_layers=teacher)


def _first(student: int, teacher: int, count: int, draws: random.Random) -> list[Gene]:
    """Uniform where it divides, last, and maps at random."""
    names = ("uniform", "last") if teacher % student == 0 else ("last",)
    maps = [resolve(name, student, teacher) for name in names]
    genes = [tuple(row[0] if row else 0 for row in each.rows) for each in maps]
    return _filled(genes, count, lambda: tuple(draws.randint(0, teacher) for _ in range(student)))


def _filled(genes: list[Gene], count: int, draw: Callable[[], Gene]) -> list[Gene]:
    """Genes and drawn ones, each once, up to `count`; fewer where there are few to draw."""
    found = dict.fromkeys(genes)
    for _ in range(100 * count):
        if len(found) == count:
            break
        found[draw()] = None
    return list(found)


def _child(parents: list[Gene], teacher: int, mutation: float, draws: random.Random) -> Gene:
    """Each layer of one of two parents, or drawn anew."""
    one, other = draws.choices(parents, k=2)
    return tuple(
        draws.randint(0, teacher) if draws.random() < mutation else draws.choice(pair)
        for pair in zip(one, other, strict=True)
    )
