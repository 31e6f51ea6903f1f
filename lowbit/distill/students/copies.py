"""Students that are ordinary models of the teacher's kind: some of its layers, or other sizes with random weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ... import models
from ...files.stage import current_config
from . import Built

WHICH = ("uniform", "first", "last", "alternate")


def layers(teacher: PreTrainedModel, layers: int = 3, which: str | Sequence[int] = "uniform") -> Built:
    """A copy of the teacher with some of its layers; embeddings, pooler and head are the teacher's too.

    Args:
        teacher: float, of an architecture that `lowbit.models` describes.
        layers: how many to keep; a list in `which` says so itself.
        which: "uniform" (the last of each of `layers` equal groups: TinyBERT's map), "first" (BERT-PKD), "last",
            "alternate" (evenly spaced with the first and the last: DistilBERT's 1, 3, 5, 8, 10, 12 of 12), or the
            indices of the teacher's layers, from 0.

    Raises:
        TypeError, ValueError: another model, more layers than there are, an unknown choice, an index that is no layer.
    """
    count = len(layers_of(teacher))
    chosen = choose(count, layers, which)
    config = config_of(teacher)
    config.num_hidden_layers = len(chosen)
    student = type(teacher)(config)
    prefix = f"{models.base_name(teacher)}{models.describe(teacher).layers}."
    state = {name: tensor for name, tensor in teacher.state_dict().items() if not name.startswith(prefix)}
    for new, layer in enumerate(layers_of(teacher)[index] for index in chosen):
        state |= {f"{prefix}{new}.{name}": tensor for name, tensor in layer.state_dict().items()}
    student.load_state_dict(state)
    return Built(student.to(device=teacher.device, dtype=teacher.dtype).eval())


def random(
    teacher: PreTrainedModel,
    layers: int = 4,
    hidden: int = 312,
    heads: int = 12,
    intermediate: int = 1200,
    seed: int = 0,
    **changes: Any,
) -> Built:
    """A model of the teacher's class, vocabulary and task, of other sizes, with random weights.

    The defaults are TinyBERT-4's; TinyBERT-6 is (6, 768, 12, 3072).

    Args:
        teacher: of an architecture that `lowbit.models` describes.
        layers, hidden, heads, intermediate: sizes; heads have to divide hidden.
        seed: of the weights; torch's own random numbers go on as if nothing had been drawn.
        **changes: further fields of the configuration (vocab_size, hidden_dropout_prob, ...).

    Raises:
        TypeError, ValueError: another model, a size below 1, heads that do not divide hidden, a field that is none.
    """
    config = config_of(teacher)
    check_sizes(layers=layers, hidden=hidden, heads=heads, intermediate=intermediate)
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = layers, hidden, heads
    setattr(config, models.describe(teacher).intermediate_size, intermediate)
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(f"{name}={value!r}: {type(config).__name__} has no such field")
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = type(teacher)(config)
    return Built(student.to(device=teacher.device, dtype=teacher.dtype).eval())


def choose(count: int, layers: int, which: str | Sequence[int]) -> list[int]:
    """Indices of the teacher's layers, from 0, for each layer of the student.

    Raises:
        ValueError: as `layers`.
    """
    if not isinstance(which, str):
        chosen = [*which]
        wrong = [index for index in chosen if not (isinstance(index, int) and 0 <= index < count)]
        if not chosen or wrong:
            raise ValueError(f"which={chosen}; accepted: a list of layers, of a teacher of {count} 0 to {count - 1}")
        return chosen
    if which not in WHICH:
        raise ValueError(f"which={which!r}; accepted: {', '.join(WHICH)}, or a list of layers from 0")
    check_sizes(layers=layers)
    if layers > count:
        raise ValueError(f"layers={layers} of a teacher of {count}; accepted: 1 to {count}")
    if which == "uniform":
        return [(index + 1) * count // layers - 1 for index in range(layers)]
    if which == "alternate":
        gaps = max(layers - 1, 1)
        return [(2 * index * (count - 1) + gaps) // (2 * gaps) for index in range(layers)]  # rounded half up
    start = 0 if which == "first" else count - layers
    return [*range(start, start + layers)]


def layers_of(model: PreTrainedModel) -> list[Any]:
    """The encoder's layers."""
    return [layer for _, layer in models.layers(model)]


def config_of(teacher: PreTrainedModel) -> Any:
    """A copy of a float teacher's configuration, for a student of other sizes.

    Raises:
        TypeError, ValueError: a model that `lowbit.models` does not describe, prepared, packed or slimmed.
    """
    models.describe(teacher)
    current = current_config(teacher)
    if current.stage != "float" or current.num_attention_heads is not None:
        state = "slimmed" if current.stage == "float" else current.stage
        raise ValueError(
            f"the teacher is {state}; students are built of float models of full width. Build the student first, then "
            "prepare or slim it"
        )
    config = copy.deepcopy(teacher.config)
    for name in ("quantization_config", "length_config"):  # of a model that the teacher was made from
        config.__dict__.pop(name, None)
    return config


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size that is no whole number above 0, or heads that do not divide hidden."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r}; accepted: a whole number of at least 1")
    if sizes.get("hidden", 0) % sizes.get("heads", 1):
        raise ValueError(
            f"hidden={sizes['hidden']} is no multiple of heads={sizes['heads']}; each head reads an equal share"
        )
