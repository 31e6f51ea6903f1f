"""One training step on the GPU: bfloat16 fine-tuning, and the same with quantization-aware modules; no teacher.

Also the time to split a whole BERT-base (BinaryBERT's ternary weight splitting).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import lowbit
from lowbit_kernels import split_ternary

from .gpu_timing import check_alive
from .results import Row, Rows, failure

FINE_TUNING = "fine-tuning bf16"
SIZE, LENGTH = 32, 128


def measure(
    device: str, median: Callable[[Callable[[], Any]], float], **changes: Any
) -> Iterator[tuple[str, str, Row]]:
    """(case, runner, row): milliseconds of forward, backward and AdamW at batch 32, length 128, bfloat16 autocast.

    `changes` to the configuration make it small, for tests.
    """
    with torch.device(device):
        base = BertForSequenceClassification(BertConfig(**changes))
    length = min(LENGTH, base.config.max_position_embeddings)
    ids = torch.randint(0, base.config.vocab_size, (SIZE, length), device=device)
    labels = torch.randint(0, 2, (SIZE,), device=device)
    students: dict[str, Callable[[], Any]] = {
        FINE_TUNING: lambda: copy.deepcopy(base),
        "lowbit ternary": lambda: lowbit.prepare(copy.deepcopy(base), lowbit.TernaryConfig()),
        "lowbit binary": lambda: lowbit.prepare(copy.deepcopy(base), lowbit.BinaryConfig()),
        "lowbit split pair": lambda: lowbit.split(lowbit.prepare(copy.deepcopy(base), lowbit.TernaryConfig())),
    }
    for name, build in students.items():
        try:
            row: Row = {"ms/step": round(median(_step(build(), ids, labels)), 3)}
        except Exception as error:  # the students after it can still be measured
            check_alive()
            row = failure(name, error)
        yield f"batch {SIZE}, length {length}", name, row
    weights = [linear.weight.detach() for linear in base.modules() if isinstance(linear, torch.nn.Linear)]
    milliseconds = median(lambda: [split_ternary(w) for w in weights])
    yield "ternary weight splitting", "all linears", {"ms": round(milliseconds, 3)}


def _step(student: Any, ids: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    device = ids.device.type
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=device == "cuda")

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = student(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compared(rows: Rows) -> Rows:
    """The rows with their time over fine-tuning's."""
    base = rows.get(FINE_TUNING, {}).get("ms/step")
    for row in rows.values():
        if "ms/step" in row and isinstance(base, float):
            row["over fine-tuning"] = round(float(row["ms/step"]) / base, 3)
    return rows


def head(machine: dict[str, Any]) -> dict[str, Any]:
    """The report around results."""
    return {
        "suite": "gpu-training",
        "model": "BERT-base sequence classifier, random weights",
        "machine": machine,
        "method": "median of triton.testing.do_bench",
    }
