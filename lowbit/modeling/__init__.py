"""Models that transformers does not have, in its own terms: configurations, classes, entries of its Auto classes.

deformer    BERT whose lower layers read question and passage apart
words       BiLSTM and CNN over words

After `import lowbit` their checkpoints load by `AutoModelFor....from_pretrained` like any other (`lowbit._register`,
`configurations`).
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "DeformerModel": "deformer",
    "DeformerForQuestionAnswering": "deformer",
    "DeformerForSequenceClassification": "deformer",
    "WordModel": "words",
    "WordClassifier": "words",
}


def class_named(name: str) -> Any:
    """A model class of this room, None where there is none of that name."""
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name) if name in _HOME else None
