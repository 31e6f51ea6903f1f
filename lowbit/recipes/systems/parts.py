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

from ... import exits
from ...distill import layer_maps, objectives
from ...distill.augment import HardestNeighbour
from ...distill.generator import MaskedGenerator
from ...distill.schedules import Scheduled
from ...distill.students import Built, copies, deformer, mobile, rnn, squeeze, subwords, theseus
from ...distill.students.both import OwnColumns
from ...distill.views import On
from .. import RecipeError
from . import fields as of_fields

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
OF_LABELS = ("task", "exit_task", "exit_certainty")  # objectives that compare with them
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
# Fields of a recipe alone: of a student's vocabulary, and the share of the steps of its own training.
OF_RUN: dict[str, dict[str, Any]] = {
    "bilstm": {"size": 20000},
    "cnn": {"size": 20000},
    "subwords": {"size": 5000, "steps": 0.5},
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
        made = _scheduled(name, made, plain, schedules) if schedules else made
        if on is None:
            return made
        seen, of_view = named("view", on, VIEWS)
        own = {key: of_view.pop(key) for key in OF_ON if key in of_view}
        of_fields.check(f"view {seen}", On, own)
        check_fields("view", seen, VIEWS[seen], of_view, 2 if seen == "masked_generator" else 0)
        return made if view is None else On(view(seen, of_view), made, **own)
    except ValueError as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"objective {name}: {error}") from error


def _scheduled(name: str, made: Any, plain: Mapping[str, Any], schedules: Mapping[str, Any]) -> Any:
    """An objective whose fields follow schedules, which have to stay at values that it accepts."""
    followed = Scheduled(made, **schedules)
    for progress in (0.0, 0.5, 1.0):
        values = {key: schedule(progress) for key, schedule in followed.schedules.items()}
        make("objective", name, OBJECTIVES[name], {**plain, **values})
    return followed


def layer_map(path: Path) -> layer_maps.LayerMap:
    """A map that `LayerMap.save` wrote."""
    return layer_maps.opened(path)  # type: ignore[return-value]


def criterion(given: Any) -> Any:
    """A criterion of early exit, None where there is none."""
    if given is None:
        return None
    name, fields = named("criterion", given, CRITERIA)
    return make("criterion", name, CRITERIA[name], fields)


def view_of(fields: Mapping[str, Any]) -> str | None:
    """The name of an objective's view."""
    return named("view", fields["view"], VIEWS)[0] if fields.get("view") is not None else None


def is_searched(given: Any) -> bool:
    """Whether an objective's layer map is one that a search finds."""
    return named("objective", given, OBJECTIVES)[1].get("map") == SEARCHED


def check_fields(what: str, name: str, part: Callable[..., Any], fields: Mapping[str, Any], skip: int = 0) -> None:
    """RecipeError for fields that a part does not have, or of another type than its own.

    Its first `skip` parameters are none of a recipe's.
    """
    known = parameters_of(part)[skip:]
    if unknown := fields.keys() - set(known):
        raise RecipeError(f"{what} {name} has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(known)}")
    of_fields.check(f"{what} {name}", part, fields)


def parameters_of(part: Callable[..., Any]) -> list[str]:
    """Names of what a part takes."""
    return [each.name for each in inspect.signature(part).parameters.values() if each.kind is not each.VAR_KEYWORD]


def reads_own_tokens(given: Any) -> bool:
    """Whether a builder's student has a tokenizer of its own."""
    return named("student", given, STUDENTS)[0] in OWN_TOKENS


def check_student(given: Any) -> None:
    """RecipeError for a builder that there is not, or fields that it does not have."""
    name, fields = named("student", given, STUDENTS)
    of_run, fields = split_student(name, fields)
    for key, value in of_run.items():
        if not of_fields.fits(value, float if key == "steps" else int) or value <= 0:
            raise RecipeError(
                f"student {name}: {key}={value!r}; accepted: a {'number' if key == 'steps' else 'whole number'} above 0"
            )
    check_fields("student", name, STUDENTS[name], fields, {"subwords": 3, "bilstm": 2, "cnn": 2}.get(name, 1))


def split_student(name: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields that the run reads, and those of the builder."""
    of_run = OF_RUN.get(name, {})
    return {**of_run, **{key: fields[key] for key in of_run if key in fields}}, {
        key: value for key, value in fields.items() if key not in of_run
    }


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
