"""The search for a layer map finds the best one, keeps what it scored, and goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowbit.distill.layer_maps import LayerMap, resolve
from lowbit.distill.map_search import Evolution, search_layer_map

BEST = (2, 0, 5)


def close_to_best(found: LayerMap, seed: int) -> float:
    return -sum(abs((row[0] if row else 0) - wanted) for row, wanted in zip(found.rows, BEST, strict=True))


def test_it_finds_a_map_that_is_none_of_the_named_ones() -> None:
    found = search_layer_map(3, 6, close_to_best, Evolution(population=16, generations=20, mutation=0.3))
    assert found.rows == ((2,), (), (5,)) and found.teacher_layers == 6


def test_uniform_and_last_are_among_the_candidates(tmp_path: Path) -> None:
    seen = []
    search_layer_map(3, 6, lambda each, seed: seen.append(each.rows) or 0.0, Evolution(population=4, generations=1))
    assert resolve("uniform", 3, 6).rows in seen and resolve("last", 3, 6).rows in seen


def test_an_interrupted_search_goes_on_and_ends_alike(tmp_path: Path) -> None:
    how, calls = Evolution(population=6, generations=4, finalists=3, repeats=3), []

    def counted(found: LayerMap, seed: int) -> float:
        calls.append((found.rows, seed))
        return close_to_best(found, seed) + 0.1 * seed

    whole = search_layer_map(3, 6, counted, how, tmp_path / "whole.json")
    assert len(calls) == len(set(calls))  # none is scored twice
    everything, left = list(calls), 5
    calls.clear()

    def failing(found: LayerMap, seed: int) -> float:
        if len(calls) == left:
            raise KeyboardInterrupt
        return counted(found, seed)

    with pytest.raises(KeyboardInterrupt):
        search_layer_map(3, 6, failing, how, tmp_path / "state.json")
    assert len(json.loads((tmp_path / "state.json").read_text())["scores"]) == left
    assert search_layer_map(3, 6, counted, how, tmp_path / "state.json") == whole
    assert calls == everything


def test_noise_of_one_seed_does_not_choose() -> None:
    """A map that was lucky once is not taken where the mean of its scores is lower."""

    def lucky(found: LayerMap, seed: int) -> float:
        return 10.0 if found.rows == ((), (), (6,)) and seed == 0 else close_to_best(found, seed)

    how = Evolution(population=16, generations=20, finalists=4, repeats=40)
    assert search_layer_map(3, 6, lucky, how).rows != ((), (), (6,))


def test_a_state_of_other_models_and_bad_sizes_are_refused(tmp_path: Path) -> None:
    how = Evolution(population=4, generations=1)
    search_layer_map(3, 6, close_to_best, how, tmp_path / "state.json")
    with pytest.raises(ValueError, match=r"search for \[3, 6\] layers, not \[2, 6\]"):
        search_layer_map(2, 6, close_to_best, how, tmp_path / "state.json")
    with pytest.raises(ValueError, match="population from 4"):
        Evolution(population=3)
