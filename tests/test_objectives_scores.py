"""AttentionScoreLoss and RelationLoss equal plain float64 loops, in values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import objective_cases as cases
from helpers import tiny
from lowbit.distill.objectives import AttentionScoreLoss, RelationLoss


@pytest.mark.parametrize("include_padding", [False, True])
@pytest.mark.parametrize("distance", ["mse", "cross_entropy"])
def test_scores_of_mapped_layers(distance: str, include_padding: bool) -> None:
    columns = cases.batch()
    student, teacher = cases.pair()
    mask = columns["attention_mask"].bool().tolist()

    def layer(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        values = []
        for b in range(3):
            keys = [j for j in range(5) if mask[b][j]]
            for h in range(cases.HEADS):
                for i in range(5) if include_padding else keys:
                    if distance == "mse":
                        values += [(s[b, h, i, j] - t[b, h, i, j]) ** 2 for j in keys]
                        values += [torch.zeros((), dtype=torch.float64)] * (5 - len(keys) if include_padding else 0)
                    else:
                        p, q = (cases.log_softmax([x[b, h, i, j] for j in keys]) for x in (t, s))
                        values.append(-sum(a.exp() * c for a, c in zip(p, q, strict=True)))
        return cases.mean(values)

    expected = sum(layer(student.attentions[s - 1], teacher.attentions[t - 1]) for s, t in ((1, 2), (2, 4)))
    objective = AttentionScoreLoss(0.3, include_padding, distance=distance)
    cases.agrees(objective, student, teacher, columns, 0.3 * expected)


def test_the_mean_of_teacher_layers_and_weights_of_student_layers() -> None:
    student, teacher = cases.pair()
    columns = cases.batch((5, 5, 5))
    objective = AttentionScoreLoss(map={"name": "groups", "combine": "mean"}, layer_weights=(0.0, 2.0))
    target = (teacher.attentions[2] + teacher.attentions[3]) / 2
    cases.agrees(objective, student, teacher, columns, 2 * ((student.attentions[1] - target) ** 2).mean())


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float64).min, 1e8])
@pytest.mark.parametrize("distance", ["mse", "cross_entropy"])
def test_what_masked_keys_hold_changes_nothing(distance: str, hidden: float) -> None:
    """-inf - -inf is NaN, and so is 0 times it: scores of a model that adds its mask come so."""
    columns = cases.batch()
    student, teacher = cases.pair()
    keys = ~columns["attention_mask"].bool()[:, None, None]
    masked = [
        cases.Outputs(attentions=tuple(a.detach().masked_fill(keys, hidden).requires_grad_() for a in each.attentions))
        for each in (student, teacher)
    ]
    objective = AttentionScoreLoss(distance=distance)
    loss = objective(*masked, columns)
    assert torch.equal(loss, objective(student, teacher, columns))
    assert all(torch.isfinite(each).all() for each in cases.gradients(loss, masked[0]))


def test_scores_of_the_embedding_output_are_none() -> None:
    student, teacher = cases.pair()
    with pytest.raises(ValueError, match="AttentionScoreLoss: the layer map names layer 0, the embedding output"):
        AttentionScoreLoss(map=[0, 4])(student, teacher, {})
    with pytest.raises(ValueError, match="combine='concat'; accepted: one, mean"):
        AttentionScoreLoss(map="groups")(student, teacher, {})
    with pytest.raises(ValueError, match="layer 0, the embedding output"):
        AttentionScoreLoss(map=[0, 2]).check(tiny(), tiny())


# --- relations --------------------------------------------------------------------------------------------------------


def relations(layer: Any, pair: str, head: int, heads: int, b: int, i: int, keys: list[int]) -> list[torch.Tensor]:
    """log softmax over keys of one row, of one relation head."""
    x, y = (layer["QKV".index(letter)] for letter in pair)
    width = x.shape[-1] // heads
    part = slice(head * width, (head + 1) * width)
    return cases.log_softmax([cases.dot(x[b, i, part], y[b, j, part]) / math.sqrt(width) for j in keys])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pairs", [("QQ", "KK", "VV"), ("QK", "VV")])
@pytest.mark.parametrize("layers", [(None, None), (1, 3)])
def test_relations_of_two_widths(pairs: tuple[str, ...], heads: int, layers: Any) -> None:
    columns = cases.batch()
    student, teacher = cases.pair()
    objective = RelationLoss(0.5, pairs, heads, *layers)
    s, t = (
        each.qkv[-1 if layer is None else layer - 1] for each, layer in zip((student, teacher), layers, strict=True)
    )
    expected: Any = 0
    for b, length in enumerate(cases.LENGTHS):
        keys = [*range(length)]
        for pair in pairs:
            for head in range(heads):
                for i in keys:
                    p, q = (relations(each, pair, head, heads, b, i, keys) for each in (t, s))
                    divergence = sum(a.exp() * (a - c) for a, c in zip(p, q, strict=True))
                    expected = expected + divergence / (len(cases.LENGTHS) * heads * length)
    cases.agrees(objective, student, teacher, columns, 0.5 * expected)


def test_relations_do_not_see_a_rotation_of_a_heads_space() -> None:
    columns = cases.batch()
    student, teacher = cases.pair()
    loss = RelationLoss(relation_heads=1)(student, teacher, columns)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    turned = cases.Outputs(qkv=tuple(tuple(x @ rotation for x in layer) for layer in teacher.qkv))
    torch.testing.assert_close(RelationLoss(relation_heads=1)(student, turned, columns), loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relation_heads": 5}, r"5 relation heads do not divide the student's width of 64; accepted: .* 1, 2, 4, 8"),
        ({"relation_heads": 32}, r"32 relation heads do not divide the teacher's width of 48"),
        ({"student_layer": 3}, r"student_layer=3; accepted: 1 to 2, or None"),
        ({"teacher_layer": 0}, r"teacher_layer=0; accepted: 1 to 2"),
    ],
)
def test_relations_that_cannot_be_are_said_before_training(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"RelationLoss: {message}"):
        RelationLoss(**fields).check(tiny(), tiny(hidden_size=48))


@pytest.mark.parametrize("pairs", ["QQ", (), ("Q",), ("QX",), ("QQK",)])
def test_pairs_are_two_letters_of_queries_keys_and_values(pairs: Any) -> None:
    with pytest.raises(ValueError, match=r"RelationLoss: pairs=.*; accepted: a list of two letters"):
        RelationLoss(pairs=pairs)


def test_relation_heads_are_the_teachers_where_none_are_given() -> None:
    student, teacher = cases.pair()
    objective = RelationLoss()
    with pytest.raises(ValueError, match="pass relation_heads, or call build"):
        objective(student, teacher, cases.batch())
    objective.build(tiny(), tiny(num_attention_heads=2))
    same = RelationLoss(relation_heads=2)
    assert torch.equal(objective(student, teacher, cases.batch()), same(student, teacher, cases.batch()))
