"""Search of lengths: known optima, determinism, resuming, ends; fronts and budgets."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import tiny
from lowbit.length import Front, FrontPoint, LengthConfig, search_lengths
from lowbit.length.search import _children, _first_population

WEIGHTS = (0.1, 0.6, 0.2, 0.1)  # of four layers: what a kept token of each is worth


def worth(config: LengthConfig) -> float:
    """Concave in each layer, so that the best way to spend a budget is no corner."""
    return sum(weight * keep**0.5 for weight, keep in zip(WEIGHTS, config.keep, strict=False))


def total(config: LengthConfig) -> float:
    return sum(config.keep)


def search(evaluate: Callable[[LengthConfig], float] = worth, layers: int = 4, **options: object) -> Front:
    model = tiny("BertForTokenClassification", num_hidden_layers=layers)
    return search_lengths(model, evaluate, **{"cost": total, "progress": False, "step": 0.1, **options})


def optimum(limit: float, levels: int, layers: int) -> float:
    """The best score of all genes within a cost, by trying every one."""
    genes = itertools.product(range(1, levels + 1), repeat=layers)
    configs = (
        LengthConfig(tuple(level / levels for level in gene))
        for gene in genes
        if all(a >= b for a, b in itertools.pairwise(gene))
    )
    return max(worth(config) for config in configs if total(config) <= limit)


def test_finds_the_optimum_of_every_budget() -> None:
    front = search()
    for budget in (1, 1.25, 2, 3, 5):
        found = front.for_budget(f"{budget}x")
        assert total(found) <= front.full_cost / budget
        assert worth(found) == pytest.approx(optimum(front.full_cost / budget, 10, 4), rel=1e-3)


def test_random_search_of_as_many_is_worse() -> None:
    """The toy is hard enough to tell a search from sampling."""
    seen: list[LengthConfig] = []
    front = search(lambda config: seen.append(config) or worth(config), iterations=4, step=0.05)
    rng = random.Random(0)
    sampled = [LengthConfig(tuple(sorted((rng.randint(1, 20) / 20 for _ in range(4)), reverse=True))) for _ in seen]
    budgets = [front.full_cost / b for b in (1.5, 2, 2.5, 3, 4)]
    by_search = sum(max(worth(c) for c in seen if total(c) <= limit) for limit in budgets)
    by_chance = sum(max(worth(c) for c in sampled if total(c) <= limit) for limit in budgets)
    assert by_search > by_chance


def test_configurations_are_monotone_distinct_multiples_of_the_step_and_few() -> None:
    seen: list[LengthConfig] = []
    search(
        lambda config: seen.append(config) or random.random(),
        layers=6, unit="tokens", step=16, max_tokens=120, iterations=3, population=7, mutations=11, crossovers=5,
    )  # fmt: skip
    assert seen[0].keep == (128,) * 6
    assert seen[1].keep == (16,) * 6
    assert all(config.unit == "tokens" and config.keep[0] <= 128 for config in seen)
    assert all(keep % 16 == 0 and isinstance(keep, int) for config in seen for keep in config.keep)
    assert all(a >= b for config in seen for a, b in itertools.pairwise(config.keep))
    assert len(set(seen)) == len(seen) <= 2 + 2 * 7 + 3 * (11 + 5)
    assert len(seen) > 2 + 3 * 11


def test_children_are_new_and_crossovers_are_rounded_up_means() -> None:
    found = {gene: FrontPoint(LengthConfig((1,)), sum(gene), sum(gene)) for gene in ((9, 2, 1), (10, 10, 4))}
    assert _children(found, 10, 0, 5, 0.5, random.Random(0)) == [(10, 6, 3)]
    assert not found.keys() & set(_children(found, 10, 40, 0, 0.2, random.Random(0)))


def test_first_population_is_evenly_spaced() -> None:
    seen: list[LengthConfig] = []
    search(lambda config: seen.append(config) or 0.0, layers=12, population=9, iterations=0, step=0.01)
    full, least = seen[:2]
    for ways in (seen[2::2], seen[3::2]):  # an early and a late one for each number of tokens
        means = [total(config) / 12 for config in (least, *ways, full)]
        assert len(means) == 11
        assert all(b - a == pytest.approx(0.099, abs=0.01) for a, b in itertools.pairwise(means))
    assert all(config.keep.count(1) == 12 * index // 10 for index, config in enumerate(seen[3::2], 1))


@pytest.mark.parametrize("layers", [1, 2, 6, 24])
@pytest.mark.parametrize("levels", [1, 2, 20])
@pytest.mark.parametrize("population", [0, 1, 20])
def test_first_population_is_of_distinct_valid_genes(layers: int, levels: int, population: int) -> None:
    genes = _first_population(layers, levels, population)
    assert {(levels,) * layers, (1,) * layers} <= set(genes)
    assert len(set(genes)) == len(genes) <= 2 + 2 * population
    assert all(len(gene) == layers and gene[-1] >= 1 and gene[0] <= levels for gene in genes)
    assert all(a >= b for gene in genes for a, b in itertools.pairwise(gene))


def test_starts_from_dropping_late_too() -> None:
    """A model that knows nothing before its fourth layer: whatever leaves before that costs the whole score."""
    front = search(
        lambda config: float(min(config.keep[:3]) == 1 and config.keep[3] >= 0.3), layers=6, iterations=0, step=0.05
    )
    assert front.points[-1].score == 1
    assert total(front.points[-1].config) < 0.7 * 6


def test_starts_from_what_it_is_given_too() -> None:
    """Rounded to the step, after the first population, once each; a score that only it has is found at once."""
    seen: list[LengthConfig] = []
    given = [(1.0, 0.52, 0.31, 0.0), (1.0, 0.5, 0.3, 0.1), (1.0, 1.0, 1.0, 1.0)]
    special = (1.0, 0.5, 0.3, 0.1)
    front = search(
        lambda config: seen.append(config) or float(config.keep == special), population=2, iterations=0, first=given
    )
    assert [config.keep for config in seen].count(special) == 1 and len(seen) == 2 + 2 * 2 + 1
    assert seen[-1].keep == front.points[-1].config.keep == special


def test_default_step_is_a_twentieth_without_rounding_errors() -> None:
    seen: list[LengthConfig] = []
    search(lambda config: seen.append(config) or random.random(), step=None, iterations=2)
    assert {keep for config in seen for keep in config.keep} <= {level / 20 for level in range(1, 21)}


def test_fields_reach_every_configuration() -> None:
    seen: list[LengthConfig] = []
    search(
        lambda config: seen.append(config) or 0.0, iterations=1, min_tokens=3, score="cls", protect=("first_segment",)
    )
    assert {(c.min_tokens, c.score, c.protect) for c in seen} == {(3, "cls", ("first_segment",))}


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_last_layer_is_not_searched_where_the_head_reads_the_first_token_only(layers: int) -> None:
    def evaluate(config: LengthConfig) -> float:
        seen.append(config)
        return random.random()

    seen: list[LengthConfig] = []
    search_lengths(tiny(num_hidden_layers=layers), evaluate, cost=total, progress=False, iterations=2)
    assert len(set(seen)) == len(seen) >= 20
    assert all(len(config.keep) == layers and config.keep[-1] == config.keep[-2:][0] for config in seen)


@pytest.mark.parametrize("step", [1, 0.5, 0.1])
def test_two_layers_end_with_every_gene_known(step: float) -> None:
    seen: list[LengthConfig] = []
    front = search(lambda config: seen.append(config) or worth(config), layers=2, step=step)
    levels = round(1 / step)
    assert len(seen) <= levels * (levels + 1) // 2
    assert front.full_score == worth(LengthConfig((1, 1)))
    if step >= 0.5:
        assert len(seen) == levels * (levels + 1) // 2


def test_same_seed_same_result_whatever_evaluate_draws() -> None:
    def drawing(config: LengthConfig) -> float:
        random.seed(len(seeds))
        seeds.append(random.random())
        return worth(config)

    seeds: list[float] = []
    orders: list[list[LengthConfig]] = [[], [], []]
    for seen, seed in zip(orders, (5, 5, 6), strict=True):
        search(lambda config, seen=seen: seen.append(config) or drawing(config), iterations=3, seed=seed)
    assert orders[0] == orders[1] != orders[2]


def test_front_is_the_pareto_front_of_all_that_was_evaluated() -> None:
    scores: dict[LengthConfig, float] = {}
    front = search(lambda config: scores.setdefault(config, round(random.random(), 1)), iterations=5)
    points = front.points
    assert all(a.cost < b.cost and a.score < b.score for a, b in itertools.pairwise(points))
    assert all(scores[p.config] == p.score and total(p.config) == p.cost for p in points)
    for config, score in scores.items():
        assert any(p.cost <= total(config) and p.score >= score for p in points)


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("calls", [0, 1, 17, 60])
def test_resumed_search_gives_what_an_uninterrupted_one_gives(tmp_path: Path, calls: int) -> None:
    def failing(config: LengthConfig) -> float:
        if len(first) == calls:
            raise RuntimeError("out of memory")
        first.append(config)
        return worth(config)

    first: list[LengthConfig] = []
    second: list[LengthConfig] = []
    uninterrupted: list[LengthConfig] = []
    options = {"iterations": 3, "seed": 3}
    whole = search(lambda config: uninterrupted.append(config) or worth(config), **options)
    assert len(uninterrupted) > 60
    with pytest.raises(RuntimeError, match="out of memory"):
        search(failing, path=tmp_path / "store.json", **options)
    resumed = search(lambda config: second.append(config) or worth(config), path=tmp_path / "store.json", **options)
    assert resumed == whole
    assert first + second == uninterrupted
    assert [file.name for file in tmp_path.iterdir()] == ["store.json"]


def test_more_iterations_continue_a_finished_search(tmp_path: Path) -> None:
    search(path=tmp_path / "store.json", iterations=2)
    known = len(json.loads((tmp_path / "store.json").read_text())["scores"])
    calls: list[LengthConfig] = []
    longer = search(lambda c: calls.append(c) or worth(c), path=tmp_path / "store.json", iterations=4)
    every: list[LengthConfig] = []
    assert longer == search(lambda c: every.append(c) or worth(c), iterations=4)
    assert len(calls) == len(every) - known > 0
    # Fewer again: what later rounds found does not leak into the result.
    assert search(path=tmp_path / "store.json", iterations=2) == search(iterations=2)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"population": 3},
        {"step": 0.05},
        {"unit": "tokens", "step": 4},
        {"min_tokens": 2},
        {"first": [(1.0, 0.5, 0.5, 0.5)]},
        {"layers": 3},
        {"mutation_probability": 0.4},
        {"cost": lambda config: 2 * total(config)},
    ],
)
def test_store_of_another_search_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "store.json"
    search(path=path, iterations=0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"store\.json was written by a search with .*now"):
        search(path=path, iterations=0, **change)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "scores": {"a b": 1}}', '{"settings": 1}'])
def test_file_that_is_no_store_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "store.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a store of search_lengths"):
        search(path=path)


def test_path_that_cannot_be_written_fails_before_any_evaluation(tmp_path: Path) -> None:
    calls: list[LengthConfig] = []
    with pytest.raises(FileNotFoundError):
        search(lambda config: calls.append(config) or 0.0, path=tmp_path / "no folder" / "store.json")
    assert not calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": -1}, "population=-1"),
        ({"iterations": 2.5}, r"iterations=2\.5"),
        ({"mutation_probability": 1.5}, r"mutation_probability=1\.5"),
        ({"unit": "threshold"}, "'threshold'; accepted: 'ratio', 'tokens'"),
        ({"step": 0.3}, r"step=0\.3"),
        ({"step": 0}, "step=0"),
        ({"max_tokens": 10}, "max_tokens=10"),
        ({"unit": "tokens", "step": 1.5}, r"step=1\.5"),
        ({"first": [(1.0, 0.5)]}, r"first: \(1.0, 0.5\); accepted: 4 numbers, one a layer"),
        ({"first": [(0.5, 0.6, 0.5, 0.5)]}, "none above the one before"),
        ({"unit": "tokens", "step": 8, "max_tokens": 0}, "max_tokens=0"),
        ({"evaluate": lambda config: float("nan")}, "evaluate returned nan"),
        ({"cost": lambda config: float("inf")}, "cost returned inf"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(**options)


# ------------------------------------------------------------------------------------------------------------- fronts


def front() -> Front:
    half, most, full = LengthConfig((0.5, 0.25)), LengthConfig((1.0, 0.5), min_tokens=2), LengthConfig((1.0, 1.0))
    return Front((FrontPoint(half, 40, 0.7), FrontPoint(most, 50, 0.8), FrontPoint(full, 100, 0.9)), 100, 0.9, "ms")


def test_budget_picks_the_best_that_is_cheap_enough(tmp_path: Path) -> None:
    front().save(tmp_path / "front.json")
    for budget, cost in {"1x": 100, "1.5x": 50, "2x": 50, "2.01x": 40, "2.5x": 40}.items():
        expected = next(point.config for point in front().points if point.cost == cost)
        assert front().for_budget(budget) == expected
        assert Front.load(tmp_path / "front.json").for_budget(budget) == expected
        assert Front.load(str(tmp_path / "front.json")).for_budget(budget) == expected


@pytest.mark.parametrize("budget", ["2", "x", "0.5x", "0x", "-2x", "2 x", "2xx", "nanx", "1e3x", "", 2, None])
def test_budget_that_is_none_is_refused(budget: object) -> None:
    with pytest.raises(ValueError, match=r"accepted: '<number>x'"):
        front().for_budget(budget)


def test_budget_that_nothing_meets_says_what_is_cheapest() -> None:
    with pytest.raises(ValueError, match=r"at most 33\.3333 ms \(3x of 100\).*costs 40 \(2\.50x\)"):
        front().for_budget("3x")
    with pytest.raises(ValueError, match="no configuration"):
        Front((), 100, 0.9, "ms").for_budget("1x")


def test_front_reads_what_it_wrote_exactly(tmp_path: Path) -> None:
    for case in (front(), search(iterations=2, protect=("first_segment",), restore=False)):
        case.save(tmp_path / "front.json")
        assert Front.load(tmp_path / "front.json") == case


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"points": [{"cost": 1}]}', '{"points": 3}'])
def test_file_that_is_no_front_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "front.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"front\.json is not a front"):
        Front.load(path)


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    front().plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        front().plot(tmp_path / "front.png")


def test_a_front_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front((FrontPoint(LengthConfig((0.5,)), 1.0, 90.0),), 2.0, 91.0, "ms")
    front.save(tmp_path / "front.json")

    def full_disk(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        Front((), 3.0, 91.0, "ms").save(tmp_path / "front.json")
    assert Front.load(tmp_path / "front.json") == front
