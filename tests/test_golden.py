"""Checkpoints of every format version and stage, as they were written once, load and compute what they did."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit

HERE = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in HERE.glob("*/config.json"))
_spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
assert _spec is not None and _spec.loader is not None
make: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_loads_and_computes_the_same(folder: Path) -> None:
    lowbit.verify(folder)
    expected = torch.tensor(json.loads((folder / "logits.json").read_text()))
    got = make.logits(lowbit.from_pretrained(folder).eval())
    real = torch.ones(expected.shape[:-1], dtype=torch.bool) if expected.dim() == 2 else make.MASK.bool()
    # Ties of rounding may fall the other way on another kind of CPU.
    assert (got - expected)[real].norm() <= 0.02 * expected[real].norm()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_saved_again_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    model = lowbit.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path)
    again = lowbit.from_pretrained(tmp_path).eval()
    assert torch.equal(make.logits(again), make.logits(model))


def test_there_is_one_of_every_stage_and_format_version() -> None:
    from lowbit.config import FORMAT_VERSION

    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in FOLDERS]
    assert {config["stage"] for config in configs} == {"float", "prepared", "packed"}
    packed = {config["format_version"] for config in configs if config["stage"] == "packed"}
    assert packed == set(range(1, FORMAT_VERSION + 1))
    assert len(FOLDERS) == len(make.MODELS)
