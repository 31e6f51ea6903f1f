"""Half width: keep the most important attention heads and FFN neurons (DynaBERT, Hou et al. 2020, one-shot core).

    importance of head h     |dL/d(mask_h)|, mask_h multiplying the head's output
    importance of neuron j   |dL/d(mask_j)|, mask_j multiplying the neuron's activation

summed in absolute value over batches; equal to DynaBERT's first-order |sum_i dL/dw_i w_i| over the weights behind the
mask. The kept ones stay in their order. The hidden size does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import models
from ..files import saving
from ..files.stage import current_config, own_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Importance = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: heads [H], neurons [F]


def slim(
    model: PreTrainedModel, width: float = 0.5, dataloader: Iterable[Mapping[str, Any]] | None = None
) -> PreTrainedModel:
    """Keep `width` of the heads and FFN neurons of every layer, the most important ones, in place.

    Args:
        model: float, of an architecture that `lowbit.models` describes, with attention by transformers' interface.
        width: fraction kept, in (0, 1]; counts are rounded half to even, at least 1.
        dataloader: a few batches with labels for the first-order importance; None ranks by the L2 norm of the weights.

    Returns:
        The same model, smaller; it runs, saves and loads like any other.

    Raises:
        TypeError, ValueError: not a supported float model, already slimmed, a width outside (0, 1], batches without
            labels or that are no mappings, or an empty dataloader.
    """
    models.describe_attention(model, "slim")
    models.check_single(model)
    # Of a head on a body that another model shares, the body says what it is.
    config = current_config(model.base_model)
    if config.stage != "float" or config.num_attention_heads is not None:
        state = "slimmed" if config.stage == "float" else config.stage
        raise ValueError(f"slim takes a float model of full width, this one is already {state}")
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1:
        raise ValueError(f"width={width!r}; accepted: a number greater than 0, at most 1")
    importance = _magnitude(model) if dataloader is None else _first_order(model, dataloader)
    heads = max(1, round(width * model.config.num_attention_heads))
    neurons = max(1, round(width * models.intermediate_size(model)))
    kept = [(_top(head, heads), _top(neuron, neurons)) for head, neuron in importance]
    old = [_linears(model, layer) for _, layer in models.layers(model)]
    own_config(model)
    resize(model, heads, neurons)
    for before, (_, layer), (head, neuron) in zip(old, models.layers(model), kept, strict=True):
        head_size = before["projections"][0].out_features // model.config.num_attention_heads
        columns = (head[:, None] * head_size + torch.arange(head_size, device=head.device)).flatten()
        after = _linears(model, layer)
        for source, target in zip(before["projections"], after["projections"], strict=True):
            _copy(source, target, rows=columns)
        _copy(before["attention_output"][0], after["attention_output"][0], columns=columns)
        _copy(before["ffn_input"][0], after["ffn_input"][0], rows=neuron)
        _copy(before["ffn_output"][0], after["ffn_output"][0], columns=neuron)
    kept_heads = [head.tolist() for head, _ in kept]
    return saving.attach(model, config.replace(num_attention_heads=heads, kept_heads=kept_heads))


def resize(model: PreTrainedModel, num_attention_heads: int, intermediate_size: int) -> None:
    """Replace the linears by uninitialised ones for so many heads and neurons; works on the meta device.

    `config.num_attention_heads` keeps the full count: transformers derives the head size from it, and a config cannot
    say "6 heads of 64 at hidden size 768". The kept count is in `config.quantization_config`.
    """
    architecture = models.describe(model)
    for _, layer in models.layers(model):
        attention, heads = layer.get_submodule(architecture.attention), num_attention_heads
        inner = heads * architecture.head_dim(layer)
        for name, value in {"num_attention_heads": heads, "n_heads": heads, "all_head_size": inner}.items():
            if hasattr(attention, name):
                setattr(attention, name, value)
        for path in architecture.projections:
            _replace(layer, path, out_features=inner)
        _replace(layer, architecture.attention_output, in_features=inner)
        _replace(layer, architecture.ffn_input, out_features=intermediate_size)
        _replace(layer, architecture.ffn_output, in_features=intermediate_size)
    setattr(model.config, architecture.intermediate_size, intermediate_size)


def _replace(layer: nn.Module, path: str, **sizes: int) -> None:
    old: Any = layer.get_submodule(path)
    features = {"in_features": old.in_features, "out_features": old.out_features, **sizes}
    new = nn.Linear(**features, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    layer.set_submodule(path, new.train(old.training))


def _linears(model: PreTrainedModel, layer: nn.Module) -> dict[str, list[Any]]:
    architecture = models.describe(model)
    return {
        "projections": [layer.get_submodule(path) for path in architecture.projections],
        "attention_output": [layer.get_submodule(architecture.attention_output)],
        "ffn_input": [layer.get_submodule(architecture.ffn_input)],
        "ffn_output": [layer.get_submodule(architecture.ffn_output)],
    }


@torch.no_grad()
def _copy(
    source: nn.Linear, target: nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> None:
    weight = source.weight if rows is None else source.weight[rows]
    target.weight.copy_(weight if columns is None else weight[:, columns])
    if source.bias is not None:
        target.bias.copy_(source.bias if rows is None else source.bias[rows])


def _top(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest, ascending."""
    return importance.topk(count).indices.sort().values


def _magnitude(model: PreTrainedModel) -> Importance:
    heads = model.config.num_attention_heads
    result = []
    for _, layer in models.layers(model):
        linears = _linears(model, layer)
        by_head = torch.stack([p.weight.detach().view(heads, -1).square().sum(1) for p in linears["projections"]]).sum(
            0
        )
        result.append((by_head, linears["ffn_input"][0].weight.detach().square().sum(1)))
    return result


def _first_order(model: PreTrainedModel, dataloader: Iterable[Mapping[str, Any]]) -> Importance:
    """|dL/dmask| of heads and neurons, summed over batches; the model's gradients and mode are left as they were."""
    architecture, heads = models.describe(model), model.config.num_attention_heads
    layers = [layer for _, layer in models.layers(model)]
    device = next(model.parameters()).device
    masks: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = []
    for layer in layers:
        linears = _linears(model, layer)
        head_mask = torch.ones(heads, device=device, requires_grad=True)
        neuron_mask = torch.ones(linears["ffn_output"][0].in_features, device=device, requires_grad=True)
        masks.append((head_mask, neuron_mask))
        # Both masks multiply the input of the linear that reads the heads, or the neurons.
        hooks.append(layer.get_submodule(architecture.attention_output).register_forward_pre_hook(_masking(head_mask)))
        hooks.append(layer.get_submodule(architecture.ffn_output).register_forward_pre_hook(_masking(neuron_mask)))
    was_training, flat = model.training, [mask for pair in masks for mask in pair]
    totals = [torch.zeros_like(mask) for mask in flat]
    batches = 0
    try:
        model.eval()
        for batch in tqdm(dataloader, desc="head and neuron importance"):
            if not isinstance(batch, Mapping):
                raise TypeError(f"the dataloader gives {type(batch).__name__}, expected batches that are mappings")
            inputs = {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}
            loss = getattr(model(**inputs), "loss", None)
            if loss is None:
                raise ValueError(f"the batch {sorted(batch)} gives no loss: slim needs labels and a model with a head")
            for total, gradient in zip(totals, torch.autograd.grad(loss, flat), strict=True):
                total += gradient.abs()
            batches += 1
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    if not batches:
        raise ValueError("the dataloader is empty: slim needs at least one batch, or dataloader=None")
    return list(zip(totals[::2], totals[1::2], strict=True))


def _masking(mask: torch.Tensor) -> Any:
    def multiply(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (x,) = args
        return ((x.unflatten(-1, (mask.numel(), -1)) * mask.unsqueeze(-1).to(x.dtype)).flatten(-2),)

    return multiply
