"""Questions to a transformers model: where its encoder, linears, embeddings and decoder are, and whether it is one.

What is known of whole architectures is the table in `lowbit.architectures`; of any other model it is found by looking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .architectures import ARCHITECTURES, Architecture
from .config import LowbitConfig
from .errors import check_import

__all__ = ["ARCHITECTURES", "Architecture"]  # the names for users

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def runner(model: PreTrainedModel) -> Any:
    """The module that runs the layers, of a model that `describe` took: without looking again, for every call.

    None where it is there no more: the base model was given another name since.
    """
    path = ARCHITECTURES[model.config.model_type].layers.rpartition(".")[0]
    try:
        return model.base_model.get_submodule(path)
    except AttributeError:
        return None


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
    words = problem = None
    try:
        words = word_table(model.base_model)
    except AttributeError as error:
        problem = error
    if words is None:
        prefix = model.base_model_prefix
        found = [name for name, each in _encoders(model.base_model) if each.base_model_prefix == prefix]
        if found or problem is not None:  # else a model of characters
            raise ValueError(
                f"{type(model).__name__} has no word embedding where its class says ({problem or 'it names none'}); "
                f"encoders are at {found or 'no place'}: keep the encoder at {prefix!r}, or give the class "
                "another base_model_prefix"
            ) from problem
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
