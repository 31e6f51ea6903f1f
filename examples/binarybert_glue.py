"""BinaryBERT on a GLUE task: half-width ternary student, ternary weight splitting, binary distillation, packing.

The published path (--method tws --width 0.5): teacher -> slim to half the heads and FFN neurons -> distil float ->
distil ternary -> split each ternary weight into two binary ones -> distil binary -> pack. --method bwn trains a
full-width binary student directly, with as many quantized distillation steps in all.

example:
  python examples/binarybert_glue.py --task sst2 --data_dir DIR --output_dir runs/sst2 --max_train_samples 8000

Finished stages in --output_dir are not repeated (a teacher of ternarybert_glue.py with the same options is used), and
an interrupted one goes on from its last checkpoint: to resume, run the same command again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from transformers import Trainer

import lowbit
from _common import GlueOptions, common, distil, fine_tune, load_teacher, measure, parse, table
from ternarybert_glue import open_run


@dataclass
class BinaryOptions(GlueOptions):
    """Options of ternarybert_glue.py, and which binary model."""

    method: str = field(default="tws", metadata={"help": "tws (ternary weight splitting) or bwn (binary at once)"})
    width: float = field(default=0.5, metadata={"help": "tws: fraction of heads and FFN neurons; published: 0.5"})
    slim_steps: int = field(default=250, metadata={"help": "tws: distillation steps of the slimmed float model"})


def main(options: BinaryOptions) -> None:
    if options.method not in ("tws", "bwn"):
        raise SystemExit(f"--method {options.method}: accepted are tws and bwn")
    shared = GlueOptions(**{key: getattr(options, key) for key in GlueOptions.__dataclass_fields__})
    run = open_run(shared)

    def teacher_stage() -> object:
        model, _ = load_teacher(options, run.task)
        return fine_tune(run, "teacher", model, options.teacher_steps, options.teacher_learning_rate)

    teacher = run.stage("teacher", teacher_stage)
    if options.method == "bwn":
        name = "bwn"

        def bwn_stage() -> object:
            student = lowbit.prepare(copy.deepcopy(teacher), lowbit.BinaryConfig())
            return distil(run, name, student, teacher, 2 * options.steps, options.learning_rate)

        binary = run.stage(name, bwn_stage)
    else:
        suffix = f"w{options.width:g}"
        name = f"tws-{suffix}"
        # At full width the ternary student is the one of ternarybert_glue.py.
        ternary_name = "ternary" if options.width == 1 else f"half-ternary-{suffix}"

        def slim_stage() -> object:
            model = copy.deepcopy(teacher)
            if options.width == 1:
                return model
            batches = Trainer(model=model, args=_slim_arguments(options), **common(run)).get_train_dataloader()
            model = lowbit.slim(model, options.width, dataloader=[b for b, _ in zip(batches, range(16), strict=False)])
            return distil(run, f"slim-{suffix}", model, teacher, options.slim_steps, options.teacher_learning_rate)

        def ternary_stage() -> object:
            student = lowbit.prepare(copy.deepcopy(slimmed), lowbit.TernaryConfig())
            return distil(run, ternary_name, student, teacher, options.steps, options.learning_rate)

        def split_stage() -> object:
            student = lowbit.split(copy.deepcopy(ternary))
            return distil(run, name, student, teacher, options.steps, options.learning_rate)

        slimmed = run.stage(f"slim-{suffix}", slim_stage)
        ternary = run.stage(ternary_name, ternary_stage)
        binary = run.stage(name, split_stage)
    run.stage(f"{name}-packed", lambda: lowbit.convert(binary))
    rows = {stage: measure(run, stage) for stage in ("teacher", f"{name}-packed")}
    print("\n" + table(rows, {key: key for key in rows["teacher"]}))
    for stage, values in run.results.items():
        if "seconds_per_step" in values:
            print(f"{stage}: {values['seconds_per_step']:.3f} s a step")
    print(f"results: {run.folder / 'results.json'}; CPU latency at sequence length 128")


def _slim_arguments(options: BinaryOptions) -> object:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=options.output_dir,
        per_device_train_batch_size=options.batch_size,
        seed=options.seed,
        report_to="none",
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    main(parse(BinaryOptions, __doc__))
