"""Squeezed weights are the products of the formula, start as slices, train, resume, and fold into a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForSequenceClassification, Trainer

import lowbit
from helpers import batch, identical, outputs, tiny, training_arguments
from lowbit.distill.students import copies, squeeze
from test_architectures import KNOWN
from test_architectures import tiny as tiny_of

SIZES = {"layers": 2, "hidden": 24, "heads": 2, "intermediate": 50}


def teacher_of(**changes: Any) -> Any:
    return tiny(num_hidden_layers=4, **changes)


def blocks(factor: torch.Tensor, size: int) -> np.ndarray:
    """A factor of heads [A, a, b] as one matrix [A a, size], 0 outside of the blocks."""
    heads, small, large = factor.shape
    full = np.zeros((heads * small, size))
    for head in range(heads):
        full[head * small : (head + 1) * small, head * large : (head + 1) * large] = factor[head].detach().double()
    return full


def shaken(model: Any) -> Any:
    """Factors that are no identities."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("gated", [False, True])
def test_weights_are_the_formula(gated: bool) -> None:
    teacher = teacher_of()
    student = shaken(squeeze.build(teacher, **SIZES, which=[0, 3], gated=gated, gate=0.5).model)
    old, new = teacher.bert.encoder.layer[3], student.bert.encoder.layer[1]

    def check(got: nn.Module, taught: nn.Module, left: str, right: str) -> None:
        for tensor in ("weight", "bias"):
            factors = [each for _, each in got.parametrizations[tensor].named_parameters()]
            own, gate = (factors.pop(-2), factors.pop(-1)) if gated else (None, None)
            expected = getattr(taught, tensor).detach().double().numpy()
            sides = [left, right] if tensor == "weight" else [left]
            for axis, (factor, kind) in enumerate(zip(factors, sides, strict=True)):
                size = expected.shape[axis]
                full = blocks(factor, size) if kind == "heads" else factor.detach().double().numpy()
                expected = full @ expected if axis == 0 else expected @ full.T
            if gated:
                share = 1 / (1 + np.exp(-gate.item()))
                expected = share * own.detach().double().numpy() + (1 - share) * expected
            assert np.allclose(getattr(got, tensor).detach().numpy(), expected, atol=1e-5)

    check(new.attention.self.key, old.attention.self.key, "heads", "dense")
    check(new.attention.output.dense, old.attention.output.dense, "dense", "heads")
    check(new.intermediate.dense, old.intermediate.dense, "dense", "dense")
    check(new.output.dense, old.output.dense, "dense", "dense")
    check(student.bert.pooler.dense, teacher.bert.pooler.dense, "dense", "dense")


@pytest.mark.parametrize("prefix", ["Bert", *(name for name in KNOWN if name != "MPNet")])
def test_it_starts_as_a_slice_of_the_teacher(prefix: str) -> None:
    names = {"num_hidden_layers": 4} if prefix != "DistilBert" else {"n_layers": 4}
    teacher = teacher_of() if prefix == "Bert" else tiny_of(prefix, **names)
    model = squeeze.build(teacher, **SIZES, which="last").model
    folded = squeeze.build(teacher, **SIZES, which="last")
    student, parts = folded.finish(folded.model), lowbit.models.describe(teacher)
    old, new = copies.layers_of(teacher)[2], copies.layers_of(student)[0]
    rows = [*range(12), *range(16, 28)]  # the first 12 of the 16 of each of two heads
    for path in parts.projections:
        assert torch.equal(new.get_submodule(path).weight, old.get_submodule(path).weight[rows, :24])
    assert torch.equal(new.get_submodule(parts.ffn_output).weight, old.get_submodule(parts.ffn_output).weight[:24, :50])
    assert torch.equal(new.get_submodule(parts.ffn_norm).weight, old.get_submodule(parts.ffn_norm).weight[:24])
    width = min(24, teacher.get_input_embeddings().weight.shape[1]) if prefix != "Electra" else None
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight[:, :width])
    assert not any(map(parametrize.is_parametrized, student.modules())) and type(student) is type(teacher)
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"].clamp(min=2)
    assert torch.allclose(outputs(model, inputs)[0], outputs(student, inputs)[0], atol=1e-6)


def test_random_factors_keep_the_size_of_weights() -> None:
    teacher = teacher_of(hidden_size=128, intermediate_size=512)
    student = squeeze.build(teacher, 2, 96, 4, 384, init="random").model
    for got, taught in zip(copies.layers_of(student), copies.layers_of(teacher)[1::2], strict=True):
        for path in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
            ratio = got.get_submodule(path).weight.std() / taught.get_submodule(path).weight.std()
            assert 0.8 < ratio < 1.25


def test_the_teachers_weights_are_neither_trained_nor_shared_nor_saved(tmp_path: Path) -> None:
    teacher = teacher_of()
    before = {name: each.clone() for name, each in teacher.state_dict().items()}
    student = squeeze.build(teacher, **SIZES).model
    assert not any(name.endswith(".teacher") for name in student.state_dict())
    student(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(each.grad is not None for each in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        shaken(student)
        for name, buffer in student.named_buffers():
            if name.endswith(".teacher"):
                buffer.zero_()
    assert all(torch.equal(each, before[name]) for name, each in teacher.state_dict().items())


@pytest.mark.parametrize("gated", [False, True])
def test_a_run_goes_on_to_the_same_bits_learns_and_ends_as_a_plain_model(gated: bool, tmp_path: Path) -> None:
    teacher = teacher_of()
    rows = [torch.randint(1, 101, (9,)) for _ in range(48)]
    data = [{"input_ids": each, "labels": each[0] % 3} for each in rows]

    def run(name: str, **changes: Any) -> tuple[Any, Any]:
        built = squeeze.build(teacher, **SIZES, gated=gated)
        values = {"save_strategy": "steps", "save_steps": 20, "max_steps": 40, "per_device_train_batch_size": 16}
        args = training_arguments(tmp_path / name, learning_rate=3e-3, **values)
        trainer = Trainer(built.model, args, train_dataset=data)
        trainer.train(**changes)
        return built, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    built, losses = run("whole")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    again, _ = run("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-20"))
    pairs = zip(built.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    inputs = batch()
    expected = outputs(built.model.eval(), inputs)
    model = built.finish(built.model)
    assert torch.allclose(outputs(model, inputs)[0], expected[0], atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert identical(outputs(loaded, inputs), outputs(model, inputs)) and loaded.config.hidden_size == 24
    packed = lowbit.convert(lowbit.prepare(loaded, lowbit.TernaryConfig()))
    assert outputs(packed, inputs)[0].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heads": 5}, "hidden=24 is no multiple of heads=5"),
        ({"heads": 8}, "heads=8, and the teacher has 4"),
        ({"layers": 5}, "layers=5 of a teacher of 4"),
        ({"init": "zeros"}, "init='zeros'; accepted: identity, random"),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        squeeze.build(teacher_of(), **{**SIZES, **fields})


def test_a_weight_that_two_modules_share_is_refused() -> None:
    with pytest.raises(ValueError, match="BertForMaskedLM shares a weight"):
        squeeze.build(tiny("BertForMaskedLM"), **SIZES)
    with pytest.raises(ValueError, match="relative_attention_bias"):
        squeeze.build(tiny_of("MPNet"), **SIZES)
