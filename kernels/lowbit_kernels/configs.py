"""Tile tables: which tile a Triton kernel takes for (op, M, N, K) on a device.

A table is a JSON file with one entry a line: {"op", "M", "N", "K", "tile", "source"}. M is one of `BUCKETS`, the most
rows the tile is meant for; N and K are null where the tile serves every weight. "source" says where the tile comes
from: "aot" was chosen by reading compiled code (registers, spills, instructions of the loop) and never timed, "tuned"
was timed by `python -m lowbit_kernels.tune`, and then "device", "torch", "triton", "us" and "untuned_us" say on what,
and how long it and the tile used without it took, in microseconds.

Looked up in this order, in each file first with the very N and K, then with null:
    1. the user's own, `cache_dir()`/sm_90.json          written by `tune`; one file a compute capability
    2. configs/sm_90.json of the package                 one file a family: sm_80.json serves 80 to 89
    3. configs/default.json of the package
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

VERSION = 1
BUCKETS = (1, 16, 64, 128, 512, 2048, 8192, 32768)  # the last one also serves larger M
SHIPPED = Path(__file__).parent / "configs"

Key = tuple[str, int, int | None, int | None]  # op, bucket, N, K
Table = dict[Key, dict[str, Any]]


def cache_dir() -> Path:
    """Folder of the user's tables and of compiled CPU kernels: $LOWBIT_CACHE_DIR, or ~/.cache/lowbit."""
    return Path(os.path.expanduser(os.environ.get("LOWBIT_CACHE_DIR") or "~/.cache/lowbit"))


def bucket(M: int) -> int:
    """The bucket of M rows."""
    return BUCKETS[min(bisect.bisect_left(BUCKETS, M), len(BUCKETS) - 1)]


def lookup(op: str, kind: type, M: int, N: int, K: int, arch: int | None) -> Any:
    """The tile of an op; files are read once a process (see `reload`).

    Args:
        op: name of the op, as "ternary_linear".
        kind: the op's tile dataclass; fields of an entry that it lacks are ignored.
        M, N, K: rows of activations, rows and columns of the weight.
        arch: compute capability of the device as 10 * major + minor; None: no device (the interpreter).

    Returns:
        A `kind`.

    Raises:
        LookupError: the package itself has no tile for `op`. Nothing in a user's file raises: it is named in a warning,
            once, and the next table serves.
    """
    return _lookup(op, kind, bucket(M), N, K, arch)


@functools.cache
def _lookup(op: str, kind: type, rows: int, N: int, K: int, arch: int | None) -> Any:
    return _first(kind, _paths(arch), [(op, rows, N, K), (op, rows, None, None)])


def _first(kind: type, paths: list[Path], keys: list[Key]) -> Any:
    for path in paths:
        for key in keys:
            entry = _table(path).get(key)
            if entry is None:
                continue
            try:
                return tile(kind, entry)
            except (TypeError, ValueError) as error:
                if path.parent == SHIPPED:
                    raise
                _warn(f"{path}: tile {entry['tile']} of {key[0]} is not used: {error}; tune again or delete the file")
    raise LookupError(f"no tile for {keys[0][0]} and M={keys[0][1]} in {SHIPPED}: add the op to default.json")


def untuned(op: str, kind: type, M: int, arch: int | None) -> Any:
    """The tile that serves any weight where nothing was tuned."""
    return _first(kind, shipped_tables(arch), [(op, bucket(M), None, None)])


def shipped(op: str, kind: type, arch: int) -> list[Any]:
    """Every tile that the package has for an op and a device, each once; what the ahead-of-time gate compiles."""
    entries = {key: entry for path in shipped_tables(arch)[:1] for key, entry in _table(path).items()}
    return list(dict.fromkeys(tile(kind, entry) for key, entry in entries.items() if key[0] == op))


def reload() -> None:
    """Read the files again at the next lookup."""
    _lookup.cache_clear()
    _table.cache_clear()
    _warn.cache_clear()


def tile(kind: type, entry: dict[str, Any]) -> Any:
    """The tile of an entry as a `kind`; TypeError or ValueError where it does not fit."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in entry["tile"].items() if name in known})


@functools.cache
def device_arch(device: torch.device) -> int | None:
    """Compute capability of a device as 10 * major + minor; None where it is no CUDA device."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def user_table(arch: int) -> Path:
    """The user's file for a compute capability, not a family: a block of 89 has less shared memory than one of 80."""
    return cache_dir() / f"sm_{arch}.json"


def shipped_tables(arch: int | None) -> list[Path]:
    """The package's files for a compute capability, the family's first."""
    family = [] if arch is None else [SHIPPED / f"sm_{arch // 10 * 10}.json"]
    return [path for path in family if path.exists()] + [SHIPPED / "default.json"]


def _paths(arch: int | None) -> list[Path]:
    return ([] if arch is None else [user_table(arch)]) + shipped_tables(arch)


@functools.cache
def _table(path: Path) -> Table:
    """A file's entries; none where there is no file, and where it is damaged, which a warning says."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        if path.parent == SHIPPED:
            raise
        _warn(f"{path} is not used, tiles are those of the package: {error}; tune again or delete the file")
        return {}


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def read(path: Path) -> Table:
    """The entries of a file, none if it does not exist.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no tile table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        given = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'expected {{"version": {VERSION}, "entries": [..]}}, got {given!r}')
    entries = content.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f'"entries" must be a list, got {type(entries).__name__}')
    return {_key(entry): entry for entry in entries}


def _key(entry: object) -> Key:
    if not isinstance(entry, dict):
        raise ValueError(f"an entry must be an object, got {entry!r}")
    op, rows, N, K, fields = (entry.get(name) for name in ("op", "M", "N", "K", "tile"))
    if not isinstance(op, str) or rows not in BUCKETS:
        raise ValueError(f'"op" must be a name and "M" one of {BUCKETS}, got {entry}')
    if not all(value is None or type(value) is int for value in (N, K)) or (N is None) != (K is None):
        raise ValueError(f'"N" and "K" must be both integers or both null, got {entry}')
    if not isinstance(fields, dict) or not all(type(value) is int for value in fields.values()):
        raise ValueError(f'"tile" must be an object of integers, got {entry}')
    if entry.get("source") not in ("aot", "tuned"):
        raise ValueError(f'"source" must be "aot" or "tuned", got {entry}')
    if entry["source"] == "tuned" and not isinstance(entry.get("us"), int | float):
        raise ValueError(f'what is "tuned" needs its microseconds, "us", got {entry}')
    return op, rows, N, K


def save(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write a table: to a temporary name, then renamed, so that no reader ever sees half of it."""
    lines = [json.dumps(entry) for entry in sorted(entries, key=_order)]
    text = f'{{"version": {VERSION}, "entries": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _order(entry: dict[str, Any]) -> tuple:
    op, rows, N, K = _key(entry)
    return op, N or 0, K or 0, rows
