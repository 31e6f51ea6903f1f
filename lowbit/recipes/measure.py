"""Metrics, latency and sizes of models, and the table that shows them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

import lowbit
import lowbit_kernels

from ..data.tasks import compute_metrics
from ..models import longest
from . import RecipeError, require
from .stages import Run, reading


@torch.inference_mode()
def evaluate(run: Run, model: PreTrainedModel, progress: bool = False) -> dict[str, float]:
    """The task's metrics on every validation split (in percent)."""
    require("sklearn")
    collate, metrics = DataCollatorWithPadding(run.tokenizer), compute_metrics(run.task)
    model.eval()
    scores: dict[str, float] = {}
    for split in run.task.validation:
        data = run.data[split]
        order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
        logits, labels = [], []
        for first in tqdm(range(0, len(order), 64), desc=split, unit="batch", disable=not progress):
            batch = collate([data[i] for i in order[first : first + 64]]).to(model.device)
            labels.append(batch.pop("labels"))
            logits.append(model(**batch).logits)
        suffix = split.removeprefix("validation")
        for metric, value in metrics((torch.cat(logits).float().cpu(), torch.cat(labels).cpu())).items():
            scores[metric + suffix] = round(100 * value, 2)
    return scores


@torch.inference_mode()
def latencies(
    models: Mapping[str, PreTrainedModel], batch_size: int, length: int, repeats: int = 15
) -> dict[str, list[float]]:
    """Milliseconds of forward passes on random token ids, without padding; models take turns, so that drift hits all.

    Raises:
        RecipeError: fewer positions than `length`, or numbers below 1.
    """
    if min(batch_size, length, repeats) < 1:
        raise RecipeError(f"batch size {batch_size}, length {length}, repeats {repeats}; accepted: from 1")
    times: dict[str, list[float]] = {name: [] for name in models}
    inputs = {}
    for name, model in models.items():
        positions = longest(model)
        if positions is not None and length > positions:
            raise RecipeError(f"length {length}: {name} has {positions} positions")
        most = model.config.vocab_size
        ids = torch.randint(min(1000, most // 2), most, (batch_size, length), device=model.device)
        inputs[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(model.config, "reads_pairs", False):  # its second text is the second half
            second = torch.arange(length, device=model.device) >= length // 2
            inputs[name]["token_type_ids"] = second.long().expand_as(ids)
    for turn in range(repeats + 3):
        for name, model in models.items():
            begin = time.perf_counter()
            model(**inputs[name])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - begin))
    return times


def latency_ms(model: PreTrainedModel, batch_size: int, length: int, repeats: int = 15) -> float:
    """Median milliseconds of a forward pass on random token ids."""
    return round(statistics.median(latencies({"model": model}, batch_size, length, repeats)["model"]), 2)


def disk_mb(folder: Path) -> float:
    """Megabytes of a folder's safetensors files."""
    return round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6, 2)


def sizes(folder: Path, model: PreTrainedModel) -> dict[str, float]:
    """Megabytes on disk, in memory, and of the int8 expansions that the CPU path keeps after a first forward."""
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "disk_mb": disk_mb(folder),
        "memory_mb": round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 2),
        "expanded_mb": round(lowbit_kernels.expanded_bytes() / 1e6, 2),
    }


def measure(
    run: Run, name: str, length: int = 128, compiled: bool = False, score: Callable[..., dict[str, float]] = evaluate
) -> dict[str, Any]:
    """Reload a stage from disk and record its metrics, sizes and latency; on demand also that of `lowbit.compile`.

    A packed model runs fused, where it can be.
    """
    lowbit_kernels.keep_expanded(False)  # forget what other models left behind
    lowbit_kernels.keep_expanded(True)
    model = run.auto.from_pretrained(run.folder / name).eval()
    with contextlib.suppress(ValueError):  # a float model, or a packed one that only runs module by module
        lowbit.fuse(model)
    values: dict[str, Any] = score(as_read(run, name), model)
    for batch_size in (1, 8):
        values[f"latency_b{batch_size}_ms"] = latency_ms(model, batch_size, length)
    values |= sizes(run.folder / name, model)
    if compiled:
        lowbit.compile(model, dynamic=False)
        for batch_size in (1, 8):
            values[f"compiled_b{batch_size}_ms"] = latency_ms(model, batch_size, length)
    run.record(name, **values)
    return values


def as_read(run: Run, name: str) -> Run:
    """The run in the tokens of a stage's model, which may be others than the teacher's."""
    if not (run.folder / name / "tokenizer_config.json").is_file():
        return run
    tokenizer = AutoTokenizer.from_pretrained(run.folder / name)
    return run if tokenizer.get_vocab() == run.tokenizer.get_vocab() else reading(run, tokenizer)


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; `columns` maps keys of a row to headings, a missing value prints as "-"."""
    head = ["model", *columns.values()]
    body = [[name, *(str(row.get(key, "-")) for key in columns)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )
