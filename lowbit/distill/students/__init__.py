"""Student builders: a float teacher becomes a smaller model, and what is needed to train it.

copies      some of the teacher's layers, or a model of another size with random weights
theseus     a hybrid whose modules are replaced at random (BERT-of-Theseus)
squeeze     weights that are learned maps of the teacher's (weight squeezing)
deformer    lower layers that read question and passage apart (DeFormer)
rnn         BiLSTM and CNN over words
subwords    a small vocabulary, trained beside the teacher's (Zhao et al.)
mobile      layer by layer (MobileBERT)

A builder is a function `build(teacher, **fields) -> Built`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _itself(model: Any) -> Any:
    return model


@dataclass
class Built:
    """What a builder gives.

    Attributes:
        model: what `Trainer` trains, in eval mode as `from_pretrained` gives it.
        callbacks: of transformers, for the trainer; each is a function of the global step, so that a run resumes.
        finish: trained `model` -> the ordinary model that is saved. It may change the model that it is given.
    """

    model: Any
    callbacks: tuple[Any, ...] = ()
    finish: Callable[[Any], Any] = _itself
