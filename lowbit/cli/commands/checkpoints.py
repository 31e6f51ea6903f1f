"""lowbit quantize, split, info, doctor: what is done to checkpoints, and said about them."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from .arguments import (
    ActivationBits,
    Bits,
    DecoderBits,
    EmbeddingBits,
    Json,
    ModelName,
    OutFolder,
    Overwrite,
)
from .printing import bits_of, info_tables, progress_to_stderr, show, sizes


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
    from .. import loading, weights

    loading.check_out(out, overwrite, model)
    with progress_to_stderr():
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
            **bits_of(given),
            "disk_mb_before": before,
            "disk_mb": weights.disk_mb(saved),
            "seconds": round(time.perf_counter() - started, 2),
        }
    show(result, as_json, f"{out}: {sizes(result)}, {result['bits']} (weights-embedding-activations)")


def split(
    prepared: Annotated[str, typer.Argument(metavar="PREPARED", help="Checkpoint of a trained ternary student.")],
    out: OutFolder,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Split each ternary weight of a prepared checkpoint into two binary ones, the same function (BinaryBERT).

    The result is prepared: train it on, then `lowbit quantize` packs it.
    """
    from .. import loading, weights

    loading.check_out(out, overwrite, prepared)
    with progress_to_stderr():
        import lowbit

        given = lowbit.split(loading.load_model(prepared))
        saved = loading.save(given, prepared, out)
        result = {"model": prepared, "out": str(out), **bits_of(given), "disk_mb": weights.disk_mb(saved)}
    show(result, as_json, f"{out}: {result['bits']} (weights-embedding-activations), pairs of binary weights")


def info(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Of lowbit, or float: a folder or Hub id.")],
    as_json: Json = False,
) -> None:
    """Show what is in a checkpoint: bits, sizes, scales and zeros by module, and where the bytes are.

    Exit code 1 if a tensor does not match its checksum.
    """
    from .. import loading

    with progress_to_stderr():
        folder = loading.model_folder(checkpoint)
        from .. import checkpoint as reader

        found = reader.read(folder)
    show(found.to_dict(), as_json, *([] if as_json else info_tables(found)))
    if found.damaged:
        typer.echo(f"error: {len(found.damaged)} tensors do not match their checksum: {found.damaged[0]} ...", err=True)
        raise typer.Exit(1)


def doctor(as_json: Json = False) -> None:
    """Say what will run lowbit on this machine, why, and what is missing.

    Exit code 1 if lowbit cannot run.
    """
    from ..doctor import examine

    with progress_to_stderr():
        found = examine()
    if not as_json:
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, show_header=False, padding=(0, 1))
        signs = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "error": "[red]error[/red]"}
        for check in found["checks"]:
            table.add_row(signs[check["status"]], *(escape(check[key]) for key in ("name", "value", "hint")))
        verdict = "lowbit can run here" if found["ok"] else "lowbit cannot run here"
        show(found, False, table, f"backend: {found['backend']}", f"why: {found['why']}", verdict)
    else:
        show(found, True)
    if not found["ok"]:
        raise typer.Exit(1)
