"""Runs a recipe: builds its students, trains them stage by stage, quantizes and packs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

import lowbit

from . import RecipeError, parts
from .recipe import Recipe, Stage
from .stages import Run, arguments, common, train, without_dropout

QUANTIZED = {"ternary": lowbit.TernaryConfig, "binary": lowbit.BinaryConfig}
# How a float student of a recipe is made a low-bit one afterwards (TernaryBERT).
AFTER = Stage("", ("hidden", "scores", "logits"))


def distil_by_recipe(run: Run, teacher: PreTrainedModel, recipe: Recipe, bits: str | None = None) -> str:
    """Train the student of a recipe.

    Args:
        run: `options.steps` is shared out among a student's stages. The learning rate of float students is
            `teacher_learning_rate`, of others `learning_rate`.
        teacher: float.
        recipe: what is done.
        bits: "float", "ternary" (2-2-8) or "binary" (1-1-8); None: the recipe's first.

    Returns:
        The stage of the run that holds the student, packed where it is a low-bit one.

    Raises:
        RecipeError: bits that have no meaning for the recipe, or parts that do not fit these models.
    """
    bits = bits or recipe.bits[0]
    if bits not in recipe.bits:
        raise RecipeError(f"recipe {recipe.name} trains {' and '.join(recipe.bits)} students, not {bits}")
    quantize = None if bits == "float" else partial(_quantized, config=QUANTIZED[bits]())
    before = quantize if recipe.quantize == "before" else None
    for number, builder in enumerate(recipe.chain, 1):
        _, teacher = _student(run, teacher, recipe, f"{recipe.name}-assistant{number}", builder, None)
    name, student = _student(run, teacher, recipe, f"{recipe.name}-{bits}", recipe.student, before)
    if quantize is not None and before is None:
        name, guide = f"{recipe.name}-{bits}", student
        student = run.stage(name, lambda: _train(run, name, AFTER, quantize(copy.deepcopy(guide)), guide, low_bit=True))
    if quantize is not None:
        name, prepared = f"{name}-packed", student
        run.stage(name, lambda: lowbit.convert(prepared))
    return name


def _quantized(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    return lowbit.prepare(model, config)


def _student(
    run: Run,
    teacher: PreTrainedModel,
    recipe: Recipe,
    name: str,
    builder: Any,
    quantize: Callable[[Any], Any] | None,
) -> tuple[str, PreTrainedModel]:
    """The stage that ends a student's training, and the student. What a builder made is finished after the first."""
    student: Any = None
    total = sum(stage.share for stage in recipe.stages)
    for number, stage in enumerate(recipe.stages):
        shared, given = replace(stage, share=stage.share / total), student

        def build(stage: Stage = shared, given: Any = given, first: bool = number == 0) -> PreTrainedModel:
            built = parts.student(builder, teacher, quantize) if first else None
            model = given if built is None else built.model
            callbacks = () if built is None else built.callbacks
            trained = _train(run, f"{name}-{stage.name}", stage, model, teacher, quantize is not None, callbacks)
            return trained if built is None else built.finish(trained)

        student = run.stage(f"{name}-{stage.name}", build)
    return f"{name}-{recipe.stages[-1].name}", student


def _train(
    run: Run,
    name: str,
    stage: Stage,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    low_bit: bool,
    callbacks: Sequence[Any] = (),
) -> PreTrainedModel:
    if not stage.dropout:
        student = without_dropout(student)
    args = _arguments(run, name, stage, low_bit)
    try:
        trainer = lowbit.DistillationTrainer(
            model=student,
            teacher=teacher,
            args=args,
            objectives=[parts.objective(each) for each in stage.objectives],
            teacher_dropout=stage.teacher_dropout,
            callbacks=[*callbacks],
            **common(run),
        )
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from error
    return train(run, name, trainer)


def _arguments(run: Run, name: str, stage: Stage, low_bit: bool) -> TrainingArguments:
    options = run.options
    rate = options.learning_rate if low_bit else options.teacher_learning_rate
    args = arguments(run, name, max(1, round(stage.share * options.steps)) if options.steps else 0, stage.rate * rate)
    if stage.schedule == "constant":
        args.lr_scheduler_type, args.warmup_steps = "constant", 0
    return args
