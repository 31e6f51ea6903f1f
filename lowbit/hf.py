"""The transformers plug-in: `save_pretrained` and `from_pretrained` of slimmed, prepared and packed models.

A model's `config.quantization_config` is a `LowbitConfig`; with `quant_method: "lowbit"` in config.json, transformers
hands the freshly built model (on the meta device) to `LowbitQuantizer`, which gives it the checkpoint's modules. Files
carry checksums and the configuration in the safetensors header (`checkpoints`) and are verified before any weight is
used.

Files hold ternary codes five to a byte, modules four to a byte, both as `weight`. So ternary modules get a buffer of
the file's shape before transformers loads (by whatever route: shards, other heads, device maps), and the codes are
expanded where they have landed. `state_dict()` and `load_state_dict` know the modules' form only.

`attach` replaces methods of the model where transformers' own would do the wrong thing without a word.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
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
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit_kernels import pack_ternary, pack_trits, unpack_ternary, unpack_trits

from . import card, checkpoints, publishing
from ._files import exclusive, staging
from .config import FORMAT_VERSION, BinaryConfig, LengthConfig, LowbitConfig, TernaryConfig
from .counting import num_parameters
from .errors import CheckpointError
from .models import has_plain_attention, is_pooler
from .nn import PackedDecoder, QuantDecoder, UnpaddedEncoder, attention
from .nn._packed import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("lowbit")

_EXPANDED_AT_A_TIME = 2**19  # codes: so many stay in cache, and take little memory beside the packed model
_WEIGHTS = re.compile(
    r"model(?:\.(?!safetensors)([^.-]+))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.([^.]+))?\.json"
)


for _registered in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    if getattr(_registered.get("lowbit"), "__module__", "").startswith(f"{__package__}."):
        del _registered["lowbit"]  # of an earlier import of this package: transformers refuses a second one


@register_quantization_config("lowbit")
class _RegisteredConfig(QuantizationConfigMixin):
    """What transformers calls to read config.json; the object it gets is a `LowbitConfig`.

    Its class is the one a user would have passed: transformers compares the names, where both are given.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        try:
            config = LowbitConfig.from_dict(config_dict)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: {error}") from error
        kind = {2: TernaryConfig, 1: BinaryConfig}.get(config.weight_bits or 0, LowbitConfig)
        if config.stage != "float":
            config = kind.from_dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer("lowbit")
class LowbitQuantizer(HfQuantizer):
    """Builds lowbit modules before weights load, checks them after."""

    given_state: dict[str, torch.Tensor] | None = None  # `save_pretrained(state_dict=...)`, which transformers drops
    asked_attention: str | dict[str, str] | None = None  # `from_pretrained(attn_implementation=...)`
    quantization_config: LowbitConfig
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Before the model is built: afterwards what was asked for looks like the default. (New in transformers.)"""
        self.asked_attention = config._attn_implementation
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if self.pre_quantized:
            from .conversion import build

            try:
                build(model, self.quantization_config)
            except CheckpointError:
                raise
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"config.json: {error}") from error
            # Without files there is a state dict from memory, which has the modules' form.
            if checkpoint_files:
                if self.quantization_config.stage == "packed" and self.quantization_config.format_version >= 2:
                    _expect_trits(model)
                _verify_files(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            from .conversion import quantize

            offloaded = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
            if offloaded is not None:
                raise ValueError(
                    f"{offloaded} is offloaded (device_map) and cannot be quantized while loading; "
                    "load with a device_map that keeps all weights on devices, or device_map='cpu'"
                )
            # transformers has already noted the wanted config on the model, which is still float.
            wanted, model.config.quantization_config, model.hf_quantizer = self.quantization_config, None, None
            return _set_asked_attention(quantize(model, wanted), self.asked_attention)
        if self.quantization_config.stage == "packed":
            _expand_trits(model)
            _verify_modules(model)
        attach(model, self.quantization_config.replace(format_version=FORMAT_VERSION))
        if self.quantization_config.stage == "packed":
            from .unpadding import fuse_where_possible

            fuse_where_possible(model)
        return _set_saved_length(_set_asked_attention(model, self.asked_attention))

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What to write in place of the model's own state dict, and checksums for the file header."""
        if getattr(model, "_hf_peft_config_loaded", False):  # what is written is the adapter alone
            return self.given_state, {}
        state = dict(model.state_dict() if self.given_state is None else self.given_state)
        if self.quantization_config.stage == "packed" and self.quantization_config.format_version >= 2:
            for name, module in _ternary_modules(model).items():
                state[f"{name}.weight"] = pack_trits(unpack_ternary(state[f"{name}.weight"], module.row_length))
        return state, checkpoints.record(model, state)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from .dequantizing import dequantize

        return dequantize(model, dtype)


def _set_asked_attention(model: PreTrainedModel, asked: str | dict[str, str] | None) -> PreTrainedModel:
    """What the caller of `from_pretrained` asked for where attention is float; a warning where it is quantized."""
    if asked is None or not has_plain_attention(model):
        return model
    if not _has_quantized_attention(model):
        model.set_attn_implementation(asked)
    elif _of_model(asked) not in (None, attention.NAME):
        _log.warning(
            "from_pretrained(attn_implementation=%r): kept 'lowbit', which quantizes the attention of this model; for "
            "float attention quantize with quantize_attention=False, or call model.dequantize()",
            asked,
        )
    return model


def _set_saved_length(model: PreTrainedModel) -> PreTrainedModel:
    """Drop tokens as the model did that was saved; the first layers of it, where fewer were asked for.

    (`from_pretrained(..., length_config=None)` keeps all tokens.)
    """
    from .models import layers
    from .unpadding import set_length

    values = getattr(model.config, "length_config", None)
    try:
        if values is None:
            return model
        length = LengthConfig.from_dict(values)
        return set_length(model, dataclasses.replace(length, keep=length.keep[: len(list(layers(model)))]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {error}") from error


def current_config(model: PreTrainedModel) -> LowbitConfig:
    """The model's `LowbitConfig`; a fresh one with stage "float" where it has none.

    A model built from the configuration of another one is float, whatever became of the other. A head on a body is at
    the stage of its body, which may have come there by a verb for the body alone, or for another head on it.

    Raises:
        TypeError, ValueError: not a supported model, or quantized by another method.
    """
    from .models import check

    check(model)
    own, of_body = _quantizers(model)
    if isinstance(own, HfQuantizer) and not _is_lowbits(own):
        config = own.quantization_config
        raise ValueError(f"the model is already quantized by another method ({config}); load its float checkpoint")
    if not _is_lowbits(of_body):
        return LowbitConfig(stage="float")
    # The decoder of another head is none of this one's.
    return (
        of_body.quantization_config
        if own is of_body
        else of_body.quantization_config.replace(output_embedding_bits=None)
    )


def _quantizers(model: PreTrainedModel) -> tuple[Any, Any]:
    """What the model has as `hf_quantizer`, and what its body has: one object unless they went separate ways."""
    return getattr(model, "hf_quantizer", None), getattr(model.base_model, "hf_quantizer", None)


def _is_lowbits(quantizer: Any) -> bool:
    """By its configuration: the class may be that of another import of this module."""
    return isinstance(getattr(quantizer, "quantization_config", None), LowbitConfig)


def own_config(model: PreTrainedModel) -> None:
    """Give the model a configuration of its own: a teacher built from the same object must not change with it.

    All layers get it: one that was copied (`copy.deepcopy`), or taken from another model, has brought its own along,
    which no change of the model's attention would reach.
    """
    from .models import is_known, layers

    old, new = model.config, copy.deepcopy(model.config)
    owns_body = is_known(model) and model.base_model.config is old  # not one that another model shares with it
    inside = {part for _, layer in layers(model) for part in layer.modules()} if owns_body else set()
    for module in model.modules():
        for each in (module, *getattr(module, "_original", ())):  # what a `StandIn` stands in for
            own = each.__dict__.get("config")
            if own is old or (module in inside and type(own) is type(old)):
                each.config = new


def attach(model: PreTrainedModel, config: LowbitConfig) -> PreTrainedModel:
    """Make `model` save and load as what `config` says it is."""
    model.config.quantization_config = config
    model.config._is_quantized = config.stage == "packed"
    quantizer = LowbitQuantizer(config, pre_quantized=True)
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
    own, of_body = _quantizers(model)
    if own is not of_body:  # the body has gone on alone
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
        from .nn import QuantEmbedding, QuantLinear

        own, of_body = _quantizers(model)
        if isinstance(own, HfQuantizer) and (own is of_body or not _is_lowbits(own)):
            return save_pretrained(model, *args, **kwargs)
        kinds = (Packed, QuantLinear, QuantEmbedding, QuantDecoder)
        parts = [n for n, each in model.named_modules() if isinstance(each, kinds)]
        outside = [name for name in parts if not name.startswith(f"{model.base_model_prefix}.")]
        were = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
        try:
            if _is_lowbits(of_body) and not outside:
                _take_over(model, of_body.quantization_config)
                return model.save_pretrained(*args, **kwargs)
            if _is_lowbits(own) and not parts:
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
            if hasattr(model.config, "length_config"):
                del model.config.length_config
        if model.config._attn_implementation != attention.NAME:
            return save_pretrained(model, *args, **kwargs)
        with _attention_by_any_name(model):  # made from such a configuration, too
            return save_pretrained(model, *args, **kwargs)

    return save


def _take_over(model: PreTrainedModel, config: LowbitConfig) -> None:
    """Make a head save as what its body is: `config`."""
    from .models import ARCHITECTURES

    own_config(model)
    base = model.base_model
    architecture = ARCHITECTURES.get(base.config.model_type)
    names = ("length_config", *(() if architecture is None else (architecture.intermediate_size,)))
    for name in names:
        if hasattr(base.config, name):
            setattr(model.config, name, copy.deepcopy(getattr(base.config, name)))
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
    wanted = _of_model(attn_implementation) or model.config._attn_implementation
    # One that drops no tokens steps aside where masks are not those of "lowbit".
    drops = any(isinstance(each, UnpaddedEncoder) and each.lengths is not None for each in model.modules())
    quantized = _has_quantized_attention(model)
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


def _of_model(attn_implementation: str | dict[str, str]) -> str | None:
    """The entry for the model itself of what transformers takes; None where there are those of its parts only."""
    return attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation


def _has_quantized_attention(model: PreTrainedModel) -> bool:
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


def _verify_files(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse files where tensors of the encoder are missing, of another type or shape, or changed since written."""
    if model.name_or_path:
        checkpoints.check_inside(model.name_or_path, files)
    expected, own, base = _expected_tensors(model), model.state_dict(), model.base_model.state_dict()
    found: set[str] = set()

    def check(file: str, name: str, tensor: torch.Tensor) -> None:
        bare = _bare(model, name)
        found.add(bare)
        # Of what need not be there: a pooler has one shape; a head may be given another size by the caller.
        free = own[name].shape if bare in base and name in own else tensor.shape
        dtype, shape = expected.get(bare, (None, free))
        wants_float = dtype is None and (bare in expected or (name in own and own[name].is_floating_point()))
        fits = tensor.is_floating_point() if wants_float else dtype in (None, tensor.dtype)
        if not fits or tensor.shape != shape:
            raise CheckpointError(
                f"{file}: {name} is {tensor.dtype} {tuple(tensor.shape)}, config.json asks for "
                f"{dtype or 'float'} {tuple(shape)}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity, values must be finite; the file is damaged")

    recorded = checkpoints.read_tensors(files, check)
    config = Path(files[0]).parent / "config.json"
    if config.is_file():
        checkpoints.check_config(config, recorded, type(model.config))
    # A packed decoder shares a bias with its head, unless the file has two.
    for one, other in list(model.all_tied_weights_keys.items()):
        pair = {_bare(model, one), _bare(model, other)}
        if pair <= found and any(_is_of_decoder(model, name) for name in pair):
            del model.all_tied_weights_keys[one]
    ties = [(_bare(model, one), _bare(model, other)) for one, other in model.all_tied_weights_keys.items()]
    for one, other in ties:  # transformers writes one of them
        found |= {one, other} if found & {one, other} else set()
    missing = sorted(set(expected) - found)
    if missing and all(is_pooler(model, name) for name in missing):
        can_do_without = "add_pooling_layer" in inspect.signature(type(model)).parameters
        raise CheckpointError(
            f"{files[0]}: holds no pooler, the model that was saved has none, and the one of {type(model).__name__} is "
            "quantized, so that it cannot be initialized; "
            f"{'pass add_pooling_layer=False' if can_do_without else 'load the class that was saved'}"
        )
    if missing and all(_is_of_decoder(model, name) for name in missing):
        raise CheckpointError(
            f"{files[0]}: holds no {missing[0]}: the model that was saved has no such decoder, and the one of "
            f"{type(model).__name__} is quantized (output_embedding_bits), so that it cannot be initialized; load the "
            "class that was saved"
        )
    if missing:
        raise CheckpointError(
            f"{files[0]}: {len(missing)} tensors of the encoder are missing, the first is {missing[0]}; the file is "
            f"damaged, or was saved from a model without a part that {type(model).__name__} has"
        )


def _verify_modules(model: PreTrainedModel) -> None:
    for name, module in _packed_modules(model).items():
        if problem := module.problems():
            raise CheckpointError(f"{name}: {problem}; the checkpoint is damaged")


def _packed_modules(model: PreTrainedModel) -> dict[str, Packed]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}


def _is_of_decoder(model: PreTrainedModel, bare: str) -> bool:
    """Whether a tensor, by its bare name, is a packed decoder's."""
    packed = _packed_modules(model).items()
    return any(
        bare.rpartition(".")[0] == _bare(model, name) for name, each in packed if isinstance(each, PackedDecoder)
    )


def _ternary_modules(model: PreTrainedModel) -> dict[str, Packed]:
    return {name: module for name, module in _packed_modules(model).items() if module.layout == "ternary"}


def _expect_trits(model: PreTrainedModel) -> None:
    """Give ternary modules, still on the meta device, a `weight` of the file's shape: uint8 [N, ceil(K/5)]."""
    for module in _ternary_modules(model).values():
        module.weight = module.weight.new_empty(module.weight.shape[0], -(-module.row_length // 5))


def _expand_trits(model: PreTrainedModel) -> None:
    """Replace what `_expect_trits` made room for by layout lb2: uint8 [N, ceil(K/128)*32].

    Raises:
        CheckpointError: a byte that five ternary codes do not reach.
    """
    for name, module in _ternary_modules(model).items():
        if module.weight.shape[1] != -(-module.row_length // 5):
            continue  # lb2 already (version 1, or a state dict); its rows are always longer
        try:
            # As in PackedLinear: of an inference tensor the CPU path could not keep its int8 expansion.
            with torch.inference_mode(False):
                module.weight = _expanded(module.weight, module.row_length)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; the checkpoint is damaged") from error


def _expanded(trits: torch.Tensor, columns: int) -> torch.Tensor:
    """Layout b3 [N, ceil(columns/5)] -> lb2."""
    expanded = trits.new_empty(trits.shape[0], -(-columns // 128) * 32)
    rows = max(1, _EXPANDED_AT_A_TIME // columns)
    for source, target in zip(trits.split(rows), expanded.split(rows), strict=True):
        target.copy_(pack_ternary(unpack_trits(source, columns)))
    return expanded


def _expected_tensors(model: PreTrainedModel) -> dict[str, tuple[torch.dtype | None, torch.Size]]:
    """Bare names of the base model's tensors -> dtype (None: any float) and shape in a file.

    A float pooler may be missing, as in files of heads that have none: transformers initializes it and says so.
    """
    expected: dict[str, tuple[torch.dtype | None, torch.Size]] = {
        name: (None if tensor.is_floating_point() else tensor.dtype, tensor.shape)
        for name, tensor in model.base_model.state_dict().items()
        if not is_pooler(model, name)
    }
    for name, module in _packed_modules(model).items():
        bare = _bare(model, name)
        expected[f"{bare}.weight_scale"] = module.weight_scale.dtype, module.weight_scale.shape
        expected[f"{bare}.weight"] = module.weight.dtype, module.weight.shape
    return expected


def _bare(model: PreTrainedModel, name: str) -> str:
    """A tensor's name without the base model's prefix: heads and bare models load each other's files."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _dequantize_with_body(dequantize: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `dequantize`, for a head on a body that lowbit quantized."""

    @functools.wraps(dequantize)
    def run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        own, of_body = _quantizers(model)
        if own is None and _is_lowbits(of_body):
            return of_body.dequantize(model, *args, **kwargs)
        return dequantize(model, *args, **kwargs)

    return run


def _guard(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a wrapper around a method of transformers' models."""
    from transformers import PreTrainedModel

    original = getattr(PreTrainedModel, name)
    if getattr(original, "lowbit_guards", False):  # of an earlier import
        original = original.__wrapped__
    wrapped: Any = wrap(original)
    wrapped.lowbit_guards = True
    setattr(PreTrainedModel, name, wrapped)


_guard("save_pretrained", _save_as_what_it_is)
_guard("dequantize", _dequantize_with_body)
