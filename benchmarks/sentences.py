"""Sentence embeddings of packed models against the float model's: on STS-B, right after quantization and distilled.

    python -m benchmarks.sentences --data_dir DATA --steps 300

Embeddings are means over tokens, scaled to length 1, as all-MiniLM-L6-v2 and most sentence encoders take them. Of each
model two figures: Spearman's correlation of cosine similarities with the gold scores of STS-B's validation pairs, and
the mean cosine similarity of its embeddings with the float model's. Distillation trains a copy to give the float
model's hidden states, attention scores and embeddings, on sentences of STS-B's and SST-2's training splits without
labels.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, TrainingArguments, set_seed

import lowbit
from examples._common import default_model
from lowbit.data.tasks import compute_metrics, get_task, load_task

from . import cpu, results

# What is measured right after quantization.
CONFIGS = {
    "8-bit embeddings, rest float": lowbit.LowbitConfig(weight_bits=None, embedding_bits=8, activation_bits=None),
    "ternary 2-8-32 (float activations)": lowbit.TernaryConfig(embedding_bits=8, activation_bits=None),
    "ternary 2-8-8": lowbit.TernaryConfig(embedding_bits=8),
    "ternary 2-2-8": lowbit.TernaryConfig(),
}
DISTILLED = ("ternary 2-8-8", "ternary 2-2-8")


def pooled(last_hidden_state: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, S, H] and [B, S] -> [B, H], of length 1."""
    weights = mask.unsqueeze(-1).to(last_hidden_state)
    return F.normalize((last_hidden_state * weights).sum(1) / weights.sum(1), dim=-1)


@dataclass
class EmbeddingLoss:
    """1 - cosine similarity of the sentence embeddings."""

    weight: float = 1.0
    name: str = "embedding"
    needs: tuple[str, ...] = ()

    def __call__(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        s, t = (pooled(output.last_hidden_state, batch["attention_mask"]) for output in (student, teacher))
        return self.weight * (1 - (s * t).sum(-1)).mean()


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: list[str], batch_size: int = 32) -> torch.Tensor:
    """[len(sentences), H], the longest sentences run together."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    embeddings = torch.empty(len(sentences), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [sentences[i] for i in rows]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        embeddings[rows] = pooled(model.eval()(**inputs).last_hidden_state, inputs["attention_mask"])
    return embeddings


def measure(model: Any, tokenizer: Any, pairs: Any, reference: torch.Tensor | None) -> tuple[results.Row, torch.Tensor]:
    """One row, and the embeddings; `reference` are the float model's, None for itself."""
    embeddings = embed(model, tokenizer, [*pairs["sentence1"], *pairs["sentence2"]])
    first, second = embeddings.chunk(2)
    similarity = (first * second).sum(-1, keepdim=True)
    scores = compute_metrics(get_task("stsb"))((similarity.numpy(), pairs["label"]))
    cosine = (embeddings * (embeddings if reference is None else reference)).sum(-1).mean()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        megabytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
    row: results.Row = {
        "spearman": round(100 * scores["spearman"], 2),
        "cosine_to_float": round(cosine.item(), 4),
        "megabytes": round(megabytes, 2),
    }
    return row, embeddings


def sentences_of(data_dir: str, count: int, seed: int) -> list[str]:
    """Distinct sentences of both training splits in random order, as often around as `count` needs."""
    stsb, sst2 = load_task("stsb", data_dir)["train"], load_task("sst2", data_dir)["train"]
    found = sorted({*stsb["sentence1"], *stsb["sentence2"]}) + sorted({*sst2["sentence"]})
    random.Random(seed).shuffle(found)
    return (found * (1 + count // len(found)))[:count]


def distilled(teacher: Any, tokenizer: Any, config: lowbit.LowbitConfig, sentences: Iterable[str], steps: int) -> Any:
    """A packed model that was trained to give the teacher's embeddings."""
    student = lowbit.prepare(copy.deepcopy(teacher), config)
    data = [dict(tokenizer(sentence, truncation=True, max_length=64)) for sentence in sentences]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=len(data) // steps, learning_rate=2e-4,
            warmup_steps=steps // 10, lr_scheduler_type="linear", save_strategy="no", report_to=[], use_cpu=True,
            logging_steps=max(1, steps // 10),
        )  # fmt: skip
        lowbit.DistillationTrainer(
            student,
            teacher=teacher,
            args=arguments,
            objectives=[lowbit.HiddenStateLoss(), lowbit.AttentionScoreLoss(), EmbeddingLoss(weight=10.0)],
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
        ).train()
    return lowbit.convert(student)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder with stsb/ and sst2/, train and validation files")
    parser.add_argument("--model", default=default_model(), help="a sentence encoder's folder or Hub name")
    parser.add_argument("--steps", type=int, default=300, help="of distillation, for each of two models; 0: none")
    parser.add_argument("--batch_size", type=int, default=16, help="sentences a step")
    parser.add_argument("--max_pairs", type=int, default=None, help="validation pairs; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    teacher, tokenizer = (
        AutoModel.from_pretrained(arguments.model).eval(),
        AutoTokenizer.from_pretrained(arguments.model),
    )
    pairs = load_task("stsb", arguments.data_dir)["validation"]
    pairs = pairs[: arguments.max_pairs or len(pairs)]
    folder = Path(arguments.model)
    name = folder.parent.name if folder.name == "model" else folder.name
    trained = {each: f"{each}, {arguments.steps} steps of distillation" for each in DISTILLED if arguments.steps}
    cases = ["float", *(f"{each}, post-training" for each in CONFIGS), *trained.values()]
    rows: dict[str, results.Row] = {case: {"note": "not measured: the run was cut off"} for case in cases}
    report = {
        "suite": "cpu-sentences",
        "model": f"{name}: sentence embeddings of packed models",
        "machine": cpu.machine(),
        "method": (
            f"Spearman's correlation (x 100) with the gold scores of {len(pairs['label'])} STS-B validation pairs; "
            "mean cosine similarity of the embeddings with the float model's; size of model.safetensors; distilled: "
            f"{arguments.steps} steps of {arguments.batch_size} sentences of STS-B's and SST-2's training splits, "
            f"AdamW, learning rate 2e-4 with linear decay, one seed ({arguments.seed})"
        ),
        "results": {f"STS-B validation, {name}": rows},
    }

    def add(case: str, model: Any, reference: torch.Tensor | None) -> torch.Tensor:
        rows[case], embeddings = measure(model, tokenizer, pairs, reference)
        print(case, rows[case], flush=True)
        results.write(report, arguments.results)
        return embeddings

    reference = add("float", teacher, None)
    for each, config in CONFIGS.items():
        add(f"{each}, post-training", lowbit.quantize(copy.deepcopy(teacher), config), reference)
    for each, case in trained.items():
        sentences = sentences_of(arguments.data_dir, arguments.steps * arguments.batch_size, arguments.seed)
        add(case, distilled(teacher, tokenizer, CONFIGS[each], sentences, arguments.steps), reference)


if __name__ == "__main__":
    main()
