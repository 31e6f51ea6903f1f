"""What objectives need that transformers' forward does not return: queries, keys and values of each layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import models
from .checks import slimmed


@contextlib.contextmanager
def captured(model: PreTrainedModel, wanted: bool) -> Iterator[list[tuple[Any, Any, Any]]]:
    """While open, a forward pass fills the list: (query, key, value) of each layer, [B, S, width], heads side by side.

    They are what the projections return, so that of quantized ones they carry gradients to the latent weights.
    """
    found: list[Any] = []
    with contextlib.ExitStack() as stack:
        if wanted:
            architecture = models.describe(model)
            for index, (_, layer) in enumerate(models.layers(model)):
                found.append([None, None, None])
                for which, path in enumerate(architecture.projections):
                    stack.callback(layer.get_submodule(path).register_forward_hook(_note(found, index, which)).remove)
        yield found


def _note(found: list[Any], index: int, which: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        found[index][which] = output

    return hook


def of_kept_heads(
    model: PreTrainedModel, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """The teacher's scores [B, H, S, S] of each layer, only of the heads that a slimmed or pruned student kept."""
    config = slimmed(model)
    if config is None or config.kept_heads is None or len(teacher) % len(config.kept_heads):
        return teacher
    kept = config.kept_heads
    full = model.config.num_attention_heads
    if [s.shape[1] for s in student] != [*map(len, kept)] or any(t.shape[1] != full for t in teacher):
        return teacher
    step = len(teacher) // len(kept)  # as uniform maps pair them: a layer learns from the last of `step`
    # Stacked views: an index would be copied to the GPU in every layer, and each copy waits for it.
    return tuple(torch.stack([t[:, head] for head in kept[i // step]], 1) for i, t in enumerate(teacher))
