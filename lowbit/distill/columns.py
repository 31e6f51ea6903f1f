"""What a model's forward takes of a batch, by name: student and teacher share a batch, not every column of it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


# What objectives need -> options of transformers' forward.
OPTIONS = {
    "hidden_states": ("output_hidden_states",),
    "scores": ("output_attentions", "output_scores"),
    "qkv": (),
}


def options(needs: Collection[str]) -> dict[str, bool]:
    """Options of forward for what objectives need."""
    return {option: True for need in OPTIONS if need in needs for option in OPTIONS[need]}


def arguments(
    model: nn.Module,
    batch: Mapping[str, Any],
    options: Mapping[str, Any] = MappingProxyType({}),
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Keywords to call a model with: the columns that its forward names, and the options that it takes.

    **kwargs alone are no invitation to a column: they are options that are passed on, where a column ends in an error
    or is lost. Only a forward that names nothing gets all.

    Args:
        model: may be wrapped.
        batch: columns by name.
        options: of transformers' forward (`return_dict`, ...), which **kwargs do take.
        without: columns to leave out.
    """
    names, takes_any = parameters(model)
    columns = {name: value for name, value in batch.items() if (name in names or not names) and name not in without}
    return {**columns, **{name: value for name, value in options.items() if takes_any or name in names}}


def parameters(model: nn.Module) -> tuple[list[str], bool]:
    """Names of what a model's forward takes, and whether it takes other keywords (**kwargs), too.

    A forward with **kwargs hands them on to the one that it overrides, whose names then count as well. What wraps a
    model (DistributedDataParallel, DataParallel, torch.compile, PEFT) takes what the model takes.
    """
    names: dict[str, None] = {}
    takes_any: list[bool] = []
    for forward in _forwards(_unwrapped(model)):
        names |= {each.name: None for each in forward if each.kind not in _VARIADIC}
        takes_any.append(any(each.kind is inspect.Parameter.VAR_KEYWORD for each in forward))
        if not takes_any[-1]:
            break
    return [*names], takes_any[0]


def _forwards(model: Any) -> Iterator[list[inspect.Parameter]]:
    """Parameters of the forward that is called, then of each that it overrides, or wraps as PEFT does."""
    yield [*inspect.signature(model.forward).parameters.values()]
    if hasattr(model, "get_base_model"):
        yield from _forwards(model.get_base_model())
        return
    for kind in type(model).__mro__:
        forward = vars(kind).get("forward")
        if forward is not None and forward is not getattr(model.forward, "__func__", None):
            yield [*inspect.signature(forward).parameters.values()][1:]  # but for self


def _unwrapped(model: Any) -> Any:
    if isinstance(model, PreTrainedModel):
        return model
    from accelerate.utils import extract_model_from_parallel  # no trainer is without it, but `import lowbit` may be

    return extract_model_from_parallel(model, keep_torch_compile=False)
