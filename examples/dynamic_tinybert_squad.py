"""Dynamic-TinyBERT on SQuAD v1.1: a small student that answers questions on fewer and fewer tokens.

Fine-tune a teacher; distil a student with fewer layers from it (--layers, TinyBERT: every k-th layer of the teacher,
which learns its hidden states, attention scores and start and end logits; 0: the teacher itself goes on). With
--ternary, distil a 2-2-8 student of that. Then LengthDrop training (--length_steps 0: none, the model is used as it
is), in which the attention of [CLS] learns where answers are; the search for lengths, and what 1.5, 2 and 3 times fewer
multiply-accumulates lose. Tokens that a layer drops keep the state that they had there, so that every token of the
context can still be an answer. With --length_method ltp or power_bert (and --score all) lengths are learned in place of
searched.

A few thousand questions are soon known by heart, and how to find other answers with fewer tokens is not learned from
them. --other_paragraphs 0.75 puts three of four to a paragraph nearby while that is learned; what is right is then what
the float model said before.

example:
  python examples/dynamic_tinybert_squad.py --output_dir runs/squad --max_eval_samples 1000 --layers 3

Finished stages in --output_dir are not repeated; an interrupted one goes on from its last checkpoint, the search from
its last evaluation: to resume, run the same command again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
)

from _common import Options, print_step_times, run_example
from lowbit import models
from lowbit.data.squad import ask_elsewhere, best_answers, featurize, load_squad, score_answers
from lowbit.recipes.data import offline_if_local
from lowbit.recipes.lengths import adaptive_stages, check_lengths, choose_lengths, compare
from lowbit.recipes.measure import measure, table
from lowbit.recipes.options import LengthOptions
from lowbit.recipes.stages import Run, distill, fine_tune, start


@dataclass
class SquadOptions(LengthOptions, Options):
    """Options of the question answering example."""

    max_train_samples: int = field(
        default=0, metadata={"help": "use only N training questions of all articles, 0: all"}
    )
    max_eval_samples: int = field(default=0, metadata={"help": "evaluate on N questions of all articles, 0: all"})
    max_length: int = field(default=384, metadata={"help": "tokens of question and context together"})
    stride: int = field(default=128, metadata={"help": "tokens that neighbouring windows of a long context share"})
    layers: int = field(
        default=0, metadata={"help": "layers of the student, a divisor of the teacher's; 0: no student"}
    )
    batch_size: int = field(default=16, metadata={"help": "of training"})
    score: str = field(
        default="cls", metadata={"help": "lengthdrop: importance is attention from [CLS], or from all queries (all)"}
    )
    search_samples: int = field(
        default=200, metadata={"help": "training questions set apart, that the search scores on"}
    )
    importance_weight: float = field(
        default=1.0, metadata={"help": "weight of the loss by which LengthDrop training learns what to keep"}
    )
    other_paragraphs: float = field(
        default=0.0,
        metadata={
            "help": "share of the questions that are put to another paragraph nearby while the model learns to drop "
            "tokens, all answered by the float model before; 0: labelled questions"
        },
    )
    protect_question: bool = field(default=False, metadata={"help": "never drop tokens of the question"})


def open_run(options: SquadOptions) -> Run:
    """Load questions and tokenizer; windows for training and evaluation."""
    offline_if_local(options.model, options.data_dir)
    config = AutoConfig.from_pretrained(options.model)
    if options.max_length > config.max_position_embeddings:
        raise SystemExit(f"--max_length {options.max_length}: the model has {config.max_position_embeddings} positions")
    if options.layers and config.num_hidden_layers % options.layers:
        raise SystemExit(f"--layers {options.layers} does not divide the teacher's {config.num_hidden_layers} layers")
    check_lengths(options, options.layers or config.num_hidden_layers)
    if not 0 <= options.other_paragraphs <= 1:
        raise SystemExit(f"--other_paragraphs {options.other_paragraphs}: accepted is a share from 0 to 1")
    if options.other_paragraphs and not options.length_steps:
        raise SystemExit("--other_paragraphs is of training to drop tokens; it needs --length_steps above 0")
    questions = load_squad(options.data_dir)
    train = evenly(questions["train"], options.max_train_samples)
    begin = max(len(train) - options.search_samples, len(train) // 2)
    apart = train.select(range(begin, len(train)))  # of the last articles
    train = train.select(range(begin))
    validation = evenly(questions["validation"], options.max_eval_samples)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = {
        split: featurize(examples, tokenizer, options.max_length, options.stride)
        for split, examples in (("train", train), ("validation", validation), ("apart", apart))
    }
    data["train"] = data["train"].remove_columns(["example", "offsets"])
    if options.other_paragraphs:
        pairs = ask_elsewhere(train, options.length_steps * options.batch_size, options.other_paragraphs, options.seed)
        windows = featurize(pairs, tokenizer, options.max_length, options.stride)
        data["unlabelled"] = windows.select_columns(tokenizer.model_input_names)
    questions = {"validation": validation, "apart": apart}
    return start(options, questions, data, tokenizer, auto=AutoModelForQuestionAnswering)


def evenly(data: Dataset, count: int) -> Dataset:
    """`count` rows spread over the whole set, which is ordered by article; 0: all rows."""
    count = min(count or len(data), len(data))
    return data.select([i * len(data) // count for i in range(count)])


def teacher_stage(run: Run) -> PreTrainedModel:
    """--model with a fresh head (or its own, where it was fine-tuned before), trained on the answers."""

    def build() -> PreTrainedModel:
        torch.manual_seed(run.options.seed)
        model = run.auto.from_pretrained(run.options.model)
        return fine_tune(run, "teacher", model, run.options.teacher_steps, run.options.teacher_learning_rate)

    return run.stage("teacher", build)


def student_stage(run: Run, teacher: PreTrainedModel) -> PreTrainedModel:
    """Every k-th layer of the teacher, distilled."""

    def build() -> PreTrainedModel:
        student = every_kth_layer(teacher, run.options.layers)
        return distill(run, "student", student, teacher, run.options.steps, run.options.learning_rate)

    return run.stage("student", build)


def every_kth_layer(teacher: PreTrainedModel, count: int) -> PreTrainedModel:
    """A copy with `count` layers: the last of each group, which are those that distillation compares them with."""
    student = copy.deepcopy(teacher)
    path = models.describe(student).layers
    layers = student.base_model.get_submodule(path)
    step = len(layers) // count
    student.base_model.set_submodule(path, torch.nn.ModuleList(layers[step - 1 :: step]))
    student.config.num_hidden_layers = count
    return student


@torch.inference_mode()
def evaluate(run: Run, model: PreTrainedModel, split: str = "validation") -> dict[str, float]:
    """Exact match and F1 (in percent) on the questions of a split; windows of like length share a batch."""
    windows = list(run.data[split].select_columns(run.tokenizer.model_input_names))
    order = sorted(range(len(windows)), key=lambda i: len(windows[i]["input_ids"]))
    collate = DataCollatorWithPadding(run.tokenizer)
    logits: dict[int, Any] = {}
    model.eval()
    for first in range(0, len(order), 32):
        chosen = order[first : first + 32]
        output = model(**collate([windows[i] for i in chosen]).to(model.device))
        both = torch.stack([output.start_logits, output.end_logits], 1).float().cpu().numpy()
        logits |= dict(zip(chosen, both, strict=True))
    starts, ends = zip(*(logits[i] for i in range(len(windows))), strict=True)
    answers = best_answers(run.task[split], run.data[split], starts, ends)
    predictions = [best[0].text if best else "" for best in answers]
    scores = score_answers(predictions, [given["text"] for given in run.task[split]["answers"]])
    return {"questions": len(predictions), **{name: round(100 * value, 2) for name, value in scores.items()}}


def main(options: SquadOptions) -> None:
    run = open_run(options)
    stages = ["teacher"]
    model = teacher_stage(run)
    if options.layers:
        model = student_stage(run, model)
        stages.append("student")
    rows = {name: measure(run, name, options.max_length, score=evaluate) for name in stages}
    print("\n" + table(rows, {key: key for key in rows["teacher"]}))
    print_step_times(run)
    print(f"CPU latency at sequence length {options.max_length}")
    protect = ("first_segment",) if options.protect_question else ()
    name, model, before = adaptive_stages(run, model, protect=protect)
    configs = choose_lengths(
        run,
        name,
        model,
        lambda model: evaluate(run, model, "apart")["f1"],
        [len(ids) for ids in run.data["apart"]["input_ids"]],
        protect=protect,
    )
    validation = list(run.data["validation"].select_columns(run.tokenizer.model_input_names))
    print("\n" + compare(run, model, configs, lambda model: evaluate(run, model), validation, before))
    print(f"results: {run.folder / 'results.json'}")


if __name__ == "__main__":
    run_example(main, SquadOptions, __doc__)
