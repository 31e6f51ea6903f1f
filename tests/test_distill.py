"""Distillation losses equal their formulas, and DistillationTrainer trains, accumulates, logs and resumes rightly."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput, QuestionAnsweringModelOutput, SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput

import lowbit
from helpers import batch, tiny, training_arguments
from lowbit import AttentionScoreLoss, HiddenStateLoss, LogitsLoss, TaskLoss
from lowbit.distill.states import of_kept_heads

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TWO_STAGES = [(0.5, [HiddenStateLoss(), AttentionScoreLoss()]), (1.0, [LogitsLoss()])]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
    }
    return training_arguments(folder, **{**values, **changes})


def dataset(rows: int = 32, length: int = 9) -> list[dict[str, torch.Tensor]]:
    """Every second sentence is padded, so that all batches of an even size hold equally many real tokens."""
    examples = []
    for row in range(rows):
        mask = torch.ones(length, dtype=torch.long)
        mask[length - 4 * (row % 2) :] = 0
        ids = torch.randint(1, 101, (length,))
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(row % 3)})
    return examples


def distil(folder: Path, student: Any, teacher: Any, data: Any, **kwargs: Any) -> lowbit.DistillationTrainer:
    changes = kwargs.pop("arguments", {})
    trainer = lowbit.DistillationTrainer(
        model=student, teacher=teacher, args=arguments(folder, **changes), train_dataset=data, **kwargs
    )
    trainer.train()
    return trainer


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


# --- the formulas, written again in float64 numpy, token by token -----------------------------------------------------


def expected_hidden(student: list[Any], teacher: list[Any], mask: np.ndarray | None) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        per_token = [
            np.mean((s[b, i] - t[b, i]) ** 2)
            for b in range(s.shape[0])
            for i in range(s.shape[1])
            if mask is None or mask[b, i]
        ]
        total += np.mean(per_token)
    return float(total)


def expected_attention(student: list[Any], teacher: list[Any], mask: np.ndarray, include_padding: bool) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        entries = []
        for b, h, i, j in np.ndindex(s.shape):
            if include_padding:
                entries.append((s[b, h, i, j] - t[b, h, i, j]) ** 2 if mask[b, j] else 0.0)
            elif mask[b, i] and mask[b, j]:
                entries.append((s[b, h, i, j] - t[b, h, i, j]) ** 2)
        total += np.mean(entries)
    return float(total)


def expected_logits(student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0) -> float:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    target = np.exp(log_softmax(teacher / temperature))
    return float(np.mean(-(target * log_softmax(student / temperature)).sum(-1)))


@pytest.mark.parametrize("include_padding", [False, True])
def test_hidden_loss_is_its_formula(include_padding: bool) -> None:
    mask = batch(rows=3, length=11)["attention_mask"]
    student, teacher = ([torch.randn(3, 11, 16) for _ in range(4)] for _ in range(2))
    loss = HiddenStateLoss(weight=0.7, include_padding=include_padding)(
        BaseModelOutput(hidden_states=tuple(student)),
        BaseModelOutput(hidden_states=tuple(teacher)),
        {"attention_mask": mask},
    )
    rows = None if include_padding else mask.numpy()
    expected = 0.7 * expected_hidden([*map(array, student)], [*map(array, teacher)], rows)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("include_padding", [False, True])
def test_attention_loss_is_its_formula(include_padding: bool) -> None:
    mask = batch(rows=3, length=7)["attention_mask"]
    student, teacher = ([torch.randn(3, 4, 7, 7) for _ in range(2)] for _ in range(2))
    loss = AttentionScoreLoss(weight=0.3, include_padding=include_padding)(
        BaseModelOutput(attentions=tuple(student)),
        BaseModelOutput(attentions=tuple(teacher)),
        {"attention_mask": mask},
    )
    expected = expected_attention([*map(array, student)], [*map(array, teacher)], mask.numpy(), include_padding)
    assert loss.item() == pytest.approx(0.3 * expected, rel=1e-5)


def test_students_with_fewer_heads_are_compared_by_the_mean_over_heads() -> None:
    mask = batch(rows=2, length=6)["attention_mask"]
    student, teacher = torch.randn(2, 2, 6, 6), torch.randn(2, 4, 6, 6)
    loss = AttentionScoreLoss()(
        BaseModelOutput(attentions=(student,)), BaseModelOutput(attentions=(teacher,)), {"attention_mask": mask}
    )
    means = [array(x).mean(1, keepdims=True) for x in (student, teacher)]
    assert loss.item() == pytest.approx(expected_attention(means[:1], means[1:], mask.numpy(), False), rel=1e-5)


def test_a_shallow_student_learns_from_every_second_layer_and_the_embedding() -> None:
    student, teacher = [torch.randn(2, 5, 8) for _ in range(3)], [torch.randn(2, 5, 8) for _ in range(5)]
    loss = HiddenStateLoss()(
        BaseModelOutput(hidden_states=tuple(student)), BaseModelOutput(hidden_states=tuple(teacher)), {}
    )
    chosen = [teacher[0], teacher[2], teacher[4]]
    assert loss.item() == pytest.approx(expected_hidden([*map(array, student)], [*map(array, chosen)], None), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logits_loss_is_the_soft_cross_entropy(temperature: float) -> None:
    student, teacher = torch.randn(6, 5) * 4, torch.randn(6, 5) * 4
    loss = LogitsLoss(weight=2.0, temperature=temperature)(
        SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher), {}
    )
    assert loss.item() == pytest.approx(2 * expected_logits(array(student), array(teacher), temperature), rel=1e-5)


def test_logits_loss_of_a_regression_is_the_squared_error() -> None:
    student, teacher = torch.randn(6, 1), torch.randn(6, 1)
    loss = LogitsLoss()(SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher), {})
    assert loss.item() == pytest.approx(float(np.mean((array(student) - array(teacher)) ** 2)), rel=1e-5)


def test_logits_loss_of_several_targets_and_of_several_labels() -> None:
    student, teacher = torch.randn(6, 3), torch.randn(6, 3)
    outputs = [SequenceClassifierOutput(logits=logits) for logits in (student, teacher)]
    loss = LogitsLoss(problem_type="regression")(*outputs, {})
    assert loss.item() == pytest.approx(((array(student) - array(teacher)) ** 2).mean(), rel=1e-5)
    s, t = (1 / (1 + np.exp(-array(logits))) for logits in (student, teacher))
    expected = -(t * np.log(s) + (1 - t) * np.log(1 - s)).mean()
    for labels in ({"labels": torch.rand(6, 3)}, {}):
        kind = None if labels else "multi_label_classification"
        assert LogitsLoss(problem_type=kind)(*outputs, labels).item() == pytest.approx(expected, rel=1e-5)


def test_logits_loss_of_pretraining_averages_both_heads() -> None:
    words, pairs = (torch.randn(2, 2, 4, 9), torch.randn(2, 2, 2))
    student, teacher = (
        BertForPreTrainingOutput(prediction_logits=words[i], seq_relationship_logits=pairs[i]) for i in range(2)
    )
    labels = torch.tensor([[-100, 3, -100, 5], [-100, -100, 1, -100]])
    seen = labels != -100
    tokens = expected_logits(array(words[0][seen]), array(words[1][seen]))
    expected = (tokens + expected_logits(array(pairs[0]), array(pairs[1]))) / 2
    assert LogitsLoss()(student, teacher, {"labels": labels}).item() == pytest.approx(expected, rel=1e-5)


def test_logits_loss_of_question_answering_averages_start_and_end() -> None:
    s_start, s_end, t_start, t_end = (torch.randn(4, 9) for _ in range(4))
    loss = LogitsLoss()(
        QuestionAnsweringModelOutput(start_logits=s_start, end_logits=s_end),
        QuestionAnsweringModelOutput(start_logits=t_start, end_logits=t_end),
        {},
    )
    start, end = expected_logits(array(s_start), array(t_start)), expected_logits(array(s_end), array(t_end))
    assert loss.item() == pytest.approx((start + end) / 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_is_never_in_the_padding(dtype: torch.dtype, temperature: float) -> None:
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0] * 3 + [1] * 6])  # padding on the left too
    student, teacher = (torch.randn(2, 3, 9).to(dtype) for _ in range(2))
    for logits in (student, teacher):
        logits.masked_fill_(mask == 0, 30.0)  # what a model says of padding is nobody's
    student.requires_grad_()
    loss = LogitsLoss(temperature=temperature)(
        QuestionAnsweringModelOutput(start_logits=student[0], end_logits=student[1]),
        QuestionAnsweringModelOutput(start_logits=teacher[0], end_logits=teacher[1]),
        {"attention_mask": mask},
    )
    rows = [
        expected_logits(array(s[i, seen])[None], array(t[i, seen])[None], temperature)
        for s, t in zip(student.detach().float(), teacher.float(), strict=True)
        for i, seen in enumerate(mask.bool())
    ]
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-5)
    loss.backward()
    assert torch.isfinite(student.grad).all() and not student.grad[:, mask == 0].any()


def test_token_logits_count_labelled_tokens_only_and_none_is_no_nan() -> None:
    student, teacher = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    labels = torch.full((2, 6), -100)
    outputs = SequenceClassifierOutput(logits=student), SequenceClassifierOutput(logits=teacher)
    assert LogitsLoss()(*outputs, {"labels": labels}).item() == 0.0
    labels[0, 2], labels[1, 4] = 1, 3
    expected = expected_logits(array(student)[[0, 1], [2, 4]], array(teacher)[[0, 1], [2, 4]])
    assert LogitsLoss()(*outputs, {"labels": labels}).item() == pytest.approx(expected, rel=1e-5)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    expected = expected_logits(array(student)[mask.bool().numpy()], array(teacher)[mask.bool().numpy()])
    assert LogitsLoss()(*outputs, {"attention_mask": mask}).item() == pytest.approx(expected, rel=1e-5)


def test_objectives_that_cannot_apply_say_both_sizes() -> None:
    def hidden(*sizes: int) -> BaseModelOutput:
        return BaseModelOutput(hidden_states=tuple(torch.randn(1, 2, size) for size in sizes))

    with pytest.raises(ValueError, match=r"student hidden size 8, teacher 16"):
        HiddenStateLoss()(hidden(8, 8), hidden(16, 16), {})
    with pytest.raises(ValueError, match=r"2 student layers do not divide 3 teacher layers"):
        HiddenStateLoss()(hidden(8, 8, 8), hidden(8, 8, 8, 8), {})
    with pytest.raises(ValueError, match="set_attn_implementation"):
        AttentionScoreLoss()(BaseModelOutput(attentions=()), BaseModelOutput(attentions=()), {})
    with pytest.raises(ValueError, match=r"student \(2, 3\), teacher \(2, 4\)"):
        LogitsLoss()(
            SequenceClassifierOutput(logits=torch.randn(2, 3)), SequenceClassifierOutput(logits=torch.randn(2, 4)), {}
        )
    with pytest.raises(ValueError, match="no logits"):
        LogitsLoss()(hidden(8), hidden(8), {})
    with pytest.raises(ValueError, match="no labels"):
        TaskLoss()(SequenceClassifierOutput(), SequenceClassifierOutput(), {})


# --- the trainer on real models ---------------------------------------------------------------------------------------


def hidden_and_scores(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[Any], list[Any]]:
    """Hidden states, and q k^T / sqrt(d) from the projections' own outputs: no use of the attention interface."""
    seen: list[torch.Tensor] = []
    hooks = []
    for layer in model.bert.encoder.layer:
        for projection in (layer.attention.self.query, layer.attention.self.key):
            hooks.append(projection.register_forward_hook(lambda _module, _args, output: seen.append(output)))
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    scores = []
    for q, k in zip(seen[::2], seen[1::2], strict=True):
        q, k = (array(x).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k))
        scores.append(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]))
    return [array(x) for x in hidden], scores


def test_trainer_logs_the_losses_of_the_formulas(tmp_path: Path) -> None:
    student, teacher = tiny(**NO_DROPOUT), tiny(**NO_DROPOUT)
    data = dataset(8)
    inputs = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    s_hidden, s_scores = hidden_and_scores(student, inputs)
    t_hidden, t_scores = hidden_and_scores(teacher, inputs)
    with torch.no_grad():
        logits = [array(model(**inputs).logits) for model in (student, teacher)]
    trainer = distil(tmp_path, student, teacher, data, arguments={"max_steps": 1})
    mask = inputs["attention_mask"].numpy()
    expected = {
        "loss_hidden": expected_hidden(s_hidden, t_hidden, mask),
        "loss_attention": expected_attention(s_scores, t_scores, mask, False),
        "loss_logits": expected_logits(*logits),
    }
    for key, value in expected.items():
        assert logged(trainer, key) == [pytest.approx(value, rel=1e-4)]
    assert logged(trainer, "loss") == [pytest.approx(sum(expected.values()), rel=1e-4)]


def test_mixed_precision_is_the_teachers_too(tmp_path: Path) -> None:
    student = tiny(**NO_DROPOUT)
    ran: list[torch.dtype] = []
    teacher = copy.deepcopy(student)
    teacher.bert.encoder.layer[0].output.dense.register_forward_hook(lambda _, inputs, output: ran.append(output.dtype))
    trainer = distil(tmp_path, student, teacher, dataset(8), arguments={"max_steps": 1, "bf16": True})
    assert ran == [torch.bfloat16]
    assert logged(trainer, "loss_hidden") == logged(trainer, "loss_attention") == [0.0]


def losses(student: Any, teacher: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
    for model in (student, teacher):
        model.set_attn_implementation("lowbit")
    with torch.no_grad():
        outputs = [
            model(**inputs, output_hidden_states=True, output_attentions=True, output_scores=True)
            for model in (student, teacher)
        ]
    return [kind()(*outputs, inputs).item() for kind in (HiddenStateLoss, AttentionScoreLoss)]


def test_padding_changes_no_hidden_or_attention_loss() -> None:
    student, teacher, inputs = tiny(), tiny(), batch(rows=3, length=11)
    more = torch.randint(1, 101, (3, 6))
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], more], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros_like(more)], 1),
    }
    assert losses(student, teacher, longer) == pytest.approx(losses(student, teacher, inputs), rel=1e-5)


def test_accumulation_of_four_steps_is_one_large_batch(tmp_path: Path) -> None:
    student, teacher, data = tiny(**NO_DROPOUT), tiny(**NO_DROPOUT), dataset()
    whole = distil(tmp_path, copy.deepcopy(student), teacher, data)
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = distil(tmp_path, copy.deepcopy(student), teacher, data, arguments=parts)
    for key in ("loss", "loss_hidden", "loss_attention", "loss_logits", "grad_norm"):
        assert len(logged(whole, key)) == 4
        assert logged(accumulated, key) == pytest.approx(logged(whole, key), rel=1e-4)
    start = weights(student)
    for name, tensor in weights(whole.model).items():
        assert torch.allclose(tensor, weights(accumulated.model)[name], atol=1e-6)
    assert any(not torch.allclose(tensor, start[name], atol=1e-4) for name, tensor in weights(whole.model).items())


def test_stages_follow_the_step_and_each_loss_is_the_mean_over_its_own_steps(tmp_path: Path) -> None:
    student, teacher, data = tiny(**NO_DROPOUT), tiny(**NO_DROPOUT), dataset()
    stages = [(0.75, TWO_STAGES[0][1]), TWO_STAGES[1]]  # three steps and one
    each = distil(tmp_path, copy.deepcopy(student), teacher, data, stages=stages)
    window = distil(tmp_path, copy.deepcopy(student), teacher, data, stages=stages, arguments={"logging_steps": 4})
    for key, steps in (("loss_hidden", [1, 2, 3]), ("loss_attention", [1, 2, 3]), ("loss_logits", [4])):
        assert [entry["step"] for entry in each.state.log_history if key in entry] == steps
        assert logged(window, key) == [pytest.approx(np.mean(logged(each, key)), abs=2e-6)]


@pytest.mark.parametrize("kind", ["float", "ternary", "slimmed"])
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    """With dropout, Adam and a decaying rate, and a stage border after the interruption."""

    def student() -> Any:
        model = tiny()
        if kind == "slimmed":  # each keeps other heads
            return lowbit.slim(model, 0.5)
        return lowbit.prepare(model, lowbit.TernaryConfig()) if kind == "ternary" else model

    teacher, data = tiny(), dataset()
    changes = {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    stages = [(0.75, TWO_STAGES[0][1]), TWO_STAGES[1]]
    whole = distil(tmp_path, student(), teacher, data, stages=stages, arguments=changes)
    resumed = lowbit.DistillationTrainer(
        model=student(), teacher=teacher, args=arguments(tmp_path, **changes), train_dataset=data, stages=stages
    )
    started = weights(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    final = weights(whole.model)
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(resumed.model).items())
    assert any(not torch.equal(tensor, final[name]) for name, tensor in started.items())
    assert logged(resumed, "loss_logits") == logged(whole, "loss_logits")


def test_evaluation_is_the_ordinary_one_and_never_asks_the_teacher(tmp_path: Path) -> None:
    class NoTeacher(type(tiny())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("the teacher was asked")

    student, data = tiny(), dataset()
    asked: list[dict[str, Any]] = []
    student.register_forward_pre_hook(lambda _module, _args, kwargs: asked.append(kwargs), with_kwargs=True)
    trainer = lowbit.DistillationTrainer(
        model=student, teacher=NoTeacher(student.config), args=arguments(tmp_path), eval_dataset=data
    )
    ordinary = Trainer(model=copy.deepcopy(student), args=arguments(tmp_path), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ordinary.evaluate()["eval_loss"], rel=1e-5)
    predictions = trainer.predict(data).predictions
    assert isinstance(predictions, np.ndarray)
    assert predictions.shape == (32, 3)
    assert asked
    assert not any(kwargs.get(key) for kwargs in asked for key in ("output_hidden_states", "output_attentions"))


def test_only_what_the_active_objectives_need_is_asked_for(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny()
    asked: list[dict[str, Any]] = []
    teacher.register_forward_pre_hook(lambda _module, _args, kwargs: asked.append(kwargs), with_kwargs=True)
    distil(tmp_path, student, teacher, dataset(), stages=TWO_STAGES)
    wanted = ("output_hidden_states", "output_attentions", "output_scores")
    assert [[bool(kwargs.get(key)) for key in wanted] for kwargs in asked] == [[True] * 3] * 2 + [[False] * 3] * 2
    assert all("labels" not in kwargs for kwargs in asked)


def test_without_scores_the_attention_implementation_stays(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny()
    before = student.config._attn_implementation
    distil(tmp_path, student, teacher, dataset(), objectives=[HiddenStateLoss(), LogitsLoss()])
    assert student.config._attn_implementation == teacher.config._attn_implementation == before != "lowbit"


def test_the_teacher_is_in_eval_mode_untouched_and_not_saved(tmp_path: Path) -> None:
    teacher = tiny().train()
    before = weights(teacher)
    trainer = distil(tmp_path, tiny(), teacher, dataset())
    assert not teacher.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(teacher).items())
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(teacher).from_pretrained(tmp_path / "saved")
    student = weights(trainer.model)
    assert all(torch.equal(tensor, student[name]) for name, tensor in weights(saved).items())


def test_training_brings_a_ternary_student_closer_to_its_teacher(tmp_path: Path) -> None:
    teacher = tiny(**NO_DROPOUT)
    student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())
    # At ten times this rate the hidden loss rises: too large a step for weights of about 0.05.
    changes = {"optim": "adamw_torch", "learning_rate": 1e-4, "max_steps": 40}
    trainer = distil(tmp_path, student, teacher, dataset(64), arguments=changes)
    for key in ("loss_hidden", "loss_attention"):
        first, *_, last = np.reshape(logged(trainer, key), (5, 8)).mean(1)  # epochs of the same 8 batches
        assert last < 0.95 * first
    assert lowbit.convert(trainer.model.eval())(**batch()).logits.shape == (3, 3)


def test_a_half_width_ternary_student_learns_from_a_full_width_teacher(tmp_path: Path) -> None:
    teacher = tiny()
    student = lowbit.prepare(lowbit.slim(copy.deepcopy(teacher), 0.5), lowbit.TernaryConfig())
    trainer = distil(tmp_path, student, teacher, dataset())
    assert all(math.isfinite(value) and value > 0 for value in logged(trainer, "loss_attention"))


@pytest.mark.parametrize("schedule", ["joint", "stages"])
def test_a_slimmed_student_is_compared_with_the_heads_that_it_kept(tmp_path: Path, schedule: str) -> None:
    teacher = tiny(**NO_DROPOUT, num_hidden_layers=1)
    with torch.no_grad():  # the last two heads are the important ones
        teacher.bert.encoder.layer[0].attention.self.query.weight[32:] *= 10
    student = lowbit.slim(copy.deepcopy(teacher), 0.5)
    kwargs = {"stages": TWO_STAGES} if schedule == "stages" else {}
    trainer = distil(tmp_path, student, teacher, dataset(16), arguments={"max_steps": 2}, **kwargs)
    # The first layer of both reads the same embeddings with the same weights.
    first, *later = logged(trainer, "loss_attention")
    assert first == pytest.approx(0, abs=1e-9)
    assert len(later) == (schedule == "joint") and all(value > 1e-9 for value in later)


def test_kept_heads_are_those_of_the_teachers_layer_that_is_compared(tmp_path: Path) -> None:
    student = lowbit.slim(tiny(), 0.5)
    student.config.quantization_config.kept_heads = [[0, 3], [1, 2]]
    trainer = lowbit.DistillationTrainer(model=student, teacher=tiny(), args=arguments(tmp_path))
    own, scores = torch.randn(2, 2, 2, 5, 5).unbind(), torch.randn(4, 2, 4, 5, 5).unbind()
    chosen = of_kept_heads(trainer.model, own, scores)
    assert torch.equal(chosen[1], scores[1][:, [0, 3]]) and torch.equal(chosen[3], scores[3][:, [1, 2]])
    for other in (torch.randn(2, 2, 2, 5, 5).unbind(), torch.randn(3, 2, 4, 5, 5).unbind()):
        assert (
            of_kept_heads(trainer.model, own, other) is other
        )  # a teacher of half width; layers without a counterpart
    assert (
        of_kept_heads(trainer.model, scores[:2], scores) is scores
    )  # a student of full width with a slimmed one's config


def test_objectives_of_one_name_are_all_counted(tmp_path: Path) -> None:
    student, teacher, data = tiny(**NO_DROPOUT), tiny(**NO_DROPOUT), dataset()
    objectives = [LogitsLoss(), LogitsLoss(weight=2.0)]
    both = distil(tmp_path, copy.deepcopy(student), teacher, data, objectives=objectives, arguments={"max_steps": 1})
    one = distil(tmp_path, student, teacher, data, objectives=[LogitsLoss()], arguments={"max_steps": 1})
    for key in ("loss", "loss_logits"):
        assert logged(both, key) == [pytest.approx(3 * logged(one, key)[0], rel=1e-4)]


def test_model_init_and_an_objective_of_the_users_own_work(tmp_path: Path) -> None:
    class Norm:
        name, weight, needs = "norm", 1.0, ()

        def __call__(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
            return self.weight * student.logits.square().mean()

    def model_init() -> Any:
        return tiny()

    objectives = [AttentionScoreLoss(), TaskLoss(), Norm()]
    trainer = lowbit.DistillationTrainer(
        model_init=model_init,
        teacher=tiny(),
        args=arguments(tmp_path),
        train_dataset=dataset(),
        objectives=objectives,
    )
    trainer.train()
    total = np.sum([logged(trainer, f"loss_{name}") for name in ("attention", "task", "norm")], 0)
    assert logged(trainer, "loss") == pytest.approx(total.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"teacher": torch.nn.Linear(2, 2)}, "transformers model, got Linear"),
        ({"objectives": [LogitsLoss()], "stages": TWO_STAGES}, "not both"),
        ({"stages": []}, "last one 1.0"),
        ({"stages": [(0.5, [LogitsLoss()])]}, "last one 1.0"),
        ({"stages": [(0.7, [LogitsLoss()]), (0.5, [LogitsLoss()]), (1.0, [LogitsLoss()])]}, "ascending"),
        ({"stages": [(0.5, []), (1.0, [LogitsLoss()])]}, "at least one objective"),
        ({"objectives": []}, "at least one objective"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.DistillationTrainer(model=tiny(), args=arguments(tmp_path), **{"teacher": tiny(), **kwargs})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
def test_training_arguments_that_would_do_nothing_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.DistillationTrainer(model=tiny(), teacher=tiny(), args=arguments(tmp_path, **changes))


def test_a_teacher_prepared_in_place_with_its_student_is_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"share the trainable parameter .*deepcopy"):
        lowbit.DistillationTrainer(
            model=lowbit.prepare(model, lowbit.TernaryConfig()), teacher=model, args=arguments(tmp_path)
        )
