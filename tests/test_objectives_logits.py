"""LogitsLoss equals plain float64 loops in every form that published codes have, and stays finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import objective_cases as cases
from helpers import batch as token_batch
from helpers import tiny
from lowbit.distill.objectives import LogitsLoss, TaskLoss


def row(s: torch.Tensor, t: torch.Tensor, distance: str, temperature: float) -> torch.Tensor:
    """One example's loss: a sum over classes."""
    if distance == "mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True))  # type: ignore[return-value]
    p, q = (cases.log_softmax([x / temperature for x in logits]) for logits in (t, s))
    entropy = sum(a.exp() * a for a in p) if distance == "kl" else 0
    return entropy - sum(a.exp() * c for a, c in zip(p, q, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("reduction", ["examples", "elements"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("distance", ["cross_entropy", "kl", "mse"])
def test_every_form_of_the_loss(distance: str, temperature: float, reduction: str, rescale: bool, scale: float) -> None:
    student, teacher = cases.pair(scale=3)
    objective = LogitsLoss(0.7, temperature, distance=distance, reduction=reduction, rescale=rescale, scale=scale)
    factor = temperature**2 if rescale and distance != "mse" else 1.0
    factor = factor / cases.CLASSES if reduction == "elements" else factor
    expected = cases.mean(
        row(s, scale * t, distance, temperature) for s, t in zip(student.logits, teacher.logits, strict=True)
    )
    cases.agrees(objective, student, teacher, {}, 0.7 * factor * expected)


@pytest.mark.parametrize("distance", ["cross_entropy", "kl"])
def test_both_forms_have_the_same_gradient_and_differ_by_the_entropy(distance: str) -> None:
    student, teacher = cases.pair()
    one, other = (LogitsLoss(distance=each)(student, teacher, {}) for each in ("cross_entropy", "kl"))
    for a, b in zip(cases.gradients(one, student), cases.gradients(other, student), strict=True):
        torch.testing.assert_close(a, b)
    shares = teacher.logits.softmax(-1)
    torch.testing.assert_close(one - other, -(shares * shares.log()).sum(-1).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("distance", ["cross_entropy", "kl", "mse"])
def test_saturated_logits_are_finite(distance: str, dtype: torch.dtype) -> None:
    values = torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 200.0]], dtype=dtype)
    student = cases.Outputs(logits=values.clone().requires_grad_())
    for teacher in (values, -values, values.flip(0)):
        for labels in ({}, {"labels": torch.ones(2, 3)}):  # one label, several labels
            loss = LogitsLoss(distance=distance)(student, cases.Outputs(logits=teacher), labels)
            assert loss.dtype == torch.float32 and torch.isfinite(loss)
            assert torch.isfinite(cases.gradients(loss, student)[0]).all()
    same = LogitsLoss(distance="kl")(student, cases.Outputs(logits=values), {})
    assert same.item() == 0 and not cases.gradients(same, student)[0].any()


@pytest.mark.parametrize("distance", ["cross_entropy", "kl", "mse"])
def test_several_labels_are_each_yes_or_no(distance: str) -> None:
    student, teacher = cases.pair()

    def label(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if distance == "mse":
            return (s - t) ** 2
        p, q = (torch.sigmoid(x / 2) for x in (t, s))
        entropy = p * p.log() + (1 - p) * (1 - p).log() if distance == "kl" else 0
        return entropy - p * q.log() - (1 - p) * (1 - q).log()

    expected = cases.mean(
        label(a, b) for s, t in zip(student.logits, teacher.logits, strict=True) for a, b in zip(s, t, strict=True)
    )
    objective = LogitsLoss(temperature=2, distance=distance, problem_type="multi_label_classification")
    cases.agrees(objective, student, teacher, {}, expected)


@pytest.mark.parametrize("distance", ["cross_entropy", "kl", "mse"])
@pytest.mark.parametrize("reduction", ["examples", "elements"])
def test_question_answering_is_over_the_tokens_of_each_text(reduction: str, distance: str) -> None:
    columns = cases.batch()
    names = ("start_logits", "end_logits")
    student, teacher = (
        cases.Outputs({name: torch.randn(3, 5, dtype=torch.float64).requires_grad_() for name in names})
        for _ in range(2)
    )
    objective = LogitsLoss(temperature=2, reduction=reduction, distance=distance, scale=0.5)
    expected = cases.mean(
        row(student[name][b, :length], 0.5 * teacher[name][b, :length], distance, 2)
        / (length if reduction == "elements" else 1)
        for name in names
        for b, length in enumerate(cases.LENGTHS)
    )
    cases.agrees(objective, student, teacher, columns, expected)


@pytest.mark.parametrize("tokens", ["labelled", "all"])
def test_words_are_compared_where_they_are_labelled_or_at_all_real_tokens(tokens: str) -> None:
    columns = cases.batch()
    labels = torch.full((3, 5), -100)
    labels[0, 1] = labels[0, 4] = labels[1, 2] = 2
    student, teacher = (
        cases.Outputs(logits=torch.randn(3, 5, 7, dtype=torch.float64).requires_grad_()) for _ in range(2)
    )
    where = cases.real(columns) if tokens == "all" else [(0, 1), (0, 4), (1, 2)]
    expected = cases.mean(row(student.logits[at], teacher.logits[at], "kl", 2) for at in where)
    objective = LogitsLoss(temperature=2, distance="kl", tokens=tokens, rescale=True)
    cases.agrees(objective, student, teacher, {**columns, "labels": labels}, 4 * expected)
    unlabelled = LogitsLoss(temperature=2, distance="kl", rescale=True)(student, teacher, columns)
    torch.testing.assert_close(unlabelled, LogitsLoss(2, 2, distance="kl", tokens="all")(student, teacher, columns) * 2)


def test_distilberts_losses_of_a_masked_language_model() -> None:
    """The words' divergence over all real tokens, and the model's own loss over the masked ones."""
    student, teacher = tiny("BertForMaskedLM"), tiny("BertForMaskedLM")
    columns = token_batch(rows=3, length=7)
    columns["labels"] = columns["input_ids"].masked_fill(torch.rand(3, 7) > 0.4, -100)
    columns["labels"][1, 1] = 5
    ours = student(**columns)
    with torch.no_grad():
        theirs = teacher(**{name: columns[name] for name in ("input_ids", "attention_mask")})
    real, masked = columns["attention_mask"].bool(), columns["labels"] != -100
    p, q = (each.logits[real].double().div(2).log_softmax(-1) for each in (theirs, ours))
    expected = 4 * (p.exp() * (p - q)).sum(-1).mean()
    loss = LogitsLoss(temperature=2, distance="kl", rescale=True, tokens="all")(ours, theirs, columns)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    picked = ours.logits[masked].log_softmax(-1).gather(-1, columns["labels"][masked].unsqueeze(-1))
    assert TaskLoss(2.0)(ours, theirs, columns).item() == pytest.approx(-2 * picked.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"distance": "KL"}, "LogitsLoss: distance='KL'; accepted: 'cross_entropy', 'kl', 'mse'"),
        ({"reduction": "batchmean"}, "LogitsLoss: reduction='batchmean'; accepted: 'examples', 'elements'"),
        ({"tokens": "masked"}, "LogitsLoss: tokens='masked'; accepted: 'labelled', 'all'"),
        ({"temperature": 0}, "LogitsLoss: temperature=0; accepted: a number above 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_fields_without_such_a_value_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitsLoss(**fields)
