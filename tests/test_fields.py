"""Fields that somebody added to config.json: accepted where the loaded model is the same to the bit, else one error."""

from __future__ import annotations

import ast
import inspect
import json
import random
import re
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lowbit
from benchmarks.soak_damage import STRANGE
from helpers import SIZES, batch, identical, outputs, tiny
from lowbit.files.fields import _OWN_OTHERS, _names_in_code, first_that_matters

MODELS = {
    "bert": tiny,
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**{**SIZES, "max_position_embeddings": 42})),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=101, dim=64, n_layers=2, n_heads=4, hidden_dim=150, max_position_embeddings=40)
    ),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(**SIZES, embedding_size=32)),
}
# Of files on the Hub, of notes that people make, and of other libraries.
NOTES = {
    "language": "en", "_num_labels": 5, "tokenizer_class": "BertTokenizer", "foo": {"bar": [1, None]}, "license": "mit",
    "gradient_checkpointing_": 1, "pooler_fc_size": 768, "pooler_type": "first_token_transform", "output_past": True,
    "directionality": "bidi", "model_note": "trained on Monday", "sentence_transformers": {"version": "5.0"},
    "max_seq_length": 17, "custom_pipelines": {}, "quantized_by": "me", "a b/c": 0,
}  # fmt: skip
# What transformers and lowbit act on while they load, or read in a forward pass.
REFUSED = {
    "configuration_files": ["config.4.0.0.json"], "transformers_weights": "other.safetensors", "is_causal": True,
    "attn_implementation": "eager", "_attn_implementation": "sdpa", "per_layer_config": {"0": {"hidden_size": 3}},
    "length_config": {"keep": [0.5, 0.5]}, "chunk_size_feed_forward": 3, "num_labels": 4, "model_type": "electra",
    "architectures": ["BertModel"], "to_dict": 1, "__class__": "x", "attribute_map": {"hidden_size": "vocab_size"},
    "base_model_tp_plan": {"layer": "colwise"}, "sub_configs": {}, "text_config": {"hidden_size": 3}, "from_dict": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fields")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        lowbit.quantize(make().eval(), lowbit.TernaryConfig()).save_pretrained(root / name)
    return {name: root / name for name in MODELS}


def with_fields(folder: Path, target: Path, **fields: object) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **fields}))
    return target


def scores(model: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return outputs(model, batch())


def names_that_code_reads() -> list[str]:
    """Attributes of configurations in transformers' sources, found as text."""
    root = Path(transformers.__file__).parent
    files = [*root.glob("*.py"), *root.glob("integrations/*.py"), *root.glob("models/*/modeling_*bert*.py")]
    found: set[str] = set()
    for file in files:
        text = file.read_text()
        found |= set(re.findall(r"\bconfig\.([a-z_]\w*)", text))
        found |= set(re.findall(r"(?:getattr|hasattr)\(\s*(?:self\.)?config, \"(\w+)\"", text))
    return sorted(found)


def cases(seed: int) -> list[tuple[str, Any]]:
    """Names of everything that may mean something, and some that mean nothing, with values that may be meant or not."""
    rng = random.Random(seed)
    known = {*dir(PreTrainedConfig), *inspect.signature(PreTrainedConfig).parameters, *dir(BertConfig())}
    names = [*rng.sample(names_that_code_reads(), 40), *rng.sample(sorted(known), 25), *REFUSED, *NOTES]
    names += ["".join(rng.choices(string.ascii_lowercase + "_", k=8)) for _ in range(5)]
    values = (*STRANGE, "relative_key", "sdpa", {"0": [1]}, 0.5, 2, 4, 64, "float32", "float16", "gelu", ["x"])
    return [(name, rng.choice(values)) for name in names]


@pytest.mark.parametrize("model", MODELS)
def test_a_field_is_accepted_where_it_changes_nothing(model: str, saved: dict[str, Path], tmp_path: Path) -> None:
    expected = scores(lowbit.from_pretrained(saved[model]))
    accepted = []
    free = {"return_dict", "output_attentions", "output_hidden_states"}  # of what is returned beside the logits
    own = json.loads((saved[model] / "config.json").read_text())
    for name, value in [*cases(len(model)), *NOTES.items()]:
        if name in free or name in own:
            continue
        folder = with_fields(saved[model], tmp_path / "model", **{name: value})
        try:
            loaded = lowbit.from_pretrained(folder)
        except lowbit.CheckpointError:
            continue
        assert identical(scores(loaded), expected), (name, value)
        accepted.append(name)
    assert set(NOTES) - own.keys() <= set(accepted)


@pytest.mark.parametrize("model", MODELS)
def test_fields_that_mean_nothing_are_accepted_together(model: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = with_fields(saved[model], tmp_path / "model", **NOTES)
    lowbit.verify(folder)
    loaded = lowbit.from_pretrained(folder)
    assert identical(scores(loaded), scores(lowbit.from_pretrained(saved[model])))
    loaded.save_pretrained(tmp_path / "again")
    lowbit.verify(tmp_path / "again")


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_mean_something_are_one_error(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = with_fields(saved["bert"], tmp_path / "model", **{name: REFUSED[name]})
    for load in (lowbit.verify, lowbit.from_pretrained):
        with pytest.raises(lowbit.CheckpointError, match=re.escape(str(folder / "config.json"))):
            load(folder)


def test_the_field_at_fault_is_named_among_others(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = with_fields(saved["bert"], tmp_path / "model", **NOTES, is_causal=False)
    with pytest.raises(lowbit.CheckpointError, match="is_causal is False, the weights were saved without this field"):
        lowbit.from_pretrained(folder)


def test_another_name_of_a_field_may_say_the_same(saved: dict[str, Path], tmp_path: Path) -> None:
    """DistilBERT calls its hidden size `dim`, and older files its type `torch_dtype`."""
    lowbit.verify(with_fields(saved["distilbert"], tmp_path / "same", hidden_size=64, torch_dtype="float32"))
    with pytest.raises(lowbit.CheckpointError, match="hidden_size is 96"):
        lowbit.verify(with_fields(saved["distilbert"], tmp_path / "other", hidden_size=96))


def test_a_field_that_is_newer_than_the_checkpoint_may_say_its_default() -> None:
    values = {"hidden_size": 64}
    assert (
        first_that_matters(
            BertConfig, {**values, "hidden_act": "gelu", "remark_of_mine": 1}, ["hidden_act", "remark_of_mine"]
        )
        is None
    )
    assert (
        first_that_matters(
            BertConfig, {**values, "hidden_act": "relu", "remark_of_mine": 1}, ["hidden_act", "remark_of_mine"]
        )
        == "hidden_act"
    )


def test_lowbits_own_code_is_read_in_every_room() -> None:
    package, names = Path(lowbit.__file__).parent, _names_in_code(BertConfig)
    for path in package.rglob("*.py"):
        file = path.relative_to(package)
        # Programs and data; what reads no configuration.
        if file.parts[0] not in ("cli", "recipes", "data") and file.as_posix() not in _OWN_OTHERS:
            defined = {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
            assert defined <= names, file
    assert all((package / file).is_file() for file in _OWN_OTHERS)


def test_of_code_that_cannot_be_read_every_field_is_refused() -> None:
    class Own(PreTrainedConfig):
        model_type = "own"

    assert first_that_matters(Own, {"note": 1}, ["note"]) == "note"
