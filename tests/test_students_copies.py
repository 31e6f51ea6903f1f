"""Copies of layers are those layers; random students have the sizes and the seed that were asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import lowbit
from helpers import batch, identical, outputs, tiny
from lowbit import models
from lowbit.distill.students import copies
from test_architectures import KNOWN
from test_architectures import tiny as tiny_of

WHICH = {"uniform": [1, 3, 5], "first": [0, 1, 2], "last": [3, 4, 5], "alternate": [0, 3, 5], "list": [5, 0]}


def teacher_of(prefix: str, layers: int = 6) -> Any:
    if prefix == "Bert":
        return tiny(num_hidden_layers=layers)
    return tiny_of(prefix, **{"n_layers" if prefix == "DistilBert" else "num_hidden_layers": layers})


def inputs() -> dict[str, torch.Tensor]:
    found = batch()
    return {**found, "input_ids": found["input_ids"].clamp(min=2)}


@pytest.mark.parametrize("prefix", ["Bert", *KNOWN])
@pytest.mark.parametrize("which", WHICH)
def test_a_copy_is_the_teacher_without_its_other_layers(prefix: str, which: str, tmp_path: Path) -> None:
    teacher, given = teacher_of(prefix), inputs()
    student = copies.layers(teacher, 3, WHICH[which] if which == "list" else which).model
    reference = copy.deepcopy(teacher)  # of which layers are taken out by hand
    path = models.describe(teacher).layers
    kept = reference.base_model.get_submodule(path)
    reference.base_model.set_submodule(path, nn.ModuleList([kept[index] for index in WHICH[which]]))
    expected = outputs(reference, given)
    assert identical(outputs(student, given), expected)
    assert type(student) is type(teacher) and student.config.num_hidden_layers == len(WHICH[which])
    assert teacher.config.num_hidden_layers == 6
    student.save_pretrained(tmp_path)
    assert identical(outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path), given), expected)


def test_distilberts_choice_of_twelve() -> None:
    assert copies.choose(12, 6, "alternate") == [0, 2, 4, 7, 9, 11]
    assert copies.choose(12, 4, "uniform") == [2, 5, 8, 11]
    assert copies.choose(7, 3, "uniform") == [1, 3, 6]
    assert copies.choose(5, 1, "alternate") == [0] and copies.choose(5, 5, "alternate") == [0, 1, 2, 3, 4]


def test_a_student_shares_nothing_with_its_teacher() -> None:
    teacher = tiny(num_hidden_layers=3)
    before = outputs(teacher, inputs_ := batch())
    student = copies.layers(teacher, 2).model
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert identical(outputs(teacher, inputs_), before)


def test_a_masked_lm_student_keeps_its_tie() -> None:
    student = copies.layers(tiny("BertForMaskedLM", num_hidden_layers=4), 2).model
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("prefix", ["Bert", *KNOWN])
def test_random_students_have_their_sizes_and_the_teachers_words(prefix: str) -> None:
    teacher = teacher_of(prefix)
    before = torch.random.get_rng_state()
    student = copies.random(teacher, layers=2, hidden=24, heads=3, intermediate=50, seed=5).model
    assert torch.equal(torch.random.get_rng_state(), before)
    layer = copies.layers_of(student)[1]
    architecture = models.describe(student)
    assert layer.get_submodule(architecture.ffn_input).weight.shape == (50, 24) and architecture.heads(layer) == 3
    assert student.config.vocab_size == teacher.config.vocab_size and student.num_labels == 3
    given = inputs()
    again, other = (copies.random(teacher, 2, 24, 3, 50, seed).model for seed in (5, 6))
    assert identical(outputs(student, given), outputs(again, given))
    assert not identical(outputs(student, given), outputs(other, given))


def test_students_are_prepared_and_packed() -> None:
    for student in (copies.layers(tiny(), 1).model, copies.random(tiny(), 2, 24, 3, 50).model):
        packed = lowbit.convert(lowbit.prepare(student, lowbit.TernaryConfig()))
        assert packed(**batch()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": 3}, "layers=3 of a teacher of 2; accepted: 1 to 2"),
        ({"layers": 0}, "layers=0; accepted: a whole number of at least 1"),
        ({"which": "middle"}, "accepted: uniform, first, last, alternate"),
        ({"which": [0, 2]}, "of a teacher of 2 0 to 1"),
        ({"which": []}, "accepted: a list of layers"),
    ],
)
def test_layers_that_are_not_there(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        copies.layers(tiny(), **fields)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="hidden=312 is no multiple of heads=10"):
        copies.random(tiny(), hidden=312, heads=10)
    with pytest.raises(ValueError, match=r"heads=2\.5"):
        copies.random(tiny(), heads=2.5)  # type: ignore[arg-type]


def test_only_float_teachers_of_full_width() -> None:
    prepared = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    with pytest.raises(ValueError, match="the teacher is prepared"):
        copies.layers(prepared, 1)
    with pytest.raises(ValueError, match="the teacher is slimmed"):
        copies.layers(lowbit.slim(tiny()), 1)
    copies.layers(type(prepared)(prepared.config), 1)  # float, whatever became of the other
