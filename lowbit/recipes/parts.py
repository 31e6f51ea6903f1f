"""Names that a recipe file may use for the parts of distillation, and what they stand for.

A part is a name and its fields: `{hidden: {map: uniform}}`. A field whose value is a table with `kind` is a schedule.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..distill import objectives
from ..distill.schedules import Scheduled
from ..distill.students import Built, copies, squeeze, theseus
from . import RecipeError

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "hidden": objectives.HiddenStateLoss,
    "scores": objectives.AttentionScoreLoss,
    "logits": objectives.LogitsLoss,
    "task": objectives.TaskLoss,
}


def _same(teacher: Any) -> Built:
    """The teacher's own size."""
    return Built(copy.deepcopy(teacher))


STUDENTS: dict[str, Callable[..., Any]] = {
    "same": _same,
    "layers": copies.layers,
    "random": copies.random,
    "theseus": theseus.build,
    "squeeze": squeeze.build,
}


def named(what: str, given: Any, table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the fields of a part: `name`, or a table with the name alone in it.

    Raises:
        RecipeError: another form, or a name that is not in the table.
    """
    name, fields = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (given, {})
    if not isinstance(name, str) or name not in table or not isinstance(fields or {}, Mapping):
        raise RecipeError(f"{what} {given!r}; accepted: {', '.join(table)}, alone or as {{name: {{field: value}}}}")
    return name, dict(fields or {})


def make(what: str, name: str, part: Callable[..., Any], fields: Mapping[str, Any], *given: Any) -> Any:
    """Call a part with fields of a recipe; RecipeError for fields that it does not have, or values that it refuses."""
    known = [*inspect.signature(part).parameters][len(given) :]
    if unknown := fields.keys() - set(known):
        raise RecipeError(f"{what} {name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    try:
        return part(*given, **fields)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what} {name}: {error}") from error


def objective(given: Any) -> Any:
    """An objective of a recipe.

    Raises:
        RecipeError: what it does not know.
    """
    name, fields = named("objective", given, OBJECTIVES)
    schedules = {key: value for key, value in fields.items() if isinstance(value, Mapping) and "kind" in value}
    plain = {key: value for key, value in fields.items() if key not in schedules}
    made = make("objective", name, OBJECTIVES[name], plain)
    if not schedules:
        return made
    try:
        return Scheduled(made, **schedules)
    except ValueError as error:
        raise RecipeError(f"objective {name}: {error}") from error


def check_student(given: Any) -> None:
    """RecipeError for a builder that there is not, or fields that it does not have."""
    name, fields = named("student", given, STUDENTS)
    known = [*inspect.signature(STUDENTS[name]).parameters][1:]
    if unknown := fields.keys() - set(known):
        raise RecipeError(f"student {name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")


def student(given: Any, teacher: Any, quantize: Callable[[Any], Any] | None) -> Built:
    """Build a student of a teacher, and quantize it where that is asked for.

    Raises:
        RecipeError: what the builder refuses.
    """
    name, fields = named("student", given, STUDENTS)
    if quantize is not None and name == "theseus":  # the successors are quantized, what they replace is not
        kept = {key: value for key, value in fields.items() if key in ("layers", "which")}
        successor = quantize(make("student", "layers", copies.layers, kept, teacher).model)
        return make("student", name, theseus.build, {**fields, "successor": successor, "train": "all"}, teacher)
    built = make("student", name, STUDENTS[name], fields, teacher)
    return built if quantize is None else replace(built, model=quantize(built.model))
