"""lowbit: BERT in 2-bit and 1-bit weights, packed and fast.

    lowbit.quantize(model, lowbit.TernaryConfig())     post-training, one line
    lowbit.prepare / lowbit.convert                    quantization-aware training, then packing
    lowbit.slim / lowbit.split                         half width and ternary weight splitting (BinaryBERT)
    lowbit.rewire / lowbit.extract / prune_heads       narrower and shallower models (DynaBERT, Michel et al.)
    lowbit.DistillationTrainer                         transformers.Trainer with a teacher
    lowbit.add_exits / lowbit.set_exit                 sentences leave a classifier early

Names are resolved on first use, so that importing lowbit costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _register

if TYPE_CHECKING:
    from . import nn
    from .config import BinaryConfig, LengthConfig, LowbitConfig, TernaryConfig
    from .deploy.compiling import compile
    from .deploy.exporting import export
    from .deploy.graphs import compile_for
    from .distill.objectives import AttentionScoreLoss, HiddenStateLoss, LogitsLoss, TaskLoss
    from .distill.trainer import DistillationTrainer
    from .elastic.importance import importance
    from .elastic.pruning import prune_heads
    from .elastic.rewire import rewire
    from .elastic.slim import slim
    from .elastic.subnet import Subnet, extract
    from .elastic.training import Elastic
    from .errors import CheckpointError
    from .exits.criteria import Certainty, Entropy, NormalizedEntropy, Patience
    from .exits.objectives import ExitCertaintyLoss, ExitLogitsLoss, ExitTaskLoss
    from .exits.verbs import add_exits, freeze_backbone, set_exit
    from .files import card
    from .files.loading import from_pretrained
    from .files.records import verify
    from .info import backend
    from .length.soft import LearnedThresholds, SoftExtract
    from .length.training import LengthDrop, LengthDropTrainer, SoftLengthTrainer
    from .stages.convert import convert, quantize
    from .stages.prepare import left_in_float, prepare
    from .stages.split import split
    from .stages.unpadding import fuse, set_length

__version__ = "0.1.0"

_HOME = {
    "BinaryConfig": "config",
    "LengthConfig": "config",
    "LowbitConfig": "config",
    "TernaryConfig": "config",
    "compile": "deploy.compiling",
    "compile_for": "deploy.graphs",
    "convert": "stages.convert",
    "fuse": "stages.unpadding",
    "left_in_float": "stages.prepare",
    "prepare": "stages.prepare",
    "quantize": "stages.convert",
    "split": "stages.split",
    "AttentionScoreLoss": "distill.objectives",
    "DistillationTrainer": "distill.trainer",
    "HiddenStateLoss": "distill.objectives",
    "LogitsLoss": "distill.objectives",
    "TaskLoss": "distill.objectives",
    "CheckpointError": "errors",
    "export": "deploy.exporting",
    "Entropy": "exits.criteria",
    "NormalizedEntropy": "exits.criteria",
    "Patience": "exits.criteria",
    "Certainty": "exits.criteria",
    "ExitTaskLoss": "exits.objectives",
    "ExitLogitsLoss": "exits.objectives",
    "ExitCertaintyLoss": "exits.objectives",
    "add_exits": "exits.verbs",
    "set_exit": "exits.verbs",
    "freeze_backbone": "exits.verbs",
    "backend": "info",
    "LearnedThresholds": "length.soft",
    "SoftExtract": "length.soft",
    "LengthDrop": "length.training",
    "LengthDropTrainer": "length.training",
    "SoftLengthTrainer": "length.training",
    "from_pretrained": "files.loading",
    "set_length": "stages.unpadding",
    "importance": "elastic.importance",
    "prune_heads": "elastic.pruning",
    "rewire": "elastic.rewire",
    "slim": "elastic.slim",
    "Subnet": "elastic.subnet",
    "extract": "elastic.subnet",
    "Elastic": "elastic.training",
    "verify": "files.records",
}

_MODULES = {"card": ".files.card", "nn": ".nn"}

__all__ = [
    "AttentionScoreLoss",
    "BinaryConfig",
    "Certainty",
    "CheckpointError",
    "DistillationTrainer",
    "Elastic",
    "Entropy",
    "ExitCertaintyLoss",
    "ExitLogitsLoss",
    "ExitTaskLoss",
    "HiddenStateLoss",
    "LearnedThresholds",
    "LengthConfig",
    "LengthDrop",
    "LengthDropTrainer",
    "LogitsLoss",
    "LowbitConfig",
    "NormalizedEntropy",
    "Patience",
    "SoftExtract",
    "SoftLengthTrainer",
    "Subnet",
    "TaskLoss",
    "TernaryConfig",
    "add_exits",
    "backend",
    "card",
    "compile",
    "compile_for",
    "convert",
    "export",
    "extract",
    "freeze_backbone",
    "from_pretrained",
    "fuse",
    "importance",
    "left_in_float",
    "nn",
    "prepare",
    "prune_heads",
    "quantize",
    "rewire",
    "set_exit",
    "set_length",
    "slim",
    "split",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name], __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_register.install()
