"""Names that a recipe file may use for the parts of distillation, and what they stand for.

A part is a name and its fields: `{hidden: {map: uniform}}`. A field whose value is a table with `kind` is a schedule.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import exits
from ..distill import layer_maps, objectives
from ..distill.augment import HardestNeighbour
from ..distill.generator import MaskedGenerator
from ..distill.schedules import Scheduled
from ..distill.students import Built, copies, deformer, mobile, rnn, squeeze, subwords, theseus
from ..distill.students.both import OwnColumns
from ..distill.views import On
from . import RecipeError

OBJECTIVES: dict[str, Callable[..., Any]] = {
    "hidden": objectives.HiddenStateLoss,
    "scores": objectives.AttentionScoreLoss,
    "logits": objectives.LogitsLoss,
    "task": objectives.TaskLoss,
    "relations": objectives.RelationLoss,
    "statistics": objectives.StatisticsLoss,
    "pairs": objectives.PairRelationLoss,
    "triples": objectives.TripleRelationLoss,
    "exit_task": exits.ExitTaskLoss,
    "exit_logits": exits.ExitLogitsLoss,
    "exit_certainty": exits.ExitCertaintyLoss,
}

# Other batches that an objective may see: `view: {name: fields}`. The run gives a generator its model and tokenizer.
VIEWS: dict[str, Callable[..., Any]] = {
    "masked_generator": MaskedGenerator,
    "hardest_neighbour": HardestNeighbour,
    "own_columns": OwnColumns,
}
SEARCHED = "searched"  # a layer map that a search is to find
OF_ON = ("alternate", "learning_rate")  # fields of a view's table that are `On`'s

CRITERIA: dict[str, Callable[..., Any]] = {
    "entropy": exits.Entropy,
    "normalized_entropy": exits.NormalizedEntropy,
    "patience": exits.Patience,
    "certainty": exits.Certainty,
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
    "mobile": mobile.transfer,
    "deformer": deformer.build,
    "bilstm": rnn.build,
    "cnn": rnn.build,
    "subwords": subwords.build,
}
OWN_TOKENS = ("bilstm", "cnn", "subwords")  # students that read other tokens than their teacher
OF_RUN = ("size", "steps")  # of a student's vocabulary and of its own training: fields of a recipe alone


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
    check_fields(what, name, part, fields, len(given))
    try:
        return part(*given, **fields)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what} {name}: {error}") from error


def objective(given: Any, view: Callable[[str, dict[str, Any]], Any] | None = None, usual: str | None = None) -> Any:
    """An objective of a recipe.

    Args:
        given: `name`, or `{name: fields}`. A field `view` names one with its fields.
        view: makes a view of its name and fields; None: it is looked at and left out, to check a recipe.
        usual: the view of an objective that names none.

    Raises:
        RecipeError: what it does not know.
    """
    name, fields = named("objective", given, OBJECTIVES)
    on = fields.pop("view", usual)
    schedules = {key: value for key, value in fields.items() if isinstance(value, Mapping) and "kind" in value}
    plain = {key: value for key, value in fields.items() if key not in schedules}
    if view is None and plain.get("map") == SEARCHED:
        del plain["map"]
    made = make("objective", name, OBJECTIVES[name], plain)
    try:
        made = Scheduled(made, **schedules) if schedules else made
        if on is None:
            return made
        seen, of_view = named("view", on, VIEWS)
        own = {key: of_view.pop(key) for key in OF_ON if key in of_view}
        check_fields("view", seen, VIEWS[seen], of_view)
        return made if view is None else On(view(seen, of_view), made, **own)
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"objective {name}: {error}") from error


def layer_map(path: Path) -> layer_maps.LayerMap:
    """A map that `LayerMap.save` wrote."""
    return layer_maps.opened(path)  # type: ignore[return-value]


def criterion(given: Any) -> Any:
    """A criterion of early exit, None where there is none."""
    if given is None:
        return None
    name, fields = named("criterion", given, CRITERIA)
    return make("criterion", name, CRITERIA[name], fields)


def check_fields(what: str, name: str, part: Callable[..., Any], fields: Mapping[str, Any], skip: int = 0) -> None:
    """RecipeError for fields that a part does not have; its first `skip` parameters are none of a recipe's."""
    known = [*inspect.signature(part).parameters][skip:]
    if unknown := fields.keys() - set(known):
        raise RecipeError(f"{what} {name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")


def reads_own_tokens(given: Any) -> bool:
    """Whether a builder's student has a tokenizer of its own."""
    return named("student", given, STUDENTS)[0] in OWN_TOKENS


def check_student(given: Any) -> None:
    """RecipeError for a builder that there is not, or fields that it does not have."""
    name, fields = named("student", given, STUDENTS)
    check_fields("student", name, STUDENTS[name], {key: fields[key] for key in fields if key not in OF_RUN}, 1)


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
