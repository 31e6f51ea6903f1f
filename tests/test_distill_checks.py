"""What cannot be distilled is said when the trainer is made, before anything changes, with what to pass instead."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MPNetConfig, MPNetForSequenceClassification, TrainingArguments

import lowbit
from helpers import SIZES, tiny
from lowbit import AttentionScoreLoss, HiddenStateLoss, LengthConfig, LogitsLoss, TaskLoss


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_strategy="no", logging_steps=1
    )


def dataset(words: int = 90) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(1, words, (7,)), "labels": torch.tensor(row % 3)} for row in range(8)]


def mpnet(**changes: Any) -> Any:
    return MPNetForSequenceClassification(MPNetConfig(**{**SIZES, "num_labels": 3, **changes}))


def trained(folder: Path, student: Any, teacher: Any, **kwargs: Any) -> Any:
    trainer = lowbit.DistillationTrainer(
        model=student, teacher=teacher, args=arguments(folder), train_dataset=dataset(), **kwargs
    )
    trainer.train()
    return trainer


# What is wrong: student, teacher, objectives (None: the default), what the error says.
REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "hidden size": (
        lambda: tiny(hidden_size=32),
        tiny,
        None,
        r"HiddenStateLoss: student hidden size 32, teacher 64; they must be equal\. "
        r"Pass objectives=\[AttentionScoreLoss\(\), LogitsLoss\(\)\].* or take a student of hidden size 64",
    ),
    "hidden size, no scores": (
        lambda: mpnet(hidden_size=32),
        mpnet,
        None,
        r"student hidden size 32, teacher 64; .* Pass objectives=\[LogitsLoss\(\)\]",
    ),
    "layers, hidden states": (
        lambda: tiny(num_hidden_layers=3),
        lambda: tiny(num_hidden_layers=4),
        [HiddenStateLoss()],
        r"HiddenStateLoss: 3 student layers do not divide 4 teacher layers evenly; take a student of 1, 2, 4 layers, "
        r"or .*objectives=\[LogitsLoss\(\)\]",
    ),
    "layers, scores": (
        lambda: tiny(num_hidden_layers=4),
        tiny,
        [AttentionScoreLoss()],
        r"AttentionScoreLoss: 4 student layers do not divide 2 teacher layers evenly; take a student of 1, 2 layers",
    ),
    "labels": (
        lambda: tiny(num_labels=5),
        tiny,
        None,
        r"LogitsLoss: student of 5 labels, teacher of 3; equal needed. Load the student with num_labels=3",
    ),
    "words": (
        lambda: tiny("BertForMaskedLM", vocab_size=90),
        lambda: tiny("BertForMaskedLM"),
        [LogitsLoss()],
        r"LogitsLoss: the student predicts 90 words, the teacher 101; equal needed",
    ),
    "no head": (
        tiny,
        lambda: tiny("BertModel"),
        None,
        r"the teacher, a BertModel, has no head and returns no logits; load it as .*BertForSequenceClassification",
    ),
    "token ids": (
        lambda: tiny(vocab_size=104),
        tiny,
        [TaskLoss()],
        r"student has a vocabulary of 104 tokens, the teacher of 101: .* 101 to 103 are none of the teacher's.*"
        r"teacher.resize_token_embeddings\(104\)",
    ),
    "scores of a teacher": (tiny, mpnet, [AttentionScoreLoss()], r"AttentionScoreLoss supports models of type bert"),
    "scores of a student": (mpnet, tiny, [AttentionScoreLoss()], r"AttentionScoreLoss supports models of type bert"),
    "student drops tokens": (
        lambda: lowbit.set_length(tiny(), LengthConfig((0.9, 0.5))),
        tiny,
        [HiddenStateLoss()],
        r"hidden_states of all tokens are compared, and the student drops tokens .*set_length\(model, None\)",
    ),
    "teacher drops tokens": (
        tiny,
        lambda: lowbit.set_length(tiny(), LengthConfig((0.9, 0.5))),
        [AttentionScoreLoss()],
        r"scores of all tokens are compared, and the teacher drops tokens .*objectives=\[LogitsLoss\(\)\]",
    ),
}


@pytest.mark.parametrize("schedule", ["joint", "later stage", "model_init"])
@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_compared_is_said_before_anything_changes(tmp_path: Path, wrong: str, schedule: str) -> None:
    make_student, make_teacher, objectives, message = REFUSED[wrong]
    student, teacher = make_student(), make_teacher().train()
    before = [copy.deepcopy(model.state_dict()) for model in (student, teacher)]
    implementations = [model.config._attn_implementation for model in (student, teacher)]
    kwargs: dict[str, Any] = {} if objectives is None else {"objectives": objectives}
    if schedule == "later stage":
        default = [HiddenStateLoss(), LogitsLoss()]
        kwargs = {"stages": [(0.5, [TaskLoss()]), (1.0, default if objectives is None else objectives)]}
    model = {"model_init": lambda: student} if schedule == "model_init" else {"model": student}
    with pytest.raises(ValueError, match=message):
        lowbit.DistillationTrainer(teacher=teacher, args=arguments(tmp_path), **model, **kwargs)
    assert teacher.training
    assert [model.config._attn_implementation for model in (student, teacher)] == implementations
    for model, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_advice_can_be_followed(tmp_path: Path) -> None:
    """Each of what the errors propose trains."""
    trained(tmp_path, tiny(hidden_size=32), tiny(), objectives=[AttentionScoreLoss(), LogitsLoss()])
    trained(tmp_path, tiny(num_hidden_layers=3), tiny(num_hidden_layers=4), objectives=[LogitsLoss()])
    for layers in (1, 2, 4):
        trained(tmp_path, tiny(num_hidden_layers=layers), tiny(num_hidden_layers=4))
    teacher = tiny()
    teacher.resize_token_embeddings(104)
    trained(tmp_path, tiny(vocab_size=104), teacher)
    trained(tmp_path, mpnet(hidden_size=32), mpnet(), objectives=[LogitsLoss()])
    student = lowbit.set_length(tiny(), LengthConfig((0.9, 0.5)))
    trained(tmp_path, student, tiny(), objectives=[LogitsLoss()])
    trained(tmp_path, lowbit.set_length(student, None), tiny())


def test_a_smaller_vocabulary_is_warned_of_and_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        trained(tmp_path, tiny(), tiny())
        assert not caplog.records
        trained(tmp_path, tiny(vocab_size=96), tiny())
    (record,) = caplog.records
    assert "vocabulary of 96 tokens, the teacher of 101" in record.getMessage()


def test_numbers_of_labels_matter_only_to_heads_that_have_labels(tmp_path: Path) -> None:
    """A word's logits are as many as words, whatever `num_labels` of the configuration says."""
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in dataset()]
    lowbit.DistillationTrainer(
        model=tiny("BertForMaskedLM", num_labels=7),
        teacher=tiny("BertForMaskedLM"),
        args=arguments(tmp_path),
        train_dataset=data,
    ).train()


@pytest.mark.parametrize("objective", [HiddenStateLoss(), AttentionScoreLoss(), LogitsLoss()])
def test_objectives_that_compare_need_a_teacher(tmp_path: Path, objective: Any) -> None:
    kind = type(objective).__name__
    with pytest.raises(ValueError, match=rf"{kind} compares with a teacher, and there is none; pass teacher="):
        lowbit.LengthDropTrainer(model=tiny(), args=arguments(tmp_path), objectives=[TaskLoss(), objective])
    lowbit.LengthDropTrainer(model=tiny(), args=arguments(tmp_path), objectives=[TaskLoss()])


def test_training_for_any_length_compares_states_of_a_student_that_has_lengths(tmp_path: Path) -> None:
    student = lowbit.set_length(tiny(), LengthConfig((0.9, 0.5)))
    trainer = lowbit.LengthDropTrainer(
        model=student, teacher=tiny(), args=arguments(tmp_path), train_dataset=dataset(), objectives=[HiddenStateLoss()]
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss_hidden"] > 0


def test_every_student_of_model_init_is_checked(tmp_path: Path) -> None:
    students = iter([tiny(), tiny(), tiny(hidden_size=32)])
    trainer = lowbit.DistillationTrainer(
        model_init=lambda: next(students), teacher=tiny(), args=arguments(tmp_path), train_dataset=dataset()
    )
    trainer.train()
    with pytest.raises(ValueError, match="student hidden size 32, teacher 64"):
        trainer.train()


def test_a_model_init_that_shares_the_teachers_parameters_is_refused(tmp_path: Path) -> None:
    teacher = tiny()
    with pytest.raises(ValueError, match="share the trainable parameter"):
        lowbit.DistillationTrainer(model_init=lambda: teacher, teacher=teacher, args=arguments(tmp_path))


class Narrow:
    """An objective of a user's that says itself what it cannot compare."""

    name, needs = "narrow", ()

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Any]] = []

    def check(self, student: Any, teacher: Any) -> None:
        self.asked.append((student, teacher))
        if student.config.hidden_size > 32:
            raise ValueError(f"Narrow: hidden size {student.config.hidden_size}; take up to 32")

    def __call__(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        return student.logits.square().mean()


def test_objectives_of_users_may_check_the_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Narrow: hidden size 64; take up to 32"):
        trained(tmp_path, tiny(), tiny(), stages=[(0.5, [LogitsLoss()]), (1.0, [Narrow()])])
    objective, student, teacher = Narrow(), tiny(hidden_size=32), tiny()
    trained(tmp_path, student, teacher, objectives=[objective])
    assert objective.asked == [(student, teacher)]
    objective = Narrow()
    lowbit.LengthDropTrainer(model=student, args=arguments(tmp_path), objectives=[objective])
    assert objective.asked == [(student, None)]


def test_sizes_that_a_configuration_does_not_name_are_left_to_the_call() -> None:
    student: Any = SimpleNamespace(config=SimpleNamespace(), get_output_embeddings=lambda: None)
    for objective in (HiddenStateLoss(), AttentionScoreLoss(), LogitsLoss()):
        objective.check(student, tiny())
