"""lowbit recipes: the systems that `lowbit distill` trains."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from .arguments import Json
from .printing import show


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this recipe, to start one from.")] = None,
    as_json: Json = False,
) -> None:
    """List the systems that `lowbit distill --recipe NAME` trains: name, students, what it does, source.

    The first of the students is the one that is trained without --bits.
    """
    from ...recipes.systems import recipe

    if name:
        found = recipe.load(name)
        show(dataclasses.asdict(found), as_json, recipe.path_of(name).read_text(encoding="utf-8").rstrip())
        return
    found_all = [recipe.load(each) for each in recipe.names()]
    widest = max(len(each.name) for each in found_all)
    lines = [f"{each.name:<{widest}}  {' '.join(each.bits):<20}  {each.about}. {each.source}" for each in found_all]
    rows = [
        {"name": each.name, "bits": list(each.bits), "about": each.about, "source": each.source} for each in found_all
    ]
    show({"recipes": rows}, as_json, *lines)
