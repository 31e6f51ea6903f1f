"""A DeFormer computes what its masks and positions say, from cached passages too, and loads like any other model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, Trainer

import lowbit
from helpers import tiny, training_arguments
from lowbit.distill.students import deformer
from lowbit.modeling.deformer import DeformerForQuestionAnswering, DeformerForSequenceClassification

HEADS = ["BertForQuestionAnswering", "BertForSequenceClassification"]
QUESTIONS, LENGTHS = [5, 3, 4, 6], [12, 9, 12, 6]  # the last pair has no passage


def teacher_of(head: str = HEADS[0], **changes: Any) -> Any:
    return tiny(head, **{"num_hidden_layers": 4, **changes})


def pairs() -> dict[str, torch.Tensor]:
    """Questions of 3 to 6 tokens, passages of 0 to 8, padding."""
    ids, places = torch.randint(1, 101, (4, 12)), torch.arange(12)
    mask = torch.stack([(places < length).long() for length in LENGTHS])
    types = torch.stack([(places >= asked).long() for asked in QUESTIONS]) * mask
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types}


def states_by_masks(teacher: Any, inputs: dict[str, torch.Tensor], separate: int, offset: int) -> list[torch.Tensor]:
    """The teacher's modules in float64 on whole batches: texts are kept apart by a mask, not taken apart."""
    bert = teacher.double().bert
    types, real = inputs["token_type_ids"], inputs["attention_mask"].bool()
    positions = torch.zeros_like(types)
    for row, asked in enumerate(QUESTIONS):
        for column in range(types.shape[1]):
            positions[row, column] = column if column < asked else column - asked + offset
    states = [bert.embeddings(inputs["input_ids"], token_type_ids=types, position_ids=positions * real)]
    both = (real[:, :, None] & real[:, None, :]) | torch.eye(types.shape[1], dtype=torch.bool)
    apart = both & (types[:, :, None] == types[:, None, :])
    for index, layer in enumerate(bert.encoder.layer):
        states.append(layer(states[-1], (apart if index < separate else both)[:, None]))
    return states


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("separate", "offset"), [(0, 0), (2, 0), (3, 7), (4, 20)])
def test_every_layer_is_the_teachers_under_a_mask(head: str, separate: int, offset: int) -> None:
    teacher, inputs = teacher_of(head), pairs()
    student = deformer.build(teacher, separate, offset).model
    with torch.no_grad():
        got = student(**inputs, output_hidden_states=True)
        expected = states_by_masks(teacher, inputs, separate, offset)
        assert len(got.hidden_states) == 5
        for own, wanted in zip(got.hidden_states, expected, strict=True):
            real = inputs["attention_mask"].bool()
            assert torch.allclose(own[real].double(), wanted[real], atol=1e-5)
        if head == "BertForSequenceClassification":
            logits = teacher.classifier(teacher.bert.pooler(expected[-1]))
            assert torch.allclose(got.logits.double(), logits, atol=1e-5)
        else:
            logits = teacher.qa_outputs(expected[-1])[..., 0]
            assert torch.allclose(got.start_logits.double()[real], logits[real], atol=1e-5)


def test_where_no_layer_reads_apart_and_positions_go_on_it_is_bert() -> None:
    teacher, inputs = teacher_of(), pairs()
    same = {name: each[:1] for name, each in inputs.items()}  # a question of 5
    student = deformer.build(teacher, 0, 5).model
    assert torch.allclose(student(**same).start_logits, teacher(**same).start_logits, atol=1e-6)


def passages_of(model: Any, inputs: dict[str, torch.Tensor], rows: list[int]) -> Any:
    """The passages of some pairs, padded to one more than the longest."""
    ids = [inputs["input_ids"][row, QUESTIONS[row] : LENGTHS[row]] for row in rows]
    width = max(map(len, ids)) + 1
    mask = torch.stack([(torch.arange(width) < len(each)).long() for each in ids])
    padded = torch.stack([torch.nn.functional.pad(each, (0, width - len(each))) for each in ids])
    return model.encode_passages(padded, mask)


def stage(model: Any, name: str) -> Any:
    if name == "float":
        return model
    prepared = lowbit.prepare(model, lowbit.TernaryConfig())
    return prepared if name == "prepared" else lowbit.convert(prepared)


@pytest.mark.parametrize("name", ["float", "prepared", "packed"])
@pytest.mark.parametrize("head", HEADS)
def test_cached_passages_give_the_same_answers(head: str, name: str) -> None:
    inputs, rows = pairs(), [0, 1, 2]
    model = stage(deformer.build(teacher_of(head), 2, 6).model, name)
    ids = [inputs["input_ids"][row, : QUESTIONS[row]] for row in rows]
    questions = torch.stack([torch.nn.functional.pad(each, (0, 7 - len(each))) for each in ids])
    mask = torch.stack([(torch.arange(7) < QUESTIONS[row]).long() for row in rows])
    with torch.no_grad():
        whole = model(**inputs)
        cached = model(input_ids=questions, attention_mask=mask, passages=passages_of(model, inputs, rows))
    for key in ("logits", "start_logits", "end_logits"):
        if key in whole:
            places = inputs["attention_mask"].bool()[rows] if key != "logits" else ...
            assert torch.allclose(cached[key][places], whole[key][rows][places], atol=1e-5)


def test_one_passage_for_all_questions_and_passages_by_index() -> None:
    model = deformer.build(teacher_of(), 3).model
    inputs = pairs()
    read = passages_of(model, inputs, [0, 2])
    questions = torch.randint(1, 101, (3, 4))
    with torch.no_grad():
        every = model(input_ids=questions, passages=read[[1]]).start_logits
        single = [model(input_ids=each[None], passages=read[[1]]).start_logits[0] for each in questions]
        mixed = model(input_ids=questions, passages=read[[0, 1, 0]]).start_logits
    assert torch.allclose(every, torch.stack(single), atol=1e-6) and every.shape == (3, 4 + 8)
    assert torch.allclose(mixed[1], every[1], atol=1e-6) and not torch.allclose(mixed[0, :11], every[0, :11], atol=1e-3)


def test_lower_layers_read_no_passage_again() -> None:
    model = deformer.build(teacher_of(), 3).model
    read, seen = passages_of(model, pairs(), [0]), []
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    model(input_ids=torch.randint(1, 101, (1, 4)), passages=read)
    assert seen == [4, 4, 4, 4 + 7]


def test_padding_and_pairs_without_a_passage_leave_gradients_finite() -> None:
    model = deformer.build(teacher_of(HEADS[1]), 2).model.train()
    inputs = pairs()
    model(**inputs, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_teacher_is_compared_token_by_token(tmp_path: Path) -> None:
    teacher = teacher_of(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    student = deformer.build(teacher, 2, 4).model
    rows = [{name: each[index % 4] for name, each in pairs().items()} for index in range(32)]
    data = [{**row, "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)} for row in rows]
    args = training_arguments(tmp_path, max_steps=30, per_device_train_batch_size=8, learning_rate=3e-3)
    trainer = lowbit.DistillationTrainer(
        student, args, train_dataset=data, teacher=teacher,
        objectives=[lowbit.HiddenStateLoss(), lowbit.LogitsLoss(4.0, 2.0), lowbit.TaskLoss()],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss_hidden"] for entry in trainer.state.log_history if "loss_hidden" in entry]
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(ValueError, match="AttentionScoreLoss supports"):
        lowbit.DistillationTrainer(
            student, args, train_dataset=data, teacher=teacher, objectives=[lowbit.AttentionScoreLoss()]
        )


@pytest.mark.parametrize(
    ("head", "name"), [(HEADS[0], "float"), (HEADS[0], "packed"), (HEADS[1], "float"), (HEADS[1], "prepared")]
)
def test_it_loads_in_a_new_process(head: str, name: str, tmp_path: Path) -> None:
    model = stage(deformer.build(teacher_of(head), 2, 6).model, name)
    inputs = pairs()
    with torch.no_grad():
        expected = model(**inputs).to_tuple()[0]
    model.save_pretrained(tmp_path)
    torch.save((inputs, expected), tmp_path / "expected.pt")
    auto = head.replace("Bert", "AutoModel")
    load = f"transformers.{auto}" if name in ("float", "prepared") else "lowbit"
    program = f"""
import torch, lowbit, transformers
assert transformers.AutoConfig.from_pretrained({str(tmp_path)!r}).separate_layers == 2
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = {load}.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    print(type(model).__name__, torch.equal(model(**inputs).to_tuple()[0], expected))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [head.replace("Bert", "Deformer"), "True"]


def test_a_program_without_lowbit_loads_it_too(tmp_path: Path) -> None:
    model = stage(deformer.build(teacher_of(), 2, 6).model, "packed")
    model.save_pretrained(tmp_path, self_contained=True)
    program = f"""
import sys
from transformers import AutoModelForQuestionAnswering as Auto
model = Auto.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
print(type(model).__name__, type(model.bert).__name__, model.config.separate_layers)
"""
    cache = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=cache)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["DeformerForQuestionAnswering", "DeformerModel", "2"]


def test_what_cannot_be_is_said() -> None:
    inputs = pairs()
    for fields, said in [
        ({"separate_layers": 5}, "separate_layers=5 of 4; accepted: 0 to 4"),
        ({"separate_layers": 2, "passage_offset": 40}, "passage_offset=40; accepted: 0 to 39"),
    ]:
        with pytest.raises(ValueError, match=said):
            deformer.build(teacher_of(), **fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="made of a BertForQuestionAnswering or BertForSequenceClassification"):
        deformer.build(tiny("BertForMaskedLM"), 1)
    model = deformer.build(teacher_of(), 2, 35).model
    with pytest.raises(ValueError, match=r"ends at position 42 \(passages begin at 35\), and the model has 40"):
        model(**inputs)
    with pytest.raises(ValueError, match="needs token_type_ids"):
        model(inputs["input_ids"])
    with pytest.raises(ValueError, match="2 passages for 3 questions"):
        read = model.encode_passages(inputs["input_ids"][:2, :3])
        model(inputs["input_ids"][:3, :3], passages=read)
    with pytest.raises(ValueError, match="no map of all tokens"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="set_length supports"):
        lowbit.set_length(model, lowbit.LengthConfig((0.5,) * 4))
    with pytest.raises(ValueError, match="fuse supports"):
        lowbit.fuse(stage(model, "packed"))


def test_a_trained_one_is_an_ordinary_model(tmp_path: Path) -> None:
    model = deformer.build(teacher_of(), 2).model
    assert type(model) is DeformerForQuestionAnswering
    assert type(deformer.build(teacher_of(HEADS[1]), 2).model) is DeformerForSequenceClassification
    rows = [{name: each[index] for name, each in pairs().items()} for index in range(4)]
    data = [{**row, "start_positions": torch.tensor(1), "end_positions": torch.tensor(2)} for row in rows]
    trainer = Trainer(model, training_arguments(tmp_path, max_steps=2), train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    assert type(AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")) is DeformerForQuestionAnswering
