"""A system of the literature as a short YAML file: a student, and stages of objectives. Reading and checking one.

    about: one line
    source: paper, arXiv id, equations
    bits: [float, ternary, binary]      # students for which it has a meaning
    student: {layers: {layers: 3}}      # a builder and its fields (`parts.STUDENTS`)
    stages:
      - {name: layers, share: 0.8, objectives: [{hidden: {map: uniform}}, scores]}
      - {name: logits, share: 0.2, objectives: [{logits: {temperature: 2}}]}

Every stage is a training of its own, with a fresh optimizer, and a folder of the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import RecipeError
from . import besides, parts, yaml_file
from . import fields as of_fields

CATALOGUE = Path(__file__).parent / "catalogue"
BITS = ("float", "ternary", "binary")
# Of a stage: it is the end of a folder's name, beside which there are others.
NAME = re.compile(r"(?!(.*-)?(packed|checkpoints)$)[A-Za-z0-9_-]+")
DATA = ("train", "augmented", "text", "neighbours")


@dataclass(frozen=True)
class Stage:
    """One training of a student.

    Attributes:
        name: of its folder.
        objectives: as in the file.
        share: of the run's steps.
        rate: factor of the run's learning rate.
        schedule: of the learning rate: "linear" (10 % warm-up, then down to 0) or "constant".
        dropout, teacher_dropout: whether they drop out.
        data: "train"; "augmented" (by the recipe's `augment`); "text": the task's texts without labels, in chunks; or
            "neighbours": with candidates for the view `hardest_neighbour`.
        head: "task", or "masked_lm": student and teacher predict masked words of the task's texts (general
            distillation), the teacher being the recipe's `masked_lm`. Of the student the encoder is kept.
        train: "all"; "joint": with ramps (the recipe's `exits`); or "exits": ramps only, the rest as it is.
    """

    name: str
    objectives: tuple[Any, ...]
    share: float = 1.0
    rate: float = 1.0
    schedule: str = "linear"
    dropout: bool = False
    teacher_dropout: bool = False
    data: str = "train"
    head: str = "task"
    train: str = "all"


@dataclass(frozen=True)
class Recipe:
    """What a file says.

    Attributes:
        name: of the file, without its suffix.
        about, source: one line each.
        student: a builder with its fields.
        stages: in their order.
        bits: students that it may train, the default first.
        quantize: "before" the stages, so that they train the low-bit student; or "after" them: they make a float
            student, that a last stage distils into a low-bit one as TernaryBERT does.
        chain: builders of assistants, trained one after the other by the same stages, each the next one's teacher.
        augment: a method of `lowbit.distill.augment` with its fields, for stages with `data: augmented`; or
            `{neighbours: fields}` of `add_neighbours`.
        masked_lm: of augmentation and generators: the path of a checkpoint, or `layers` of the teacher's that are
            trained on the task's texts for a `share` of the steps.
        search: `share` of the steps that a candidate of the search for a layer map is trained, `examples` that it is
            scored on, and fields of `lowbit.distill.map_search.Evolution`; objectives name it `map: searched`.
        exits: fields of `lowbit.add_exits`, and a `criterion`: `{entropy: {threshold: 0.3}}`.
    """

    name: str
    about: str
    source: str
    student: Any
    stages: tuple[Stage, ...]
    bits: tuple[str, ...] = ("float",)
    quantize: str = "before"
    chain: tuple[Any, ...] = ()
    augment: Any = None
    masked_lm: str | Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    exits: Mapping[str, Any] | None = None


def names() -> list[str]:
    """Recipes that come with lowbit."""
    return sorted(path.stem for path in CATALOGUE.glob("*.yaml"))


def load(name: str | Path) -> Recipe:
    """A recipe of the catalogue, or of a YAML file of the user's.

    Raises:
        RecipeError: no such recipe, a file that is none, or parts and fields that there are not.
    """
    path = path_of(name)
    try:
        return parse(path.stem, yaml_file.read(path))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def path_of(name: str | Path) -> Path:
    """The file of a recipe of the catalogue, or of the user's; RecipeError where there is none."""
    path = CATALOGUE / f"{name}.yaml" if str(name) in names() else Path(name)
    if not path.is_file():
        raise RecipeError(f"recipe {name}: accepted are {', '.join(names())}, or the path of a YAML file")
    return path


def parse(name: str, given: Any) -> Recipe:
    """A recipe from the table that its file holds.

    Raises:
        RecipeError: as `load`.
    """
    table = _table(Recipe, given, "a recipe", {"name": name})
    if not table["stages"]:
        raise RecipeError("stages: a list of at least one")
    table["stages"] = tuple(_stage(number, each) for number, each in enumerate(table["stages"], 1))
    for key in ("bits", "chain"):
        if key in table:
            table[key] = tuple(table[key])
    recipe = Recipe(**table)
    if not recipe.bits or (unknown := [each for each in recipe.bits if each not in BITS]):
        raise RecipeError(f"bits {', '.join(unknown if recipe.bits else ['none'])}; accepted: {', '.join(BITS)}")
    _one_of("quantize", recipe.quantize, ("before", "after"))
    stages = [stage.name for stage in recipe.stages]
    if len(set(stages)) < len(stages):
        raise RecipeError(f"stages {', '.join(stages)}: each needs a name of its own")
    for builder in (recipe.student, *recipe.chain):
        parts.check_student(builder)
    _check_together(recipe)
    return recipe


def _check_together(recipe: Recipe) -> None:
    """RecipeError for parts that need others which are not there, or that nothing uses."""
    own = parts.reads_own_tokens(recipe.student)
    if any(map(parts.reads_own_tokens, recipe.chain)):
        raise RecipeError("chain: an assistant has to read its student's tokens, which bilstm, cnn, subwords do not")
    for stage in recipe.stages:
        if own and (stage.data in ("text", "neighbours") or stage.head != "task" or stage.train != "all"):
            raise RecipeError(
                f"stage {stage.name}: a student that reads other tokens than its teacher learns from data: train or "
                "data: augmented, by head: task and train: all"
            )
        for each in stage.objectives:
            name, fields = parts.named("objective", each, parts.OBJECTIVES)
            if stage.data == "text" and stage.head == "task" and name in parts.OF_LABELS:
                raise RecipeError(f"stage {stage.name}: {name} needs labels, and data: text has none")
            hardest = parts.view_of(fields) == "hardest_neighbour"
            if hardest and stage.data != "neighbours":
                raise RecipeError(f"stage {stage.name}: the view hardest_neighbour needs data: neighbours")
        if stage.data == "augmented" and not (recipe.augment and "neighbours" not in recipe.augment):
            raise RecipeError(
                f"stage {stage.name}: data: augmented, and the recipe has no augment: {{substitution: {{}}}}"
            )
    searched = any(parts.is_searched(each) for stage in recipe.stages for each in stage.objectives)
    if searched != (recipe.search is not None):
        raise RecipeError("search and map: searched go together: the search finds the map that objectives name")
    if own and recipe.search is not None:
        raise RecipeError("search: a student that reads other tokens than its teacher is not taught layer by layer")
    besides.check(recipe.augment, recipe.masked_lm, recipe.search, recipe.exits)
    if any(stage.head == "masked_lm" for stage in recipe.stages):
        if recipe.masked_lm is None:
            raise RecipeError(
                "a stage predicts masked words, and the recipe has no masked_lm: a checkpoint, or {share: 0.5}"
            )
        if recipe.quantize == "before" and recipe.bits != ("float",):
            raise RecipeError("a stage predicts masked words, which float students do: give quantize: after")
    if recipe.exits is None and any(stage.train != "all" for stage in recipe.stages):
        raise RecipeError("a stage trains ramps, and the recipe has no exits: give exits: {kind: pooler}")


def _stage(number: int, given: Any) -> Stage:
    table = _table(Stage, given, f"stage {number}")
    if not table["objectives"]:
        raise RecipeError(f"stage {number}: objectives: a list of at least one")
    stage = Stage(**{**table, "objectives": tuple(table["objectives"])})
    if not NAME.fullmatch(stage.name):
        raise RecipeError(
            f"stage {number}: name={stage.name!r} is the end of its folder's name; accepted: letters, digits, _ and -, "
            "and neither packed nor checkpoints, which other folders end in"
        )
    if not 0 < stage.share <= 1 or stage.rate <= 0:
        raise RecipeError(
            f"stage {stage.name}: share={stage.share}, rate={stage.rate}; accepted: share up to 1, above 0"
        )
    _one_of(f"stage {stage.name}: schedule", stage.schedule, ("linear", "constant"))
    _one_of(f"stage {stage.name}: data", stage.data, DATA)
    _one_of(f"stage {stage.name}: head", stage.head, ("task", "masked_lm"))
    _one_of(f"stage {stage.name}: train", stage.train, ("all", "joint", "exits"))
    for each in stage.objectives:
        parts.objective(each)
    return stage


def _table(kind: Any, given: Any, what: str, besides: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The fields of a dataclass from a table of a file; it has no `besides`."""
    if not isinstance(given, Mapping):
        raise RecipeError(f"{what} is a table, got {given!r}")
    known = {each.name: each for each in fields(kind) if each.name not in besides}
    needed = {name for name, each in known.items() if each.default is MISSING}
    if unknown := given.keys() - known.keys():
        raise RecipeError(f"{what} has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(known)}")
    if missing := needed - given.keys():
        raise RecipeError(f"{what} lacks {', '.join(sorted(missing))}")
    of_fields.check(what, kind, given)
    return {**besides, **given}


def _one_of(what: str, value: Any, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise RecipeError(f"{what} {value!r}; accepted: {', '.join(accepted)}")
