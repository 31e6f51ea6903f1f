"""`save_pretrained` and the like, of slimmed, prepared and packed models, and of what holds parts of them.

`attach` replaces methods of the model where transformers' own would do the wrong thing without a word; two of
`PreTrainedModel` itself are guarded for models that lowbit did not make.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ..config import LowbitConfig
from ..models import ARCHITECTURES
from ..nn import PackedDecoder, QuantDecoder, QuantEmbedding, QuantLinear, UnpaddedEncoder, attention
from ..nn._packed import Packed
from ..nn.counting import num_parameters
from . import card, publishing
from .atomic import exclusive, staging
from .stage import is_lowbits, own_config, quantizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("lowbit")


_WEIGHTS = re.compile(
    r"model(?:\.(?!safetensors)([^.-]+))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.([^.]+))?\.json"
)


def attach(model: PreTrainedModel, config: LowbitConfig) -> PreTrainedModel:
    """Make `model` save and load as what `config` says it is."""
    model.config.quantization_config = config
    model.config._is_quantized = config.stage == "packed"
    # By its name: the class, which builds models at loading too, is above (`lowbit.plugin`).
    quantizer = AUTO_QUANTIZER_MAPPING["lowbit"](config, pre_quantized=True)
    for part in {model, model.base_model}:  # `model.bert.save_pretrained` is a way to drop the head
        part.hf_quantizer = quantizer
        # transformers refuses .half() and .float() on models marked quantized; lowbit modules survive both.
        part.is_quantized = False
        for name, method in _METHODS.items():
            setattr(part, name, functools.partial(method, part))  # unlike a method, it can be pickled
    return model


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: what `model` holds are float modules again."""
    for part in {model, model.base_model}:
        for name in (*_METHODS, "hf_quantizer", "quantization_method"):
            part.__dict__.pop(name, None)
        part.is_quantized = False
    for name in ("quantization_config", "_is_quantized"):
        model.config.__dict__.pop(name, None)


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    *,
    self_contained: bool = False,
    **kwargs: Any,
) -> None:
    """`PreTrainedModel.save_pretrained`, with files written aside and renamed: a failure leaves the old ones intact.

    A process that is killed leaves them intact too, but for one moment: between the renames of several shards, or of
    weights and another configuration than before, the folder holds parts of both, and loading refuses it.

    A model card is written too, but never over one that a person wrote (`lowbit.card`).

    Args:
        save_directory, is_main_process, state_dict, push_to_hub, **kwargs: as transformers has them.
        self_contained: add a small modeling file, so that `from_pretrained(..., trust_remote_code=True)` loads the
            folder in a program that does not import lowbit (which must be installed still).

    Raises:
        NotADirectoryError: `save_directory` is a file.
        OSError: no space left, no permission; nothing has changed.
    """
    target = Path(save_directory)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; save_pretrained needs a directory")
    target.mkdir(parents=True, exist_ok=True)
    own, of_body = quantizers(model)
    if own is not of_body:  # the body has gone on alone
        if self_contained and is_lowbits(of_body):  # a float model needs no file for that
            kwargs["self_contained"] = True
        return type(model).save_pretrained(
            model, target, is_main_process, state_dict, push_to_hub=push_to_hub, **kwargs
        )
    hub = {name: kwargs.pop(name) for name in publishing.OPTIONS if name in kwargs}
    # Names are the modules' own: those of other libraries, which transformers writes for some types, say other shapes.
    kwargs.setdefault("save_original_format", False)
    model.hf_quantizer.given_state = state_dict
    try:
        with staging(target) as folder, _attention_by_any_name(model):
            type(model).save_pretrained(model, folder, is_main_process, state_dict, **kwargs)
            if (folder / "config.json").exists():  # not on the other ranks
                _complete(model, folder, target, self_contained)
            written = {path.name for path in folder.iterdir()}
            variants = {_variant(name) for name in written} - {None}
            with exclusive(target):  # of two processes that save, one checkpoint stays, not parts of both
                # config.json last: until then a reader sees the old one, and mismatches are refused by the checks.
                for name in sorted(written, key=lambda name: (name == "config.json", name)):
                    os.replace(folder / name, target / name)
                for path in target.iterdir():
                    if path.name not in written and _variant(path.name) in variants:
                        path.unlink()  # shards of the checkpoint before
    except SafetensorError as error:  # its name for a full disk
        raise OSError(f"{target}: {error}; what was there has not changed") from error
    finally:
        model.hf_quantizer.given_state = None
    if push_to_hub and written:
        publishing.upload(target, written | {card.FILE}, hub.pop("repo_id", target.name), **hub)


@contextmanager
def _attention_by_any_name(model: PreTrainedModel) -> Iterator[None]:
    """transformers writes no configuration with `output_attentions` unless attention is called "eager".

    ("lowbit" gives maps too, and no name of an attention is written.)
    """
    config: Any = model.config
    name = config._attn_implementation_internal
    config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        config._attn_implementation_internal = name


def _save_as_what_it_is(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `save_pretrained`, for models that lowbit did not make but that have something of those it made.

    A new model made from the configuration of a packed one is float, and saved as such. A head is saved as what its
    body is now, which may be another model's, or have gone on alone (`lowbit.convert(model.bert)`). A model that holds
    quantized parts otherwise could not be loaded, and is refused.
    """

    @functools.wraps(save_pretrained)
    def save(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        own, of_body = quantizers(model)
        if isinstance(own, HfQuantizer) and (own is of_body or not is_lowbits(own)):
            return save_pretrained(model, *args, **kwargs)
        kinds = (Packed, QuantLinear, QuantEmbedding, QuantDecoder)
        parts = [n for n, each in model.named_modules() if isinstance(each, kinds)]
        outside = [name for name in parts if not name.startswith(f"{model.base_model_prefix}.")]
        were = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
        try:
            if is_lowbits(of_body) and not outside:
                _take_over(model, of_body.quantization_config)
                result = model.save_pretrained(*args, **kwargs)
                model.base_model.hf_quantizer = of_body  # still that of the head it came from, which may save later
                return result
            if is_lowbits(own) and not parts:
                own_config(model)
                detach(model)
                return model.save_pretrained(*args, **kwargs)
        except BaseException:
            for now, was in were:
                now.clear()
                now.update(was)
            raise
        if parts:
            raise ValueError(
                f"{type(model).__name__} holds modules that lowbit quantized ({parts[0]}, {len(parts)} in all) and is "
                "not a model that lowbit.prepare or lowbit.quantize made: its configuration cannot say so, and "
                "nothing could load the file. Save the part that was quantized by its own save_pretrained, or call "
                "dequantize() of it first"
            )
        if isinstance(getattr(model.config, "quantization_config", None), LowbitConfig):
            own_config(model)
            del model.config.quantization_config
            for name in ("length_config", "exit_config"):
                model.config.__dict__.pop(name, None)
        if model.config._attn_implementation != attention.NAME:
            return save_pretrained(model, *args, **kwargs)
        with _attention_by_any_name(model):  # made from such a configuration, too
            return save_pretrained(model, *args, **kwargs)

    return save


def _take_over(model: PreTrainedModel, config: LowbitConfig) -> None:
    """Make a head save as what its body is: `config`."""
    own_config(model)
    base = model.base_model
    architecture = ARCHITECTURES.get(base.config.model_type)
    names = ("length_config", *(() if architecture is None else (architecture.intermediate_size,)))
    for name in names:
        if hasattr(base.config, name):
            setattr(model.config, name, copy.deepcopy(getattr(base.config, name)))
    if "exits" not in model._modules:
        model.config.__dict__.pop("exit_config", None)
    attach(model, config.replace(output_embedding_bits=None))  # a float head


def _push_to_hub(model: PreTrainedModel, repo_id: str, *, tags: list[str] | None = None, **kwargs: Any) -> Any:
    """`PreTrainedModel.push_to_hub`: what `save_pretrained` writes; a card that the repository has is left alone."""
    hub = {name: kwargs.pop(name) for name in publishing.OPTIONS if name in kwargs}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **kwargs)
        if tags:
            card.model_card(model, tags=tags).save(Path(folder) / card.FILE)
        return publishing.upload(Path(folder), set(os.listdir(folder)), repo_id, **hub)


def _complete(model: PreTrainedModel, staging: Path, target: Path, self_contained: bool) -> None:
    """Add to a saved model what transformers does not write."""
    if card.may_write(target / card.FILE):
        card.model_card(model).save(staging / card.FILE)
    if self_contained:
        publishing.add_modeling_file(model, staging)


def _set_attn_implementation(model: PreTrainedModel, attn_implementation: str | dict[str, str], **kwargs: Any) -> None:
    """`PreTrainedModel.set_attn_implementation`, which would leave out the quantization of attention unasked.

    "lowbit" is right at every stage. "eager", by which programs ask for attention maps, stays "lowbit" where attention
    is quantized, or tokens are dropped: that gives maps too.

    Raises:
        ValueError: another one, where attention is quantized or tokens are dropped.
    """
    wanted = of_model(attn_implementation) or model.config._attn_implementation
    # One that drops no tokens steps aside where masks are not those of "lowbit".
    drops = any(isinstance(each, UnpaddedEncoder) and each.lengths is not None for each in model.modules())
    quantized = has_quantized_attention(model)
    if wanted != attention.NAME and (drops or quantized):
        if wanted != "eager" and quantized:
            raise ValueError(
                f"attn_implementation={wanted!r} would leave out the quantization of this model's attention; accepted: "
                "'lowbit'. For float attention quantize with quantize_attention=False, or call model.dequantize()"
            )
        if wanted != "eager":
            raise ValueError(
                f"attn_implementation={wanted!r}: the encoder that lowbit.set_length put into this model runs "
                "attention itself; accepted: 'lowbit'"
            )
        _log.warning("attn_implementation='eager': kept 'lowbit', which is what the model needs and returns maps too")
        wanted = attention.NAME
    type(model).set_attn_implementation(model, wanted, **kwargs)


def of_model(attn_implementation: str | dict[str, str]) -> str | None:
    """The entry for the model itself of what transformers takes; None where there are those of its parts only."""
    return attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation


def has_quantized_attention(model: PreTrainedModel) -> bool:
    return any(getattr(module, "quantizers", None) for module in model.modules())


def _resize_token_embeddings(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.resize_token_embeddings`, for float tables.

    Raises:
        ValueError: the table is quantized.
    """
    table, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    quantized = "word embedding" if not isinstance(table, torch.nn.Embedding) else ""
    if isinstance(decoder, PackedDecoder | QuantDecoder) and not quantized:
        quantized, table = "decoder", decoder
    if quantized and (args or kwargs):
        raise ValueError(
            f"the {quantized} is quantized ({type(table).__name__}) and cannot be resized; resize the float model "
            "before quantizing it, or call model.dequantize() first"
        )
    return type(model).resize_token_embeddings(model, *args, **kwargs)


# What `attach` puts in place of transformers' methods.
_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained": _save_pretrained,
    "push_to_hub": _push_to_hub,
    "set_attn_implementation": _set_attn_implementation,
    "resize_token_embeddings": _resize_token_embeddings,
    "num_parameters": num_parameters,
}


def _variant(file_name: str) -> str | None:
    """The variant ("" for none) that a file of weights, or an index of such files, belongs to; None for other files."""
    match = _WEIGHTS.fullmatch(file_name)
    return match and (match[1] or match[2] or "")


def _dequantize_with_body(dequantize: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `dequantize`, for a head on a body that lowbit quantized."""

    @functools.wraps(dequantize)
    def run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        own, of_body = quantizers(model)
        if own is None and is_lowbits(of_body):
            return of_body.dequantize(model, *args, **kwargs)
        return dequantize(model, *args, **kwargs)

    return run


def _guard() -> None:
    """Put wrappers around two methods of transformers' models."""
    from transformers import PreTrainedModel

    for name, wrap in {"save_pretrained": _save_as_what_it_is, "dequantize": _dequantize_with_body}.items():
        original = getattr(PreTrainedModel, name)
        if getattr(original, "lowbit_guards", False):  # of an earlier import
            original = original.__wrapped__
        wrapped: Any = wrap(original)
        wrapped.lowbit_guards = True
        setattr(PreTrainedModel, name, wrapped)


_guard()
