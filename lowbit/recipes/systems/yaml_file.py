"""Reads YAML as people write it: 5e-7 is a number, and a key that stands twice in a table is a mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .. import RecipeError


class _Loader(yaml.SafeLoader):
    """PyYAML's, which follows YAML 1.1: there 5e-7 is text, for want of a point."""


def _table(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice in a table", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _table)


def read(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        RecipeError: no text, or no YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError, ValueError) as error:
        raise RecipeError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
