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

from dataclasses import dataclass

from _common import GlueOptions, print_step_times, run_example
from lowbit.recipes import options as recipe_options
from lowbit.recipes.measure import measure, table
from lowbit.recipes.stages import binary_stages, teacher_stage
from ternarybert_glue import open_run


@dataclass
class BinaryOptions(GlueOptions, recipe_options.BinaryOptions):
    """Options of ternarybert_glue.py, and which binary model."""


def main(options: BinaryOptions) -> None:
    run = open_run(GlueOptions(**{key: getattr(options, key) for key in GlueOptions.__dataclass_fields__}))
    run.options = options  # recorded are those of ternarybert_glue.py, whose teacher is used
    packed = binary_stages(run, teacher_stage(run))
    rows = {name: measure(run, name) for name in ("teacher", packed)}
    print("\n" + table(rows, {key: key for key in rows["teacher"]}))
    print_step_times(run)
    print(f"results: {run.folder / 'results.json'}; CPU latency at sequence length 128")


if __name__ == "__main__":
    run_example(main, BinaryOptions, __doc__)
