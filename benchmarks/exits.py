"""Early exit of a packed, fused SST-2 model: speed beside accuracy, with the same model without exits.

    python -m benchmarks.exits --data-dir DATA --work-dir runs/exits

all-MiniLM-L6-v2 is fine-tuned on SST-2, then trained together with ramps (PABEE's weights, and the first model's
answers), distilled into a ternary 2-2-8 model with ramps and packed; last, ramps are trained on the packed model, which
stays as it is. Training sentences are set apart before anything is trained, with every phrase of
theirs: the entropy threshold is the fastest that loses at most `--loss` points there. Accuracy and time are of the
validation split, which nothing else has seen. Finished models in the working folder are not trained again.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import lowbit
from examples._common import default_model
from lowbit.data.tasks import get_task, load_task, tokenize
from lowbit.exits import exit_front

from . import cpu, results

TURNS = 5
FROM_TEACHER = [lowbit.LogitsLoss(), lowbit.ExitLogitsLoss(target="teacher")]
Batch = dict[str, torch.Tensor]


def set_apart(rows: Sequence[dict[str, Any]], count: int, seed: int) -> tuple[list[Any], list[Any]]:
    """(sentences of 10 words or more, the rows that share no text with them), both in random order."""
    shuffled = [*rows]
    random.Random(seed).shuffle(shuffled)
    apart = [row for row in shuffled if len(row["sentence"].split()) >= 10][:count]
    texts = [row["sentence"].strip() for row in apart]
    joined = "\n".join(texts)

    def shares(text: str) -> bool:
        return text in joined or any(other in text for other in texts)

    return apart, [row for row in shuffled if not shares(row["sentence"].strip())]


def arguments(folder: str, steps: int, rate: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=rate,
        warmup_steps=steps // 10, weight_decay=0.01, train_sampling_strategy="group_by_length", save_strategy="no",
        report_to=[], use_cpu=True, logging_steps=max(1, steps // 10), seed=seed, disable_tqdm=True,
    )  # fmt: skip


def stage(folder: Path, build: Callable[[], Any]) -> Any:
    """The model in a folder; it is built and saved there first, where there is none."""
    if not folder.is_dir():
        print(f"== {folder.name}", flush=True)
        unfinished = folder.with_name(f".{folder.name}")
        build().save_pretrained(unfinished)
        unfinished.rename(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


class Training:
    """What the three stages of training share."""

    def __init__(self, options: argparse.Namespace, tokenizer: Any, data: Any) -> None:
        self.options, self.data, self.collate = options, data, DataCollatorWithPadding(tokenizer)

    def run(self, model: Any, steps: int, rate: float, **distillation: Any) -> Any:
        kind = lowbit.DistillationTrainer if distillation else Trainer
        with tempfile.TemporaryDirectory() as folder:
            args = arguments(folder, steps, rate, self.options.seed)
            kind(model=model, args=args, train_dataset=self.data, data_collator=self.collate, **distillation).train()
        return model.eval()

    def teacher(self) -> Any:
        set_seed(self.options.seed)
        model = AutoModelForSequenceClassification.from_pretrained(self.options.model, num_labels=2)
        return self.run(model, self.options.teacher_steps, 1e-4)

    def joint(self, teacher: Any) -> Any:
        """The float model with exits."""
        set_seed(self.options.seed)
        model = lowbit.add_exits(copy.deepcopy(teacher), self.options.kind, self.options.layers)
        objectives = [lowbit.ExitTaskLoss("linear"), *FROM_TEACHER]
        return self.run(model, self.options.joint_steps, 1e-4, teacher=teacher, objectives=objectives)

    def ternary(self, teacher: Any) -> Any:
        student = without_dropout(lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig()))
        objectives = [lowbit.HiddenStateLoss(), lowbit.AttentionScoreLoss(), *FROM_TEACHER]
        return lowbit.convert(self.run(student, self.options.steps, 3e-4, teacher=teacher, objectives=objectives))

    def ramps(self, packed: Any, teacher: Any) -> Any:
        """Ramps on the packed model, everything else frozen."""
        set_seed(self.options.seed)
        objectives = [lowbit.ExitTaskLoss("sum"), lowbit.ExitLogitsLoss(target="teacher")]
        model = lowbit.freeze_backbone(packed)
        return self.run(model, self.options.ramp_steps, 1e-3, teacher=teacher, objectives=objectives)


def batches(rows: Any, collate: Any, size: int, order: Sequence[int]) -> list[Batch]:
    return [dict(collate([rows[i] for i in order[k : k + size]])) for k in range(0, len(order), size)]


@torch.inference_mode()
def measure(model: Any, criteria: dict[str, Any], data: list[Batch]) -> dict[str, results.Row]:
    """Accuracy, mean layers and milliseconds a batch by criterion, which take turns batch by batch."""
    rows: dict[str, results.Row] = {}
    times: dict[str, list[list[float]]] = {name: [] for name in criteria}
    for name, criterion in criteria.items():
        lowbit.set_exit(model, criterion)
        right, layers = 0, 0
        for batch in data:
            labels = batch["labels"]
            output = model(**{k: v for k, v in batch.items() if k != "labels"})
            right += int((output.logits.argmax(-1) == labels).sum())
            found = getattr(output, "exit_layer", torch.full_like(labels, model.config.num_hidden_layers))
            layers += int(found.sum())
        total = sum(len(batch["labels"]) for batch in data)
        rows[name] = {"accuracy": round(100 * right / total, 2), "layers": round(layers / total, 2)}
    for batch in data:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        turns: dict[str, list[float]] = {name: [] for name in criteria}
        for _ in range(TURNS):
            for name, criterion in criteria.items():
                model.exits.criterion = criterion
                model(**inputs)  # other layers run together than with the criterion before: prepared once
                begin = time.perf_counter()
                model(**inputs)
                turns[name].append(1000 * (time.perf_counter() - begin))
        for name in criteria:
            times[name].append(turns[name])
    full = next(iter(criteria))
    for name, row in rows.items():
        row["ms"] = round(statistics.mean(map(statistics.median, times[name])), 3)
        row["times_as_fast"] = round(float(rows[full]["ms"]) / float(row["ms"]), 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with sst2/, train and validation files")
    parser.add_argument("--work-dir", type=Path, required=True, help="models are kept here")
    parser.add_argument("--model", default=default_model(), help="a float encoder's folder or Hub name")
    parser.add_argument("--kind", default="mean", help="of ramps")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="behind which there are ramps")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--joint-steps", type=int, default=1000, help="of the float model with ramps")
    parser.add_argument("--steps", type=int, default=1200, help="of distillation")
    parser.add_argument("--ramp-steps", type=int, default=1500)
    parser.add_argument("--apart", type=int, default=2000, help="training sentences to choose thresholds on")
    parser.add_argument("--train", type=int, default=47000, help="training phrases, at most")
    parser.add_argument("--loss", type=float, default=0.5, help="points of accuracy that may be lost on these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    task, data = get_task("sst2"), load_task("sst2", options.data_dir)
    apart, rest = set_apart([*data["train"]], options.apart, options.seed)
    data["apart"] = type(data["train"]).from_list(apart)
    data["train"] = type(data["train"]).from_list(rest[: options.train])
    data = tokenize(data, tokenizer, task)
    print(f"{len(data['train'])} phrases of {len(rest)} to train on, {len(apart)} sentences set apart", flush=True)
    training = Training(options, tokenizer, data["train"])
    teacher = stage(options.work_dir / "teacher", training.teacher)
    joint = stage(options.work_dir / "joint", lambda: training.joint(teacher))
    packed = stage(options.work_dir / "ternary", lambda: training.ternary(joint))
    model = stage(options.work_dir / "exits", lambda: training.ramps(packed, joint))
    lowbit.fuse(model)
    name = Path(options.model).parent.name if Path(options.model).name == "model" else Path(options.model).name
    suite = results.Suite(
        options.results,
        {
            "suite": "exits",
            "model": f"{name} on SST-2, ternary 2-2-8, packed and fused, with early exits",
            "machine": cpu.machine(),
            "method": (
                f"{options.kind} ramps behind layers {options.layers} (0: embeddings); teacher {options.teacher_steps} "
                f"steps, with ramps {options.joint_steps}, distillation {options.steps}, ramps alone "
                f"{options.ramp_steps}, of 32 out of {len(data['train'])} training phrases; entropy threshold: the "
                f"fastest that loses at most {options.loss} points on {len(apart)} training sentences set apart with "
                f"all their phrases; accuracy and layers on the {len(data['validation'])} validation sentences; ms a "
                f"batch of validation sentences in random order, median of {TURNS} turns of each batch, mean of all"
            ),
        },
    )
    order = [*range(len(data["validation"]))]
    random.Random(options.seed).shuffle(order)
    front = exit_front(model, batches(data["apart"], training.collate, 32, [*range(len(apart))]))
    front.save(options.work_dir / "front.json")
    point = front.for_loss(options.loss / 100)
    print("set apart: all layers", front.full_score, "chosen", point, flush=True)
    chosen = {"all layers": None, f"entropy below {point.criterion.threshold:.3f}": point.criterion}
    for size in (1, 8):
        rows = measure(model, chosen, batches(data["validation"], training.collate, size, order))
        for row_name, row in rows.items():
            suite.add(f"batch {size}", row_name, row)
            print(size, row_name, row, flush=True)


if __name__ == "__main__":
    main()
