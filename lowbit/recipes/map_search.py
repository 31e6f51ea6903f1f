"""A recipe's search for a layer map: short trainings with each candidate, scored on examples that they do not see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel

from ..distill.augment.hardest import divergence
from ..distill.layer_maps import LayerMap
from ..distill.map_search import Evolution, search_layer_map
from . import RecipeError, parts
from .recipe import Recipe
from .stages import Run

OWN = ("share", "examples")


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
    path, given = run.folder / "layer-map.json", dict(recipe.search)
    if path.is_file():
        return parts.layer_map(path)
    share, examples = (given.pop(name, default) for name, default in zip(OWN, (0.1, 1000), strict=True))
    rows = run.data["train"]
    if examples >= len(rows):
        raise RecipeError(f"search: examples={examples} of {len(rows)} training examples; give fewer")
    seen, apart = rows.select(range(len(rows) - examples)), rows.select(range(len(rows) - examples, len(rows)))
    options = run.options
    changes = {
        "steps": max(1, round(share * options.steps)),
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

    how = parts.make("search", recipe.name, Evolution, given)
    own, taught = (model.config.num_hidden_layers for model in (student().model, teacher))
    found = search_layer_map(own, taught, score, how, run.folder / "layer-map-search.json")
    found.save(path)
    return found


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
