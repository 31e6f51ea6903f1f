"""What is looked at before training: whether student, teacher and objectives fit together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .. import models
from ..config import LowbitConfig
from ..nn import UnpaddedEncoder
from . import layer_maps
from .columns import arguments, options
from .objectives import Objective, sizes_of

logger = logging.getLogger("lowbit")


def refuse_shared_parameters(student: nn.Module, teacher: nn.Module) -> None:
    """`prepare` works in place: a teacher that is the same model would follow its student."""
    taught = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and id(parameter) in taught:
            raise ValueError(
                f"student and teacher share the trainable parameter {name}; "
                "give each its own: student = lowbit.prepare(copy.deepcopy(teacher), ...)"
            )


def check_models(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    objectives: Sequence[Objective],
    lifts_lengths: bool = False,
) -> None:
    """Raise ValueError where models cannot give what objectives compare; nothing is changed.

    Args:
        student: without adapters around it (`inside_peft`).
        teacher: or None.
        objectives: of all stages.
        lifts_lengths: the student keeps all tokens where they are compared, though it drops some else.

    Raises:
        TypeError, ValueError: what does not fit, and what to pass instead.
    """
    pair = [model for model in (student, teacher) if model is not None]
    if teacher is not None:
        refuse_shared_parameters(student, teacher)
        if any(getattr(objective, "view", None) is None for objective in objectives):
            compare_vocabularies(student, teacher)  # a view may give each its own tokens
    for objective in objectives:
        if (check := getattr(objective, "check", None)) is not None:
            check(student, teacher)
    needs = {need for objective in objectives for need in objective.needs}
    asked = options(needs)
    for model in pair:
        if "scores" in needs:
            models.describe_attention(model, "AttentionScoreLoss")
        if "qkv" in needs:
            models.describe(model)  # refuses a model whose projections it does not know
        if lacking := asked.keys() - arguments(model, {}, asked).keys():
            raise ValueError(
                f"{type(model).__name__}.forward does not take {', '.join(sorted(lacking))}, which the objectives "
                "need; give it **kwargs and pass them on, or pass objectives that need less"
            )
        if asked and drops_tokens(model) and (model is teacher or not lifts_lengths):
            raise ValueError(
                f"{' and '.join(sorted(needs))} of all tokens are compared, and the "
                f"{'teacher' if model is teacher else 'student'} drops tokens on the way; call "
                "lowbit.set_length(model, None), or pass objectives=[LogitsLoss()]"
            )


def check_elastic(elastic: Any, student: Any, teacher: PreTrainedModel | None, objectives: Sequence[Objective]) -> None:
    """Raise TypeError or ValueError where sub-networks of a student cannot be trained by these objectives."""
    elastic.check(student, teacher)
    layers = student.config.num_hidden_layers
    for objective in objectives:
        if lost := {"scores", "qkv"} & set(objective.needs):
            raise ValueError(
                f"{_class_of(objective)} compares {' and '.join(sorted(lost))}, and sub-networks have other heads than "
                "their teacher; accepted with elastic: objectives of logits and hidden states"
            )
        if getattr(objective, "view", None) is not None:
            raise ValueError(f"{_class_of(objective)} has a view, which elastic training does not run")
        given = getattr(objective, "map", "uniform")
        for subnet in elastic.subnets() if "hidden_states" in objective.needs else ():
            kept = len(subnet.shape(student).layers)
            found = layer_maps.resolve(given, kept, kept, _class_of(objective))
            if kept < layers and getattr(objective, "layer_weights", None) is not None:
                raise ValueError(f"{_class_of(objective)}: layer_weights are for one depth, not for {elastic.depths}")
            if any(row != (number,) for number, row in found.taught()):
                raise ValueError(
                    f"{_class_of(objective)}: map={given!r}; accepted with elastic: 'uniform', since each sub-network "
                    "is compared with the teacher's layers of its own numbers"
                )


def inside_peft(model: Any) -> PreTrainedModel:
    """The model of transformers in a `PeftModel`; another one is itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_prompt(student: Any, objectives: Sequence[Objective]) -> None:
    """Raise ValueError where a student whose prompt is trained has other tokens or keys than its teacher."""
    config = getattr(student, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return
    # A prefix is seen, and has no states of its own.
    compared = {"scores"} if config.peft_type == "PREFIX_TUNING" else {"hidden_states", "scores", "qkv"}
    for objective in objectives:
        if compared & set(objective.needs):
            raise ValueError(
                f"{_class_of(objective)} compares token by token, and the student's {config.num_virtual_tokens} "
                f"virtual tokens ({type(config).__name__}) are none of the teacher's; accepted: "
                "objectives=[lowbit.LogitsLoss()]"
            )


def _class_of(objective: Objective) -> str:
    """Of an objective, or of the one inside of `Scheduled` and `On`."""
    inner = getattr(objective, "objective", None)
    return type(objective).__name__ if inner is None else _class_of(inner)


def compare_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Both models read the same token ids: those that the teacher does not have are refused, fewer are warned of."""
    sizes = sizes_of("vocab_size", student, teacher)
    if sizes is None or sizes[0] == sizes[1]:
        return
    own, taught = sizes
    if own > taught:
        raise ValueError(
            f"the student has a vocabulary of {own} tokens, the teacher of {taught}: both read the same token ids, and "
            f"{taught} to {own - 1} are none of the teacher's. Take a student with the teacher's tokenizer; if it has "
            f"it, and the rest of its table is spare, call teacher.resize_token_embeddings({own})"
        )
    logger.warning(
        "The student has a vocabulary of %d tokens, the teacher of %d. Both read the same token ids: with tokenizers "
        "that differ these mean other words to the teacher, and nothing can be learned from it.",
        own,
        taught,
    )


def drops_tokens(model: nn.Module) -> bool:
    return any(isinstance(module, UnpaddedEncoder) and module.lengths is not None for module in model.modules())


def slimmed(model: nn.Module) -> LowbitConfig | None:
    """The configuration of a model of `lowbit.slim`."""
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, LowbitConfig) and config.num_attention_heads is not None else None
