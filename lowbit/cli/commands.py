"""One function a command: its arguments, what it does by calling the package, and what it prints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from ..data.tasks import TASKS
from ..recipes.options import FileOptions

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else to stdout.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into OUT even if it holds files.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint: a folder, or a model of the Hub.")]
OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
RunFolder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the run: finished parts are not repeated.")]
TaskName = Annotated[str | None, typer.Option("--task", help=f"GLUE task: {', '.join(TASKS)}.")]
DataDir = Annotated[
    str | None, typer.Option(help="Folder with TASK/train.* and TASK/validation.* (jsonl, csv, parquet); without: Hub.")
]
TextColumn = Annotated[
    list[str] | None, typer.Option(help="Column of the text; twice for pairs of texts. Without: text.")
]
LabelColumn = Annotated[str, typer.Option(help="Column of the label: text or whole numbers.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Longer texts of files are truncated, tokens.")]
Fused = Annotated[
    bool,
    typer.Option("--fused", help="Refuse a model that cannot run fused, and say why."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is the GPU where there is one.")]

DEFAULTS = FileOptions()


class Bits(StrEnum):
    """Of weights."""

    ternary = "ternary"
    binary = "binary"


class EmbeddingBits(StrEnum):
    """Of the word embedding."""

    eight, two, one, none = "8", "2", "1", "none"


class DecoderBits(StrEnum):
    """Of the decoder of a head that scores words."""

    eight, none = "8", "none"


class ActivationBits(StrEnum):
    """Of activations."""

    eight, four, none = "8", "4", "none"


class Method(StrEnum):
    """Of binary students."""

    tws = "tws"
    bwn = "bwn"


class Cost(StrEnum):
    """What a search saves."""

    macs = "macs"
    latency = "latency"


class Score(StrEnum):
    """Importance of tokens."""

    all = "all"
    cls = "cls"


# --------------------------------------------------------------------------------------------------------- checkpoints


def quantize(
    model: ModelName,
    out: OutFolder,
    bits: Annotated[Bits | None, typer.Option(help="Of the weights: 2 or 1. Without: ternary.")] = None,
    embedding_bits: Annotated[
        EmbeddingBits | None, typer.Option(help="Of the word embedding. Without: as the weights.")
    ] = None,
    output_embedding_bits: Annotated[
        DecoderBits | None, typer.Option(help="Of the decoder of a masked language model. Without: float.")
    ] = None,
    activation_bits: Annotated[ActivationBits | None, typer.Option(help="Of activations. Without: 8.")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="Leave this module in float, with all inside it; repeat for others."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pack a checkpoint into 2 or 1 bits.

    A float model is quantized as it is, which loses accuracy (`lowbit distill` gets it back). A prepared one, that is a
    trained student, is packed bit for bit as it was trained.
    """
    from . import loading, weights

    loading.check_out(out, overwrite, model)
    with _progress_to_stderr():
        import lowbit

        given, started = loading.load_model(model), time.perf_counter()
        before = weights.disk_mb(loading.model_folder(model))
        chosen = {
            "embedding_bits": embedding_bits,
            "output_embedding_bits": output_embedding_bits,
            "activation_bits": activation_bits,
        }
        stage = getattr(getattr(given.config, "quantization_config", None), "stage", "float")
        if stage == "prepared":
            if named := [
                f"--{name.replace('_', '-')}" for name, value in {"bits": bits, **chosen, "keep": keep}.items() if value
            ]:
                raise typer.BadParameter(f"{', '.join(named)}: {model} is prepared and has bits of its own")
            lowbit.convert(given)
        else:
            kind = lowbit.BinaryConfig if bits == Bits.binary else lowbit.TernaryConfig
            fields: dict[str, Any] = {"modules_to_not_convert": keep or []}
            for name, value in chosen.items():
                if value is not None:
                    fields[name] = None if value == "none" else int(value)
            lowbit.quantize(given, kind(**fields))
        saved = loading.save(given, model, out)
        result = {
            "model": model,
            "out": str(out),
            "from_stage": stage,
            **_bits_of(given),
            "disk_mb_before": before,
            "disk_mb": weights.disk_mb(saved),
            "seconds": round(time.perf_counter() - started, 2),
        }
    _print(result, as_json, f"{out}: {_sizes(result)}, {result['bits']} (weights-embedding-activations)")


def split(
    prepared: Annotated[str, typer.Argument(metavar="PREPARED", help="Checkpoint of a trained ternary student.")],
    out: OutFolder,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Split each ternary weight of a prepared checkpoint into two binary ones, the same function (BinaryBERT).

    The result is prepared: train it on, then `lowbit quantize` packs it.
    """
    from . import loading, weights

    loading.check_out(out, overwrite, prepared)
    with _progress_to_stderr():
        import lowbit

        given = lowbit.split(loading.load_model(prepared))
        saved = loading.save(given, prepared, out)
        result = {"model": prepared, "out": str(out), **_bits_of(given), "disk_mb": weights.disk_mb(saved)}
    _print(result, as_json, f"{out}: {result['bits']} (weights-embedding-activations), pairs of binary weights")


def info(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Of lowbit, or float: a folder or Hub id.")],
    as_json: Json = False,
) -> None:
    """Show what is in a checkpoint: bits, sizes, scales and zeros by module, and where the bytes are.

    Exit code 1 if a tensor does not match its checksum.
    """
    from . import loading

    with _progress_to_stderr():
        folder = loading.model_folder(checkpoint)
        from . import checkpoint as reader

        found = reader.read(folder)
    _print(found.to_dict(), as_json, *([] if as_json else _info_tables(found)))
    if found.damaged:
        typer.echo(f"error: {len(found.damaged)} tensors do not match their checksum: {found.damaged[0]} ...", err=True)
        raise typer.Exit(1)


def doctor(as_json: Json = False) -> None:
    """Say what will run lowbit on this machine, why, and what is missing.

    Exit code 1 if lowbit cannot run.
    """
    from .doctor import examine

    with _progress_to_stderr():
        found = examine()
    if not as_json:
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, show_header=False, padding=(0, 1))
        signs = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "error": "[red]error[/red]"}
        for check in found["checks"]:
            table.add_row(signs[check["status"]], *(escape(check[key]) for key in ("name", "value", "hint")))
        verdict = "lowbit can run here" if found["ok"] else "lowbit cannot run here"
        _print(found, False, table, f"backend: {found['backend']}", f"why: {found['why']}", verdict)
    else:
        _print(found, True)
    if not found["ok"]:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------ evaluation and timing


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
    _one_of(("--task", task), ("--file", file))
    from ..recipes import require
    from ..recipes.data import labels_of, load_files, offline_if_local

    require("datasets", "sklearn")
    offline_if_local(model, data_dir, _text(file))
    with _progress_to_stderr():
        from ..data.tasks import get_task, load_task, tokenize
        from ..recipes.measure import evaluate as score
        from ..recipes.stages import Run
        from . import loading

        known = get_task(task) if task else None
        classifier = loading.load_classifier(model, known.labels if known else None)
        if task and known:
            given, data = known, load_task(task, data_dir, known.validation)
        else:
            names = labels_of(model, classifier.config)
            files = {"validation": str(file)}
            given, data = load_files(files, text_column or (), label_column, names, max_length)
        tokenizer = loading.load_tokenizer(model)
        _no_bars()
        run = Run(SimpleNamespace(output_dir="."), given, tokenize(data, tokenizer, given), tokenizer)
        classifier = _placed(classifier, device, fused)
        started = time.perf_counter()
        scores = score(run, classifier, progress=_terminal())
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
    _print(result, as_json, *lines, f"{examples} examples in {seconds:.1f} s ({examples / seconds:.0f} a second)")


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
    with _progress_to_stderr():
        import lowbit

        from ..recipes.measure import latencies
        from . import loading

        models = {model: _placed(loading.load_model(model), device, fused)}
        if baseline is not None:
            if baseline == model:
                raise typer.BadParameter("is MODEL itself", param_hint="--baseline")
            models[baseline] = _placed(loading.load_model(baseline), device, False)
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
    _print(result, as_json, _table(rows, columns), lines)


# ------------------------------------------------------------------------------------------------------------- training


def distill(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Float model: folder or Hub id.")],
    out: RunFolder,
    task: TaskName = None,
    data_dir: DataDir = None,
    train_file: Annotated[Path | None, typer.Option(help="CSV, TSV, JSON lines or parquet, instead of a task.")] = None,
    validation_file: Annotated[Path | None, typer.Option(help="As the training file, other rows.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    max_length: MaxLength = DEFAULTS.max_length,
    bits: Annotated[Bits, typer.Option(help="Of the student's weights.")] = Bits.ternary,
    method: Annotated[
        Method, typer.Option(help="Binary: tws (ternary weight splitting) or bwn (binary at once).")
    ] = Method.tws,
    width: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Binary, tws: share of heads and FFN neurons kept before the split.")
    ] = DEFAULTS.width,
    teacher_steps: Annotated[
        int, typer.Option(min=0, help="Fine-tuning of MODEL first; 0: it is fine-tuned for the task already.")
    ] = DEFAULTS.teacher_steps,
    steps: Annotated[int, typer.Option(min=0, help="Of each distillation stage.")] = DEFAULTS.steps,
    slim_steps: Annotated[
        int, typer.Option(min=0, help="Binary, tws: distillation of the slimmed float model.")
    ] = DEFAULTS.slim_steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Of training.")] = DEFAULTS.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Of distillation; published for BERT-base: 2e-5, after the split 5e-5.")
    ] = DEFAULTS.learning_rate,
    split_learning_rate: Annotated[
        float | None, typer.Option(help="Binary, tws: of distillation after the split.", show_default="--learning-rate")
    ] = None,
    teacher_learning_rate: Annotated[
        float, typer.Option(help="Of fine-tuning and of the slimmed float model; BERT-base: 2e-5 to 5e-5.")
    ] = DEFAULTS.teacher_learning_rate,
    max_train_samples: Annotated[
        int, typer.Option(min=0, help="Use only the first N training examples, 0: all.")
    ] = DEFAULTS.max_train_samples,
    save_steps: Annotated[
        int, typer.Option(min=0, help="Checkpoints to resume from inside a stage, 0: none.")
    ] = DEFAULTS.save_steps,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = DEFAULTS.seed,
    as_json: Json = False,
) -> None:
    """Train a packed student of a float model: fine-tune the teacher, distil, pack, measure.

    OUT gets a folder for each stage, options.json, results.json, and the packed model with a model card. To resume an
    interrupted run, run the same command again.
    """
    _one_of(("--task", task), ("--train-file", train_file))
    if (train_file is None) != (validation_file is None):
        raise typer.BadParameter("--train-file and --validation-file go together")
    from ..recipes import require
    from ..recipes.data import load_files, load_glue, offline_if_local

    require("accelerate", "datasets", "sklearn")
    offline_if_local(model, data_dir, _text(train_file))
    with _progress_to_stderr():
        from ..data.tasks import tokenize
        from ..recipes import stages
        from ..recipes.measure import measure
        from . import loading

        loading.quiet()
        _no_bars()
        options = FileOptions(
            data_dir=data_dir, model=loading.for_transformers(model), output_dir=str(out),
            max_train_samples=max_train_samples, teacher_steps=teacher_steps, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate, teacher_learning_rate=teacher_learning_rate, save_steps=save_steps, seed=seed,
            task=task or "",
            method=method.value, width=width, slim_steps=slim_steps, split_learning_rate=split_learning_rate,
            bits=bits.value,
            train_file=_text(train_file), validation_file=_text(validation_file),
            text_columns=text_column or [], label_column=label_column, max_length=max_length,
        )  # fmt: skip
        if task:
            given, data = load_glue(options)
        else:
            names = None if teacher_steps else loading.label_names(model)
            files = {"train": str(train_file), "validation": str(validation_file)}
            given, data = load_files(files, text_column or (), label_column, names, max_length, max_train_samples)
        tokenizer = loading.load_tokenizer(model)
        stages.load_teacher(options, given)  # refuses a model that is no teacher before OUT is written
        run = stages.start(options, given, tokenize(data, tokenizer, given), tokenizer)
        teacher = stages.teacher_stage(run)
        packed = (stages.ternary_stages if bits == Bits.ternary else stages.binary_stages)(run, teacher)
        results = {name: measure(run, name) for name in ("teacher", packed)}
        _write_card(out / packed, task or Path(str(validation_file)).stem, model, results)
        result = {
            "model": str(out / packed),
            "task": task or str(train_file),
            "teacher": str(out / "teacher"),
            "results": results,
        }
    rows = [{"model": name, **row} for name, row in results.items()]
    _print(result, as_json, _table(rows, {key: key for key in rows[0]}), f"packed model: {out / packed}")


def _write_card(folder: Path, task: str, teacher: str, results: dict[str, dict[str, Any]]) -> None:
    """The packed model's README.md: what it is, and its metrics (shares, as the Hub has them) beside the teacher's."""
    metrics = {
        name: {key: round(value / 100, 4) for key, value in row.items() if not key.endswith(("_ms", "_mb"))}
        for name, row in results.items()
    }
    from ..files.card import model_card
    from . import loading

    model = loading.load_model(str(folder))
    card = model_card(
        model, results=metrics[folder.name], teacher=teacher, teacher_results=metrics["teacher"], task=task
    )
    card.save(folder / "README.md")


def search_length(
    model: ModelName,
    out: RunFolder,
    task: TaskName = None,
    data_dir: DataDir = None,
    file: Annotated[Path | None, typer.Option(help="CSV, TSV, JSON lines or parquet file to score on.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    max_length: MaxLength = DEFAULTS.max_length,
    samples: Annotated[int, typer.Option(min=1, help="Examples: the last of a task's training set.")] = 1000,
    iterations: Annotated[int, typer.Option(min=0, help="Of 10 mutations and 10 crossovers each.")] = 5,
    cost: Annotated[Cost, typer.Option(help="What is saved; latency measures a table first.")] = Cost.macs,
    score: Annotated[Score, typer.Option(help="Attention received from all tokens, or from the first.")] = Score.all,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="Nx", help="Save the model with the best lengths at N times less cost in OUT/Nx; repeat."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
    as_json: Json = False,
) -> None:
    """Search which layer of a classifier may drop how many tokens: accuracy against cost.

    Writes OUT/front.json and front.png; `lowbit.LengthConfig.for_budget("2x", "OUT/front.json")` picks from it. To
    resume an interrupted search, run the same command again. Score on examples that the model was not trained on.
    """
    _one_of(("--task", task), ("--file", file))
    from ..recipes import require
    from ..recipes.data import labels_of, load_files, offline_if_local

    require("datasets", "sklearn")
    offline_if_local(model, data_dir, _text(file))
    with _progress_to_stderr():
        import lowbit

        from ..data.tasks import get_task, load_task, tokenize
        from ..length.front import times_less
        from ..recipes import lengths, stages
        from ..recipes.measure import evaluate as metrics
        from . import loading

        for name in budget or ():
            times_less(name)  # refuses what is no budget before the search
        known = get_task(task) if task else None
        classifier = loading.load_classifier(model, known.labels if known else None)
        if task and known:
            given, data = known, load_task(task, data_dir, ["train"])
            rows = data["train"]
        else:
            names = labels_of(model, classifier.config)
            given, data = load_files({"search": str(file)}, text_column or (), label_column, names, max_length)
            rows = data["search"]
        data = type(data)({"search": rows.select(range(max(0, len(rows) - samples), len(rows)))})
        tokenizer = loading.load_tokenizer(model)
        _no_bars()
        options = SearchOptions(
            model, str(out), task, data_dir, _text(file), text_column or [], label_column, max_length, samples,
            iterations, cost.value, score.value, seed,
        )  # fmt: skip
        given = dataclasses.replace(given, validation=("search",))
        run = stages.start(options, given, tokenize(data, tokenizer, given), tokenizer)
        packed = getattr(getattr(classifier.config, "quantization_config", None), "stage", "float") == "packed"
        if packed:
            lowbit.fuse(classifier)
        tokens = [len(ids) for ids in run.data["search"]["input_ids"]]
        front = lengths.search(run, "model", classifier, lambda m: next(iter(metrics(run, m).values())), tokens)
        budgets = {name: front.for_budget(name) for name in budget or ()}
        for name, config in budgets.items():
            lowbit.set_length(classifier, config)
            loading.save(classifier, model, out / name)
        points = [{"keep": list(p.config.keep), "cost": p.cost, "score": p.score,
                   "times_less": round(front.full_cost / p.cost, 2)} for p in front.points]  # fmt: skip
        result = {"front": str(out / "front.json"), "cost_unit": front.cost_unit, "full_cost": front.full_cost,
                  "full_score": front.full_score, "points": points,
                  "saved": {name: str(out / name) for name in budgets}}  # fmt: skip
    shown = [
        {**point, "keep": " ".join(f"{k:g}" for k in config.keep)}
        for point, (config, *_) in zip(points, front.points, strict=True)
    ]
    lines = [f"all tokens: score {front.full_score}, {front.full_cost:g} {front.cost_unit}", f"front: {out}/front.json"]
    lines += [f"{name}: {out / name}" for name in budgets]
    columns = {"keep": "keep", "score": "score", "cost": front.cost_unit, "times_less": "times less"}
    _print(result, as_json, _table(shown, columns), *lines)


@dataclasses.dataclass
class SearchOptions:
    """What a search is asked to do; recorded with it."""

    model: str
    output_dir: str
    task: str | None
    data_dir: str | None
    file: str | None
    text_columns: list[str]
    label_column: str
    max_length: int
    samples: int
    iterations: int
    cost: str
    score: str
    seed: int


COMMANDS = (quantize, distill, split, evaluate, bench, search_length, info, doctor)


# --------------------------------------------------------------------------------------------------------------- output


def _progress_to_stderr() -> Any:
    """What others print while they work; stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


def _print(result: dict[str, Any], as_json: bool, *lines: Any) -> None:
    """The result as JSON, or lines and tables for people."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console

    # A table in a pipe or a file is not cut to 80 columns.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    for line in lines:
        console.print(line, markup=not isinstance(line, str))


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(columns.values()):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(key, "-")) for key in columns))
    return table


def _info_tables(found: Any) -> list[Any]:
    rows = []
    for module in found.modules:
        scale = "-" if module.scale is None else f"{module.scale[0]:.3g} to {module.scale[1]:.3g}"
        zeros = "-" if module.sparsity is None else f"{100 * module.sparsity:.1f} %"
        shape = "x".join(map(str, module.shape))
        rows.append({"module": module.name or "-", "kind": module.kind, "bits": module.bits, "shape": shape,
                     "bytes": f"{module.bytes:,}", "scales": scale, "zeros": zeros})  # fmt: skip
    parts = found.parts()
    total, widest = max(1, sum(parts.values())), max(map(len, parts), default=0)
    bars = []
    for name, size in parts.items():
        bar = "█" * round(40 * size / total) or "▏"
        bars.append(f"{name:<{widest}}  {bar:<40} {size / 1e6:8.2f} MB {100 * size / total:5.1f} %")
    head = f"{found.path}: {found.model_class}, {found.stage}, {found.bytes / 1e6:.2f} MB"
    sums = f"checksums: {found.checksums - len(found.damaged)} of {found.checksums} tensors match"
    lines = [head, _table(rows, {key: key for key in rows[0]}) if rows else "no tensors", "", *bars, ""]
    if found.config and found.stage in ("prepared", "packed"):
        lines.append("bits: " + _wea(found.config) + " (weights-embedding-activations)")
    if found.float_decoder:
        size = next(module.bytes for module in found.modules if module.name == found.float_decoder)
        lines.append(
            f"decoder: {found.float_decoder}, float, {size / 1e6:.2f} MB; output_embedding_bits=8 stores it in 8 bits"
        )
    if found.length_config:
        lines.append(f"lengths: keep {found.length_config.get('keep')}, {found.length_config.get('unit')}")
    return [*lines, sums if found.checksums else "checksums: none in these files"]


def _wea(config: dict[str, Any]) -> str:
    """2-2-8, as in the papers; 32 is float."""
    return "-".join(str(config.get(f"{name}_bits") or 32) for name in ("weight", "embedding", "activation"))


def _bits_of(model: Any) -> dict[str, Any]:
    config = model.config.quantization_config
    return {"stage": config.stage, "bits": _wea(config.to_dict()), "split": config.split}


def _sizes(result: dict[str, Any]) -> str:
    before, after = result["disk_mb_before"], result["disk_mb"]
    return f"{before:.2f} MB -> {after:.2f} MB" + (f", {before / after:.1f} times smaller" if after else "")


# ---------------------------------------------------------------------------------------------------------------- other


def _one_of(*options: tuple[str, object]) -> None:
    if sum(value is not None for _, value in options) != 1:
        raise typer.BadParameter(f"give one of {' and '.join(name for name, _ in options)}")


def _placed(model: Any, device: str, fused: bool) -> Any:
    from . import loading

    if fused:
        import lowbit

        lowbit.fuse(model)
    return model.to(loading.device_of(device))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _terminal() -> bool:
    return sys.stderr.isatty()


def _no_bars() -> None:
    """datasets draws a bar for every map, even of a hundred rows."""
    import datasets

    datasets.disable_progress_bars()
