"""lowbit: BERT in 2-bit and 1-bit weights, packed and fast.

    lowbit.quantize(model, lowbit.TernaryConfig())     post-training, one line
    lowbit.prepare / lowbit.convert                    quantization-aware training, then packing
    lowbit.slim / lowbit.split                         half width and ternary weight splitting (BinaryBERT)
    lowbit.DistillationTrainer                         transformers.Trainer with a teacher

Names are resolved on first use, so that importing lowbit costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _plugin

if TYPE_CHECKING:
    from . import card, nn
    from .checkpoints import verify
    from .compiling import compile
    from .config import BinaryConfig, LengthConfig, LowbitConfig, TernaryConfig
    from .conversion import convert, left_in_float, prepare, quantize, split
    from .distill import AttentionScoreLoss, DistillationTrainer, HiddenStateLoss, LogitsLoss, TaskLoss
    from .errors import CheckpointError
    from .exporting import export
    from .graphs import compile_for
    from .info import backend
    from .length.soft import LearnedThresholds, SoftExtract
    from .length.training import LengthDrop, LengthDropTrainer, SoftLengthTrainer
    from .loading import from_pretrained
    from .slimming import slim
    from .unpadding import fuse, set_length

__version__ = "0.1.0"

_HOME = {
    "BinaryConfig": "config",
    "LengthConfig": "config",
    "LowbitConfig": "config",
    "TernaryConfig": "config",
    "compile": "compiling",
    "compile_for": "graphs",
    "convert": "conversion",
    "fuse": "unpadding",
    "left_in_float": "conversion",
    "prepare": "conversion",
    "quantize": "conversion",
    "split": "conversion",
    "AttentionScoreLoss": "distill",
    "DistillationTrainer": "distill",
    "HiddenStateLoss": "distill",
    "LogitsLoss": "distill",
    "TaskLoss": "distill",
    "CheckpointError": "errors",
    "export": "exporting",
    "backend": "info",
    "LearnedThresholds": "length.soft",
    "SoftExtract": "length.soft",
    "LengthDrop": "length.training",
    "LengthDropTrainer": "length.training",
    "SoftLengthTrainer": "length.training",
    "from_pretrained": "loading",
    "set_length": "unpadding",
    "slim": "slimming",
    "verify": "checkpoints",
}

__all__ = [
    "AttentionScoreLoss",
    "BinaryConfig",
    "CheckpointError",
    "DistillationTrainer",
    "HiddenStateLoss",
    "LearnedThresholds",
    "LengthConfig",
    "LengthDrop",
    "LengthDropTrainer",
    "LogitsLoss",
    "LowbitConfig",
    "SoftExtract",
    "SoftLengthTrainer",
    "TaskLoss",
    "TernaryConfig",
    "backend",
    "card",
    "compile",
    "compile_for",
    "convert",
    "export",
    "from_pretrained",
    "fuse",
    "left_in_float",
    "nn",
    "prepare",
    "quantize",
    "set_length",
    "slim",
    "split",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("card", "nn"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_plugin.install()
