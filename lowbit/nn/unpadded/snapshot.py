"""Whether modules are still those that were looked at: children, settings, methods. Cheap enough for every call."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module


class Snapshot:
    """Modules as they are now: their children, their attributes, the `forward` of their classes.

    Parameters and buffers do not count: who relies on a snapshot reads these anew. Nor do hooks, see `hooked`.

    Args:
        modules: each by itself; children count by identity only. Hooks of the first one are not looked at: it is what
            the others are in, and its hooks run whatever is done for the others.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.modules = list(modules)
        self._own = [module.__dict__ for module in self.modules]
        self._own += [
            module._modules for module in self.modules if module._modules
        ]  # no leaf grows a child that it calls
        self._were = [{**own, "training": False} if "training" in own else dict(own) for own in self._own]
        self._forward = [(kind, kind.forward) for kind in {type(module) for module in self.modules}]
        self._hooks = [hooks for module in self.modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def __reduce__(self) -> Any:
        """A copy would hold on to the modules that were copied: it holds of nothing."""
        return Snapshot, ()

    def compare(self) -> str:
        """ "same": nothing has changed since; "mode": but that some modules are in train mode; "changed": more."""
        if not self.modules or any(kind.forward is not forward for kind, forward in self._forward):
            return "changed"
        try:
            if all(map(operator.eq, self._own, self._were)):
                return "same"
            pairs = zip(self._own, self._were, strict=True)
            mode_only = all({**own, "training": None} == {**was, "training": None} for own, was in pairs)
            return "mode" if mode_only else "changed"
        except Exception:  # attributes may be anything: == of tensors and arrays has no truth value
            return "changed"

    @property
    def hooked(self) -> bool:
        """Whether a forward hook would see or change an input or output of one of the modules."""
        return any(self._hooks) and any(map(is_hooked, self.modules[1:]))


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks, but for those that transformers leaves in its models to note hidden states.

    (These do something where such are asked for only.)
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in hooks)


def any_global_hook() -> bool:
    """Whether there are forward hooks of all modules (`torch.nn.modules.module.register_module_forward_hook`)."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
