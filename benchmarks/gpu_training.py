"""One training step on the GPU: bfloat16 fine-tuning, and the same with quantization-aware modules; no teacher.

Also the time to split a whole BERT-base (BinaryBERT's ternary weight splitting).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import lowbit
from lowbit_kernels import split_ternary

from .results import Row


def measure(device: str, median: Callable[[Callable[[], Any]], float], **changes: Any) -> dict[str, dict[str, Row]]:
    """Milliseconds of forward, backward and AdamW at batch 32, length 128, under bfloat16 autocast."""
    base = BertForSequenceClassification(BertConfig(**changes)).to(device)
    size, length = 32, min(128, base.config.max_position_embeddings)
    ids = torch.randint(0, base.config.vocab_size, (size, length), device=device)
    labels = torch.randint(0, 2, (size,), device=device)
    students = {
        "fine-tuning bf16": copy.deepcopy(base),
        "ternary": lowbit.prepare(copy.deepcopy(base), lowbit.TernaryConfig()),
        "binary": lowbit.prepare(copy.deepcopy(base), lowbit.BinaryConfig()),
    }
    students["split pair"] = lowbit.split(copy.deepcopy(students["ternary"]))
    rows: dict[str, Row] = {}
    for name, student in students.items():
        student.train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=device == "cuda")

        def step(student: Any = student, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = student(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        milliseconds = median(step)
        plain = float(rows["fine-tuning bf16"]["ms/step"]) if rows else milliseconds
        rows[name] = {"ms/step": round(milliseconds, 3), "over fine-tuning": round(milliseconds / plain, 3)}
    weights = [linear.weight.detach() for linear in base.modules() if isinstance(linear, torch.nn.Linear)]
    splitting: dict[str, Row] = {"all linears": {"ms": round(median(lambda: [split_ternary(w) for w in weights]), 3)}}
    return {f"batch {size}, length {length}": rows, "ternary weight splitting": splitting}


def suite(machine: dict[str, Any], results: dict[str, dict[str, Row]]) -> dict[str, Any]:
    """The report around results."""
    return {
        "suite": "gpu-training",
        "model": "BERT-base sequence classifier, random weights",
        "machine": machine,
        "method": "median of triton.testing.do_bench",
        "results": results,
    }
