"""What a model's head reads of the encoder's output: proven by running it, not known by its class."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .nn.encoder import GIVEN_STATES, UnpaddedEncoder
from .nn.proof import trying
from .nn.snapshot import Snapshot, any_global_hook, is_hooked
from .nn.stand_in import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHAPES = ((2, 3), (1, 2, 3))  # of ids: [B, S], or [B, choices, S]

_found: WeakKeyDictionary[nn.Module, tuple[Snapshot, bool]] = WeakKeyDictionary()


def reads_first_token_only(model: PreTrainedModel) -> bool:
    """Whether a model's head reads nothing but the first token's last hidden state, and nobody else the others'.

    The head is given states that are NaN at all other places: what it reads of them, its outputs show. That is tried
    of heads made of modules of transformers, torch and lowbit only, which do the same in every call, and tried anew
    after modules were replaced or settings changed. A hook on what comes after the encoder sees all tokens.

    Args:
        model: whose encoder is an `UnpaddedEncoder`.
    """
    if model.base_model is model or torch.compiler.is_compiling():  # Dynamo cannot trace how it is found out
        return False
    after = list(_after_encoder(model))
    # Of a hook before the base model and the whole model, which is ours, neither reads the encoder's output.
    watched = (
        module for module in after if is_hooked(module) and module is not model and module is not model.base_model
    )
    encoder = next(module for module in model.base_model.modules() if isinstance(module, UnpaddedEncoder))
    seen = model.base_model._forward_hooks or is_hooked(encoder) or "forward" in encoder.__dict__
    if any_global_hook() or next(watched, None) is not None or seen:
        return False
    snapshot, reads = _found.get(model, (Snapshot(), False))
    if snapshot.compare() == "changed":
        snapshot = Snapshot(after)
        reads = all(_is_library(module) for module in after) and Context().run(_ignores_others, model)
        _found[model] = snapshot, reads
    return reads


def _after_encoder(model: PreTrainedModel) -> Iterator[nn.Module]:
    """All modules but those in the encoder and the embeddings, with what holds these."""
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if not isinstance(module, StandIn):
            yield module
            waiting.extend(module.children())


def _is_library(module: nn.Module) -> bool:
    own_forward = "forward" in module.__dict__
    return type(module).__module__.startswith(("transformers.", "torch.nn.", "lowbit.")) and not own_forward


def _ignores_others(model: PreTrainedModel) -> bool:
    """Whether outputs stay the same to the last bit when the states of all tokens but the first become NaN."""
    device, dtype = model.device, model.dtype
    with trying(model):  # hooks of the embeddings would see ids that nobody gave
        for shape in _SHAPES:
            ids = torch.zeros(shape, dtype=torch.long, device=device)
            states = torch.linspace(-1, 1, 6 * model.config.hidden_size, device=device, dtype=dtype).view(2, 3, -1)
            hidden = states.clone()
            hidden[:, 1:] = float("nan")
            try:
                seen, unseen = (_outputs(model, ids, given) for given in (states, hidden))
            except Exception:  # takes another shape of ids, or more than ids
                continue
            return len(seen) > 0 and all(torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))
        return False


def _outputs(model: PreTrainedModel, ids: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
    GIVEN_STATES.set(states)
    outputs: Any = model.forward(ids, return_dict=True, output_hidden_states=False, output_attentions=False)
    return [value for value in outputs.values() if torch.is_tensor(value)]
