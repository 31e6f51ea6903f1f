"""How much the loss depends on each attention head and FFN neuron, to first order; by a definition that has a name.

A gate of ones multiplies a head's context (the input of the attention's output linear). The gradient of the loss L for
the gate of one token is c = sum_i ctx_i dL/dctx_i, and importance is a sum of these contributions c[b, s]:

    per_token      sum over rows b and tokens s of |c[b, s]|     (code of Michel et al. 2019)
    per_example    sum over b of |sum_s c[b, s]|                 (Michel et al. 2019, eq. 2)
    per_batch      sum over batches of |sum_b,s c[b, s]|         (|dL/d(mask)|: transformers' run_bertology)
    cumulative     sum over batches of |sum of c so far|         (released DynaBERT: gradients are never cleared)

A neuron has two such gates, before its activation function and behind it, whose importances are added. By `per_batch`
they are DynaBERT's |sum_k w_jk dL/dw_jk + b_j dL/db_j| of the weights into it, and |sum_k w_kj dL/dw_kj| of those out
of it (Hou et al. 2020, section 2.1).

`per_token` and `per_example` are divided by the number of tokens and of rows. The loss is taken for a mean over rows,
and multiplied by their number, so that examples count alike in batches of any size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .. import models
from . import layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFINITIONS = ("per_token", "per_example", "per_batch", "cumulative")


@dataclass(frozen=True)
class Importance:
    """Of the heads and neurons of a model, from 0; only the order within a layer and the definition say something.

    Attributes:
        heads: for each layer float [heads].
        neurons: for each layer float [neurons].
    """

    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]

    def normalized(self) -> Importance:
        """Each layer's divided by their L2 norm, as Michel et al. 2019 compare heads of different layers."""
        return Importance(*([x / x.norm().clamp(min=1e-20) for x in each] for each in (self.heads, self.neurons)))


def importance(
    model: PreTrainedModel, data: Iterable[Mapping[str, Any]], definition: str = "per_example"
) -> Importance:
    """Importance of every head and neuron for the model's own loss on a few batches.

    Take training data: what is pruned by examples is fitted to them. The model runs in eval mode; its mode and
    gradients are left as they were.

    Args:
        model: float, with a head that computes a loss, of an architecture that `lowbit.models` describes, with
            attention by transformers' interface.
        data: batches with labels.
        definition: "per_token", "per_example", "per_batch", or "cumulative" (released DynaBERT), see the top of this
            file. They rank differently.

    Raises:
        TypeError, ValueError: not a supported float model, or one with a linear in several places; another definition,
            no batch, or one without labels.
    """
    layout.describe(model, "importance")
    layout.check_parted(model, "importance")
    if definition not in DEFINITIONS:
        raise ValueError(f"definition={definition!r}; accepted: {', '.join(map(repr, DEFINITIONS))}")
    device = next(model.parameters()).device
    totals: list[torch.Tensor] = []
    running: list[torch.Tensor] = []
    rows = tokens = 0
    was_training = model.training
    try:
        model.eval()
        for batch in tqdm(data, desc="head and neuron importance"):
            if not isinstance(batch, Mapping):
                raise TypeError(f"the data give {type(batch).__name__}, expected batches that are mappings")
            inputs = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}
            with torch.enable_grad(), _gated(model, definition) as gates:
                loss = getattr(model(**inputs), "loss", None)
                if loss is None:
                    raise ValueError(f"the batch {sorted(batch)} gives no loss: it needs labels, the model a head")
                contributions = [c.detach() for c in torch.autograd.grad(loss, gates)]
            count = len(contributions[0])  # rows, or 1 where they are summed
            rows, tokens = rows + count, tokens + _tokens(inputs, gates)
            if definition == "cumulative":
                running = [a + c for a, c in zip(running, contributions, strict=True)] if running else contributions
                contributions = running
            found = [(full(c) * count).abs().sum((0, 1)) for c in contributions]
            totals = [a + c for a, c in zip(totals, found, strict=True)] if totals else found
    finally:
        model.train(was_training)
    if not totals:
        raise ValueError("the data are empty: importance needs at least one batch")
    number = {"per_token": tokens, "per_example": rows}.get(definition, 1)
    totals = [total / number for total in totals]
    return Importance(totals[::3], [a + b for a, b in zip(totals[1::3], totals[2::3], strict=True)])


def magnitude(model: PreTrainedModel) -> Importance:
    """Without data: the squared L2 norm of the weights into each head (query, key, value) and neuron."""
    architecture = layout.describe(model, "magnitude")
    heads, neurons = [], []
    for _, layer in models.layers(model):
        paths = [*architecture.projections, architecture.ffn_input]
        *weights, ffn = (layer.get_submodule(path).get_parameter("weight").detach() for path in paths)
        norms = [w.view(architecture.heads(layer), -1).square().sum(1) for w in weights]
        heads.append(torch.stack(norms).sum(0))
        neurons.append(ffn.square().sum(1))
    return Importance(heads, neurons)


@contextlib.contextmanager
def _gated(model: PreTrainedModel, definition: str) -> Iterator[list[torch.Tensor]]:
    """While open, a forward pass fills the list with gates: for each layer of heads, of neurons before and behind.

    A gate is [rows, tokens, units] for "per_token", [rows, 1, units] for "per_example", else [1, 1, units].
    """
    gates: list[Any] = []

    def gate(x: torch.Tensor, place: int, units: int) -> torch.Tensor:
        if x.dim() != 3:
            raise ValueError(
                "importance needs rows of tokens, and this model runs without padding; call "
                "lowbit.set_length(model, None) first"
            )
        if gates[place] is not None:
            raise ValueError("importance needs each layer to run once a batch (chunk_size_feed_forward=0)")
        seen = {"per_token": x.shape[:2], "per_example": (len(x), 1)}.get(definition, (1, 1))
        gates[place] = torch.ones(*seen, units, device=x.device, dtype=x.dtype, requires_grad=True)
        return (x.unflatten(-1, (units, -1)) * gates[place].unsqueeze(-1)).flatten(-2)

    def on_input(place: int, units: int) -> Any:
        return lambda module, args: (gate(args[0], place, units),)

    def on_output(place: int, units: int) -> Any:
        return lambda module, args, output: gate(output, place, units)

    architecture, number = models.describe(model), 0
    with contextlib.ExitStack() as stack:
        for (_, layer), (heads, neurons) in zip(models.layers(model), layout.sizes(model), strict=True):
            find = layer.get_submodule
            for hook in (
                find(architecture.attention_output).register_forward_pre_hook(on_input(number, heads)),
                find(architecture.ffn_input).register_forward_hook(on_output(number + 1, neurons)),
                find(architecture.ffn_output).register_forward_pre_hook(on_input(number + 2, neurons)),
            ):
                stack.callback(hook.remove)
            gates += [None] * 3
            number += 3
        yield gates


def _tokens(inputs: Mapping[str, torch.Tensor], gates: list[torch.Tensor]) -> int:
    """Real tokens of a batch."""
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else gates[0].shape[0] * gates[0].shape[1]


def full(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32: sums of many small numbers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def top(values: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of the `count` largest, ascending."""
    return values.topk(count).indices.sort().values


def ranked(values: torch.Tensor) -> torch.Tensor:
    """Numbers from the most to the least important; the earlier of equals first."""
    return values.argsort(descending=True, stable=True)
