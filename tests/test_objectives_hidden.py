"""HiddenStateLoss and StatisticsLoss equal plain float64 loops, in values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import objective_cases as cases
from lowbit.distill.objectives import HiddenStateLoss, StatisticsLoss


def built(objective: HiddenStateLoss, width: int = 6, layers: int = 4) -> HiddenStateLoss:
    """With projections for models of these sizes, in float64."""
    student, teacher = nn.Linear(1, 1), nn.Linear(1, 1)
    student.config = SimpleNamespace(hidden_size=4, num_hidden_layers=2)
    teacher.config = SimpleNamespace(hidden_size=width, num_hidden_layers=layers)
    objective.check(student, teacher)  # type: ignore[arg-type]
    objective.build(student, teacher)  # type: ignore[arg-type]
    return objective.double()


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / cases.dot(x, x).sqrt()


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    mean = cases.mean(x)
    return (x - mean) / cases.mean((x - mean) ** 2).sqrt()


# One token's distance, of vectors of one width.
DISTANCES = {
    "mse": lambda s, t: cases.mean((a - b) ** 2 for a, b in zip(s, t, strict=True)),
    "normalised": lambda s, t: cases.mean((a - b) ** 2 for a, b in zip(unit(s), unit(t), strict=True)),
    "layer_norm": lambda s, t: cases.mean((a - b) ** 2 for a, b in zip(layer_norm(s), layer_norm(t), strict=True)),
    "cosine": lambda s, t: 1 - cases.cosine(s, t),
}


@pytest.mark.parametrize("tokens", ["real", "all", "first"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_of_mapped_layers(distance: str, tokens: str) -> None:
    columns = cases.batch()
    student, teacher = cases.pair(width=4)
    objective = HiddenStateLoss(
        weight=0.7, include_padding=tokens == "all", tokens="first" if tokens == "first" else "all", distance=distance
    )
    counted = {"real": cases.real(columns), "all": cases.every(columns), "first": [(b, 0) for b in range(3)]}[tokens]
    expected = sum(
        cases.mean(DISTANCES[distance](student.hidden_states[s][at], teacher.hidden_states[t][at]) for at in counted)
        for s, t in ((0, 0), (1, 2), (2, 4))
    )
    cases.agrees(objective, student, teacher, columns, 0.7 * expected)


@pytest.mark.parametrize("distance", ["mse", "normalised"])
def test_pkd_as_its_paper_sums_and_as_its_code_averages(distance: str) -> None:
    """The paper: squares summed over layers and width, mean over sentences. The code: the mean of them all."""
    student, teacher = cases.pair(width=4)
    columns = cases.batch()
    pairs = [(1, 2)]  # skip: the last layer is left to the logits
    common = {"map": "skip", "embedding": False, "tokens": "first", "distance": distance}
    total = sum(
        sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        for layer, taught in pairs
        for b in range(3)
        for s, t in [(student.hidden_states[layer][b, 0], teacher.hidden_states[taught][b, 0])]
        for s, t in [(unit(s), unit(t)) if distance == "normalised" else (s, t)]
    )
    cases.agrees(HiddenStateLoss(reduction="sum", **common), student, teacher, columns, total / 3)
    cases.agrees(HiddenStateLoss(**common), student, teacher, columns, total / (3 * len(pairs) * 4))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("project", ["shared", "per_layer"])
def test_a_projection_brings_the_student_to_the_teachers_width(project: str, bias: bool) -> None:
    columns = cases.batch()
    student, teacher = cases.pair()
    objective = built(HiddenStateLoss(project=project, bias=bias))
    names = ["shared"] if project == "shared" else ["0", "1", "2"]
    assert [*objective.projections] == names

    def projected(layer: int, x: torch.Tensor) -> list[torch.Tensor]:
        linear: Any = objective.projections["shared" if project == "shared" else str(layer)]
        offset = linear.bias if bias else torch.zeros(6, dtype=torch.float64)
        return [cases.dot(row, x) + b for row, b in zip(linear.weight, offset, strict=True)]

    expected = sum(
        cases.mean(
            cases.mean(
                (a - b) ** 2
                for a, b in zip(projected(s, student.hidden_states[s][at]), teacher.hidden_states[t][at], strict=True)
            )
            for at in cases.real(columns)
        )
        for s, t in ((0, 0), (1, 2), (2, 4))
    )
    cases.agrees(objective, student, teacher, columns, expected)
    parameters = [*objective.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(objective(student, teacher, columns), parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("combine", ["concat", "mean"])
def test_combined_teacher_layers_are_projected_to_or_from(combine: str, side: str) -> None:
    """CKD: the code projects the student up to the concatenation, the paper the concatenation down."""
    columns = cases.batch()
    student, teacher = cases.pair()
    spec = {"name": "groups", "combine": combine}
    objective = built(HiddenStateLoss(map=spec, embedding=False, project="per_layer", project_side=side))
    wide = 12 if combine == "concat" else 6
    shape = (wide, 4) if side == "student" else (4, wide)
    assert all(linear.weight.shape == shape for linear in objective.projections.values())

    def layer(s: int, row: tuple[int, int], at: tuple[int, int]) -> torch.Tensor:
        first, second = (teacher.hidden_states[t][at] for t in row)
        state, target = student.hidden_states[s][at], [*first, *second]
        if combine == "mean":
            target = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        weight = objective.projections[str(s)].weight
        if side == "student":
            state = [cases.dot(row, state) for row in weight]
        else:
            target = [cases.dot(row, target) for row in weight]
        return cases.mean((a - b) ** 2 for a, b in zip(state, target, strict=True))

    rows = {1: (1, 2), 2: (3, 4)}
    expected = sum(cases.mean(layer(s, row, at) for at in cases.real(columns)) for s, row in rows.items())
    cases.agrees(objective, student, teacher, columns, expected)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("spec", "rows"), [("all", [(1, 2, 3, 4)] * 2), ("buckets", [(1, 2), (3, 4)])])
def test_attention_over_teacher_layers(spec: str, rows: Any, scale: bool, detach: bool) -> None:
    columns = cases.batch()
    student, teacher = cases.pair(width=4)
    objective = HiddenStateLoss(
        map=spec, embedding=False, tokens="first", scale_attention=scale, detach_weights=detach, weight=2.0
    )
    expected: Any = 0
    for layer, row in enumerate(rows, 1):
        entropies = []
        for b in range(3):
            state = student.hidden_states[layer][b, 0]
            states = [teacher.hidden_states[t][b, 0] for t in row]
            shares = [
                share.exp() for share in cases.log_softmax([cases.dot(state, t) / (2 if scale else 1) for t in states])
            ]
            entropies.append(-sum((share * share.log()).item() for share in shares))
            if detach:
                shares = [share.detach() for share in shares]
            mixture = [sum(a * t[i] for a, t in zip(shares, states, strict=True)) for i in range(4)]
            expected = expected + cases.mean((a - c) ** 2 for a, c in zip(state, mixture, strict=True)) / 3
        objective(student, teacher, columns)
        assert objective.entropies[layer].item() == pytest.approx(sum(entropies) / 3)
    cases.agrees(objective, student, teacher, columns, 2 * expected)


def test_attention_with_a_projection_is_in_the_teachers_width() -> None:
    """The projected student is what is compared, and what attends; its scores are scaled by that width's root."""
    columns = cases.batch()
    student, teacher = cases.pair()
    objective = built(HiddenStateLoss(map="all", embedding=False, project="per_layer"))
    projected = [student.hidden_states[i] @ objective.projections[str(i)].weight.T for i in (1, 2)]
    expected: Any = 0
    for state in projected:
        for at in cases.real(columns):
            states = [teacher.hidden_states[t][at] for t in range(1, 5)]
            shares = cases.log_softmax([cases.dot(state[at], t) / 6**0.5 for t in states])
            mixture = [sum(a.exp() * t[i] for a, t in zip(shares, states, strict=True)) for i in range(6)]
            expected = expected + cases.mean((a - c) ** 2 for a, c in zip(state[at], mixture, strict=True)) / 9
    cases.agrees(objective, student, teacher, columns, expected)


def test_saturated_attention_over_layers_is_finite() -> None:
    student, teacher = cases.pair(width=4, scale=1e4)
    objective = HiddenStateLoss(map="all", scale_attention=False)
    loss = objective(student, teacher, cases.batch())
    assert torch.isfinite(loss) and all(torch.isfinite(each).all() for each in cases.gradients(loss, student))
    assert all(0 <= entropy.item() < 1e-6 for entropy in objective.entropies.values())


def test_weights_of_layers_gate_them() -> None:
    columns = cases.batch()
    student, teacher = cases.pair(width=4)
    gated = HiddenStateLoss(embedding=False, layer_weights=(0.0, 3.0))
    alone = HiddenStateLoss(embedding=False, map=[None, 4], weight=3.0)
    loss = gated(student, teacher, columns)
    torch.testing.assert_close(loss, alone(student, teacher, columns))
    assert not cases.gradients(loss, student)[1].any()
    shut = HiddenStateLoss(embedding=False, layer_weights=(0.0, 0.0))(student, teacher, columns)
    assert shut.item() == 0 and not cases.gradients(shut, student)[0].any()


@pytest.mark.parametrize("teacher_layers", ["mapped", "all"])
@pytest.mark.parametrize("include_padding", [False, True])
def test_statistics_of_each_token(include_padding: bool, teacher_layers: str) -> None:
    columns = cases.batch()
    student, teacher = cases.pair()
    objective = StatisticsLoss(2.0, 5.0, 3.0, include_padding, teacher_layers=teacher_layers, layer_weights=(1.0, 0.5))

    def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cases.mean(x), cases.mean((x - cases.mean(x)) ** 2)

    def layer(s: int, t: int) -> torch.Tensor:
        values = []
        for at in cases.every(columns) if include_padding else cases.real(columns):
            (m_s, v_s), (m_t, v_t) = (statistics(x[at]) for x in (student.hidden_states[s], teacher.hidden_states[t]))
            values.append(5 * (m_s - m_t) ** 2 + 3 * (v_s - v_t).abs())
        return cases.mean(values)

    taught = {1: [2], 2: [4]} if teacher_layers == "mapped" else {1: range(5), 2: range(5)}
    expected = sum(
        weight * cases.mean(layer(s, t) for t in row)
        for (s, row), weight in zip(taught.items(), (1.0, 0.5), strict=True)
    )
    cases.agrees(objective, student, teacher, columns, 2 * expected)


@pytest.mark.parametrize("distance", DISTANCES)
def test_states_of_zeros_and_of_one_value_have_finite_gradients(distance: str) -> None:
    student, teacher = cases.pair(width=4)
    student = cases.changed(student, lambda x: torch.zeros_like(x).requires_grad_())
    loss = HiddenStateLoss(distance=distance)(student, teacher, cases.batch())
    assert torch.isfinite(loss) and all(torch.isfinite(each).all() for each in cases.gradients(loss, student))
