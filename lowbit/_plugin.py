"""Register with transformers without importing it: at once where it is loaded, else right after it loads.

`import lowbit` must stay cheap, yet a later `AutoModel.from_pretrained` has to know our checkpoints.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRIGGER = "transformers.modeling_utils"  # imported by every model class, after the quantizer registry


def install() -> None:
    """Register now if transformers' models can be loaded already, else when they first are.

    Called again (importlib.reload, an import after sys.modules was emptied), it takes the place of the call before.
    """
    for finder in [*sys.meta_path]:
        kind = type(finder)  # that of an earlier import is another class
        if (kind.__module__, kind.__qualname__) == (__name__, _AfterImport.__qualname__):
            _remove(finder)
    if _TRIGGER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from . import hf  # noqa: F401 (importing registers)
    from .nn import attention  # noqa: F401


def _remove(finder: object) -> None:
    sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds `_TRIGGER` like everyone else, but calls `_register` once it has been executed."""

    def __init__(self) -> None:
        self.package = sys.modules[__package__]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        _remove(self)  # or it would find itself
        spec = importlib.util.find_spec(fullname)
        sys.meta_path.insert(0, self)  # who asks for a spec need not load it
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _remove(self)
                if sys.modules.get(__package__) is self.package:  # else dropped: it would be imported again, unasked
                    _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
