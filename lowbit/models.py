"""What a BERT is: where its linears, attention, norms and embeddings are. Architectures are data, not code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Module paths of one architecture: relative to the base model, or to one layer where said."""

    layers: str
    attention: str  # in a layer; the module that calls the attention interface and knows its head count
    projections: tuple[str, str, str]  # query, key, value; in a layer
    attention_output: str  # in a layer
    attention_dropout: str  # of the output; in a layer
    attention_norm: str  # in a layer
    ffn_input: str  # in a layer
    ffn_activation: str  # in a layer
    ffn_output: str  # in a layer
    ffn_dropout: str  # in a layer
    ffn_norm: str  # in a layer
    pooler: str
    embeddings: str
    word_embeddings: str
    position_embeddings: str

    def layer_linears(self) -> dict[str, str]:
        """Path in a layer -> activation site of its input (see `LowbitConfig.asymmetric`)."""
        sites = dict.fromkeys((*self.projections, self.attention_output, self.ffn_input), "linear")
        return {**sites, self.ffn_output: "ffn_output"}


ARCHITECTURES = {
    "bert": Architecture(
        layers="encoder.layer",
        attention="attention.self",
        projections=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_output="attention.output.dense",
        attention_dropout="attention.output.dropout",
        attention_norm="attention.output.LayerNorm",
        ffn_input="intermediate.dense",
        ffn_activation="intermediate.intermediate_act_fn",
        ffn_output="output.dense",
        ffn_dropout="output.dropout",
        ffn_norm="output.LayerNorm",
        pooler="pooler.dense",
        embeddings="embeddings",
        word_embeddings="embeddings.word_embeddings",
        position_embeddings="embeddings.position_embeddings",
    ),
}


def describe(model: PreTrainedModel) -> Architecture:
    """The architecture of a Hugging Face model.

    Raises:
        TypeError: not a transformers model.
        ValueError: a model type not in `ARCHITECTURES`, or a BERT with cross-attention.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__} has model_type {config.model_type!r}; "
            f"supported: {', '.join(ARCHITECTURES)}. Swap single layers with lowbit.nn.PackedLinear.from_float"
        )
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"{type(model).__name__} has cross-attention; supported: encoders without it")
    return ARCHITECTURES[config.model_type]


def base_name(model: PreTrainedModel) -> str:
    """Prefix of the base model's module names: "bert." under a head, "" for the bare model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(full module name, layer) of every encoder layer."""
    path = describe(model).layers
    for index, layer in enumerate(model.base_model.get_submodule(path)):
        yield f"{base_name(model)}{path}.{index}", layer


def linears(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """(full module name, activation site) of every linear of the encoder, then the pooler's where there is one."""
    architecture = describe(model)
    for layer_name, _ in layers(model):
        for path, site in architecture.layer_linears().items():
            yield f"{layer_name}.{path}", site
    if _has(model.base_model, architecture.pooler):
        yield f"{base_name(model)}{architecture.pooler}", "linear"


def _has(module: nn.Module, path: str) -> bool:
    """Whether `path` names a submodule; a head without pooler holds None there."""
    for part in path.split("."):
        child = getattr(module, part, None)
        if child is None:
            return False
        module = child
    return True
