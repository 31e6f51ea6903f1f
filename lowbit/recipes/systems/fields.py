"""Values of a recipe's fields against the types that its parts name."""

from __future__ import annotations

import builtins
import dataclasses
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from .. import RecipeError


def check(what: str, part: Callable[..., Any], fields: Mapping[str, Any]) -> None:
    """RecipeError for a value of another type than that of the parameter, or attribute, of its name."""
    hints = types_of(part)
    for name, value in fields.items():
        if name in hints and not fits(value, hints[name]):
            raise RecipeError(f"{what}: {name}={value!r}; accepted: {described(hints[name])}")


def types_of(part: Callable[..., Any]) -> dict[str, Any]:
    """Types of a function's parameters, of a dataclass's fields, or of what another class is made of."""
    made_by = part.__init__ if isinstance(part, type) and not hasattr(part, "__dataclass_fields__") else part  # type: ignore[misc]
    return get_type_hints(made_by, localns=_Names(vars(sys.modules[part.__module__])))


class _Names(dict[str, Any]):
    """Of a module; what it imports for type checkers alone is anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file has a type; types that a file cannot say fit whatever is given."""
    kinds, inside = get_origin(hint) or hint, get_args(hint)
    if kinds in (Union, types.UnionType):
        return any(fits(value, each) for each in inside)
    if kinds in (None, types.NoneType):
        return value is None
    if kinds is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kinds is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kinds in (bool, str):
        return isinstance(value, kinds)
    if kinds in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if kinds is tuple and inside and inside[-1] is not Ellipsis:
            return len(value) == len(inside) and all(map(fits, value, inside))
        return not inside or all(fits(each, inside[0]) for each in value)
    if kinds in (dict, Mapping):
        return isinstance(value, Mapping)
    if dataclasses.is_dataclass(kinds):  # its own table, which is looked at later
        return isinstance(value, Mapping | kinds)
    return kinds is Any or not isinstance(kinds, type) or isinstance(value, kinds)


def described(hint: Any) -> str:
    """A type in words of a file."""
    kinds, inside = get_origin(hint) or hint, get_args(hint)
    if kinds in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(described, inside)))
    if kinds in (list, tuple, Sequence):
        of = ", ".join(described(each) for each in inside if each is not Ellipsis)
        return f"a list of {of}" if of else "a list"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", types.NoneType: "null",
             Mapping: "a table", dict: "a table"}  # fmt: skip
    return words.get(kinds, getattr(kinds, "__name__", str(kinds)))
