"""A small cross-encoder that ranks documents, distilled in one stage (Simplified TinyBERT): MRR@10 and nDCG@10.

Passages are JSON lines with query_id, doc_id, query, passage; judgements are TREC's qrels. A document has the score of
its best passage. MS MARCO and TREC DL have this form after a few lines of conversion.

example:
  python examples/ranking.py --train_pairs train.jsonl --train_qrels train.qrels --pairs dev.jsonl --qrels dev.qrels
      --model my-bert --output_dir runs/ranking

Finished stages in --output_dir are not repeated, and an interrupted one goes on from its last checkpoint: to resume,
run the same command again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import DatasetDict
from transformers import DataCollatorWithPadding, PreTrainedModel

from _common import Options, run_example
from lowbit.data.ranking import ranking_metrics, read_pairs, read_qrels
from lowbit.data.tasks import Task, tokenize
from lowbit.recipes import RecipeError
from lowbit.recipes.measure import table
from lowbit.recipes.stages import Run, load_teacher, start, teacher_stage
from lowbit.recipes.systems import recipe
from lowbit.recipes.systems.distilling import distil_by_recipe


@dataclass
class RankingOptions(Options):
    """Options of this example."""

    train_pairs: str = field(default="train.jsonl", metadata={"help": "passages to train on"})
    train_qrels: str = field(default="train.qrels", metadata={"help": "their judgements"})
    pairs: str = field(default="dev.jsonl", metadata={"help": "passages to rank"})
    qrels: str = field(default="dev.qrels", metadata={"help": "their judgements"})
    recipe: str = field(default="simplified-tinybert", metadata={"help": "of `lowbit recipes`, or a YAML file"})
    bits: str = field(default="float", metadata={"help": "of the student", "choices": ["float", "ternary", "binary"]})
    max_length: int = field(default=256, metadata={"help": "tokens of query and passage; published: 256"})


@torch.inference_mode()
def evaluate(run: Run, model: PreTrainedModel) -> dict[str, float]:
    """MRR@10 and nDCG@10 in percent."""
    rows, collate, found = run.data["validation"], DataCollatorWithPadding(run.tokenizer), []
    for first in range(0, len(rows), 64):
        batch = collate([rows[i] for i in range(first, min(first + 64, len(rows)))])
        batch.pop("labels")
        found.append(model.eval()(**batch.to(model.device)).logits.float().cpu())
    metrics = ranking_metrics(run.raw["validation"], read_qrels(run.options.qrels))
    return {name: round(100 * value, 2) for name, value in metrics((torch.cat(found).numpy(), None)).items()}


def main(options: RankingOptions) -> None:
    task = Task(("query", "passage"), ("not_relevant", "relevant"), ("accuracy",), options.max_length)
    try:
        data = DatasetDict(
            train=read_pairs(options.train_pairs, read_qrels(options.train_qrels)),
            validation=read_pairs(options.pairs, read_qrels(options.qrels)),
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    _, tokenizer = load_teacher(options, task)
    run = start(options, task, tokenize(data, tokenizer, task), tokenizer, raw=data)
    teacher = teacher_stage(run)
    student = distil_by_recipe(run, teacher, recipe.load(options.recipe), options.bits)
    rows = {name: evaluate(run, run.auto.from_pretrained(run.folder / name)) for name in ("teacher", student)}
    for name, row in rows.items():
        run.record(name, **row)
    print("\n" + table(rows, {key: key for key in rows["teacher"]}))
    print(f"results: {run.folder / 'results.json'}")


if __name__ == "__main__":
    run_example(main, RankingOptions, __doc__)
