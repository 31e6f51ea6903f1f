"""Runs a recipe: builds its students, trains them stage by stage, quantizes and packs."""

from __future__ import annotations

import copy
import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import DataCollatorForLanguageModeling, PreTrainedModel, TrainingArguments, set_seed

import lowbit

from ...data.masking import SeededByBatch
from ...distill.generator import masked_lm_of
from ...distill.students import Built
from ...files.atomic import write_text
from .. import RecipeError
from ..stages import Run, arguments, train, without_dropout
from . import map_search, parts, students
from .checking import AFTER, check, give_exits, leave, quantizer
from .recipe import Recipe, Stage
from .sources import Source, masked_lm, source

# What a recipe makes before its stages, under names that are not its own.
MADE_BEFORE = ("masked-lm", "subwords", *(f"{name}-tokenizer" for name in parts.OWN_TOKENS), map_search.SCORES)


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
    bits = check(run, teacher, recipe, bits)
    _record(run, recipe, bits)
    quantize = quantizer(bits)
    before = quantize if recipe.quantize == "before" else None
    if recipe.search is not None:
        low_bit = before is not None
        found = map_search.search(
            run, teacher, recipe, lambda: parts.student(recipe.student, teacher, before),
            lambda proxy, tried, built: _all_stages(proxy, tried, built, teacher, low_bit),
        )  # fmt: skip
        recipe = map_search.with_map(recipe, found)
    for number, builder in enumerate(recipe.chain, 1):
        _, teacher, _ = _student(run, teacher, recipe, f"{recipe.name}-assistant{number}", builder, None)
    name, student, run = _student(run, teacher, recipe, f"{recipe.name}-{bits}", recipe.student, before)
    if quantize is not None and before is None:
        name, guide = f"{recipe.name}-{bits}", student
        student = run.stage(
            name, lambda: _train(run, name, recipe, AFTER, quantize(copy.deepcopy(guide)), guide, low_bit=True)
        )
    if quantize is not None:
        name, prepared = f"{name}-packed", student
        run.stage(name, lambda: lowbit.convert(prepared))
    return name


def _record(run: Run, recipe: Recipe, bits: str) -> None:
    """Write the recipe beside its stages; RecipeError where these are of another form of it."""
    path, given = run.folder / f"{recipe.name}-{bits}.json", json.dumps(asdict(recipe), indent=2)
    stages = glob.escape(recipe.name) + "-*"
    begun = any([*run.folder.glob(f"{stages}/config.json"), *run.folder.glob(f"{stages}/checkpoint-*")])
    begun |= any((run.folder / name).exists() for name in MADE_BEFORE)
    if begun and path.is_file() and path.read_text() != given:
        raise RecipeError(f"{path} is of another form of recipe {recipe.name}; choose another folder or delete it")
    write_text(path, given)


def _student(
    run: Run,
    teacher: PreTrainedModel,
    recipe: Recipe,
    name: str,
    builder: Any,
    quantize: Callable[[Any], Any] | None,
) -> tuple[str, PreTrainedModel, Run]:
    """The stage that ends a student's training, the student, and the run in its tokens.

    What a builder made is finished after the first stage.
    """
    made, student, own = None, None, run
    total = sum(stage.share for stage in recipe.stages)
    if parts.reads_own_tokens(builder) or not (run.folder / f"{name}-{recipe.stages[0].name}").is_dir():
        made = students.build(run, teacher, recipe, builder, quantize)
        own = made.run
    for number, stage in enumerate(recipe.stages):
        shared, given = replace(stage, share=stage.share / total), student

        def build(stage: Stage = shared, given: Any = given, first: bool = number == 0) -> PreTrainedModel:
            built = made.built if made is not None and first else Built(given)
            rows = None if made is None else made.rows
            low_bit, stage_name = quantize is not None, f"{name}-{stage.name}"
            trained = _train(own, stage_name, recipe, stage, built.model, teacher, low_bit, built.callbacks, rows)
            return built.finish(trained)

        student = own.stage(f"{name}-{stage.name}", build)
    return f"{name}-{recipe.stages[-1].name}", student, own


def _all_stages(run: Run, recipe: Recipe, built: Built, teacher: PreTrainedModel, low_bit: bool) -> Any:
    """A student through all stages, without folders of its own."""
    model, callbacks, total = built.model, built.callbacks, sum(stage.share for stage in recipe.stages)
    for stage in recipe.stages:
        shared = replace(stage, share=stage.share / total)
        model = _train(run, f"proxy-{stage.name}", recipe, shared, model, teacher, low_bit, callbacks)
        model, callbacks = built.finish(model) if stage is recipe.stages[0] else model, ()
    return model


def _train(
    run: Run,
    name: str,
    recipe: Recipe,
    stage: Stage,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    low_bit: bool,
    callbacks: Sequence[Any] = (),
    rows: Callable[[str], Source] | None = None,
) -> PreTrainedModel:
    """One stage of a student; `rows` gives the data of one that reads other tokens than its teacher."""
    set_seed(run.options.seed)  # of ramps and of what else is made here: the same when a stage begins again
    if stage.head == "masked_lm":
        return _general(run, name, recipe, stage, student, teacher)
    usual = None if rows is None else "own_columns"
    if not stage.dropout:
        student = without_dropout(student)
    if stage.train != "all":
        give_exits(recipe, stage, student)
    given = source(run, recipe, stage.data, teacher) if rows is None else rows(stage.data)
    args = _arguments(run, name, stage, low_bit)
    args.remove_unused_columns = not given.keep_columns
    views: dict[str, Any] = {}
    attention = teacher.config._attn_implementation

    def view(kind: str, fields: dict[str, Any]) -> Any:
        """The same one for objectives that say the same, so that it is run once a step."""
        key = f"{kind} {fields}"
        if key not in views:
            its = (masked_lm(run, recipe, teacher), run.tokenizer) if kind == "masked_generator" else ()
            views[key] = parts.make("view", kind, parts.VIEWS[kind], fields, *its)
        return views[key]

    try:
        trainer = lowbit.DistillationTrainer(
            model=student,
            teacher=teacher,
            args=args,
            objectives=[parts.objective(each, view, usual) for each in stage.objectives],
            teacher_dropout=stage.teacher_dropout,
            callbacks=[*callbacks],
            train_dataset=given.rows,
            data_collator=given.collate,
            processing_class=run.tokenizer,
        )
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from error
    try:
        trained = train(run, name, trainer)
    finally:  # another attention rounds otherwise, and a run that goes on from here would have this one
        teacher.set_attn_implementation(attention)
    if stage.train != "all":
        leave(recipe, trained.requires_grad_(True))
    return trained


def _general(
    run: Run, name: str, recipe: Recipe, stage: Stage, student: PreTrainedModel, teacher: PreTrainedModel
) -> PreTrainedModel:
    """The student, its encoder distilled from that of a masked language model on the task's texts."""
    taught = masked_lm(run, recipe, teacher)
    own = masked_lm_of(student)
    head = {key: value for key, value in taught.state_dict().items() if not key.startswith(taught.base_model_prefix)}
    known = own.state_dict()
    own.load_state_dict({key: value for key, value in head.items() if known[key].shape == value.shape}, strict=False)
    try:
        trainer = lowbit.DistillationTrainer(
            model=own if stage.dropout else without_dropout(own),
            teacher=taught,
            args=_arguments(run, name, stage, low_bit=False),
            objectives=[parts.objective(each) for each in stage.objectives],
            train_dataset=source(run, recipe, "text", teacher).rows,
            data_collator=SeededByBatch(DataCollatorForLanguageModeling(run.tokenizer), run.options.seed),
            processing_class=run.tokenizer,
        )
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from error
    encoder = train(run, name, trainer).base_model.state_dict()
    student.base_model.load_state_dict(encoder, strict=False)  # a pooler is of the task
    return student.eval()


def _arguments(run: Run, name: str, stage: Stage, low_bit: bool) -> TrainingArguments:
    options = run.options
    rate = options.learning_rate if low_bit else options.teacher_learning_rate
    args = arguments(run, name, max(1, round(stage.share * options.steps)) if options.steps else 0, stage.rate * rate)
    if stage.schedule == "constant":
        args.lr_scheduler_type, args.warmup_steps = "constant", 0
    return args
