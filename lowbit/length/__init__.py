"""Dynamic sequence length: what a `LengthConfig` costs, and the search for good ones.

Training for it is in `lowbit.length.training` and `lowbit.length.soft` (`lowbit.LengthDropTrainer` and its kin).
"""

from __future__ import annotations

from ..config import LengthConfig
from .cost import LatencyTable, batch_macs, kept_lengths, macs, measure_latency, observed_lengths
from .front import Front, FrontPoint
from .search import search_lengths

__all__ = [
    "Front",
    "FrontPoint",
    "LatencyTable",
    "LengthConfig",
    "batch_macs",
    "kept_lengths",
    "macs",
    "measure_latency",
    "observed_lengths",
    "search_lengths",
]
