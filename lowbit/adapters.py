"""peft on prepared and packed models: adapters beside quantized linears, prompts before a quantized word embedding.

Importing this registers with peft (`_register` does it, once peft has loaded). Three private functions of peft are
replaced by ones that look for lowbit's modules first and then do what they did:

    _maybe_include_all_linear_layers   called when the targets are known and no module is replaced yet: LoRA gets its
                                       layer for lowbit's linears, and what cannot work is refused
    LoraModel._check_merge_allowed     called before a weight is merged
    PeftModel._setup_prompt_encoder    looks for the word embedding among the parameters, where a packed one is not

An adapter is LoRA's: y = q(x) q(W)^T + b + scaling (x A^T) B^T with A and B float and x not quantized. The gradient
goes straight through the quantized product to what is below.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import peft
from peft.tuners import lora, tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .nn import PackedDecoder, PackedEmbedding, PackedLinear, QuantDecoder, QuantEmbedding, QuantLinear
from .nn._packed import Packed
from .quantizers import ActivationQuantizer

LINEARS = (PackedLinear, QuantLinear)
EMBEDDINGS = (PackedEmbedding, QuantEmbedding)
DECODERS = (PackedDecoder, QuantDecoder)

_INITIALIZATIONS = (True, False, "gaussian")  # the others read or change a float weight
_TABLE = "embeddings.word_embeddings"  # where peft looks for a word embedding before it searches the parameters


class LowbitLoraLinear(lora.Linear):  # by "Linear" peft knows a layer that takes a further adapter under "all-linear"
    """LoRA on a `PackedLinear` or `QuantLinear`, which stays what it is: without the adapter its outputs are the same.

    Args:
        base_layer: the linear.
        adapter_name, **options: as of `peft.tuners.lora.Linear`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, **options)
        self.fan_in_fan_out = False  # as peft corrects it for `nn.Linear`

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter to the latent float weight of a prepared linear.

        Raises:
            ValueError: the linear is packed, or a pair.
        """
        _check_mergeable("this linear", self.get_base_layer())
        super().merge(safe_merge, adapter_names)


def _include_linears(config: Any, model: nn.Module) -> Any:
    """`_maybe_include_all_linear_layers`: with the linears of lowbit, which are none of torch's."""
    modules = _quantized_modules(model)
    wants_all = (
        isinstance(getattr(config, "target_modules", None), str) and config.target_modules.lower() == "all-linear"
    )
    config = _ORIGINALS["all_linear"](config, model)
    if not modules:
        return config
    if wants_all:
        adapted = {name for name, module in model.named_modules() if isinstance(module, LowbitLoraLinear)}
        linears = {name for name, module in modules.items() if isinstance(module, LINEARS)}
        config.target_modules = {*config.target_modules, *linears, *adapted}
    _leave_out_quantizers(config, model)
    _check_targets(config, modules)
    if config.peft_type == peft.PeftType.LORA:
        config._register_custom_module(dict.fromkeys(LINEARS, LowbitLoraLinear))
    return config


def _quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    """lowbit's linears and embeddings by the names that peft has for them, adapters or not."""
    return {
        name.replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, LINEARS + EMBEDDINGS + DECODERS)
    }


def _check_targets(config: Any, modules: dict[str, nn.Module]) -> None:
    """Raise ValueError for what an adapter of this configuration cannot do with the modules of lowbit that it names."""
    targets = {name: modules[name] for name in _named(config, modules)}
    for name, module in targets.items():
        kind = f"{name} is a {type(module).__name__}"
        if config.peft_type != peft.PeftType.LORA:
            raise ValueError(
                f"{kind}, which {type(config).__name__} cannot adapt: it works on float weights. Accepted on prepared "
                "and packed models: LoraConfig, PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig"
            )
        if not isinstance(module, LINEARS):
            raise ValueError(
                f"{kind}, which LoRA cannot adapt; accepted: {', '.join(kind.__name__ for kind in LINEARS)} and float "
                f"modules. Leave it out of target_modules, or quantize with {_field(module)}=None"
            )
    if targets:
        _check_lora(config)
    for entry in getattr(config, "target_parameters", None) or ():
        if found := [name for name in modules if f".{name}.weight".endswith(f".{entry}")]:
            raise ValueError(
                f"target_parameters={entry!r} names the quantized weight of {found[0]}; name the module, in "
                "target_modules"
            )
    for entry in getattr(config, "modules_to_save", None) or ():
        packed = [name for name, module in modules.items() if isinstance(module, Packed)]
        if found := [name for name in packed if _is_in(name, entry)]:
            raise ValueError(
                f"modules_to_save={entry!r} holds {found[0]}, whose packed weight cannot be trained; leave it out "
                "(target_modules takes linears), or leave that module in float: modules_to_not_convert of LowbitConfig"
            )
    if getattr(config, "trainable_token_indices", None):
        table = next((name for name, module in modules.items() if isinstance(module, EMBEDDINGS)), None)
        if table is not None:
            raise ValueError(
                f"trainable_token_indices changes rows of {table}, which is quantized; quantize with "
                "embedding_bits=None"
            )


def _field(module: nn.Module) -> str:
    """Of LowbitConfig, that has the bits of an embedding or decoder."""
    return "output_embedding_bits" if isinstance(module, DECODERS) else "embedding_bits"


def _leave_out_quantizers(config: Any, model: nn.Module) -> None:
    """Name the targets by longer endings where the quantizers of attention have the names of its linears, too."""
    adapters = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    modules = {name: module for name, module in model.named_modules() if name and not name.startswith(adapters)}
    named = _named(config, modules)
    wanted = {name for name in named if not isinstance(modules[name], ActivationQuantizer)}
    if wanted and len(wanted) < len(named):
        config.target_modules = tuners_utils._find_minimal_target_modules(wanted, modules.keys() - wanted)


def _named(config: Any, names: Iterable[str]) -> list[str]:
    """Which of them `target_modules` means."""
    if not getattr(config, "target_modules", None):
        return []
    return [name for name in names if tuners_utils.check_target_module_exists(config, name)]


def _is_in(name: str, entry: str) -> bool:
    """Whether a module lies in one that `modules_to_save` names, by the endings of names as peft has it."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts) + 1))


def _check_lora(config: Any) -> None:
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported on quantized linears; accepted: "
            f"{', '.join(map(repr, _INITIALIZATIONS))}"
        )
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    if found := next((name for name in (*variants, "use_qalora") if getattr(config, name, None)), None):
        raise ValueError(
            f"LoraConfig({found}={getattr(config, found)!r}) is not supported on quantized linears; accepted: LoRA as "
            "it is, with use_rslora, lora_bias, rank_pattern and alpha_pattern"
        )


def _check_mergeable(name: str, base: nn.Module) -> None:
    """Raise ValueError where a linear cannot take an adapter into its weight."""
    if isinstance(base, PackedLinear):
        raise ValueError(
            f"{name} is packed: its {base.layout} codes cannot hold what an adapter adds. Keep the adapter beside it "
            "(save_pretrained and from_pretrained of peft), or make the model float first: model.dequantize(), then "
            "merge"
        )
    if isinstance(base, QuantLinear) and base.weight.dim() == 3:
        raise ValueError(
            f"{name} is a pair of binary planes (lowbit.split), of which an adapter belongs to neither. Keep the "
            "adapter beside it, or make the model float first: model.dequantize(), then merge"
        )


def _check_merge_allowed(self: Any) -> None:
    """`LoraModel._check_merge_allowed`: before the first of several linears has changed."""
    for name, module in self.model.named_modules():
        if isinstance(module, LowbitLoraLinear):
            _check_mergeable(name, module.get_base_layer())
    _ORIGINALS["merge"](self)


def _setup_prompt_encoder(self: Any, adapter_name: str) -> None:
    """`PeftModel._setup_prompt_encoder`, which finds the word embedding of a quantized model, too."""
    model = self.base_model
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(table, EMBEDDINGS):
        return _ORIGINALS["prompt"](self, adapter_name)
    find = model.get_submodule
    model.get_submodule = lambda name: table if name == _TABLE else find(name)
    try:
        return _ORIGINALS["prompt"](self, adapter_name)
    finally:
        del model.get_submodule


def _original(function: Any) -> Any:
    """peft's own, also where an earlier import of lowbit has put another in its place."""
    return getattr(function, "lowbit_original", function)


_ORIGINALS = {
    "all_linear": _original(tuners_utils._maybe_include_all_linear_layers),
    "merge": _original(lora.LoraModel._check_merge_allowed),
    "prompt": _original(peft.PeftModel._setup_prompt_encoder),
}
_REPLACEMENTS = {"all_linear": _include_linears, "merge": _check_merge_allowed, "prompt": _setup_prompt_encoder}


def register() -> None:
    """Put the three functions in place of peft's."""
    for key, function in _REPLACEMENTS.items():
        function.lowbit_original = _ORIGINALS[key]  # type: ignore[attr-defined]
    name = "_maybe_include_all_linear_layers"
    for path, module in list(sys.modules.items()):  # VeRA and others have imported it by name
        if path.startswith("peft.") and _original(getattr(module, name, None)) is _ORIGINALS["all_linear"]:
            setattr(module, name, _include_linears)
    lora.LoraModel._check_merge_allowed = _check_merge_allowed
    peft.PeftModel._setup_prompt_encoder = _setup_prompt_encoder


register()
