"""Which teacher layers teach which student layer, as data.

Layers count from 1; 0 is the embedding output (`hidden_states[0]`). For a student of L and a teacher of N layers:

uniform     m <- m N/L                                            (TinyBERT)
top         m <- N - L + m
bottom      m <- m
last        L <- N, all others untaught                           (MiniLM, DistilBERT's cosine)
skip        m <- m N/L for m < L: the last is left to the logits  (BERT-PKD "skip")
pkd_last    m <- N - L + m for m < L                              (BERT-PKD "last")
none        no layer is taught: what is left is the embedding output
groups      m <- its N/L layers, concatenated                     (CKD "regular")
overlap     groups with one more layer on each side, concatenated (CKD "overlap")
cross       m <- m, m + L, m + 2L, .., concatenated               (CKD "cross")
buckets     attention over groups                                 (ALP-KD)
all         attention over all N layers                           (ALP-KD)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..files.atomic import write_text

COMBINE = ("one", "mean", "concat", "attend")


@dataclass(frozen=True)
class LayerMap:
    """For each student layer its teacher layers, and what becomes of several.

    Args:
        rows: for student layers 1..L the teacher layers, ascending from 0 (the embedding output); an empty row is a
            layer that is not taught.
        combine: "one" (no row has more than one), "mean" over a row's states, "concat" along the width, or "attend":
            each token of the student weighs them by softmax of dot products.
        teacher_layers: N that the map is for; None: any that has the layers of its rows.

    Raises:
        ValueError: rows that are no ascending numbers, or "one" with more than one layer in a row.
    """

    rows: tuple[tuple[int, ...], ...]
    combine: str = "one"
    teacher_layers: int | None = None

    def __post_init__(self) -> None:
        rows = tuple(map(_row, self.rows))
        object.__setattr__(self, "rows", rows)
        if self.combine not in COMBINE:
            raise ValueError(f"layer map: combine={self.combine!r}; accepted: {', '.join(COMBINE)}")
        if self.combine == "one" and any(len(row) > 1 for row in rows):
            raise ValueError(f"layer map: rows {rows} with several layers need combine='mean', 'concat' or 'attend'")
        if self.teacher_layers is not None and max(map(max, filter(None, rows)), default=0) > self.teacher_layers:
            raise ValueError(f"layer map: rows {rows} name layers that a teacher of {self.teacher_layers} has not")

    def taught(self) -> list[tuple[int, tuple[int, ...]]]:
        """(student layer from 1, its teacher layers), without the layers that are not taught."""
        return [(layer, row) for layer, row in enumerate(self.rows, 1) if row]

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file that `resolve` takes."""
        write_text(path, json.dumps(vars(self)))


def _row(row: Any) -> tuple[int, ...]:
    """The teacher layers of one student layer: a number, several, or None for no teacher."""
    layers = () if row is None else (row,) if isinstance(row, int) else tuple(row) if _is_list(row) else (-1,)
    if any(type(layer) is not int or layer < 0 for layer in layers) or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"layer map: {row!r} is no row; accepted: a teacher layer (0: the embedding output), an ascending list of "
            "them, or None or [] for a student layer that is not taught"
        )
    return layers


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


class _Uneven(Exception):
    """A constructor's student layers do not divide the teacher's."""


def _step(student: int, teacher: int) -> int:
    if teacher % student:
        raise _Uneven
    return teacher // student


def _uniform(student: int, teacher: int) -> list[list[int]]:
    step = _step(student, teacher)
    return [[step * layer] for layer in range(1, student + 1)]


def _top(student: int, teacher: int) -> list[list[int]]:
    return [[teacher - student + layer] for layer in range(1, student + 1)]


def _groups(student: int, teacher: int, more: int = 0) -> list[list[int]]:
    step = _step(student, teacher)
    ends = range(step, teacher + 1, step)
    return [[*range(max(1, end - step + 1 - more), min(teacher, end + more) + 1)] for end in ends]


def _cross(student: int, teacher: int) -> list[list[int]]:
    _step(student, teacher)
    return [[*range(layer, teacher + 1, student)] for layer in range(1, student + 1)]


# name -> (rows for L and N, how they are combined)
NAMED: dict[str, tuple[Callable[[int, int], Any], str]] = {
    "uniform": (_uniform, "one"),
    "top": (_top, "one"),
    "bottom": (lambda student, teacher: [[layer] for layer in range(1, student + 1)], "one"),
    "last": (lambda student, teacher: [[]] * (student - 1) + [[teacher]], "one"),
    "skip": (lambda student, teacher: [*_uniform(student, teacher)[:-1], []], "one"),
    "pkd_last": (lambda student, teacher: [*_top(student, teacher)[:-1], []], "one"),
    "none": (lambda student, teacher: [[]] * student, "one"),
    "groups": (_groups, "concat"),
    "overlap": (lambda student, teacher: _groups(student, teacher, 1), "concat"),
    "cross": (_cross, "concat"),
    "buckets": (_groups, "attend"),
    "all": (lambda student, teacher: [[*range(1, teacher + 1)]] * student, "attend"),
}

Spec = str | PathLike[str] | Sequence[Any] | Mapping[str, Any] | LayerMap


def opened(spec: Spec) -> Spec:
    """A map instead of the path of its JSON file, so that files are read once; all other ways to say a map as they are.

    Raises:
        ValueError: no such name and no such file, or a file that holds no map.
    """
    if not isinstance(spec, str | PathLike) or spec in NAMED:
        return spec
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"layer map {str(spec)!r}; accepted: {', '.join(NAMED)}, a list, or the path of a JSON file")
    try:
        return _described(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no layer map: {error}") from error


def resolve(spec: Spec, student: int, teacher: int, what: str = "layer map") -> LayerMap:
    """The map for a student and a teacher of so many layers.

    Args:
        spec: a name (see the top of this file); a list with a row for each student layer: a teacher layer, a list of
            them, or None; {"rows": .., "combine": ..}; {"name": .., "combine": ..}; the path of a JSON file; a
            `LayerMap`.
        student: L, layers of the student.
        teacher: N, layers of the teacher.
        what: what asks, for the error.

    Raises:
        ValueError: no map, or one for another depth.
    """
    spec = opened(spec)
    if isinstance(spec, str):
        found = _named(spec, student, teacher, what)
    elif isinstance(spec, Mapping) and "name" in spec:
        if unknown := spec.keys() - {"name", "combine"} or {spec["name"]} - NAMED.keys():
            raise ValueError(f"{what}: layer map {dict(spec)}: {', '.join(map(str, unknown))} is not known")
        found = _named(spec["name"], student, teacher, what)
        found = replace(found, combine=spec.get("combine", found.combine))
    else:
        found = spec if isinstance(spec, LayerMap) else _described(spec)
    deepest = max(map(max, filter(None, found.rows)), default=0)
    if len(found.rows) != student or deepest > teacher or found.teacher_layers not in (None, teacher):
        raise ValueError(
            f"{what}: a layer map for {len(found.rows)} student layers and a teacher of "
            f"{found.teacher_layers or f'at least {deepest}'}; this student has {student}, the teacher {teacher}. "
            "Pass a map with a row for each student layer, or a name that fits other depths, such as map='last'"
        )
    return found


def _named(name: str, student: int, teacher: int, what: str) -> LayerMap:
    make, combine = NAMED[name]
    try:
        rows = make(student, teacher)
    except _Uneven:
        fitting = ", ".join(str(layers) for layers in range(1, teacher + 1) if teacher % layers == 0)
        raise ValueError(
            f"{what}: {student} student layers do not divide {teacher} teacher layers evenly; take a student of "
            f"{fitting} layers, or another layer map, such as map='last', or objectives that compare no layers: "
            "objectives=[LogitsLoss()]"
        ) from None
    if any(not 1 <= layer <= teacher for row in rows for layer in row):
        raise ValueError(
            f"{what}: layer map {name!r} needs a teacher of as many layers as the student; this student has {student}, "
            f"the teacher {teacher}"
        )
    return LayerMap(rows, combine, teacher)


def _described(value: Any) -> LayerMap:
    """A map from lists and tables, as JSON and YAML have them."""
    if isinstance(value, Mapping) and "rows" in value and value.keys() <= LayerMap.__dataclass_fields__.keys():
        return LayerMap(**value)
    if _is_list(value):
        return LayerMap(tuple(value))
    raise ValueError(f"layer map {value!r}; accepted: {', '.join(NAMED)}, a list, or a table with 'rows'")
