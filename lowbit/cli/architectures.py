"""The class of a float model whose config.json names none: the bare base model, if the weights hold nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..files.loading import class_of
from ..files.records import read_json
from .weights import tensor_names, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def float_class(folder: Path) -> type[PreTrainedModel]:
    """The class that config.json names; where it names none, the base model of its model_type.

    Raises:
        CheckpointError: a class that transformers does not have; no class, and no model_type or tensors of a head.
        FileNotFoundError: no weights.
    """
    path = folder / "config.json"
    values = read_json(path)
    if values.get("architectures"):
        return class_of(folder)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        found = transformers.MODEL_MAPPING[type(config)]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} names no architectures, and its model_type is {values.get('model_type')!r}, of which transformers "
            'has no base model; add "architectures": ["BertModel"] to it, or the class that was saved'
        ) from error
    base: Any = found[0] if isinstance(found, tuple) else found
    names = {_now(name) for file in weight_files(folder) for name in tensor_names(file)}
    known, buffers = _names_of(base, config)
    heads = sorted(name for name in names if _bare(base, name) not in known | buffers)
    if not heads:
        return base
    fitting = [other.__name__ for other in _heads(config) if _fits(names, other, config)]
    saved = f": the weights fit {', '.join(fitting)}" if fitting else ", the class that was saved"
    raise CheckpointError(
        f"{path} names no architectures, and the weights hold more than a {base.__name__}: {', '.join(heads[:3])}"
        f'{", ..." if heads[3:] else ""}; add "architectures": ["{(fitting or ["..."])[0]}"] to it{saved}'
    )


def _now(name: str) -> str:
    """LayerNorm's tensors had other names in files from before 2019."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _names_of(model_class: Any, config: Any) -> tuple[set[str], set[str]]:
    """Tensors that a model saves, and all its buffers: some were saved once."""
    with torch.device("meta"):
        model = model_class(config)
    return set(model.state_dict()), {name for name, _ in model.named_buffers()}


def _bare(base: Any, name: str) -> str:
    return name.removeprefix(f"{base.base_model_prefix}.")


def _heads(config: Any) -> list[Any]:
    """The classes that transformers has for a configuration, but for decoders."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: dict[str, None] = {}
    for mapping, names in vars(modeling_auto).items():
        if mapping.endswith("_MAPPING_NAMES") and "CAUSAL" not in mapping and "SEQ_TO_SEQ" not in mapping:
            given = names.get(config.model_type, ())
            found |= dict.fromkeys((given,) if isinstance(given, str) else given)
    return [getattr(transformers, name) for name in found if hasattr(transformers, name)]


def _fits(names: set[str], model_class: Any, config: Any) -> bool:
    """Whether a class has just these tensors; of tied ones only one is in a file."""
    try:
        own, buffers = _names_of(model_class, config)
    except Exception:  # of a class that does not take the configuration
        return False
    tied = model_class._tied_weights_keys or {}
    return names - buffers <= own and own - names <= set(tied)
