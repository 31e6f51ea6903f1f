"""What commands print: one JSON object, or lines and tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import typer


def progress_to_stderr() -> Any:
    """What others print while they work; stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


def show(result: dict[str, Any], as_json: bool, *lines: Any) -> None:
    """The result as JSON, or lines and tables for people."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console

    # A table in a pipe or a file is not cut to 80 columns.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    for line in lines:
        console.print(line, markup=not isinstance(line, str))


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(columns.values()):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(key, "-")) for key in columns))
    return table


def info_tables(found: Any) -> list[Any]:
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
    lines = [head, table(rows, {key: key for key in rows[0]}) if rows else "no tensors", "", *bars, ""]
    if found.config and found.stage in ("prepared", "packed"):
        lines.append("bits: " + wea(found.config) + " (weights-embedding-activations)")
    if found.float_decoder:
        size = next(module.bytes for module in found.modules if module.name == found.float_decoder)
        lines.append(
            f"decoder: {found.float_decoder}, float, {size / 1e6:.2f} MB; output_embedding_bits=8 stores it in 8 bits"
        )
    if found.length_config:
        lines.append(f"lengths: keep {found.length_config.get('keep')}, {found.length_config.get('unit')}")
    if found.exit_config is not None:
        from ...files.card import exits_in_words

        lines.append(exits_in_words(found.exit_config))
    return [*lines, sums if found.checksums else "checksums: none in these files"]


def wea(config: dict[str, Any]) -> str:
    """2-2-8, as in the papers; 32 is float."""
    return "-".join(str(config.get(f"{name}_bits") or 32) for name in ("weight", "embedding", "activation"))


def bits_of(model: Any) -> dict[str, Any]:
    config = model.config.quantization_config
    return {"stage": config.stage, "bits": wea(config.to_dict()), "split": config.split}


def sizes(result: dict[str, Any]) -> str:
    before, after = result["disk_mb_before"], result["disk_mb"]
    return f"{before:.2f} MB -> {after:.2f} MB" + (f", {before / after:.1f} times smaller" if after else "")
