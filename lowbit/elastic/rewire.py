"""Sort heads and neurons by importance: the same function, and its first ones are the ones to keep (DynaBERT, 2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..files.stage import current_config
from . import layout
from .importance import Importance, ranked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rewire(model: PreTrainedModel, importance: Importance) -> PreTrainedModel:
    """Order the heads and FFN neurons of every layer from the most to the least important, in place.

    Rows of query, key and value and columns of the attention's output linear go along with their head, rows of the
    first and columns of the second FFN linear with their neuron. Outputs stay, but for the order of float sums.

    Args:
        model: float, of full width, of an architecture that `lowbit.models` describes, with attention by
            transformers' interface.
        importance: of this model (`lowbit.importance`).

    Returns:
        The same model. `lowbit.extract` takes its sub-networks.

    Raises:
        TypeError, ValueError: not a supported float model, slimmed, or the importance of another one.
    """
    layout.describe(model, "rewire")
    if current_config(model.base_model).kept_heads is not None:
        raise ValueError("rewire takes a model of full width, and would mix up which heads this one kept; extract it "
                         "after rewiring")  # fmt: skip
    ranks = [ranked(each) for each in importance.heads], [ranked(each) for each in importance.neurons]
    if layout.sizes(model) != [(len(heads), len(neurons)) for heads, neurons in zip(*ranks, strict=True)]:
        raise ValueError("the importance is of a model of other sizes; take lowbit.importance of this one")
    layout.select(model, *ranks)
    return model
