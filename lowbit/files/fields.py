"""Fields of config.json that the weights were saved without: which of them change nothing of the model.

transformers makes an attribute of every field that it does not know. Such an attribute changes nothing where no code
that reads configurations of this model mentions its name: not transformers' code for the model, nor what all models
share, nor lowbit's. The names are taken from the compiled code, so they are those of the versions that are installed.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

_SHARED = ("*.py", "distributed/*.py", "integrations/**/*.py", "loss/*.py", "models/auto/*.py", "quantizers/*.py",
           "utils/*.py")  # fmt: skip
_OWN = ("*.py", "deploy/*.py", "distill/**/*.py", "elastic/*.py", "exits/*.py", "files/*.py", "length/*.py",
        "modeling/*.py", "nn/**/*.py", "stages/*.py")  # fmt: skip
# They read no configuration of a model, or nothing of it that a loaded model computes with.
_OTHERS = re.compile(
    r"audio|auto_docstring|convert|dummy|feature_extraction|hf_argparser|image|modelcard|notebook|processing|"
    r"sentencepiece|testing|tokeniz|trainer|training|tiktoken|video"
)
_OWN_OTHERS = ("files/card.py", "files/fields.py", "files/publishing.py", "files/records.py", "length/training.py")


def first_that_matters(config_class: Any, values: dict[str, Any], added: Iterable[str]) -> str | None:
    """The first of the fields `added` that may change the model; None where none does.

    Args:
        config_class: of transformers, builds the configuration.
        values: all fields, those added among them.

    Raises:
        Exception: `config_class` refuses values; of any type.
    """
    added = sorted(added)
    if not added:
        return None
    without = {name: value for name, value in values.items() if name not in added}
    before = _attributes(config_class, without)
    for name in added:
        after = _attributes(config_class, {**without, name: values[name]})
        if _others(after, [name]) != _others(before, [name]):
            return name
        if name in before:  # a field that is newer than the checkpoint
            if after.get(name) != before[name]:
                return name
        elif name in after and (hasattr(config_class, name) or name in _names_in_code(config_class)):
            return name
    together = _attributes(config_class, values)
    return added[0] if _others(together, added) != _others(before, added) else None


def _attributes(config_class: Any, values: dict[str, Any]) -> dict[str, Any]:
    return vars(config_class.from_dict(copy.deepcopy(values)))


def _others(attributes: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name not in names}


class _Everything(frozenset[str]):
    """Of code that nobody can read: any name may be in it."""

    def __contains__(self, name: object) -> bool:
        return True


@functools.cache
def _names_in_code(config_class: Any) -> frozenset[str]:
    """Attributes, strings and parameters of all code that may read a configuration of this class."""
    import transformers

    root = Path(transformers.__file__).parent
    own = Path(getattr(sys.modules[config_class.__module__], "__file__", None) or "").parent
    if root not in own.parents or not (root / "modeling_utils.py").is_file() or not any(own.glob("modeling_*.py")):
        return _Everything()
    package = Path(__file__).parents[1]
    files = [file for pattern in _SHARED for file in root.glob(pattern) if not _OTHERS.search(file.name)]
    files += {file for pattern in _OWN for file in package.glob(pattern)} - {package / name for name in _OWN_OTHERS}
    found = {name for file in files for name in _names(file)}
    folders, seen = [own], set()
    while folders:  # some architectures are made of the classes of others
        folder = folders.pop()
        if folder in seen:
            continue
        seen.add(folder)
        names = {name for file in folder.glob("*.py") if not _OTHERS.search(file.name) for name in _names(file)}
        parts = (re.match(r"(?:transformers\.models\.)?(\w+)\.modeling_", name) for name in names)
        folders += [root / "models" / part[1] for part in parts if part]
        found |= names
    return frozenset(found)


def _names(file: Path) -> set[str]:
    name = f"{file.parent.name}.{file.stem}"
    code = SourceFileLoader(name, str(file)).get_code(name)
    return _names_of(code) if code is not None else set()


def _names_of(code: CodeType) -> set[str]:
    found = {*code.co_names, *code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    constants = list(code.co_consts)
    while constants:
        constant = constants.pop()
        if isinstance(constant, str):
            found.add(constant)
        elif isinstance(constant, tuple | frozenset):
            constants += constant
        elif isinstance(constant, CodeType):
            found |= _names_of(constant)
    return found
