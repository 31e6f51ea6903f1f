"""What a model remembers of its stage: the `LowbitConfig` that it is saved with, and where transformers keeps it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer

from ..config import LowbitConfig
from ..models import check, is_known, layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def current_config(model: PreTrainedModel) -> LowbitConfig:
    """The model's `LowbitConfig`; a fresh one with stage "float" where it has none.

    A model built from the configuration of another one is float, whatever became of the other. A head on a body is at
    the stage of its body, which may have come there by a verb for the body alone, or for another head on it.

    Raises:
        TypeError, ValueError: not a supported model, or quantized by another method.
    """
    check(model)
    own, of_body = quantizers(model)
    if isinstance(own, HfQuantizer) and not is_lowbits(own):
        config = own.quantization_config
        raise ValueError(f"the model is already quantized by another method ({config}); load its float checkpoint")
    if not is_lowbits(of_body):
        return LowbitConfig(stage="float")
    # The decoder of another head is none of this one's.
    return (
        of_body.quantization_config
        if own is of_body
        else of_body.quantization_config.replace(output_embedding_bits=None)
    )


def quantizers(model: PreTrainedModel) -> tuple[Any, Any]:
    """What the model has as `hf_quantizer`, and what its body has: one object unless they went separate ways."""
    return getattr(model, "hf_quantizer", None), getattr(model.base_model, "hf_quantizer", None)


def is_lowbits(quantizer: Any) -> bool:
    """By its configuration: the class may be that of another import of this module."""
    return isinstance(getattr(quantizer, "quantization_config", None), LowbitConfig)


def own_config(model: PreTrainedModel) -> None:
    """Give the model a configuration of its own: a teacher built from the same object must not change with it.

    All layers get it: one that was copied (`copy.deepcopy`), or taken from another model, has brought its own along,
    which no change of the model's attention would reach.
    """
    old, new = model.config, copy.deepcopy(model.config)
    owns_body = is_known(model) and model.base_model.config is old  # not one that another model shares with it
    inside = {part for _, layer in layers(model) for part in layer.modules()} if owns_body else set()
    for module in model.modules():
        for each in (module, *getattr(module, "_original", ())):  # what a `StandIn` stands in for
            own = each.__dict__.get("config")
            if own is old or (module in inside and type(own) is type(old)):
                each.config = new
