"""What is looked at before a recipe trains anything: its parts with these models, as they are before training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

import lowbit

from ...data.text import check_one_row
from ...distill.checks import check_models
from ...distill.generator import masked_lm_of
from ...distill.students import rnn, subwords
from ...exits import freeze_backbone
from .. import RecipeError
from ..stages import Run
from . import besides, map_search, parts
from .recipe import Recipe, Stage
from .sources import corpus_of

QUANTIZED = {"ternary": lowbit.TernaryConfig, "binary": lowbit.BinaryConfig}
# How a float student of a recipe is made a low-bit one afterwards (TernaryBERT).
AFTER = Stage("", ("hidden", "scores", "logits"))


def quantizer(bits: str) -> Callable[[Any], Any] | None:
    """What makes a low-bit student of a float one; None for "float"."""
    return None if bits == "float" else partial(_quantized, config=QUANTIZED[bits]())


def _quantized(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    return lowbit.prepare(model, config)


@torch.random.fork_rng()
def check(run: Run, teacher: PreTrainedModel, recipe: Recipe, bits: str | None = None) -> str:
    """Builds what the recipe trains, and asks its objectives, without training; nothing is written.

    Args:
        run: with the task's data.
        teacher: float; it need not be fine-tuned yet, and is not changed.
        recipe, bits: as of `distil_by_recipe`.

    Returns:
        The student's bits.

    Raises:
        RecipeError: bits that have no meaning for the recipe; data, a student or an objective that does not fit.
    """
    bits = bits or recipe.bits[0]
    if bits not in recipe.bits:
        raise RecipeError(f"recipe {recipe.name} trains {' and '.join(recipe.bits)} students, not {bits}")
    _check_data(run, recipe)
    quantize = quantizer(bits)
    after = quantize is not None and recipe.quantize == "after"
    words = None if recipe.masked_lm is None else _masked_lm(run, recipe, teacher)
    if recipe.search is not None:
        map_search.check_examples(run, recipe)
        recipe = map_search.with_map(recipe, "last")
    for builder in recipe.chain:
        teacher = _check_student(run, teacher, recipe, builder, None, words)
    student = _check_student(run, teacher, recipe, recipe.student, None if after else quantize, words)
    if quantize is not None and after:
        _check_objectives(run, AFTER, quantize(copy.deepcopy(student)), student, words)
    return bits


def _check_data(run: Run, recipe: Recipe) -> None:
    """RecipeError for texts or tokens that are not there."""
    data = {stage.data for stage in recipe.stages}
    reads = bool(data & {"text", "neighbours"}) or recipe.masked_lm is not None
    if run.raw is None and (data - {"train"} or reads):
        raise RecipeError(f"recipe {recipe.name} reads texts, and the run has tokens alone; pass raw=... to `start`")
    if "neighbours" in data and len(run.task.columns) > 1:
        raise RecipeError(f"data: neighbours is for single texts, and the task has {' and '.join(run.task.columns)}")
    trained = recipe.masked_lm is not None and not isinstance(recipe.masked_lm, str)
    rows = trained or "text" in data or any(stage.head == "masked_lm" for stage in recipe.stages)
    texts = corpus_of(run) if rows or getattr(run.options, "text_file", None) else []
    needed = {"mask": run.tokenizer.mask_token_id} if recipe.masked_lm is not None else {}
    if rows:
        needed |= {"CLS": run.tokenizer.cls_token_id, "SEP": run.tokenizer.sep_token_id}
    if lacking := [name for name, number in needed.items() if number is None]:
        raise RecipeError(
            f"recipe {recipe.name}: the tokenizer of {run.options.model} has no {', '.join(lacking)} token"
        )
    if rows:
        try:
            check_one_row(texts, run.tokenizer, run.task.max_length)
        except ValueError as error:
            raise RecipeError(f"recipe {recipe.name} reads text without labels: {error}") from error


def _masked_lm(run: Run, recipe: Recipe, teacher: PreTrainedModel) -> PreTrainedModel:
    """That of the recipe, untrained where it is to be trained."""
    given = recipe.masked_lm
    try:
        if isinstance(given, str):
            return AutoModelForMaskedLM.from_pretrained(given)
        return masked_lm_of(teacher, besides.MaskedLMFields(**given or {}).layers)
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"recipe {recipe.name}: masked_lm: {error}") from error


def _check_student(
    run: Run, teacher: PreTrainedModel, recipe: Recipe, builder: Any, quantize: Any, words: PreTrainedModel | None
) -> PreTrainedModel:
    """A student as it is before its training, through all stages."""
    name, fields = parts.named("student", builder, parts.STUDENTS)
    if name in parts.OWN_TOKENS:
        return _check_own_tokens(run, teacher, recipe, name, parts.split_student(name, fields)[1], words)
    try:
        built = parts.student(builder, teacher, quantize)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"student {name}: {error}") from error
    model = built.model
    for stage in recipe.stages:
        if stage.train != "all":
            give_exits(recipe, stage, model)
        if stage.head == "masked_lm":
            _check_objectives(run, stage, masked_lm_of(model), words, words)  # type: ignore[arg-type]
        else:
            _check_objectives(run, stage, model, teacher, words)
        if stage.train != "all":
            leave(recipe, model.requires_grad_(True))
        if stage is recipe.stages[0]:
            model = built.finish(model)
    return model


def _check_own_tokens(
    run: Run, teacher: PreTrainedModel, recipe: Recipe, name: str, fields: Any, words: PreTrainedModel | None
) -> PreTrainedModel:
    """With the teacher's tokenizer in the place of one that is to be learned."""
    if run.raw is None:
        raise RecipeError(
            f"student {name} needs the texts, and the run has their tokens alone; pass raw=... to `start`"
        )
    if name == "subwords":
        if words is None:
            raise RecipeError(f"recipe {recipe.name} needs masked_lm: a checkpoint, or {{layers: 2, share: 0.5}}")
        made = parts.make("student", name, subwords.build, fields, words, run.tokenizer, run.tokenizer)
    else:
        pair = len(run.task.columns) == 2
        made = parts.make("student", name, rnn.build, {"encoder": name, "pair": pair, **fields}, teacher, run.tokenizer)
    for stage in recipe.stages:
        for each in _objectives(run, stage, words):
            if each.needs:
                raise RecipeError(
                    f"stage {stage.name}: {each.name} compares token by token, and student {name} reads other tokens "
                    "than its teacher; accepted: logits and task"
                )
    return made.model


def _objectives(run: Run, stage: Stage, words: PreTrainedModel | None) -> list[Any]:
    def view(kind: str, fields: dict[str, Any]) -> Any:
        if kind == "masked_generator" and words is None:
            raise RecipeError(f"stage {stage.name}: a generator needs masked_lm: a checkpoint, or {{layers: 2}}")
        return parts.make(
            "view", kind, parts.VIEWS[kind], fields, *((words, run.tokenizer) if kind == "masked_generator" else ())
        )

    return [parts.objective(each, view) for each in stage.objectives]


def _check_objectives(
    run: Run, stage: Stage, student: PreTrainedModel, teacher: PreTrainedModel, words: PreTrainedModel | None
) -> None:
    try:
        check_models(student, teacher, _objectives(run, stage, words))
    except (TypeError, ValueError) as error:
        name = f"stage {stage.name}" if stage.name else "the low-bit student"
        raise error if isinstance(error, RecipeError) else RecipeError(f"{name}: {error}") from error


def give_exits(recipe: Recipe, stage: Stage, student: PreTrainedModel) -> None:
    """Ramps, unless an earlier stage gave them; for their own stage all else is frozen."""
    if not hasattr(student, "exits"):
        fields = {key: value for key, value in (recipe.exits or {}).items() if key != "criterion"}
        parts.make("exits", recipe.name, lowbit.add_exits, fields, student)
    lowbit.set_exit(student, None)
    if stage.train == "exits":
        freeze_backbone(student)


def leave(recipe: Recipe, student: PreTrainedModel) -> None:
    """Let sentences leave by the recipe's criterion; RecipeError where the head has none like it."""
    try:
        lowbit.set_exit(student, parts.criterion((recipe.exits or {}).get("criterion")))
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"exits: {error}") from error
