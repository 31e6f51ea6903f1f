"""PairRelationLoss and TripleRelationLoss equal plain float64 loops, and are finite where a direction is undefined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import objective_cases as cases
from helpers import tiny
from lowbit.distill.objectives import PairRelationLoss, TripleRelationLoss

ROWS = ((0, 0), (1, 2), (2, 4))  # of the uniform map
Vectors = list[torch.Tensor]


def groups(axis: str, student: Any, teacher: Any, rows: Any = ROWS, padded: bool = False) -> Iterator[Any]:
    """(the student's vectors, the teacher's, how many of them are real) of each group that relations are between."""
    for b, length in enumerate(cases.LENGTHS):
        if axis == "words":
            for s, t in rows:
                size = 5 if padded else length
                yield [*student.hidden_states[s][b, :size]], [*teacher.hidden_states[t][b, :size]], length
        else:
            for i in range(length):
                ours, theirs = ([each.hidden_states[layer[k]][b, i] for layer in rows] for k, each in
                                enumerate((student, teacher)))  # fmt: skip
                yield ours, theirs, len(rows)


@pytest.mark.parametrize("reduction", ["rows", "pairs"])
@pytest.mark.parametrize("axis", ["words", "layers"])
def test_pairs_by_their_definition(axis: str, reduction: str) -> None:
    student, teacher = cases.pair()
    total, rows, pairs = torch.zeros((), dtype=torch.float64), 0, 0
    for ours, theirs, count in groups(axis, student, teacher):
        pairs += count * count
        for i in range(count):
            others = [j for j in range(count) if j != i]
            if others:
                p, q = (cases.log_softmax([cases.cosine(x[i], x[j]) for j in others]) for x in (theirs, ours))
                total = total + sum(a.exp() * (a - c) for a, c in zip(p, q, strict=True))
                rows += 1
    expected = total / (rows if reduction == "rows" else pairs)
    objective = PairRelationLoss(0.5, axis, reduction=reduction)
    cases.agrees(objective, student, teacher, cases.batch(), 0.5 * expected)


def angle(x: Vectors, i: int, j: int, k: int) -> torch.Tensor:
    """Of the directions from i to j and from i to k; 0 where one of them is none."""
    u, v = x[i] - x[j], x[i] - x[k]
    return torch.zeros((), dtype=torch.float64) if not u.any() or not v.any() else cases.cosine(u, v)


@pytest.mark.parametrize("window", [3, 21])
@pytest.mark.parametrize("axis", ["words", "layers"])
def test_triples_by_their_definition(axis: str, window: int) -> None:
    student, teacher = cases.pair()
    values = []
    for ours, theirs, count in groups(axis, student, teacher):
        for i in range(count):
            near = [j for j in range(count) if j != i and abs(j - i) <= window // 2]
            values += [(angle(ours, i, j, k) - angle(theirs, i, j, k)) ** 2 for j in near for k in near if j != k]
    objective = TripleRelationLoss(2.0, axis, window=window)
    cases.agrees(objective, student, teacher, cases.batch(), 2 * cases.mean(values))


@pytest.mark.parametrize("window", [3, 7, 13])
def test_triples_as_published_repeat_the_ends_and_count_padding(window: int) -> None:
    student, teacher = cases.pair()
    values = []
    for ours, theirs, count in groups("words", student, teacher, padded=True):
        for i in range(count):
            near = [min(max(i + o, 0), 4) for o in range(-(window // 2), window // 2 + 1)]
            values += [(angle(ours, i, j, k) - angle(theirs, i, j, k)) ** 2 for j in near for k in near]
    objective = TripleRelationLoss(window=window, include_padding=True)
    cases.agrees(objective, student, teacher, cases.batch(), cases.mean(values))


@pytest.mark.parametrize("whose", ["both", "student", "teacher"])
@pytest.mark.parametrize("axis", ["words", "layers"])
@pytest.mark.parametrize("kind", [PairRelationLoss, TripleRelationLoss])
def test_equal_and_zero_states_have_a_finite_loss_and_gradient(kind: Any, axis: str, whose: str) -> None:
    student, teacher = cases.pair()
    with torch.no_grad():
        for each in {"both": (student, teacher), "student": (student,), "teacher": (teacher,)}[whose]:
            for states in each.hidden_states:
                states[0, 2] = states[0, 1]  # the same state twice
                states[0, 3] = 0
                states[1, 0] = states[1, 1] = states[1, 2] = 1
            each.hidden_states[1][0, 4] = each.hidden_states[2][0, 4] = each.hidden_states[0][0, 4]
    loss = kind(axis=axis)(student, teacher, cases.batch())
    assert torch.isfinite(loss) and loss > 0
    found = cases.gradients(loss, student)
    assert all(torch.isfinite(each).all() for each in found) and max(each.abs().max() for each in found) < 1e3


@pytest.mark.parametrize("kind", [PairRelationLoss, TripleRelationLoss])
def test_relations_do_not_see_scale_or_rotation_and_triples_no_shift(kind: Any) -> None:
    student, teacher = cases.pair()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    shift = torch.randn(6, dtype=torch.float64) if kind is TripleRelationLoss else torch.zeros(6)
    moved = cases.Outputs(hidden_states=tuple(3 * h @ rotation + shift for h in teacher.hidden_states))
    loss = kind()(student, teacher, cases.batch())
    assert loss > 0.01
    torch.testing.assert_close(kind()(student, moved, cases.batch()), loss)


@pytest.mark.parametrize(("kind", "left"), [(PairRelationLoss, 1), (TripleRelationLoss, 2)])
def test_sentences_too_short_to_relate_cost_nothing(kind: Any, left: int) -> None:
    student, teacher = cases.pair()
    loss = kind()(student, teacher, cases.batch((left, 1, 1), size=5))
    assert loss.item() == 0 and not any(each.any() for each in cases.gradients(loss, student))


@pytest.mark.parametrize("kind", [PairRelationLoss, TripleRelationLoss])
def test_what_cannot_be_related_is_said_before_training(kind: Any) -> None:
    what = kind.__name__
    with pytest.raises(ValueError, match=f"{what}: axis='layers' and 1 layers to compare; pass a map of more"):
        kind(axis="layers", map="last", embedding=False).check(tiny(), tiny())
    with pytest.raises(ValueError, match=f"{what}: axis='words' and 0 layers"):
        kind(map="none", embedding=False).check(tiny(), tiny())
    with pytest.raises(ValueError, match=f"{what}: a layer map with combine='attend'"):
        kind(map="all").check(tiny(), tiny())
    with pytest.raises(ValueError, match=f"{what}: axis='heads'; accepted: 'words', 'layers'"):
        kind(axis="heads")
    kind(map="last").check(tiny(hidden_size=32), tiny())


@pytest.mark.parametrize("window", [1, 4, -3])
def test_a_window_has_a_middle(window: int) -> None:
    with pytest.raises(ValueError, match=f"window={window}; accepted: odd numbers from 3"):
        TripleRelationLoss(window=window)
