"""What a forward pass of a model calls, found out by running it on a few tokens."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING

import torch

from .. import models
from ..config import LowbitConfig, names
from .swap import left_as_it_was

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("lowbit")


_LENGTHS = (64, 128, 512, 1024)  # of the sequences on which an unknown model is tried, after its own dummy inputs


def not_called(model: PreTrainedModel) -> list[str]:
    """Linears and embeddings, by their names in the base model, that a forward pass of it does not call.

    Their weights are read in another way (DeBERTa's table of relative positions), which codes would not survive.
    """
    base = model.base_model
    prefix, words = models.base_name(model), models.embeddings(model)
    linears = dict(models.linears(model))
    if not linears:
        raise ValueError(f"{type(model).__name__} (model_type {model.config.model_type!r}) has no torch.nn.Linear")
    names = [name.removeprefix(prefix) for name in (*linears, *words[0], *words[1])]
    hint = f"describe it in lowbit.models.ARCHITECTURES[{model.config.model_type!r}]"
    called = calls(base, names, hint)
    return [name for name in names if name not in called]


def calls(model: PreTrainedModel, names: list[str], hint: str) -> set[str]:
    """Which of these modules a forward pass on token ids calls; ValueError, with a hint, where there can be none."""
    called: set[str] = set()
    hooks = [model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names]
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    lengths, problem = {model.dummy_inputs["input_ids"].shape[-1]: None, **dict.fromkeys(_LENGTHS)}, None
    try:
        for length in lengths:  # some take only multiples of a block, or no short ones
            ids = model.dummy_inputs["input_ids"][:, :1].expand(-1, length).to(model.device)
            try:
                with left_as_it_was(model), torch.no_grad():
                    model.eval()
                    model(ids, **({"attention_mask": torch.ones_like(ids)} if takes_mask else {}))
                return called
            except Exception as error:
                problem = problem or error
    finally:
        for hook in hooks:
            hook.remove()
    raise ValueError(
        f"{type(model).__name__} cannot be run on token ids, to see which linears it calls ({problem!r}); {hint}"
    ) from problem


def with_decoder_as_it_is(model: PreTrainedModel, config: LowbitConfig) -> LowbitConfig:
    """The configuration without bits of a decoder that the model does not have, or reads rather than calls."""
    found = models.decoder(model)
    if config.output_embedding_bits is None or found is None:
        return config.replace(output_embedding_bits=None)
    name = found[0]
    if config.skips(name) or calls(model, [name], f"modules_to_not_convert=[{name!r}] leaves its decoder in float"):
        return config
    logger.warning(
        "%s reads the weight of its decoder %s instead of calling it, which codes would not survive: it stays float",
        type(model).__name__,
        name,
    )
    return config.replace(modules_to_not_convert=[*config.modules_to_not_convert, name])


def kept_in_float32(model: PreTrainedModel) -> list[str]:
    """Linears that transformers itself keeps in float32, such as "wo" of T5, which reads the dtype of their weights."""
    entries = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    linears = [name for name, _ in models.linears(model)]
    return sorted(entry for entry in entries if any(names(entry, name) for name in linears))
