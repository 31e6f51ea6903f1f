"""Layers are trained in their phases at their rates; a MobileBERT is a student, also a 2-bit one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

import lowbit
from helpers import batch, identical, outputs, tiny, training_arguments
from lowbit.distill.objectives import StatisticsLoss
from lowbit.distill.schedules import Scheduled
from lowbit.distill.students import mobile
from lowbit.distill.students.mobile import LayerRates

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {"bottleneck": 32, "heads": 2, "intermediate": 40, "feedforward": 2}


def teacher_of(**changes: Any) -> Any:
    return tiny(num_hidden_layers=3, **{**NO_DROPOUT, **changes})


def dataset(rows: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = [torch.randint(1, 101, (9,)) for _ in range(rows)]
    return [{"input_ids": each, "attention_mask": torch.ones(9).long(), "labels": each[0] % 3} for each in ids]


def trained(folder: Path, model: Any, data: Any, callbacks: Any = (), resume: str | None = None, **changes: Any) -> Any:
    values = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "per_device_train_batch_size": 4}
    args = training_arguments(folder, lr_scheduler_type="constant", **{**values, **changes})
    Trainer(model, args, train_dataset=data, callbacks=[*callbacks]).train(resume_from_checkpoint=resume)
    return model


def test_factors_by_phase() -> None:
    rates = LayerRates(until=0.6)
    assert rates.factors(0.0, 3) == rates.factors(0.19, 3) == [3.0, 0.0, 0.0]
    assert rates.factors(0.2, 3) == [0.3, 3.0, 0.0]
    assert rates.factors(0.59, 3) == [0.3, 0.3, 3.0]
    assert rates.factors(0.6, 3) is None and rates.factors(0.99, 3) is None


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_a_step_is_scaled_whatever_the_optimizer(optim: str, tmp_path: Path) -> None:
    start, data = teacher_of(), dataset()
    plain, scaled = copy.deepcopy(start), copy.deepcopy(start)
    trained(tmp_path, plain, data, max_steps=1, optim=optim)
    callback = LayerRates(during=2.0, before=0.25, others=0.0)
    trained(tmp_path, scaled, data, [callback], max_steps=1, optim=optim)
    for (name, before), whole, own in zip(
        start.named_parameters(), plain.parameters(), scaled.parameters(), strict=True
    ):
        factor = 2.0 if "layer.0." in name else 0.25 if ".layer." in name else 0.0
        assert torch.allclose(own - before, factor * (whole - before), atol=1e-7), name
        assert torch.equal(own, before) == (factor == 0 or torch.equal(whole, before)), name


def test_phases_of_a_run_which_resumes_to_the_same_bits(tmp_path: Path) -> None:
    start, data = teacher_of(), dataset(24)
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", copy.deepcopy(start), data, [LayerRates(until=0.75)], **changes)
    checkpoint = str(tmp_path / "whole/checkpoint-3")
    again = trained(tmp_path / "again", copy.deepcopy(start), data, [LayerRates(until=0.75)], checkpoint, **changes)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    saved = AutoModelForSequenceClassification.from_pretrained(checkpoint)  # steps 0 to 2: phases of layers 0 and 1
    for (name, before), now in zip(start.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(before, now) == (".layer.0." not in name and ".layer.1." not in name), name
    assert not torch.equal(whole.classifier.weight, start.classifier.weight)  # trained after the transfer


def test_only_the_open_gate_teaches(tmp_path: Path) -> None:
    """Feature maps and statistics, one layer after the other, into a 2-bit student of the teacher's width."""
    teacher = teacher_of()
    built = mobile.transfer(teacher)
    student = lowbit.prepare(built.model, lowbit.TernaryConfig())
    gates = {"kind": "gates", "layers": 3}
    maps = lowbit.HiddenStateLoss(100 / 3, embedding=False, distance="layer_norm", layer_weights=(1.0, 0.0, 0.0))
    objectives = [
        Scheduled(maps, layer_weights=gates),
        Scheduled(StatisticsLoss(layer_weights=(1.0, 0.0, 0.0)), layer_weights=gates),
    ]
    args = training_arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3)
    before = {name: each.clone() for name, each in student.named_parameters()}
    trainer = lowbit.DistillationTrainer(
        student, args, teacher=teacher, objectives=objectives, train_dataset=dataset(), callbacks=[*built.callbacks]
    )
    trainer.train()
    moved = {name for name, each in student.named_parameters() if not torch.equal(each, before[name])}
    assert all(any(f".layer.{layer}." in name for name in moved) for layer in range(3))
    assert all(".layer." in name for name in moved)
    assert lowbit.convert(built.finish(student))(**batch()).logits.isfinite().all()


def test_fresh_layers_between_the_teachers_embeddings_and_head() -> None:
    teacher = teacher_of()
    student = mobile.transfer(teacher, 2, "first", fresh=True, seed=3).model
    state = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if ".layer." not in name:
            assert torch.equal(state[name], tensor)
        elif name in state and name.endswith("dense.weight"):
            assert not torch.allclose(state[name], tensor, atol=0.01)
    assert student.config.num_hidden_layers == 2
    again = mobile.transfer(teacher, 2, "first", fresh=True, seed=3).model.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)


@pytest.mark.parametrize("normalization", mobile.NORMS)
def test_a_mobilebert_is_a_student(normalization: str, tmp_path: Path) -> None:
    teacher, inputs = teacher_of(), batch()
    built = mobile.build(teacher, **SMALL, normalization=normalization)
    own, theirs = built.model.mobilebert.embeddings, teacher.bert.embeddings
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)
    if normalization == "layer_norm":
        assert torch.allclose(own(inputs["input_ids"]), theirs(inputs["input_ids"]), atol=0.01)
    args = training_arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3)
    trainer = lowbit.DistillationTrainer(
        built.model, args, teacher=teacher, train_dataset=dataset(), callbacks=[*built.callbacks],
        objectives=[lowbit.HiddenStateLoss(), StatisticsLoss(), lowbit.LogitsLoss()],
    )  # fmt: skip
    trainer.train()
    assert torch.equal(built.model.mobilebert.embeddings.word_embeddings.weight, theirs.word_embeddings.weight)
    student = built.finish(built.model.eval())
    student.save_pretrained(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert identical(outputs(loaded, inputs), outputs(student, inputs))
    packed = lowbit.convert(lowbit.prepare(loaded, lowbit.TernaryConfig()))
    assert outputs(packed, inputs)[0].isfinite().all()


def test_a_mobileberts_scores_are_refused_before_training(tmp_path: Path) -> None:
    teacher = teacher_of()
    with pytest.raises(ValueError, match="has model_type 'mobilebert'"):
        lowbit.DistillationTrainer(
            mobile.build(teacher, **SMALL).model, training_arguments(tmp_path), teacher=teacher,
            objectives=[lowbit.AttentionScoreLoss()],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heads": 5}, "hidden=32 is no multiple of heads=5"),
        ({"feedforward": 0}, "feedforward=0"),
        ({"normalization": "batch"}, "normalization='batch'; accepted: layer_norm, no_norm"),
        ({"until": 0.0}, r"until=0\.0"),
        ({"during": -1.0}, r"during=-1\.0"),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mobile.build(teacher_of(), **{**SMALL, **fields})


def test_teachers_without_a_classifier() -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification, not a BertForMaskedLM"):
        mobile.build(tiny("BertForMaskedLM"), **SMALL)
