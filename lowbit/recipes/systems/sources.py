"""What a stage of a recipe trains on: the task's examples, more of them, text without labels, neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    set_seed,
)

from ...data.masking import SeededByBatch
from ...data.tasks import tokenize
from ...data.text import chunks, read_texts
from ...distill import augment as methods
from ...distill.generator import masked_lm_of
from .. import RecipeError
from ..stages import Run, arguments, train
from . import besides, parts
from .recipe import Recipe


@dataclass
class Source:
    """Rows for a trainer, and how they become batches; `columns` are kept besides those that models read."""

    rows: Any
    collate: Any
    keep_columns: bool = False


def source(run: Run, recipe: Recipe, data: str, teacher: PreTrainedModel) -> Source:
    """The rows that a stage names.

    Args:
        run: with `raw`, the data set before it was tokenized, for all but "train".
        recipe: with what the rows are made by.
        data: one of `recipe.DATA`.
        teacher: whose encoder and word vectors look for neighbours and candidates, where the recipe names no others.

    Raises:
        RecipeError: what is needed and not there.
    """
    padding = DataCollatorWithPadding(run.tokenizer)
    if data == "train":
        return Source(run.data["train"], padding)
    if run.raw is None:
        raise RecipeError(f"data: {data} needs the texts, and the run has their tokens alone; pass raw=... to `start`")
    texts = run.raw["train"]
    if data == "text":
        return Source(chunks(corpus_of(run), run.tokenizer, run.task.max_length), padding)
    fields = dict(recipe.augment or {})
    if data == "augmented":
        return Source(_tokenized(run, augmented(run, recipe, teacher)), padding)
    held = [text for split in run.task.validation for text in run.raw[split][run.task.columns[0]]]
    found = methods.add_neighbours(
        texts, run.task.columns[0], corpus_of(run), teacher.base_model, run.tokenizer, exclude=held,
        cache=run.folder / "neighbours", **fields.get("neighbours", {}),
    )  # fmt: skip
    rows = methods.with_candidates(_tokenized(run, texts), found["candidates"], run.tokenizer, run.task.max_length)
    return Source(rows, methods.CandidateCollator(run.tokenizer), keep_columns=True)


def augmented(run: Run, recipe: Recipe, teacher: PreTrainedModel) -> Any:
    """The training texts and what a recipe's method makes of them, with labels, not yet in tokens."""
    made = methods.augment(
        run.raw["train"], run.task.columns, _method(run, recipe, teacher), seed=run.options.seed,
        cache=run.folder / "augment",
    )  # fmt: skip
    return made.remove_columns([name for name in made.column_names if name not in (*run.task.columns, "label")])


def corpus_of(run: Run) -> list[str]:
    """Texts without labels: those of the run's file, or the training set's."""
    if path := getattr(run.options, "text_file", None):
        return read_texts(path)
    return list(dict.fromkeys(text for column in run.task.columns for text in run.raw["train"][column]))


def _tokenized(run: Run, rows: Any) -> Any:
    from datasets import DatasetDict

    return tokenize(DatasetDict({"train": rows}), run.tokenizer, run.task)["train"]


def _method(run: Run, recipe: Recipe, teacher: PreTrainedModel) -> Any:
    """The method of `lowbit.distill.augment` that a recipe names."""
    name, fields = parts.named("augment", recipe.augment, {"substitution": None, "rules": None})
    if name == "rules":
        return parts.make("augment", name, methods.Rules, fields)
    sources: dict[str, Any] = {"vectors": methods.vectors_of(teacher, run.tokenizer)}
    if vectors := fields.pop("vectors", None):
        sources["vectors"] = methods.read_vectors(vectors)
    if recipe.masked_lm is not None:
        sources["lm"] = methods.MaskedLM(masked_lm(run, recipe, teacher), run.tokenizer)
    copies = methods.COPIES.get(getattr(run.options, "task", ""), 20)
    return parts.make("augment", name, methods.Substitution, {"copies": copies, **sources, **fields})


def masked_lm(run: Run, recipe: Recipe, teacher: PreTrainedModel) -> PreTrainedModel:
    """The masked language model of a recipe: a checkpoint's, or the teacher's first layers, trained on the task's text.

    Raises:
        RecipeError: a recipe without one.
    """
    given = recipe.masked_lm
    if given is None:
        raise RecipeError(f"recipe {recipe.name} needs masked_lm: a checkpoint, or {{layers: 2, share: 0.5}}")
    if isinstance(given, str):
        return AutoModelForMaskedLM.from_pretrained(given)

    fields = besides.MaskedLMFields(**given)

    def build() -> PreTrainedModel:
        set_seed(run.options.seed)  # its head is new
        steps = round(fields.share * run.options.steps)
        args = arguments(run, "masked-lm", steps, run.options.teacher_learning_rate)
        model = masked_lm_of(teacher, fields.layers)
        rows = source(run, recipe, "text", teacher).rows
        collate = SeededByBatch(DataCollatorForLanguageModeling(run.tokenizer), run.options.seed)
        trainer = Trainer(
            model=model, args=args, train_dataset=rows, data_collator=collate, processing_class=run.tokenizer
        )
        return train(run, "masked-lm", trainer)

    return run.stage("masked-lm", build, AutoModelForMaskedLM)
