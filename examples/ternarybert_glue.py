"""TernaryBERT on a GLUE task: fine-tune a teacher, distil a 2-2-8 student, pack it, evaluate what was packed.

example:
  python examples/ternarybert_glue.py --task sst2 --data_dir DIR --output_dir runs/sst2 --max_train_samples 8000

Finished stages in --output_dir are not repeated, and an interrupted one goes on from its last checkpoint: to resume,
run the same command again.
"""

from __future__ import annotations

from _common import GlueOptions, print_step_times, run_example
from lowbit.data.tasks import tokenize
from lowbit.recipes.data import load_glue, offline_if_local
from lowbit.recipes.measure import measure, table
from lowbit.recipes.stages import Run, load_teacher, start, teacher_stage, ternary_stages


def open_run(options: GlueOptions) -> Run:
    """Load data and tokenizer."""
    offline_if_local(options.model, options.data_dir)
    task, data = load_glue(options)
    _, tokenizer = load_teacher(options, task)
    return start(options, task, tokenize(data, tokenizer, task), tokenizer)


def main(options: GlueOptions) -> None:
    run = open_run(options)
    packed = ternary_stages(run, teacher_stage(run))
    rows = {name: measure(run, name) for name in ("teacher", packed)}
    print("\n" + table(rows, {key: key for key in rows["teacher"]}))
    print_step_times(run)
    print(f"results: {run.folder / 'results.json'}; CPU latency at sequence length 128")


if __name__ == "__main__":
    run_example(main, GlueOptions, __doc__)
