"""A model has as many parameters as its float one, in every stage and form, for every head."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import lowbit
from helpers import HEADS, SIZES, tiny
from lowbit.nn.counting import num_parameters

EXCLUDED = [False, True]
CONFIGS = {
    "ternary": lowbit.TernaryConfig(),
    "binary": lowbit.BinaryConfig(),
    "per tensor": lowbit.TernaryConfig(granularity="per_tensor"),
    "8-bit tables": lowbit.TernaryConfig(embedding_bits=8, position_embedding_bits=8),
    "float embeddings": lowbit.TernaryConfig(embedding_bits=None),
    "float activations": lowbit.TernaryConfig(activation_bits=None),
}


def float_count(model: PreTrainedModel, **options: bool) -> int:
    return PreTrainedModel.num_parameters(model, **options)


def prepared(model: Any) -> Any:
    return lowbit.prepare(model, lowbit.TernaryConfig())


FORMS: dict[str, Callable[[Any], Any]] = {
    "float": lambda model: model,
    "prepared": prepared,
    "split": lambda model: lowbit.split(prepared(model)),
    "packed": lambda model: lowbit.convert(prepared(model)),
    "packed pair": lambda model: lowbit.convert(lowbit.split(prepared(model))),
    "fused": lambda model: lowbit.convert(prepared(model), fused=True),
    "fused pair": lambda model: lowbit.convert(lowbit.split(prepared(model)), fused=True),
    "shorter": lambda model: lowbit.set_length(prepared(model), lowbit.LengthConfig((0.9, 0.5))),
}


@pytest.mark.parametrize("slim", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", HEADS)
def test_every_form_of_every_head_has_the_float_models_parameters(head: str, form: str, slim: bool) -> None:
    model = lowbit.slim(tiny(head), 0.5) if slim else tiny(head)
    expected = [float_count(model, exclude_embeddings=excluded) for excluded in EXCLUDED]
    base = [float_count(model.base_model, exclude_embeddings=excluded) for excluded in EXCLUDED]
    model = FORMS[form](model)
    assert [num_parameters(model, exclude_embeddings=excluded) for excluded in EXCLUDED] == expected
    assert [num_parameters(model.base_model, False, excluded) for excluded in EXCLUDED] == base


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("stage", ["prepared", "packed", "loaded"])
def test_every_configuration_has_the_float_models_parameters(stage: str, config: str, tmp_path: Path) -> None:
    model = tiny("BertForMaskedLM")
    expected = [float_count(model, exclude_embeddings=excluded) for excluded in EXCLUDED]
    model = lowbit.prepare(model, CONFIGS[config])
    if stage != "prepared":
        model = lowbit.convert(model)
    if stage == "loaded":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    assert [num_parameters(model, exclude_embeddings=excluded) for excluded in EXCLUDED] == expected


@pytest.mark.parametrize("stage", ["prepared", "packed"])
@pytest.mark.parametrize("kind", ["distilbert", "electra", "roberta"])
def test_other_architectures_with_a_tied_decoder(kind: str, stage: str) -> None:
    torch.manual_seed(0)
    model: Any = {
        "distilbert": lambda: DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=101, dim=64, n_layers=2, n_heads=4, hidden_dim=150)
        ),
        "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=32)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    }[kind]()
    expected = [float_count(model, exclude_embeddings=excluded) for excluded in EXCLUDED]
    model = FORMS[stage](model)
    assert [num_parameters(model, exclude_embeddings=excluded) for excluded in EXCLUDED] == expected


def test_trainable_ones_are_the_floats_that_require_gradients() -> None:
    model = tiny()
    every = float_count(model)
    assert num_parameters(prepared(copy.deepcopy(model)), only_trainable=True) == every
    assert num_parameters(FORMS["split"](copy.deepcopy(model)), only_trainable=True) == every
    packed = FORMS["packed"](copy.deepcopy(model))
    assert num_parameters(packed, only_trainable=True) == sum(p.numel() for p in packed.parameters()) < every
    tables = packed.bert.embeddings.position_embeddings, packed.bert.embeddings.token_type_embeddings
    without = sum(table.weight.numel() for table in tables)
    rest = num_parameters(packed, only_trainable=True) - without
    assert num_parameters(packed, only_trainable=True, exclude_embeddings=True) == rest
    fused = FORMS["fused"](copy.deepcopy(model))
    assert num_parameters(fused, only_trainable=True) == sum(p.numel() for p in fused.classifier.parameters())
    for parameter in packed.parameters():
        parameter.requires_grad_(False)
    assert num_parameters(packed, only_trainable=True) == 0
    assert num_parameters(packed) == every


@pytest.mark.parametrize("only_trainable", [False, True])
@pytest.mark.parametrize("exclude_embeddings", EXCLUDED)
@pytest.mark.parametrize("head", HEADS)
def test_a_model_without_codes_is_counted_as_transformers_counts_it(
    head: str, only_trainable: bool, exclude_embeddings: bool
) -> None:
    models = [tiny(head), tiny(head, tie_word_embeddings=False), FORMS["packed"](tiny(head)).dequantize()]
    for model in models:
        model.base_model.embeddings.requires_grad_(False)
        expected = float_count(model, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        assert num_parameters(model, only_trainable, exclude_embeddings) == expected


def test_it_takes_the_place_of_the_models_own_method() -> None:
    model = tiny()
    every = float_count(model)
    packed = FORMS["packed"](model)
    packed.num_parameters = functools.partial(num_parameters, packed)
    assert packed.num_parameters() == copy.deepcopy(packed).num_parameters() == every
    assert packed.num_parameters(exclude_embeddings=True) < every
