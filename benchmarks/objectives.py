"""What each objective adds to a training step: forward passes of student and teacher, the loss, the backward pass.

    python -m benchmarks.objectives --results benchmarks/results

A float student of 3 layers and a float teacher of 6, both of width 384 (all-MiniLM-L6-v2's sizes, random weights), on
one batch; the optimizer's step is left out. All are run in turns, beside a plain step: the student on its labels, no
teacher.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import lowbit
from lowbit.distill import objectives

from . import cpu, results

PLAIN = "plain step"
ROWS: dict[str, Any] = {
    PLAIN: objectives.TaskLoss(),
    "logits": objectives.LogitsLoss(),
    "hidden states": objectives.HiddenStateLoss(),
    "hidden states, projected": objectives.HiddenStateLoss(project="per_layer"),
    "hidden states, [CLS] normalised": objectives.HiddenStateLoss(map="skip", tokens="first", distance="normalised"),
    "hidden states, groups concatenated": objectives.HiddenStateLoss(
        map="groups", embedding=False, project="per_layer"
    ),
    "hidden states, attention over [CLS]": objectives.HiddenStateLoss(map="all", embedding=False, tokens="first"),
    "statistics": objectives.StatisticsLoss(),
    "scores": objectives.AttentionScoreLoss(),
    "scores, rows": objectives.AttentionScoreLoss(distance="cross_entropy"),
    "relations": objectives.RelationLoss(relation_heads=48),
    "pairs of words": objectives.PairRelationLoss(),
    "pairs of layers": objectives.PairRelationLoss(axis="layers"),
    "triples of words, window 7": objectives.TripleRelationLoss(window=7),
    "triples of words, window 21": objectives.TripleRelationLoss(window=21),
    "triples of layers": objectives.TripleRelationLoss(axis="layers"),
    "exits, labels": lowbit.ExitTaskLoss(),
    "exits, logits": lowbit.ExitLogitsLoss(),
}


SIZES = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}


def model(layers: int, **sizes: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**{**SIZES, **sizes, "num_hidden_layers": layers}))


def trainers(folder: str, **sizes: int) -> dict[str, lowbit.DistillationTrainer]:
    """One for each row; those that need the same of their models share them: scores switch their attention."""
    arguments = TrainingArguments(folder, report_to=[], use_cpu=True, max_steps=1, disable_tqdm=True)
    pairs = {kind: (model(3, **sizes).train(), model(6, **sizes)) for kind in ("plain", "scores", "exits")}
    lowbit.add_exits(pairs["exits"][0])
    found = {}
    for name, objective in ROWS.items():
        kind = "scores" if "scores" in objective.needs else "exits" if name.startswith("exits") else "plain"
        student, teacher = pairs[kind]
        given: dict[str, Any] = {"model": student, "args": arguments, "objectives": [objective]}
        if name == PLAIN:
            found[name] = _WithoutTeacher(teacher=None, **given)
        else:
            found[name] = lowbit.DistillationTrainer(teacher=teacher, **given)
    return found


class _WithoutTeacher(lowbit.DistillationTrainer):
    needs_teacher = False


def milliseconds(trainer: lowbit.DistillationTrainer, batch: dict[str, torch.Tensor]) -> float:
    trainer.model.zero_grad()
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
    return 1000 * (time.perf_counter() - start)


def measure(rows: int, length: int, turns: int, **sizes: int) -> dict[str, results.Row]:
    batch = {"input_ids": torch.randint(1000, 30000, (rows, length)), "labels": torch.randint(0, 2, (rows,))}
    batch["attention_mask"] = (torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))).long()
    with tempfile.TemporaryDirectory() as folder:
        made = trainers(folder, **sizes)
        times = [{name: milliseconds(trainer, batch) for name, trainer in made.items()} for _ in range(turns + 1)][1:]
    found: dict[str, results.Row] = {}
    for name in made:
        ratio = statistics.median(turn[name] / turn[PLAIN] for turn in times)
        found[name] = {
            "ms": round(statistics.median(turn[name] for turn in times), 1),
            "times a plain step": round(ratio, 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--results", type=Path, help="folder to write cpu-objectives.json into; else print")
    options = parser.parse_args()
    case = "batch 32, length 32"
    report = {
        "suite": "cpu-objectives",
        "model": "float student of 3 layers, float teacher of 6, width 384: a step without the optimizer's, float32",
        "machine": cpu.machine(),
        "method": f"medians of {options.turns} turns, all rows in each; of ratios within a turn",
        "results": {case: measure(32, 32, options.turns)},
    }
    if options.results:
        print(results.write(report, options.results))
        return
    for name, row in report["results"][case].items():
        print(f"{name:40} {row['ms']:8} ms {row['times a plain step']:6}")


if __name__ == "__main__":
    main()
