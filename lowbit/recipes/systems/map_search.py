"""A recipe's search for a layer map: short trainings with each candidate, scored on examples that they do not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel

from ...distill.augment.hardest import divergence
from ...distill.layer_maps import LayerMap
from ...distill.map_search import search_layer_map
from .. import RecipeError
from ..stages import Run
from . import besides, parts
from .recipe import Recipe

SCORES = "layer-map-search.json"  # of candidates, in the run's folder


def with_map(recipe: Recipe, found: Any) -> Recipe:
    """The recipe with a layer map in all places that say `map: searched`."""

    def placed(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {
            key: found if (key, value) == ("map", parts.SEARCHED) else placed(value) for key, value in given.items()
        }

    stages = [dataclasses.replace(stage, objectives=tuple(map(placed, stage.objectives))) for stage in recipe.stages]
    return dataclasses.replace(recipe, stages=tuple(stages))


def search(
    run: Run,
    teacher: PreTrainedModel,
    recipe: Recipe,
    student: Callable[[], Any],
    trained: Callable[[Run, Recipe, Any], PreTrainedModel],
) -> LayerMap:
    """The map of the best candidate: that of the lowest mean KL(teacher || student) on examples set apart.

    Scores of candidates are kept in layer-map-search.json, the map in layer-map.json of the run; both are taken up
    again.

    Args:
        run: its last `examples` training examples are set apart.
        teacher: float.
        recipe: with `search`.
        student: builds one.
        trained: trains it by all stages of a recipe.

    Raises:
        RecipeError: fewer training examples than are set apart.
    """
    path, (fields, how) = run.folder / "layer-map.json", besides.split_search(recipe.search or {})
    if path.is_file():
        return parts.layer_map(path)
    rows, examples = run.data["train"], fields.examples
    check_examples(run, recipe)
    seen, apart = rows.select(range(len(rows) - examples)), rows.select(range(len(rows) - examples, len(rows)))
    options = run.options
    changes = {
        "steps": max(1, round(fields.share * options.steps)),
        "save_steps": 0,
        "output_dir": str(run.folder / "map-search"),
    }

    def score(candidate: LayerMap, seed: int) -> float:
        torch.manual_seed(seed)
        proxy = dataclasses.replace(
            run,
            data={**run.data, "train": seen},
            options=dataclasses.replace(options, seed=options.seed + seed, **changes),
        )
        proxy.folder.mkdir(exist_ok=True)
        return -_divergence(run, trained(proxy, with_map(recipe, candidate), student()), teacher, apart)

    own, taught = (model.config.num_hidden_layers for model in (student().model, teacher))
    found = search_layer_map(own, taught, score, how, run.folder / SCORES)
    found.save(path)
    return found


def check_examples(run: Run, recipe: Recipe) -> None:
    """RecipeError where a search sets apart as many examples as there are."""
    examples, rows = besides.split_search(recipe.search or {})[0].examples, len(run.data["train"])
    if examples >= rows:
        raise RecipeError(f"search: examples={examples} of {rows} training examples; give fewer")


@torch.inference_mode()
def _divergence(run: Run, student: PreTrainedModel, teacher: PreTrainedModel, rows: Any) -> float:
    """Mean KL of the teacher's answers to the student's."""
    collate, total = DataCollatorWithPadding(run.tokenizer), 0.0
    student.eval()
    for first in range(0, len(rows), 64):
        batch = collate([rows[i] for i in range(first, min(first + 64, len(rows)))])
        batch = {name: value.to(student.device) for name, value in batch.items() if name != "labels"}
        total += float(divergence(student(**batch).logits, teacher(**batch).logits).sum())
    return total / len(rows)
