"""`lowbit.from_pretrained` loads what was saved, refuses damage, and leaves the errors of its caller alone.

Damage of all kinds: test_fuzz_checkpoints.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import lowbit
from helpers import HEADS, batch, identical, outputs, tiny

HASH = "0123456789abcdef0123456789abcdef01234567"


def saved(folder: Path, head: str = "BertForSequenceClassification") -> torch.nn.Module:
    model = lowbit.quantize(tiny(head), lowbit.TernaryConfig())
    model.save_pretrained(folder)
    return model


def same(model: torch.nn.Module, other: torch.nn.Module, head: str = "BertForSequenceClassification") -> bool:
    inputs = batch(head)
    return identical(outputs(model, inputs), outputs(other, inputs))


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("head", HEADS)
def test_every_head_loads_as_the_class_that_was_saved(head: str, tmp_path: Path) -> None:
    model = saved(tmp_path, head)
    loaded = lowbit.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert same(model.eval(), loaded, head)


def test_a_loaded_model_saved_from_another_class_loads_again(tmp_path: Path) -> None:
    """Its configuration still names the class before."""
    saved(tmp_path / "head")
    base = lowbit.from_pretrained(tmp_path / "head").bert
    base.save_pretrained(tmp_path / "base")
    assert type(lowbit.from_pretrained(tmp_path / "base")) is type(base)


def test_a_repository_of_the_hub_and_its_subfolders(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--bert-2bit"
    model = saved(repository / "snapshots" / HASH)
    shutil.copytree(repository / "snapshots" / HASH, repository / "snapshots" / HASH / "part")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HASH)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = lowbit.from_pretrained("me/bert-2bit", **hub)
    assert same(model.eval(), loaded) and loaded.name_or_path == loaded.config._name_or_path == "me/bert-2bit"
    assert same(model, lowbit.from_pretrained("me/bert-2bit", subfolder="part", **hub))
    assert same(model, lowbit.from_pretrained(repository / "snapshots", subfolder=HASH))
    edit(repository / "snapshots" / HASH, hidden_size="x")
    with pytest.raises(lowbit.CheckpointError, match="hidden_size"):
        lowbit.from_pretrained("me/bert-2bit", **hub)


@pytest.mark.parametrize("name", ["me/nothing-here", "nothing-here", "/no/such/folder", "a b/c"])
def test_what_is_nowhere_is_the_error_of_transformers(name: str, tmp_path: Path) -> None:
    errors = []
    for load in (lowbit.from_pretrained, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(OSError) as caught:
            load(name, cache_dir=tmp_path, local_files_only=True)
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1]) and str(errors[0]) == str(errors[1])


def test_keywords_go_to_the_class_and_their_errors_stay_what_they_are(tmp_path: Path) -> None:
    saved(tmp_path)
    assert lowbit.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="no_such_keyword"):
        lowbit.from_pretrained(tmp_path, no_such_keyword=1)
    with pytest.raises(ValueError, match="variant='fp16'"):
        lowbit.from_pretrained(tmp_path, variant="fp16")
    with pytest.raises(NotADirectoryError, match="is a file"):
        lowbit.from_pretrained(tmp_path / "config.json")


@pytest.mark.parametrize("keywords", [{}, {"dtype": torch.float32}])
def test_what_transformers_raises_after_verify_is_a_checkpoint_error(
    keywords: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("some field")

    monkeypatch.setattr(BertForSequenceClassification, "__init__", broken)
    with pytest.raises(lowbit.CheckpointError, match="KeyError: 'some field'") as caught:
        lowbit.from_pretrained(tmp_path, **keywords)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "value", [["BertModel"], ["BertConfig"], ["No"], "BertForSequenceClassification", [1], [], None]
)
def test_another_class_in_config_json_is_refused(value: object, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, architectures=value)
    with pytest.raises(lowbit.CheckpointError, match="architectures"):
        lowbit.from_pretrained(tmp_path)
    if value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)  # the caller named the class
    # Some releases of transformers refuse a configuration with values of another type by themselves.


class Own(BertForSequenceClassification):
    """Not a class of transformers."""


def test_a_class_of_the_users_own_is_named(tmp_path: Path) -> None:
    model = lowbit.quantize(Own(tiny().config), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(lowbit.CheckpointError, match=r"\['Own'\], accepted: the name of a model class"):
        lowbit.from_pretrained(tmp_path)
    assert same(model.eval(), Own.from_pretrained(tmp_path))


def test_a_float_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(lowbit.CheckpointError, match="not a checkpoint of lowbit"):
        lowbit.from_pretrained(tmp_path)
