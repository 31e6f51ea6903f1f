"""Dynamic sequence length: training for it, what a `LengthConfig` costs, and the search for good ones."""

from __future__ import annotations

from ..config import Front, FrontPoint, LengthConfig
from .cost import LatencyTable, kept_lengths, macs, measure_latency
from .search import search_lengths
from .soft import LearnedThresholds, SoftExtract
from .training import LengthDrop, LengthDropTrainer, SoftLengthTrainer

__all__ = [
    "Front",
    "FrontPoint",
    "LatencyTable",
    "LearnedThresholds",
    "LengthConfig",
    "LengthDrop",
    "LengthDropTrainer",
    "SoftExtract",
    "SoftLengthTrainer",
    "kept_lengths",
    "macs",
    "measure_latency",
    "search_lengths",
]
