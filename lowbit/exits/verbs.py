"""add_exits, set_exit, freeze_backbone: ramps on a sequence classifier, and what makes it use them.

The ramps are a child of the model, `model.exits`; `model.config.exit_config` says what they are and by which criterion
sentences leave, and loading builds them again. The model stays of transformers' class: two hooks, before and after its
forward, hand a `Passage` to its encoder and put the ramps' answers into its output.
"""

from __future__ import annotations

import inspect
from dataclasses import make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from .. import models
from ..files import saving
from ..files.stage import current_config, own_config
from ..stages.unpadding import encoder_of, unpadded_encoder
from . import criteria
from .criteria import Criterion
from .losses import task_loss
from .passage import Passage
from .ramps import KINDS, Ramps, pooler_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD = "ForSequenceClassification"
FIELD = "exit_config"  # of the model's configuration


def add_exits(
    model: PreTrainedModel, kind: str = "pooler", layers: list[int] | None = None, certainty: bool = False
) -> PreTrainedModel:
    """Put ramps behind layers of a sequence classifier, in place; ramps that it had are replaced.

    Works on float, prepared and packed models; ramps are float in all of them. In training the output has
    `exit_logits` [ramps, B, C] besides (and `exit_wrong` [ramps, B] with `certainty`), which the objectives of
    `lowbit.exits` read. Nobody leaves by them until `set_exit` says when.

    A float model with exits is saved and loaded as lowbit's checkpoints are (`import lowbit` is all that loading
    needs), with checksums.

    Args:
        model: a sequence classifier of an architecture that `lowbit.models` describes, with attention by transformers'
            interface.
        kind: of ramp: "linear", "mean", "pooler" (DeeBERT's), "shared" (PABEE's), "attention" (FastBERT's); see
            `lowbit.exits.ramps`.
        layers: numbers of layers, from 1, ascending; None: behind each but the last. 0 is what the embeddings give: a
            "mean" ramp there answers plain cases by their words alone, before any layer runs.
        certainty: also a head that says how probably a ramp is wrong (BERxiT), for `lowbit.exits.Certainty`.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: not a supported model, another head, an unknown kind, layers that are not there, no
            pooler to share; attention quantized per tensor or with a clip.
    """
    models.describe_attention(model, "add_exits")
    if not type(model).__name__.endswith(_HEAD):
        raise ValueError(
            f"{type(model).__name__} gives no answer about a whole text that a ramp could give earlier; accepted: "
            f"classes that end in {_HEAD}"
        )
    count = model.config.num_hidden_layers
    layers = [*range(1, count)] if layers is None else [*layers]
    _check(model, kind, layers, count)
    unpadded_encoder(model)
    ramps = Ramps(model, kind, layers, certainty)
    own_config(model)
    model.exits = ramps
    _describe(model)
    _watch(model)
    if current_config(model).stage == "float":
        saving.attach(model, current_config(model))
    return model


def _check(model: PreTrainedModel, kind: str, layers: list[int], count: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; accepted: {', '.join(map(repr, KINDS))}")
    numbers = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers)
    if not layers or not numbers or layers != sorted({*layers}) or layers[0] < 0 or layers[-1] >= count:
        raise ValueError(
            f"layers={layers}; accepted: ascending numbers out of 0 to {count - 1} (behind layer {count} is the "
            "model's own head)"
        )
    if kind == "shared" and pooler_of(model) is None:
        raise ValueError(f"kind='shared': {type(model).__name__} has no pooler to share; accepted: 'pooler', 'linear'")


def set_exit(model: PreTrainedModel, criterion: Criterion | None) -> PreTrainedModel:
    """Let sentences leave a model in eval mode by the first ramp where a criterion says so, in place.

    The rest of the batch goes on without them. The output has their logits in the order of the batch, and
    `output.exit_layer`, int64 [B]: the layer that each left behind (an attribute, no key; `return_dict=True`). Labels
    are compared with these logits. Where hidden states, attention maps or hooks ask for all layers, all are run, and
    the logits are the same. The criterion is kept in the model's configuration and saved with it.

    Args:
        model: with ramps (`add_exits`).
        criterion: `lowbit.Entropy(0.3)`, `NormalizedEntropy`, `Patience`, `Certainty`; None: all layers, as before.

    Returns:
        The same model.

    Raises:
        TypeError: no criterion.
        ValueError: a model without exits, one that drops tokens, or a criterion that cannot judge this head.
    """
    ramps = getattr(model, "exits", None)
    if not isinstance(ramps, Ramps):
        raise ValueError(
            f"{type(model).__name__} has no exits; add and train them first: lowbit.add_exits(model), "
            "which takes sequence classifiers"
        )
    if criterion is not None:
        if not criteria.is_criterion(criterion):
            raise TypeError(
                f"criterion must be Entropy, NormalizedEntropy, Patience, Certainty or None, got "
                f"{type(criterion).__name__}"
            )
        criterion.check(model.config.num_labels, model.config.problem_type, ramps.certainty_head is not None)
        if getattr(encoder_of(model), "lengths", None) is not None:
            raise ValueError(
                "the model drops tokens (lowbit.set_length), and its ramps would judge states that they were not "
                "trained on; call lowbit.set_length(model, None) first"
            )
    ramps.criterion = criterion
    _describe(model)
    return model


def freeze_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Let nothing of a model be trained but its ramps, in place (the second stage of DeeBERT and FastBERT).

    In training what is frozen runs in eval mode: without dropout, without gradients, and fused where it is packed.

    Raises:
        ValueError: a model without exits.
    """
    if not isinstance(getattr(model, "exits", None), Ramps):
        raise ValueError(f"{type(model).__name__} has no exits; add them first: lowbit.add_exits(model)")
    model.requires_grad_(False)
    model.exits.requires_grad_(True)
    return model


def _describe(model: PreTrainedModel) -> None:
    """Write into the model's configuration what its exits are."""
    ramps: Any = model.exits
    criterion = None if ramps.criterion is None else criteria.to_dict(ramps.criterion)
    values = {
        "kind": ramps.kind,
        "layers": ramps.layers,
        "certainty": ramps.certainty_head is not None,
        "criterion": criterion,
    }
    setattr(model.config, FIELD, values)


# ------------------------------------------------------------------------------------------------------------- loading


def rebuild(model: PreTrainedModel) -> None:
    """Give a freshly constructed model the ramps of its configuration, before its weights are loaded.

    Another head than that which was saved gets none.

    Raises:
        ValueError, TypeError: the configuration says what cannot be.
    """
    values = getattr(model.config, FIELD, None)
    if values is None:
        return
    if not type(model).__name__.endswith(_HEAD):
        delattr(model.config, FIELD)
        return
    if not isinstance(values, dict) or {*values} != {"kind", "layers", "certainty", "criterion"}:
        raise ValueError(f"{FIELD}={values!r}; accepted: kind, layers, certainty and criterion")
    count = model.config.num_hidden_layers  # fewer may have been asked for
    layers = [layer for layer in values["layers"] if not isinstance(layer, int) or layer < count]
    _check(model, values["kind"], layers, count)
    ramps = Ramps(model, values["kind"], layers, bool(values["certainty"]))
    if values["criterion"] is not None:
        criterion = criteria.from_dict(values["criterion"])
        criterion.check(model.config.num_labels, model.config.problem_type, ramps.certainty_head is not None)
        ramps.criterion = criterion
    model.exits = ramps
    _describe(model)


def start(model: PreTrainedModel) -> None:
    """After weights were loaded: an encoder that knows exits, and the hooks."""
    if isinstance(getattr(model, "exits", None), Ramps):
        unpadded_encoder(model)
        _watch(model)


# --------------------------------------------------------------------------------------------------------------- hooks


def _watch(model: PreTrainedModel) -> None:
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter, with_kwargs=True)
    if _answer not in model._forward_hooks.values():
        model.register_forward_hook(_answer, with_kwargs=True)


def _enter(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Head -> encoder, by keyword through the base model: the exits of this call, where they have something to do."""
    ramps: Any = model.exits
    if "exits" in kwargs or (not model.training and ramps.criterion is None):
        return args, kwargs
    if torch.compiler.is_compiling():
        raise ValueError(
            "a model whose sentences leave early cannot be traced as a whole; call lowbit.set_exit(model, None) and "
            "model.eval() first, or lowbit.compile(model), which compiles layer by layer"
        )
    if model.training:
        _quiet(model)
    passage = Passage(model, None if model.training else ramps.criterion)
    if passage.criterion is not None:  # the head sees some of the rows only, and is not to compare them with labels
        args, kwargs, passage.labels = _without_labels(model, args, kwargs)
    return args, {**kwargs, "exits": passage}


def _without_labels(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of a call but for its labels, and these."""
    if len(args) > 1:  # they may be among them
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
        options = bound.arguments.pop("kwargs", {})
        args, kwargs = (), {**{k: v for k, v in bound.arguments.items() if k != "self"}, **options}
    return args, {k: v for k, v in kwargs.items() if k != "labels"}, kwargs.get("labels")


def _quiet(model: PreTrainedModel) -> None:
    """Where nothing but the ramps is trained, the rest runs in eval mode."""
    trained = {id(parameter) for parameter in model.exits.parameters()}
    if not any(p.requires_grad and id(p) not in trained for p in model.parameters()):
        for child in model.children():
            child.train(child is model.exits)


@cache
def _with_exits(output: type) -> type:
    """A head's class of outputs with fields for the ramps: DistributedDataParallel builds outputs again from keys."""
    fields = [(name, "torch.Tensor | None", None) for name in ("exit_logits", "exit_wrong")]
    named = {"__module__": output.__module__}  # of the same name in two modules there may be two
    return make_dataclass(f"{output.__name__}WithExits", fields, bases=(output,), namespace=named)


def _answer(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What the ramps said, into the output."""
    passage = kwargs.get("exits")
    if not isinstance(passage, Passage):
        return output
    if passage.criterion is None:
        if not passage.answers or isinstance(output, tuple):
            return output
        kind: Any = type(output)
        return _with_exits(kind)(**output, exit_logits=passage.exit_logits(), exit_wrong=passage.exit_wrong())
    logits, layers = passage.answered(output[0])  # there is no loss before it
    loss = None if passage.labels is None else task_loss(logits, passage.labels, model.config.problem_type)
    if isinstance(output, tuple):  # return_dict=False
        return (logits, *output[1:]) if loss is None else (loss, logits, *output[1:])
    if loss is None:
        output["logits"] = logits
    else:
        output = type(output)(**{**output, "loss": loss, "logits": logits})  # the loss comes first, as ever
    output.exit_layer = layers
    return output
