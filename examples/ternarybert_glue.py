"""TernaryBERT on a GLUE task: fine-tune a teacher, distil a 2-2-8 student, pack it, evaluate what was packed.

example:
  python examples/ternarybert_glue.py --task sst2 --data_dir DIR --output_dir runs/sst2 --max_train_samples 8000

Finished stages in --output_dir are not repeated, and an interrupted one goes on from its last checkpoint: to resume,
run the same command again.
"""

from __future__ import annotations

import copy
import dataclasses

from datasets import Dataset

import lowbit
from _common import GlueOptions, Run, distil, fine_tune, load_teacher, measure, offline_if_local, parse, start, table
from lowbit.tasks import Task, get_task, load_task, tokenize


def open_run(options: GlueOptions) -> Run:
    """Load data and tokenizer."""
    offline_if_local(options)
    task = get_task(options.task)
    data = load_task(options.task, options.data_dir)
    if options.max_train_samples:
        count = min(options.max_train_samples, len(data["train"]))
        data["train"], rest = data["train"].select(range(count)), data["train"].select(range(count, len(data["train"])))
        if options.heldout:
            data["validation_heldout"] = held_out(rest, set(data["train"][task.columns[0]]), task, options.heldout)
            task = dataclasses.replace(task, validation=(*task.validation, "validation_heldout"))
    _, tokenizer = load_teacher(options, task)
    return start(options, task, tokenize(data, tokenizer, task), tokenizer)


def held_out(rest: Dataset, known: set[str], task: Task, count: int) -> Dataset:
    """The first examples of some length whose text is not known: a larger sample than most validation splits."""
    texts = rest[task.columns[0]]
    chosen = [i for i, text in enumerate(texts) if text not in known and len(text.split()) >= 6]
    return rest.select(chosen[:count])


def main(options: GlueOptions) -> None:
    run = open_run(options)

    def teacher_stage() -> object:
        model, _ = load_teacher(options, run.task)
        return fine_tune(run, "teacher", model, options.teacher_steps, options.teacher_learning_rate)

    teacher = run.stage("teacher", teacher_stage)

    def ternary_stage() -> object:
        student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())
        return distil(run, "ternary", student, teacher, options.steps, options.learning_rate)

    student = run.stage("ternary", ternary_stage)
    run.stage("ternary-packed", lambda: lowbit.convert(student))
    rows = {name: measure(run, name) for name in ("teacher", "ternary-packed")}
    headings = {key: key for key in rows["teacher"]}
    print("\n" + table({name: {**run.results.get(name, {}), **row} for name, row in rows.items()}, headings))
    for name in ("teacher", "ternary"):
        if seconds := run.results.get(name, {}).get("seconds_per_step"):
            print(f"{name}: {seconds:.3f} s a step")
    print(f"results: {run.folder / 'results.json'}; CPU latency at sequence length 128")


if __name__ == "__main__":
    main(parse(GlueOptions, __doc__))
