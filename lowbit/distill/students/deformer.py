"""DeFormer (Cao et al. 2020, 2005.00697): a student that reads question and passage apart in its lower layers.

The model is `lowbit.modeling.deformer`; it starts with the teacher's weights. Published loss: the task's, T^2 KL of
start and end logits with T = 2, and the MSE of the upper layers' hidden states, 1 each; 9 of 12 layers apart.
"""

from __future__ import annotations

from typing import Any

from transformers import BertForQuestionAnswering, BertForSequenceClassification, PreTrainedModel

from ...modeling.configurations import DeformerConfig
from ...modeling.deformer import DeformerForQuestionAnswering, DeformerForSequenceClassification
from . import Built, copies

_CLASSES = {
    BertForQuestionAnswering: DeformerForQuestionAnswering,
    BertForSequenceClassification: DeformerForSequenceClassification,
}


def build(teacher: PreTrainedModel, separate_layers: int = 9, passage_offset: int = 0) -> Built:
    """The teacher's weights in a model whose first layers read each text of a pair for itself.

    Args:
        teacher: float BertForQuestionAnswering, or BertForSequenceClassification of pairs.
        separate_layers: how many layers read them apart; the rest reads both.
        passage_offset: position of a passage's first token: 0 as published; the longest question's length keeps it
            closer to what the teacher saw.

    Raises:
        TypeError, ValueError: another class, or not float; more layers than there are, an offset that is no position.
    """
    kind = _CLASSES.get(type(teacher))  # type: ignore[call-overload]
    if kind is None:
        names = " or ".join(each.__name__ for each in _CLASSES)
        raise ValueError(f"a DeFormer is made of a {names}, got {type(teacher).__name__}")
    values = copies.config_of(teacher).to_dict()
    for name in ("model_type", "architectures"):
        values.pop(name, None)
    config = DeformerConfig(**{**values, "separate_layers": separate_layers, "passage_offset": passage_offset})
    config._attn_implementation = teacher.config._attn_implementation
    student: Any = kind(config)
    student.load_state_dict(teacher.state_dict())
    return Built(student.to(device=teacher.device, dtype=teacher.dtype).eval())
