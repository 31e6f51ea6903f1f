"""What an encoder is: where its linears, attention, norms and embeddings are. Architectures are data, not code.

`ARCHITECTURES` describes the types of `model.config.model_type` that lowbit knows in full. Of any other transformers
model `prepare` swaps every linear and the word embedding of the base model (`every_linear`, `every_embedding`); its
attention stays as it is, and `slim`, `fuse`, `set_length` and `compile`, which need to know the layers, refuse it.

Left in float by default, as the TernaryBERT releases do: everything outside of the base model (task heads, with all of
their linears: `classifier.dense`, `pre_classifier`, `lm_head`, ...), LayerNorm, biases, and the tables of positions and
token types (`LowbitConfig.position_embedding_bits` quantizes those of positions, `output_embedding_bits` the decoder of
a head that scores words). `lowbit.left_in_float` lists what is.

A further architecture is one entry, made before `prepare` and before `from_pretrained`:

    from lowbit.models import ARCHITECTURES, Architecture

    ARCHITECTURES["my_type"] = Architecture(          # paths in the base model
        layers="encoder.layer",
        word_embeddings="embeddings.word_embeddings",
        attention="attention.self",                   # from here on: paths in a layer
        projections=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_output="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        ffn_input="intermediate.dense",
        ffn_activation="intermediate.intermediate_act_fn",
        ffn_output="output.dense",
        ffn_norm="output.LayerNorm",
    )
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Module paths of one architecture.

    Its layers are BERT's, whatever their parts are called: attention, its output linear, residual, LayerNorm; two
    linears with an activation between them, residual, LayerNorm. (For others there is the fallback, see above.)

    Attributes:
        layers: list of the layers, in the base model; its parent runs them and calls the list `layer`.
        word_embeddings: in the base model.
        attention: in a layer; the module that calls transformers' attention interface, as all of transformers does,
            through `ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)`. It has
            `attention_head_size` and a `torch.nn.Dropout` called `dropout`; its `scaling`, if it has one, multiplies
            the scores.
        projections: query, key and value, in a layer, in the order in which they are called.
        attention_output, attention_norm: in a layer.
        ffn_input, ffn_activation, ffn_output, ffn_norm: in a layer; the activation is a module too.
        attention_dropout, ffn_dropout: in a layer, of the output of attention and FFN; None where there is none.
        embeddings: in the base model, the module that adds `word_embeddings`, `position_embeddings` and, if there are
            any, `token_type_embeddings`, and ends with `LayerNorm` and dropout. None: not fused by `lowbit.fuse`.
        position_embeddings: in the base model; None where there is no such table.
        pooler: in the base model, the pooler's linear; None where no head has one.
        others: further linears of the base model; a model need not have them.
        own_attention: the attention does not go through transformers' interface, or not of all tokens of a batch at
            once. It stays float, and `slim`, `set_length` and, without `position_bias`, `fuse` refuse the model.
        position_bias: method of the module that runs the layers, where attention adds the same bias by position in all
            of them: states [B, S, H] -> [B, heads, S, S].
        hidden_act, intermediate_size: what the configuration calls these.
    """

    layers: str
    word_embeddings: str
    attention: str
    projections: tuple[str, str, str]
    attention_output: str
    attention_norm: str
    ffn_input: str
    ffn_activation: str
    ffn_output: str
    ffn_norm: str
    attention_dropout: str | None = None
    ffn_dropout: str | None = None
    embeddings: str | None = None
    position_embeddings: str | None = None
    pooler: str | None = None
    others: tuple[str, ...] = ()
    own_attention: bool = False
    position_bias: str | None = None
    hidden_act: str = "hidden_act"
    intermediate_size: str = "intermediate_size"

    def layer_linears(self) -> dict[str, str]:
        """Path in a layer -> activation site of its input (see `LowbitConfig.asymmetric`)."""
        sites = dict.fromkeys((*self.projections, self.attention_output, self.ffn_input), "linear")
        return {**sites, self.ffn_output: "ffn_output"}

    def called(self) -> tuple[str, ...]:
        """Paths in a layer of what is called where layers run without padding: not the modules around them."""
        paths = (
            *self.projections, self.attention_output, self.attention_dropout, self.attention_norm,
            self.ffn_input, self.ffn_activation, self.ffn_output, self.ffn_dropout, self.ffn_norm,
        )  # fmt: skip
        return tuple(path for path in paths if path is not None)

    def heads(self, layer: nn.Module) -> int:
        """Attention heads of a layer, slimmed ones too."""
        query: Any = layer.get_submodule(self.projections[0])
        return query.out_features // self.head_dim(layer)

    def head_dim(self, layer: nn.Module) -> int:
        """Width of a head."""
        return layer.get_submodule(self.attention).attention_head_size  # type: ignore[return-value]


_BERT = Architecture(
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
)

ARCHITECTURES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "deformer": dataclasses.replace(_BERT, own_attention=True),  # lowbit.modeling.deformer
    "electra": dataclasses.replace(_BERT, pooler=None, others=("embeddings_project",)),
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_output="attention.out_lin",
        attention_norm="sa_layer_norm",
        ffn_input="ffn.lin1",
        ffn_activation="ffn.activation",
        ffn_output="ffn.lin2",
        ffn_dropout="ffn.dropout",
        ffn_norm="output_layer_norm",
        embeddings="embeddings",
        word_embeddings="embeddings.word_embeddings",
        position_embeddings="embeddings.position_embeddings",
        hidden_act="activation",
        intermediate_size="hidden_dim",
    ),
    "mpnet": dataclasses.replace(
        _BERT,
        attention="attention.attn",
        projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_output="attention.attn.o",
        attention_dropout="attention.dropout",
        attention_norm="attention.LayerNorm",
        own_attention=True,
        position_bias="compute_position_bias",
    ),
}
