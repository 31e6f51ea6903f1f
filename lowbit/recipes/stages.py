"""Resumable stages: a stage is a folder with a model, its training and the pipelines that are made of stages."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import lowbit

from ..data.tasks import Task, tokenize
from ..files.atomic import write_text
from . import RecipeError, log, require
from .data import check_order, labels_of
from .resuming import last_checkpoint

NO_STAGES = ("output_dir", "keep")  # options that change nothing in the stages of a run


@dataclass
class Run:
    """One run: its data, its folder, and what has been measured."""

    options: Any
    task: Any  # what `evaluate` needs to know: a `Task`, or a data set of questions
    data: Any  # tokenized splits: "train" and the task's validation splits
    tokenizer: PreTrainedTokenizerBase
    auto: Any = AutoModelForSequenceClassification  # loads the models of the stages
    raw: Any = None  # the splits before they were tokenized, for recipes that change texts
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    def stage(self, name: str, build: Callable[[], PreTrainedModel], auto: Any = None) -> PreTrainedModel:
        """The model of a finished stage from its folder; else build it, then save it under a temporary name.

        `auto` loads it, where it has another head than the others.

        Raises:
            RecipeError: a folder that cannot be loaded.
        """
        folder = self.folder / name
        if not folder.is_dir():
            log.info("== %s", name)
            model = build()
            unfinished = self.folder / f".{name}"
            model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
            shutil.rmtree(self.folder / f"{name}-checkpoints", ignore_errors=True)
        try:
            return (auto or self.auto).from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise RecipeError(f"{folder} cannot be loaded ({error}); delete it to have it made again") from error

    def record(self, name: str, **values: Any) -> None:
        """Add to results.json (kept from earlier runs of this folder)."""
        path = self.folder / "results.json"
        self.results = json.loads(path.read_text()) if path.is_file() else {}
        self.results.setdefault(name, {}).update(values)
        write_text(path, json.dumps(self.results, indent=2))


def start(options: Any, task: Any, data: Any, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Run:
    """Prepare the output folder, and record the options there.

    Raises:
        RecipeError: the folder holds a run with other options, or its options cannot be read.
    """
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / "options.json", {k: v for k, v in asdict(options).items() if k not in NO_STAGES}
    if path.is_file():
        try:
            read = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{path} is damaged ({error}); choose another folder or delete it") from error
        recorded = _defaults(options) | read  # options that are newer than the run
        recorded = {k: v for k, v in recorded.items() if k not in NO_STAGES}
        if recorded != wanted:
            names = sorted(key for key in recorded.keys() | wanted.keys() if recorded.get(key) != wanted.get(key))
            changes = ", ".join(f"{name}={recorded.get(name)!r} (now {wanted.get(name)!r})" for name in names)
            raise RecipeError(
                f"{folder} holds a run with other options ({path}): {changes}; choose another folder or delete it"
            )
    else:
        write_text(path, json.dumps(wanted, indent=2))
    return Run(options, task, data, tokenizer, **fields)


def reading(run: Run, tokenizer: PreTrainedTokenizerBase) -> Run:
    """The run with another tokenizer, and its data in that one's tokens.

    Raises:
        RecipeError: a run without its texts.
    """
    if run.raw is None:
        raise RecipeError("the student reads other tokens, and the run has no texts; pass raw=... to `start`")
    return replace(run, tokenizer=tokenizer, data=tokenize(run.raw, tokenizer, run.task))


def _defaults(options: Any) -> dict[str, Any]:
    given = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(options)}
    return {name: value for name, value in given.items() if value is not MISSING}


def arguments(run: Run, name: str, steps: int, learning_rate: float) -> TrainingArguments:
    """Linear warm-up over 10 % of the steps, then linear decay (TernaryBERT's schedule)."""
    require("accelerate")
    save_steps = getattr(run.options, "save_steps", 0)
    return TrainingArguments(
        output_dir=str(run.folder / f"{name}-checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=run.options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length" if getattr(run.options, "group_by_length", False) else "random",
        bf16=run.options.bf16,
        logging_steps=max(1, steps // 10),
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=1,
        seed=run.options.seed,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )


def train(run: Run, name: str, trainer: Trainer) -> PreTrainedModel:
    """Train, from the stage's last checkpoint if there is one; records seconds per step. 0 steps leave the model."""
    if trainer.args.max_steps == 0:
        return trainer.model.eval()
    resume = last_checkpoint(Path(trainer.args.output_dir))
    start_step = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if resume is None:
        run.record(name, seconds_per_step=round((time.perf_counter() - start_step) / trainer.args.max_steps, 4))
    return trainer.model.eval()


def common(run: Run) -> dict[str, Any]:
    """Trainer arguments that every stage shares."""
    return {
        "train_dataset": run.data["train"],
        "processing_class": run.tokenizer,
        "data_collator": DataCollatorWithPadding(run.tokenizer),
    }


def fine_tune(run: Run, name: str, model: PreTrainedModel, steps: int, learning_rate: float) -> PreTrainedModel:
    """Plain fine-tuning on the labels."""
    args = arguments(run, name, steps, learning_rate)
    return train(run, name, Trainer(model=model, args=args, **common(run)))


def distill(
    run: Run, name: str, student: PreTrainedModel, teacher: PreTrainedModel, steps: int, learning_rate: float
) -> PreTrainedModel:
    """TernaryBERT distillation: hidden states, attention scores and logits together, the student without dropout."""
    student, args = without_dropout(student), arguments(run, name, steps, learning_rate)
    return train(run, name, lowbit.DistillationTrainer(model=student, teacher=teacher, args=args, **common(run)))


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, to learn from another or from itself.

    Dropout is noise that what it is compared with does not have; short runs end closer to that without it.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def load_teacher(options: Any, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float model and its tokenizer; its head is a fresh one for the task unless it has one that fits.

    Raises:
        RecipeError: a quantized model, pickles of more than weights, or (`teacher_steps` 0) a model without a head for
            the task, or with the task's labels in another order.
    """
    config = AutoConfig.from_pretrained(options.model)
    if getattr(config, "quantization_config", None):
        raise RecipeError(f"{options.model} is quantized already; the teacher must be a float model")
    if not options.teacher_steps:
        check_order(options.model, labels_of(options.model, config), task.labels)
    torch.manual_seed(options.seed)
    names = dict(enumerate(task.labels))
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            options.model,
            num_labels=len(names),
            id2label=names,
            label2id={label: index for index, label in names.items()},
            problem_type="regression" if len(names) == 1 else "single_label_classification",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise RecipeError(f"{options.model} holds more than weights in its pickles, which is not unpickled") from error
    fresh = sorted({*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])})
    if fresh and not options.teacher_steps:
        raise RecipeError(
            f"{options.model} has no classifier of {len(names)} labels ({fresh[0]} is missing or of another shape), so "
            "it is not fine-tuned for this task; fine-tune it here: teacher_steps above 0"
        )
    return model, AutoTokenizer.from_pretrained(options.model)


# ----------------------------------------------------------------------------------------------------------- pipelines


def teacher_stage(run: Run) -> PreTrainedModel:
    """The model of the options, fine-tuned for `teacher_steps`."""
    options = run.options

    def build() -> PreTrainedModel:
        model, _ = load_teacher(options, run.task)
        return fine_tune(run, "teacher", model, options.teacher_steps, options.teacher_learning_rate)

    return run.stage("teacher", build)


def ternary_stages(run: Run, teacher: PreTrainedModel) -> str:
    """TernaryBERT 2-2-8: distil, pack. Returns the stage that is packed."""
    ternary = _ternary_stage(run, "ternary", teacher, teacher)
    run.stage("ternary-packed", lambda: lowbit.convert(ternary))
    return "ternary-packed"


def binary_stages(run: Run, teacher: PreTrainedModel) -> str:
    """BinaryBERT 1-1-8 by `options.method` and `options.width`. Returns the stage that is packed.

    Raises:
        RecipeError: another method.
    """
    options = run.options
    if options.method not in ("tws", "bwn"):
        raise RecipeError(f"method {options.method}: accepted are tws and bwn")
    if options.method == "bwn":
        name = "bwn"

        def bwn_stage() -> PreTrainedModel:
            student = lowbit.prepare(copy.deepcopy(teacher), lowbit.BinaryConfig())
            return distill(run, name, student, teacher, 2 * options.steps, options.learning_rate)

        binary = run.stage(name, bwn_stage)
    else:
        suffix, rate = f"w{options.width:g}", options.split_learning_rate
        name = f"tws-{suffix}" if rate is None else f"tws-{suffix}-lr{rate:g}"

        def slim_stage() -> PreTrainedModel:
            model = copy.deepcopy(teacher)
            if options.width == 1:
                return model
            model = lowbit.slim(model, options.width, dataloader=training_batches(run, model, 16))
            return distill(run, f"slim-{suffix}", model, teacher, options.slim_steps, options.teacher_learning_rate)

        def split_stage() -> PreTrainedModel:
            student = lowbit.split(copy.deepcopy(ternary))
            return distill(run, name, student, teacher, options.steps, options.learning_rate if rate is None else rate)

        slimmed = run.stage(f"slim-{suffix}", slim_stage)
        # At full width the ternary student is the one of `ternary_stages`.
        ternary = _ternary_stage(run, "ternary" if options.width == 1 else f"half-ternary-{suffix}", slimmed, teacher)
        binary = run.stage(name, split_stage)
    run.stage(f"{name}-packed", lambda: lowbit.convert(binary))
    return f"{name}-packed"


def _ternary_stage(run: Run, name: str, model: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    def build() -> PreTrainedModel:
        student = lowbit.prepare(copy.deepcopy(model), lowbit.TernaryConfig())
        return distill(run, name, student, teacher, run.options.steps, run.options.learning_rate)

    return run.stage(name, build)


def training_batches(run: Run, model: PreTrainedModel, count: int) -> list[Any]:
    """The first batches of a shuffled training set, to rank heads and neurons by."""
    args = arguments(run, "slim", 1, 1e-4)
    args.train_sampling_strategy = "random"  # batches of like length begin with the longest texts
    trainer = Trainer(model=model, args=args, **common(run))
    return list(islice(trainer.get_train_dataloader(), count))
