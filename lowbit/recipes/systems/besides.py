"""What a recipe has besides its student and its objectives: augmentation, a masked language model, a search, exits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import exits
from ...distill import augment as methods
from ...distill.map_search import Evolution
from .. import RecipeError
from . import fields as of_fields
from .parts import check_fields, criterion, make, named

METHODS: dict[str, Any] = {
    "substitution": methods.Substitution,
    "rules": methods.Rules,
    "neighbours": methods.add_neighbours,
}
OF_NEIGHBOURS = ("count", "max_angle", "max_length")


def check(augment: Any, masked_lm: Any, search: Any, given_exits: Any) -> None:
    """RecipeError for fields and values that are known to be wrong without a model."""
    if augment is not None:
        _check_augment(*named("augment", augment, METHODS))
    if isinstance(masked_lm, Mapping):
        make("masked_lm", "of the teacher", MaskedLMFields, masked_lm)
    if search is not None:
        split_search(search)
    if given_exits is not None:
        fields = {key: value for key, value in given_exits.items() if key != "criterion"}
        check_fields("exits", "of the recipe", exits.add_exits, fields, 1)
        criterion(given_exits.get("criterion"))


def _check_augment(name: str, fields: dict[str, Any]) -> None:
    if name == "neighbours":
        if unknown := fields.keys() - set(OF_NEIGHBOURS):
            raise RecipeError(f"augment {name} has no {', '.join(sorted(unknown))}; it has {', '.join(OF_NEIGHBOURS)}")
        of_fields.check(f"augment {name}", methods.add_neighbours, fields)
        if fields.get("count", 1) < 1 or not 0 < fields.get("max_angle", 1) <= 1:
            raise RecipeError(f"augment {name}: {fields}; accepted: a count from 1, an angle above 0 up to 1")
        return
    vectors = fields.pop("vectors", None) if name == "substitution" else None
    if vectors is not None and not (isinstance(vectors, str) and Path(vectors).is_file()):
        raise RecipeError(f"augment {name}: vectors={vectors!r} is no file of word vectors")
    check_fields("augment", name, METHODS[name], fields)
    source: dict[str, Any] = {"vectors": object()} if name == "substitution" else {}  # it wants one, and asks later
    try:
        METHODS[name](**source, **fields)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"augment {name}: {error}") from error


class MaskedLMFields:
    """Of a masked language model that is trained: the first `layers` of the teacher's, for a `share` of the steps."""

    def __init__(self, layers: int | None = None, share: float = 0.5) -> None:
        if share <= 0 or (layers is not None and layers < 1):
            raise ValueError(f"layers={layers}, share={share}; accepted: layers from 1, a share above 0")
        self.layers, self.share = layers, share


class SearchFields:
    """Of a search, that are not `Evolution`'s."""

    def __init__(self, share: float = 0.1, examples: int = 1000) -> None:
        if share <= 0 or examples < 1:
            raise ValueError(f"share={share}, examples={examples}; accepted: a share above 0, examples from 1")
        self.share, self.examples = share, examples


def split_search(given: Mapping[str, Any]) -> tuple[SearchFields, Evolution]:
    """What a recipe says of its search."""
    own = {key: given[key] for key in ("share", "examples") if key in given}
    how = {key: value for key, value in given.items() if key not in own}
    return make("search", "of layer maps", SearchFields, own), make("search", "of layer maps", Evolution, how)
