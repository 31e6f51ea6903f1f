"""Register with transformers and peft without importing them: at once where they are loaded, else right after.

`import lowbit` must stay cheap, yet a later `AutoModel.from_pretrained` has to know our checkpoints, and a later
`peft.get_peft_model` our linears.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def install() -> None:
    """Register now with what is loaded already, with the rest when it first is.

    Called again (importlib.reload, an import after sys.modules was emptied), it takes the place of the call before.
    """
    for finder in [*sys.meta_path]:
        kind = type(finder)  # that of an earlier import is another class
        if (kind.__module__, kind.__qualname__) == (__name__, _AfterImport.__qualname__):
            _remove(finder)
    for trigger, register in _REGISTER.items():
        if trigger in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _AfterImport(trigger, register))


def _register_with_transformers() -> None:
    from . import plugin  # noqa: F401 (importing registers)
    from .nn import attention  # noqa: F401


def _register_configurations() -> None:
    from .modeling import configurations

    configurations.register()


def _register_with_peft() -> None:
    try:
        from . import adapters  # noqa: F401 (importing registers)
    except (ImportError, AttributeError) as error:  # of a peft that has other private functions; it works without us
        logging.getLogger("lowbit").warning("peft works, but not on prepared and packed models: %r", error)


_REGISTER = {
    "transformers.modeling_utils": _register_with_transformers,  # of every model class, after the quantizer registry
    "transformers.models.auto.configuration_auto": _register_configurations,
    "peft": _register_with_peft,
}


def _remove(finder: object) -> None:
    sys.meta_path[:] = [other for other in sys.meta_path if other is not finder]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds a module like everyone else, but calls `register` once it has been executed."""

    def __init__(self, trigger: str, register: Callable[[], None]) -> None:
        self.trigger, self.register = trigger, register
        self.package = sys.modules[__package__]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.trigger:
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
                    self.register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
