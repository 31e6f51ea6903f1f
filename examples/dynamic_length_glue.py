"""Fewer tokens in every layer, on a GLUE task: LengthDrop training, a search for lengths, and what budgets lose.

Fine-tune a teacher, train it so that it works at any length (--length_steps 0 drops tokens from it as it is), search
which layer may drop how much, and measure 1.5, 2 and 3 times fewer multiply-accumulates. With --ternary the model is
distilled to 2-2-8 first, and what is searched and measured is packed and fused. With --length_method ltp or power_bert
lengths are learned in place of searched: --length_steps in which a layer scales tokens, and as many in which it drops.

example:
  python examples/dynamic_length_glue.py --task sst2 --data_dir DIR --output_dir runs/length --max_train_samples 40000

The search scores on --search_samples training examples of 9 tokens or more that training does not get and that are not
among what it gets (parts of them may be: SST-2 trains on phrases). It never sees the validation examples.

Finished stages in --output_dir are not repeated; an interrupted one goes on from its last checkpoint, the search from
its last evaluation: to resume, run the same command again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import AutoConfig

from _common import GlueOptions, run_example
from lowbit.recipes.data import offline_if_local
from lowbit.recipes.lengths import adaptive_stages, check_lengths, choose_lengths, compare, set_apart
from lowbit.recipes.measure import evaluate
from lowbit.recipes.options import LengthOptions
from lowbit.recipes.stages import teacher_stage
from ternarybert_glue import open_run


@dataclass
class LengthGlueOptions(LengthOptions, GlueOptions):
    """Options of this example."""


def main(options: LengthGlueOptions) -> None:
    offline_if_local(options.model, options.data_dir)
    check_lengths(options, AutoConfig.from_pretrained(options.model).num_hidden_layers)
    run = open_run(options)
    set_apart(run, options.search_samples)
    name, model, before = adaptive_stages(run, teacher_stage(run))
    apart = dataclasses.replace(run, task=dataclasses.replace(run.task, validation=("search",)))
    lengths = [len(ids) for ids in run.data["search"]["input_ids"]]
    configs = choose_lengths(run, name, model, lambda model: next(iter(evaluate(apart, model).values())), lengths)
    columns = run.tokenizer.model_input_names
    validation = [row for split in run.task.validation for row in run.data[split].select_columns(columns)]
    print("\n" + compare(run, model, configs, lambda model: evaluate(run, model), validation, before))
    print(f"results: {run.folder / 'results.json'}")


if __name__ == "__main__":
    run_example(main, LengthGlueOptions, __doc__)
