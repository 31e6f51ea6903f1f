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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .config import LowbitConfig
from .errors import check_import

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        own_attention: the attention does not go through transformers' interface. It stays float, and `slim`,
            `set_length` and, without `position_bias`, `fuse` refuse the model.
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


# What people put around a model -> what to give instead.
_WRAPPERS = {
    name: f"; give the model inside, {attribute}"
    for name, attribute in {
        "DataParallel": "model.module",
        "DistributedDataParallel": "model.module",
        "FullyShardedDataParallel": "model.module",
        "OptimizedModule": "model._orig_mod (torch.compile afterwards, or lowbit.compile)",
        "SentenceTransformer": "model[0].auto_model",
        "Pipeline": "pipe.model",
    }.items()
}


def _encoders(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """(name, model) of the transformers models that a model is made of: not of those inside of these."""
    from transformers import PreTrainedModel

    found: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other, _ in found)
        if name and isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return found


def check_single(model: PreTrainedModel, left: Callable[[str], bool] = lambda name: False) -> None:
    """Raise ValueError where a model has an encoder besides its base model, unless `left` says to leave it alone."""
    base = model.base_model
    if base is model:
        return
    for name, other in _encoders(model):
        if other is not base and not left(name):
            raise ValueError(
                f"{type(model).__name__} has a second encoder, {name} ({type(other).__name__}), besides "
                f"{model.base_model_prefix}; lowbit quantizes one encoder a model. To leave {name} as it is, pass "
                f"modules_to_not_convert=[{name!r}]"
            )


def check(model: PreTrainedModel) -> None:
    """Raise unless lowbit can do something with `model`.

    Raises:
        TypeError: not a transformers model.
        ValueError: an encoder-decoder, an encoder with cross-attention, or one that is not where its class says;
            quantized by an earlier import of lowbit.
    """
    from transformers.modeling_utils import PreTrainedModel  # Dynamo of torch 2.11 cannot trace transformers' lazy one

    if not isinstance(model, PreTrainedModel) or not hasattr(model.config, "model_type"):
        hint = _WRAPPERS.get(type(model).__name__, "")
        if type(model).__module__.startswith("peft."):
            hint = "; quantize the model before get_peft_model, or give model.merge_and_unload()"
        raise TypeError(f"expected a transformers model, got {type(model).__name__}{hint}")
    config: Any = model.config
    if is_known(model) and not _has(model.base_model, ARCHITECTURES[config.model_type].layers):
        path = ARCHITECTURES[config.model_type].layers
        found = next((name for name, each in _encoders(model) if _has(each, path)), None)
        hint = f"; it is at {found!r}: give the class base_model_prefix = {found!r}" if found else ""
        raise ValueError(
            f"{type(model).__name__} has no {path} at base_model_prefix {model.base_model_prefix!r}, where the encoder "
            f"of a model of type {config.model_type!r} is{hint}"
        )
    # The encoder of such a model alone may have the configuration of the whole (UMT5EncoderModel, BartEncoder).
    has_decoder = getattr(config, "is_encoder_decoder", False) and hasattr(model.base_model, "decoder")
    if getattr(config, "add_cross_attention", False) or has_decoder:
        raise ValueError(f"{type(model).__name__} has cross-attention; supported: encoders without it")
    if getattr(model, "hf_quantizer", None) is not None:  # else the configuration is that of another model
        check_import(getattr(config, "quantization_config", None), LowbitConfig, f"this {type(model).__name__}")


def is_known(model: PreTrainedModel) -> bool:
    """Whether `ARCHITECTURES` has an entry for the model."""
    return model.config.model_type in ARCHITECTURES


def describe(model: PreTrainedModel) -> Architecture:
    """The architecture of a Hugging Face model.

    Raises:
        TypeError, ValueError: as `check`; a model type not in `ARCHITECTURES`.
    """
    check(model)
    if not is_known(model):
        raise ValueError(
            f"{type(model).__name__} has model_type {model.config.model_type!r}, whose layers lowbit does not know; "
            f"known: {', '.join(ARCHITECTURES)}. Add lowbit.models.ARCHITECTURES[{model.config.model_type!r}]"
        )
    return ARCHITECTURES[model.config.model_type]


def describe_attention(model: PreTrainedModel, verb: str, bias: bool = False) -> Architecture:
    """The architecture of a model whose attention lowbit can run itself, as `verb` needs.

    Args:
        model: of transformers.
        verb: what the error says.
        bias: whether attention with a bias by position will do.

    Raises:
        TypeError, ValueError: as `check`; another model.
    """
    check(model)
    able = [name for name, each in ARCHITECTURES.items() if not each.own_attention or (bias and each.position_bias)]
    if model.config.model_type not in able:
        raise ValueError(
            f"{verb} supports models of type {', '.join(able)}, and what else lowbit.models.ARCHITECTURES has with "
            f"attention by transformers' interface; {type(model).__name__} has model_type {model.config.model_type!r}"
        )
    return describe(model)


def has_plain_attention(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be quantized, and asked for its scores: it calls transformers' interface."""
    return is_known(model) and not describe(model).own_attention


def intermediate_size(model: PreTrainedModel) -> int:
    """Neurons of a feed-forward network, as the configuration has it."""
    return getattr(model.config, describe(model).intermediate_size)


def longest(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that the position embeddings reach, None where nothing says so."""
    path = describe(model).position_embeddings if is_known(model) else None
    if path is None:
        return getattr(model.config, "max_position_embeddings", None)
    table: Any = model.base_model.get_submodule(path)
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)  # where RoBERTa begins


def base_name(model: PreTrainedModel) -> str:
    """Prefix of the base model's module names: "bert." under a head, "" for the bare model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(full module name, layer) of every encoder layer."""
    path = describe(model).layers
    for index, layer in enumerate(model.base_model.get_submodule(path)):
        yield f"{base_name(model)}{path}.{index}", layer


def layer_linears(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """(full module name, activation site) of every linear of the layers."""
    for layer_name, _ in layers(model):
        for path, site in describe(model).layer_linears().items():
            yield f"{layer_name}.{path}", site


def linears(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """(full module name, activation site) of every linear that can be quantized, of a float model."""
    if not is_known(model):
        yield from every_linear(model)
        return
    yield from layer_linears(model)
    architecture = describe(model)
    for path in (*architecture.others, architecture.pooler):
        if path is not None and _has(model.base_model, path):
            yield f"{base_name(model)}{path}", "linear"


def embeddings(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Full names of the word embedding, and of the tables of positions, of a float model."""
    if not is_known(model):
        return every_embedding(model)
    architecture, prefix = describe(model), base_name(model)
    position = architecture.position_embeddings
    return [f"{prefix}{architecture.word_embeddings}"], [] if position is None else [f"{prefix}{position}"]


def decoder(model: PreTrainedModel) -> tuple[str, Any] | None:
    """(full name, module) of the linear by which a head scores words, of a model of any stage; None where none does.

    transformers calls it the output embedding. It has as many rows as there are words.
    """
    found: Any = model.get_output_embeddings()
    words = {getattr(model.config, "vocab_size", None), getattr(word_table(model), "num_embeddings", None)}
    if getattr(found, "out_features", None) not in words - {None}:
        return None  # of DeBERTa's newer head this is another linear: it reads the word embedding
    return next(((name, module) for name, module in model.named_modules() if module is found), None)


def float_decoder_bytes(model: PreTrainedModel) -> int:
    """Bytes of a decoder's float weight; 0 where there is none, or where it is the word embedding's too."""
    found, table = decoder(model), word_table(model)
    weight = None if found is None else found[1]._parameters.get("weight")
    return 0 if weight is None or weight is getattr(table, "weight", None) else weight.nbytes


def word_table(model: PreTrainedModel) -> Any:
    """The word embedding of a model of any stage; None in models of characters."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def is_pooler(model: PreTrainedModel, name: str) -> bool:
    """Whether a module or tensor, by its name in the base model, belongs to the pooler's linear."""
    pooler = describe(model).pooler if is_known(model) else "pooler"
    return pooler is not None and f"{name}.".startswith(f"{pooler}.")


def every_linear(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """What `linears` are of a float model that is not in `ARCHITECTURES`."""
    config = model.config
    inner = getattr(config, "intermediate_size", None)
    for name, module in _inside(model, nn.Linear):
        reads_ffn = module.in_features == inner != getattr(config, "hidden_size", None)
        yield name, "ffn_output" if reads_ffn else "linear"


def every_embedding(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """What `embeddings` are of a float model that is not in `ARCHITECTURES`."""
    try:
        words = model.base_model.get_input_embeddings()
    except (AttributeError, NotImplementedError) as error:
        prefix = model.base_model_prefix
        found = [name for name, each in _encoders(model.base_model) if each.base_model_prefix == prefix]
        if not found and isinstance(error, NotImplementedError):  # of models of characters
            words = None
        else:
            raise ValueError(
                f"{type(model).__name__} has no word embedding where its class says ({error}); encoders are at "
                f"{found or 'no place'}: keep the encoder at {prefix!r}, or give the class another base_model_prefix"
            ) from error
    tables = list(_inside(model, nn.Embedding))
    return [name for name, table in tables if table is words], [name for name, table in tables if table is not words]


def _inside(model: PreTrainedModel, kind: type) -> Iterator[tuple[str, Any]]:
    """(full name, module) of the base model's modules of exactly this type, but for output heads.

    A module that is used in several places has several names, and is left out: replacing one would part them.
    """
    places: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[id(module)] = places.get(id(module), 0) + 1
    for name, module in model.base_model.named_modules():
        if type(module) is kind and places[id(module)] == 1 and module is not model.get_output_embeddings():
            yield f"{base_name(model)}{name}", module


def _has(module: nn.Module, path: str) -> bool:
    """Whether `path` names a submodule; a head without pooler holds None there."""
    for part in path.split("."):
        child = getattr(module, part, None)
        if child is None:
            return False
        module = child
    return True
