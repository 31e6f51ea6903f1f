"""Students of recipes; those that read other tokens than their teacher come with a tokenizer and data of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from ...distill.students import Built, both, rnn, segmentation, subwords
from .. import RecipeError
from ..stages import Run, arguments, reading, train
from . import parts
from .recipe import Recipe
from .sources import Source, augmented, corpus_of, masked_lm


@dataclass
class Student:
    """A built student, the run with its tokenizer, and what a stage's data are for one of other tokens."""

    built: Built
    run: Run
    rows: Callable[[str], Source] | None = None


def build(
    run: Run, teacher: PreTrainedModel, recipe: Recipe, given: Any, quantize: Callable[[Any], Any] | None
) -> Student:
    """A student by a recipe's builder.

    Raises:
        RecipeError: what the builder refuses, or texts that are not there.
    """
    name, fields = parts.named("student", given, parts.STUDENTS)
    if name not in parts.OWN_TOKENS:
        return Student(parts.student(given, teacher, quantize), run)
    from datasets import Value

    if run.raw is None:
        raise RecipeError(
            f"student {name} needs the texts, and the run has their tokens alone; pass raw=... to `start`"
        )
    made, own = (_subwords if name == "subwords" else _words)(run, teacher, recipe, name, fields)
    if quantize is not None:
        made = replace(made, model=quantize(made.model))

    def rows(data: str) -> Source:
        """Of both tokenizers; labels as `tokenize` has them, whole numbers or, of regression, any."""
        texts = run.raw["train"] if data == "train" else augmented(run, recipe, teacher)
        texts = texts.cast_column("label", Value("int64" if len(run.task.labels) > 1 else "float32"))
        encoded = both.tokenize_for_both(
            texts, own.tokenizer, run.tokenizer, run.task.columns, max_length=run.task.max_length
        )
        return Source(encoded, both.PadBoth(own.tokenizer, run.tokenizer), keep_columns=True)

    return Student(made, own, rows)


def _kept(run: Run, name: str, learn: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """A student's tokenizer from its folder of the run; else it is learned. A run that goes on must read the same."""
    folder, unfinished = run.folder / f"{name}-tokenizer", run.folder / f".{name}-tokenizer"
    if not folder.is_dir():
        learn().save_pretrained(unfinished)
        unfinished.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def _words(
    run: Run, teacher: PreTrainedModel, recipe: Recipe, name: str, fields: Mapping[str, Any]
) -> tuple[Built, Run]:
    """A BiLSTM or CNN over the training texts' words."""
    of_run, fields = parts.split_student(name, fields)
    tokenizer = _kept(run, name, lambda: rnn.word_tokenizer(corpus_of(run), of_run["size"]))
    given = {"encoder": name, "pair": len(run.task.columns) == 2, "seed": run.options.seed, **fields}
    return parts.make("student", name, rnn.build, given, teacher, tokenizer), reading(run, tokenizer)


def _subwords(
    run: Run, teacher: PreTrainedModel, recipe: Recipe, name: str, fields: Mapping[str, Any]
) -> tuple[Built, Run]:
    """A classifier on an encoder of few pieces, trained beside a masked language model of the teacher's first."""
    of_run, fields = parts.split_student(name, fields)
    tokenizer = _kept(run, name, lambda: segmentation.learn_wordpiece(corpus_of(run), of_run["size"]))
    own = reading(run, tokenizer)

    def dual() -> PreTrainedModel:
        model = masked_lm(run, recipe, teacher)
        made = parts.make("student", name, subwords.build, fields, model, tokenizer, run.tokenizer)
        args = arguments(run, "subwords", round(of_run["steps"] * run.options.steps), run.options.teacher_learning_rate)
        args.remove_unused_columns, args.train_sampling_strategy = False, "random"  # rows are texts, without a length
        trainer = Trainer(
            model=made.model, args=args, train_dataset=[{"text": text} for text in corpus_of(run)],
            data_collator=segmentation.BothSegmentations(tokenizer, run.tokenizer),
        )  # fmt: skip
        return made.finish(train(run, "subwords", trainer))

    folder = run.folder / "subwords"
    own.stage("subwords", dual, AutoModelForMaskedLM)
    labels = {"num_labels": teacher.config.num_labels, "id2label": teacher.config.id2label,
              "label2id": teacher.config.label2id, "problem_type": teacher.config.problem_type}  # fmt: skip
    return Built(AutoModelForSequenceClassification.from_pretrained(folder, **labels)), own
