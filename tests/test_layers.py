"""Imports only point down: lowbit_kernels knows torch and triton, models know transformers, and so on."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# room (a folder, or a file on top) -> rooms it may import (docs/architecture.md)
BELOW = {
    "errors": set(),
    "info": set(),
    "config": set(),
    "quantizers": set(),
    "architectures": set(),
    "modeling": set(),
    "models": {"architectures", "config", "errors"},
    "nn": {"config", "models", "quantizers"},
    "files": {"config", "errors", "modeling", "models", "nn"},
    "data": set(),
    "elastic": {"architectures", "files", "models", "nn"},
    "stages": {"config", "elastic", "errors", "files", "models", "nn", "quantizers"},
    "deploy": {"files", "models", "nn"},
    "distill": {"config", "data", "elastic", "files", "modeling", "models", "nn"},
    "length": {"config", "distill", "files", "models", "nn", "stages"},
    "exits": {"files", "models", "nn", "stages"},
    "adapters": {"nn", "quantizers"},
    "plugin": {"config", "errors", "exits", "files", "models", "nn", "stages"},
    "_register": {"adapters", "modeling", "nn", "plugin"},
    "recipes": {"data", "distill", "exits", "files", "length", "models"},
    "cli": {
        "__init__",
        "config",
        "data",
        "errors",
        "files",
        "info",
        "length",
        "models",
        "nn",
        "quantizers",
        "recipes",
        "stages",
    },
    "__main__": {"cli"},
    "__init__": None,  # names everything
}


def imports(path: Path, whole: bool = False) -> set[str]:
    """Absolute names of the modules a file imports, relative ones resolved; `whole`: with the names taken from them."""
    package = list(path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from . import saving` names submodules, `from .saving import attach` names a module's content
            inside = whole or node.module is None
            found |= {f"{module}.{alias.name}" for alias in node.names} if inside else {module}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "kernels/lowbit_kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_only_torch_triton_and_the_standard_library(path: Path) -> None:
    allowed = {"torch", "triton", "lowbit_kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "lowbit").rglob("*.py")), ids=lambda p: "/".join(p.parts[-2:]))
def test_lowbit_imports_only_what_is_below(path: Path) -> None:
    room = path.relative_to(ROOT / "lowbit").with_suffix("").parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("lowbit.")}
    used = {name if name in BELOW else "__init__" for name in used}  # `from .. import __version__`
    if BELOW[room] is not None:
        assert used - {room} <= BELOW[room]


def files() -> dict[str, Path]:
    """Module -> file, of both packages; a folder is its `__init__`."""
    found = {}
    for root, package in ((ROOT, "lowbit"), (ROOT / "kernels", "lowbit_kernels")):
        for path in (root / package).rglob("*.py"):
            found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def test_wheels_have_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, path in files().items() if path.stem == "__init__")


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Function-level imports too: what two files need of each other belongs into a third."""
    modules = files()
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        if module in ("lowbit", "lowbit_kernels"):  # they name everything
            graph[module] = set()
            continue
        # `lowbit.nn.PackedLinear`, imported from `lowbit.nn`, is what that folder names
        graph[module] = {name for name in names_of(path) if name in modules} - {module}
    assert not circle(graph), " -> ".join(circle(graph))


def names_of(path: Path) -> set[str]:
    """Modules that a file's imports run: those it names, and submodules taken `from` a folder."""
    modules, found = files(), set()
    for name in imports(path, whole=True):
        found.add(name if name in modules else name.rpartition(".")[0])
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way from a module back to it, or nothing."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if found := walk(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


@pytest.mark.parametrize("path", [*files().values()], ids=[*files()])
def test_what_is_imported_of_our_own_is_there(path: Path) -> None:
    """Imports inside of functions run late, and mypy passes over modules that it cannot find."""
    modules = files()
    for name in imports(path, whole=True):
        module, _, attribute = name.rpartition(".")
        if name.split(".")[0] in ("lowbit", "lowbit_kernels") and name not in modules and module != "lowbit":
            assert module in modules, name
            assert attribute in bound(modules[module]), name


def bound(path: Path) -> set[str]:
    """Names that a file binds at its top level, in `if` and `try` too."""
    found: set[str] = set()
    waiting: list[ast.AST] = [*ast.parse(path.read_text()).body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return found


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
