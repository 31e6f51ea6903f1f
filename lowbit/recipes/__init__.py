"""Whole runs, for the command line and the examples: data, resumable stages, evaluation, timing, tables.

options    what a run is asked to do; recorded with it
data       GLUE, or a CSV or JSON lines file of the user's
stages     fine-tuning, distillation, splitting, packing: each stage is a folder, and is not repeated
measure    metrics, latency and sizes of a saved model
lengths    training for dropped tokens, the search for lengths, what budgets cost and lose

Needs the packages of `pip install 'lowbit[train]'`.
"""

from __future__ import annotations

import importlib.util
import logging

log = logging.getLogger("lowbit")


class RecipeError(ValueError):
    """A run that cannot be done as asked; the message says what was given and what is accepted."""


def require(*packages: str) -> None:
    """ImportError where a package of the extra `train` is missing; `sklearn` is scikit-learn's import name."""
    missing = [name.replace("sklearn", "scikit-learn") for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed; recipes need it: pip install 'lowbit[train]'")
