"""Imports only point down: lowbit_kernels knows torch and triton, models know transformers, and so on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# module -> lowbit modules it may import (docs/architecture.md)
BELOW = {
    "errors": set(),
    "_files": set(),
    "_columns": set(),
    "_fields": set(),
    "config": {"length"},  # `LengthConfig.for_budget`, when it is called
    "models": {"config", "errors"},
    "sentiment": set(),
    "info": set(),
    "counting": {"nn"},
    "tasks": set(),
    "squad": {"tasks"},
    "quantizers": set(),
    "nn": {"config", "models", "quantizers", "nn"},
    "checkpoints": {"_fields", "config", "errors"},
    "loading": {"checkpoints", "errors"},
    "card": {"config", "errors", "models", "nn"},
    "publishing": {"card"},
    "hf": {
        "_files",
        "card",
        "checkpoints",
        "config",
        "counting",
        "errors",
        "models",
        "conversion",
        "dequantizing",
        "nn",
        "publishing",
        "unpadding",
    },
    "dequantizing": {"config", "models", "nn", "quantizers", "hf", "conversion", "unpadding"},
    "conversion": {"config", "errors", "models", "nn", "quantizers", "hf", "slimming", "unpadding"},
    "heads": {"models", "nn"},
    "unpadding": {"config", "errors", "heads", "models", "nn", "hf"},
    "slimming": {"config", "models", "hf"},
    "compiling": {"models", "nn"},
    "exporting": {"compiling", "hf", "models", "nn"},
    "graphs": {"heads", "models", "nn"},
    "length": {"_columns", "_files", "config", "distill", "heads", "models", "nn", "unpadding"},
    "distill": {"_columns", "nn", "checkpoints", "config", "models"},
    "adapters": {"nn", "quantizers"},
    "_plugin": {"adapters", "hf", "nn"},
    "recipes": {"_files", "length", "models", "tasks"},
    "cli": {
        "__init__",
        "card",
        "checkpoints",
        "config",
        "conversion",
        "errors",
        "info",
        "length",
        "loading",
        "models",
        "nn",
        "quantizers",
        "recipes",
        "tasks",
    },
    "__main__": {"cli"},
    "__init__": None,  # names everything
}


def imports(path: Path) -> set[str]:
    """Absolute names of the modules a file imports, relative ones resolved."""
    package = list(path.relative_to(ROOT / "kernels" if "kernels" in path.parts else ROOT).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from . import hf` names submodules, `from .hf import attach` names a module's content
            found |= {f"{module}.{alias.name}" for alias in node.names} if node.module is None else {module}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "kernels/lowbit_kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_only_torch_triton_and_the_standard_library(path: Path) -> None:
    allowed = {"torch", "triton", "lowbit_kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "lowbit").rglob("*.py")), ids=lambda p: p.stem)
def test_lowbit_imports_only_what_is_below(path: Path) -> None:
    parts = path.relative_to(ROOT / "lowbit").with_suffix("").parts
    module = parts[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("lowbit.")}
    used = {name if name in BELOW else "__init__" for name in used}  # `from .. import __version__`
    if BELOW[module] is not None:
        assert used - {module} <= BELOW[module]


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
