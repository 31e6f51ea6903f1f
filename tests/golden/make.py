"""Write the golden checkpoints: one of each stage and format version, of a tiny random BERT, with the logits they give.

    python tests/golden/make.py          adds those that are not there

What is there stays as it is: that files of earlier versions still load, and compute the same, is what they are for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import lowbit

HERE = Path(__file__).parent
IDS = torch.tensor([[2, 5, 9, 23, 41, 3], [2, 60, 7, 3, 0, 0]])
MASK = (IDS > 0).long()


def tiny(kind: type = BertForSequenceClassification) -> Any:
    """A float model of a few kilobytes, whose matrices are spread enough for faults to show."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.15)
    return model


def prepared(config: lowbit.LowbitConfig, kind: type = BertForSequenceClassification) -> Any:
    return lowbit.prepare(tiny(kind), config)


def packed(config: lowbit.LowbitConfig, kind: type = BertForSequenceClassification) -> Any:
    return lowbit.quantize(tiny(kind), config)


def split_half(version: int) -> Any:
    return lowbit.split(lowbit.prepare(lowbit.slim(tiny(), 0.5), lowbit.TernaryConfig(format_version=version)))


def shortened() -> Any:
    return lowbit.set_length(packed(lowbit.TernaryConfig(format_version=2)), lowbit.LengthConfig(keep=(0.9, 0.6)))


MODELS: dict[str, Callable[[], Any]] = {
    "slimmed, format 2": lambda: lowbit.slim(tiny(), 0.5),  # written when 2 was the newest; nothing in it is packed
    "prepared ternary, format 2": lambda: prepared(lowbit.TernaryConfig(format_version=2)),
    "prepared binary, format 2": lambda: prepared(lowbit.BinaryConfig(format_version=2)),
    "prepared split at half width, format 2": lambda: split_half(2),
    "packed ternary, format 1": lambda: packed(lowbit.TernaryConfig(format_version=1)),
    "packed ternary, format 2": lambda: packed(lowbit.TernaryConfig(format_version=2)),
    "packed binary, format 2": lambda: packed(lowbit.BinaryConfig(format_version=2)),
    "packed split at half width, format 2": lambda: lowbit.convert(split_half(2)),
    "packed ternary with lengths, format 2": shortened,
    "packed decoder of 8 bits, format 2": lambda: packed(
        lowbit.TernaryConfig(output_embedding_bits=8, format_version=2), BertForMaskedLM
    ),
    "packed ternary, format 3": lambda: packed(lowbit.TernaryConfig(format_version=3)),
    "packed binary, format 3": lambda: packed(lowbit.BinaryConfig(format_version=3)),
    "packed split at half width, format 3": lambda: lowbit.convert(split_half(3)),
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of two sentences, one of them padded."""
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool().any(1)]


def main() -> None:
    for name, make in MODELS.items():
        folder = HERE / name.replace(",", "").replace(" ", "-")
        if folder.exists():
            continue
        model = make().eval()
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            folder.mkdir()
            for file in ("config.json", "model.safetensors"):
                (folder / file).write_bytes((Path(place) / file).read_bytes())
        (folder / "logits.json").write_text(json.dumps(logits(model).tolist()) + "\n")
        print(folder.name)


if __name__ == "__main__":
    main()
