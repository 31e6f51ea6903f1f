"""lowbit evaluate, bench: how good and how fast a checkpoint is."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from .arguments import (
    DEFAULTS,
    DataDir,
    Device,
    Fused,
    Json,
    LabelColumn,
    MaxLength,
    ModelName,
    TaskName,
    TextColumn,
    need_one_of,
    no_bars,
    placed,
    terminal,
    text,
)
from .printing import progress_to_stderr, show, table


def evaluate(
    model: ModelName,
    task: TaskName = None,
    data_dir: DataDir = None,
    file: Annotated[Path | None, typer.Option(help="CSV, TSV, JSON lines or parquet file instead of a task.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    max_length: MaxLength = DEFAULTS.max_length,
    fused: Fused = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a classifier on the validation examples of a GLUE task, or on a file."""
    need_one_of(("--task", task), ("--file", file))
    from ...recipes import require
    from ...recipes.data import labels_of, load_files, offline_if_local

    require("datasets", "sklearn")
    offline_if_local(model, data_dir, text(file))
    with progress_to_stderr():
        from ...data.tasks import get_task, load_task, tokenize
        from ...recipes.measure import evaluate as score
        from ...recipes.stages import Run
        from .. import loading

        known = get_task(task) if task else None
        classifier = loading.load_classifier(model, known.labels if known else None)
        if task and known:
            given, data = known, load_task(task, data_dir, known.validation)
        else:
            names = labels_of(model, classifier.config)
            files = {"validation": str(file)}
            given, data = load_files(files, text_column or (), label_column, names, max_length)
        tokenizer = loading.load_tokenizer(model)
        no_bars()
        run = Run(SimpleNamespace(output_dir="."), given, tokenize(data, tokenizer, given), tokenizer)
        classifier = placed(classifier, device, fused)
        started = time.perf_counter()
        scores = score(run, classifier, progress=terminal())
        seconds = time.perf_counter() - started
        examples = sum(len(part) for part in run.data.values())
        result = {
            "model": model,
            "task": task or str(file),
            "metrics": scores,
            "examples": examples,
            "seconds": round(seconds, 2),
            "examples_per_second": round(examples / seconds, 1),
        }
    lines = [f"{name:<24} {value:.2f} %" for name, value in scores.items()]
    show(result, as_json, *lines, f"{examples} examples in {seconds:.1f} s ({examples / seconds:.0f} a second)")


def bench(
    model: ModelName,
    baseline: Annotated[
        str | None, typer.Option(metavar="FLOAT", help="Checkpoint to compare with, usually the float form.")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Repeat for several. Without: 1 and 8.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed forward passes; the median counts.")] = 15,
    fused: Fused = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="lowbit.compile both (a float one: torch.compile by layer).")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time forward passes of a checkpoint, on demand beside its float form in turns.

    Random token ids without padding. Kernels are timed by `make bench` and `make gpu`.
    """
    with progress_to_stderr():
        import lowbit

        from ...recipes.measure import latencies
        from .. import loading

        models = {model: placed(loading.load_model(model), device, fused)}
        if baseline is not None:
            if baseline == model:
                raise typer.BadParameter("is MODEL itself", param_hint="--baseline")
            models[baseline] = placed(loading.load_model(baseline), device, False)
        if compiled:
            for each in models.values():
                lowbit.compile(each, dynamic=False)
        rows: list[dict[str, Any]] = []
        for batch in batch_size or (1, 8):
            times = latencies(models, batch, length, repeats)
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, values in times.items():
                row = {"model": name, "batch_size": batch, "median_ms": round(medians[name], 3)}
                row |= {"min_ms": round(min(values), 3), "max_ms": round(max(values), 3)}
                if baseline is not None:
                    row["times_as_fast"] = round(medians[baseline] / medians[name], 2)
                rows.append(row)
        result = {"backend": lowbit.backend(), "device": str(models[model].device), "length": length,
                  "repeats": repeats, "fused": fused, "compiled": compiled, "results": rows}  # fmt: skip
    columns = {key: key.replace("_", " ") for key in rows[0]}
    lines = f"{result['backend']}; length {length}, median of {repeats}"
    show(result, as_json, table(rows, columns), lines)
