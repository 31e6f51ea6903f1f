"""Arguments and options that commands share, and the words that options accept."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ...data.tasks import TASKS
from ...recipes.options import FileOptions

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


class StudentBits(StrEnum):
    """Of a student's weights."""

    float = "float"
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


def need_one_of(*options: tuple[str, object]) -> None:
    if sum(value is not None for _, value in options) != 1:
        raise typer.BadParameter(f"give one of {' and '.join(name for name, _ in options)}")


def placed(model: Any, device: str, fused: bool) -> Any:
    from .. import loading

    if fused:
        import lowbit

        lowbit.fuse(model)
    return model.to(loading.device_of(device))


def text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def terminal() -> bool:
    return sys.stderr.isatty()


def no_bars() -> None:
    """datasets draws a bar for every map, even of a hundred rows."""
    import datasets

    datasets.disable_progress_bars()
