"""What a model's head reads of the encoder's output: proven by running it, not known by its class."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ... import models
from .aside import trying
from .snapshot import Snapshot, any_global_hook, is_hooked
from .stand_in import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHAPES = ((2, 3), (1, 2, 3))  # of ids: [B, S], or [B, choices, S]

_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")

_found: WeakKeyDictionary[nn.Module, tuple[Snapshot, bool]] = WeakKeyDictionary()


def reads_first_token_only(model: PreTrainedModel) -> bool:
    """Whether a model's head reads nothing but the first token's last hidden state, and nobody else the others'.

    The head is given states that are NaN at all other places: what it reads of them, its outputs show. That is tried
    of heads made of modules of transformers, torch and lowbit only, which do the same in every call, and tried anew
    after modules were replaced or settings changed. A hook on what comes after the encoder sees all tokens.

    Args:
        model: of an architecture that `lowbit.models` describes. One on the meta device, which cannot run, is judged by
            its class.
    """
    if model.base_model is model or torch.compiler.is_compiling():  # Dynamo cannot trace how it is found out
        return False
    if getattr(model, "_is_replica", False):  # of torch.nn.DataParallel, which runs by its modules
        return False
    after = list(_after_encoder(model))
    # Hooks before the base model, and those of the whole model, do not see what the encoder returns.
    watched = [module for module in after if module is not model and module is not model.base_model]
    encoder = models.runner(model)
    seen = model.base_model._forward_hooks or is_hooked(encoder) or "forward" in encoder.__dict__
    if any_global_hook() or seen or any(map(is_hooked, watched)):
        return False
    snapshot, reads = _found.get(model, (Snapshot(), False))
    if snapshot.compare() == "changed":
        if model.device.type == "meta":
            return type(model).__name__.endswith(_FIRST_TOKEN_HEADS)
        snapshot = Snapshot(after)
        reads = all(_is_library(module) for module in after) and Context().run(_ignores_others, model)
        _found[model] = snapshot, reads
    return reads


def _after_encoder(model: PreTrainedModel) -> Iterator[nn.Module]:
    """All modules but those in the encoder and the embeddings, with what holds these, and those that it calls."""
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if not isinstance(module, StandIn) and not getattr(type(module), "inside_encoder", False):
            yield module
            waiting.extend(module.children())


def _is_library(module: nn.Module) -> bool:
    own_forward = "forward" in module.__dict__
    return type(module).__module__.startswith(("transformers.", "torch.nn.", "lowbit.")) and not own_forward


def _ignores_others(model: PreTrainedModel) -> bool:
    """Whether outputs stay the same to the last bit when the states of all tokens but the first become NaN."""
    try:
        with trying(model) as tried:
            encoder = models.runner(tried)
            for shape in _SHAPES:
                ids = torch.zeros(shape, dtype=torch.long, device=model.device)
                try:
                    seen, unseen = (_outputs(tried, encoder, ids, value) for value in (1.0, float("nan")))
                except Exception:  # takes another shape of ids, or more than ids
                    continue
                return len(seen) > 0 and all(torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))
    except Exception:  # something in it cannot be copied
        return False
    return False


def _outputs(model: PreTrainedModel, encoder: nn.Module, ids: torch.Tensor, value: float) -> list[torch.Tensor]:
    """A copy's outputs where layers do nothing, and `value` replaces all states but those of first tokens."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        states = hidden_states.clone()
        states[:, 1:] = value
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)

    encoder.__dict__["forward"] = forward
    outputs: Any = model.forward(ids, return_dict=True, output_hidden_states=False, output_attentions=False)
    return [tensor for tensor in outputs.values() if torch.is_tensor(tensor)]
