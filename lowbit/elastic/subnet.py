"""A sub-network is a share of the width and of the depth: which heads, neurons and layers it has, and taking it out."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import saving
from ..files.stage import current_config
from . import layout
from .depth import kept_layers, layer_similarity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEADS_OFF = 0.05  # 0.33 of 12 heads is four


class Shape(NamedTuple):
    """What a sub-network has of a model: the first `heads` and `neurons` of the layers of these numbers, from 0."""

    layers: tuple[int, ...]
    heads: int
    neurons: int


@dataclass(frozen=True)
class Subnet:
    """A share of a model's width and depth (DynaBERT's m_w and m_d).

    Attributes:
        width: share of the heads and FFN neurons of every layer, in (0, 1]: the first ones, so rewire the model before.
            It has to give whole heads.
        depth: share of the layers, in (0, 1].
        layers: which: a strategy of `lowbit.elastic.depth.kept_layers` that needs no data, or their numbers from 0, to
            which `depth` then says nothing.
    """

    width: float = 1.0
    depth: float = 1.0
    layers: str | tuple[int, ...] = "dynabert"

    def shape(self, model: PreTrainedModel) -> Shape:
        """Layers, heads and neurons in a model of full width.

        Raises:
            ValueError: a width or depth outside (0, 1], or that gives no head, a part of one, or no layer.
        """
        every, depth = layout.sizes(model), self.layers
        kept = kept_layers(depth, len(every), self.depth) if isinstance(depth, str) else _numbers(depth, len(every))
        (all_heads, all_neurons), width = every[0], self.width
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1:
            raise ValueError(f"width={width!r}; accepted: a number greater than 0, at most 1")
        if width == 1:
            return Shape(kept, all_heads, all_neurons)
        if len(set(every)) > 1:
            raise ValueError("the layers have different numbers of heads or neurons already; accepted: width=1")
        heads = round(all_heads * width)
        if heads < 1 or abs(all_heads * width - heads) > _HEADS_OFF:
            accepted = ", ".join(f"{count / all_heads:.4g}" for count in range(1, all_heads + 1))
            raise ValueError(f"width={width} of {all_heads} heads is {all_heads * width:g} heads; accepted: {accepted}")
        return Shape(kept, heads, max(1, round(all_neurons * heads / all_heads)))


def extract(
    model: PreTrainedModel,
    width: float = 1.0,
    depth: float = 1.0,
    layers: str | Sequence[int] = "dynabert",
    data: Iterable[Mapping[str, Any]] | None = None,
) -> PreTrainedModel:
    """A sub-network as a model of its own, which saves, loads, is quantized and trained like any other.

    A shallower one is an ordinary transformers model. A narrower one needs `import lowbit` to load.

    Args:
        model: float or prepared, of full width where `width` is below 1, of an architecture that `lowbit.models`
            describes, with attention by transformers' interface. It is left as it is. Its first heads and neurons
            are taken, so rewire it before (`lowbit.rewire`).
        width: share of the heads and FFN neurons of every layer, in (0, 1]; it has to give whole heads.
        depth: share of the layers, in (0, 1].
        layers: which layers: "dynabert", "top", "bottom", "alternate", "symmetric", "contribution", see
            `lowbit.elastic.depth`; or their numbers from 0, to which `depth` then says nothing.
        data: batches for "contribution".

    Returns:
        A new model with weights of its own, in eval mode.

    Raises:
        TypeError, ValueError: not a supported model; packed; slimmed, and a width below 1; one that drops tokens or has
            exits, with fewer layers; a width or depth that gives no head, a part of one, or no layer.
    """
    layout.describe(model, "extract", ("float", "prepared"))
    config = current_config(model.base_model)
    if isinstance(layers, str) and layers == "contribution":
        similar = None if data is None else layer_similarity(model, data)
        layers = kept_layers(layers, len(layout.sizes(model)), depth, similar)
    shape = Subnet(width, depth, layers if isinstance(layers, str) else tuple(layers)).shape(model)
    every = len(layout.sizes(model))
    if width != 1 and config.num_attention_heads is not None:
        raise ValueError("extract takes a model of full width where width is below 1, this one is already slimmed")
    if shape.layers != tuple(range(every)):
        check_depth(model)
    taken = copy.deepcopy(model).eval()
    if shape.layers != tuple(range(every)):
        layout.keep_layers(taken, shape.layers)
        config = _of_layers(config, shape.layers)
    if width != 1:
        layout.lead(taken, shape.heads, shape.neurons)
        config = config.replace(num_attention_heads=shape.heads, kept_heads=None)
    return taken if config.stage == "float" and config.num_attention_heads is None else saving.attach(taken, config)


def check_depth(model: PreTrainedModel) -> None:
    """Raise ValueError where fewer layers would leave settings of the others without a meaning."""
    for name, mend in (("length_config", "lowbit.set_length(model, None)"), ("exit_config", "a model without exits")):
        if getattr(model.config, name, None) is not None:
            raise ValueError(f"the model has a {name}, which names its layers; take {mend} before dropping any")
    numbered = [name for name in current_config(model).modules_to_not_convert if re.search(r"(^|\.)\d+(\.|$)", name)]
    if numbered:
        raise ValueError(f"modules_to_not_convert names layers by their numbers ({numbered[0]}), which would be others")


def _of_layers(config: Any, layers: Sequence[int]) -> Any:
    """The configuration with what it says of these layers."""
    lists = {name: value for name, value in config.widths().items() if isinstance(value, list)}
    return config.replace(**{name: [value[index] for index in layers] for name, value in lists.items()})


def _numbers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    wrong = [n for n in layers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < count]
    if not layers or wrong or [*layers] != sorted(set(layers)):
        raise ValueError(f"layers={[*layers]}; accepted: ascending numbers of the layers 0 to {count - 1}")
    return tuple(layers)
