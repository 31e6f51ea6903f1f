"""What holds of every objective: padding, order, the teacher's gradient, agreement, half precision, bad fields."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import lowbit
import objective_cases as cases
from helpers import batch, tiny
from lowbit.distill.objectives import (
    AttentionScoreLoss,
    HiddenStateLoss,
    LogitsLoss,
    Objective,
    PairRelationLoss,
    RelationLoss,
    StatisticsLoss,
    TripleRelationLoss,
)

# Every objective that compares, in forms that take other code.
OBJECTIVES: dict[str, Objective] = {
    "hidden": HiddenStateLoss(),
    "hidden, normalised first token": HiddenStateLoss(map="skip", tokens="first", distance="normalised"),
    "hidden, cosine": HiddenStateLoss(map="last", embedding=False, distance="cosine"),
    "hidden, layer norm": HiddenStateLoss(distance="layer_norm", reduction="sum"),
    "hidden, mean": HiddenStateLoss(map={"name": "groups", "combine": "mean"}),
    "hidden, attention": HiddenStateLoss(map="all"),
    "statistics": StatisticsLoss(),
    "scores": AttentionScoreLoss(),
    "scores, rows": AttentionScoreLoss(distance="cross_entropy"),
    "logits": LogitsLoss(temperature=2, rescale=True),
    "logits, divergence": LogitsLoss(distance="kl", reduction="elements"),
    "logits, squares": LogitsLoss(distance="mse"),
    "relations": RelationLoss(relation_heads=2),
    "relations, MiniLM": RelationLoss(pairs=("QK", "VV"), relation_heads=1),
    "pairs": PairRelationLoss(),
    "pairs of layers": PairRelationLoss(axis="layers", reduction="pairs"),
    "triples": TripleRelationLoss(window=3),
    "triples of layers": TripleRelationLoss(axis="layers"),
}
every = pytest.mark.parametrize("name", OBJECTIVES)


def padded(given: Any, more: int) -> Any:
    """The same outputs with more tokens at the end, which hold anything."""

    def pad(x: torch.Tensor) -> torch.Tensor:
        scores = x.dim() == 4
        if x.dim() < 3:
            return x
        longer = torch.randn(*x.shape[:2], x.shape[2] + more, x.shape[3] + more) if scores else None
        longer = torch.randn(x.shape[0], x.shape[1] + more, x.shape[2]) if longer is None else longer
        longer = 100 * longer.to(x.dtype)
        place = (..., slice(x.shape[2]), slice(x.shape[3])) if scores else (slice(None), slice(x.shape[1]))
        longer[place] = x
        return longer

    return cases.changed(given, pad)


@every
def test_more_padding_changes_nothing(name: str) -> None:
    student, teacher = cases.pair(width=4)
    objective = OBJECTIVES[name]
    loss = objective(student, teacher, cases.batch())
    longer = objective(padded(student, 3), padded(teacher, 3), cases.batch(size=8))
    torch.testing.assert_close(longer, loss, rtol=1e-12, atol=0)


@every
def test_the_order_of_a_batch_changes_nothing(name: str) -> None:
    student, teacher = cases.pair(width=4)
    order = torch.tensor([2, 0, 1])
    columns = {key: value[order] for key, value in cases.batch().items()}
    moved = (cases.changed(each, lambda x: x[order]) for each in (student, teacher))
    loss = OBJECTIVES[name](student, teacher, cases.batch())
    torch.testing.assert_close(OBJECTIVES[name](*moved, columns), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("hidden, mean", "hidden, attention")])
def test_a_student_that_agrees_has_nothing_to_learn(name: str) -> None:
    student, _ = cases.pair()
    teacher = cases.changed(student, lambda x: x.detach().clone())
    loss = OBJECTIVES[name](student, teacher, cases.batch())
    entropy = 0.0
    if name == "scores, rows":
        for scores in student.attentions:
            shares = [scores[b, :, :n, :n].softmax(-1) for b, n in enumerate(cases.LENGTHS)]
            rows = torch.cat([-(p * p.log()).sum(-1).flatten() for p in shares])
            entropy += rows.mean().item()
    if name == "logits":
        p = (student.logits / 2).softmax(-1)
        entropy = 4 * -(p * p.log()).sum(-1).mean().item()
    assert loss.item() == pytest.approx(entropy, abs=1e-12)
    assert all(each.abs().max() < 1e-9 for each in cases.gradients(loss, student))


def test_combined_layers_that_are_all_the_students_leave_nothing_to_learn() -> None:
    student, _ = cases.pair()
    first = student.hidden_states[1]
    same = cases.Outputs(hidden_states=(first,) * 3)
    for spec in ("all", {"name": "groups", "combine": "mean"}):
        teacher = cases.Outputs(hidden_states=(first.detach().clone(),) * 5)
        assert HiddenStateLoss(map=spec)(same, teacher, cases.batch()).item() == pytest.approx(0, abs=1e-24)


@every
def test_sentences_of_one_token_are_finite(name: str) -> None:
    student, teacher = cases.pair(width=4)
    loss = OBJECTIVES[name](student, teacher, cases.batch((1, 1, 1), size=5))
    assert torch.isfinite(loss) and all(torch.isfinite(each).all() for each in cases.gradients(loss, student))


@every
def test_a_batch_without_a_mask_is_one_without_padding(name: str) -> None:
    student, teacher = cases.pair(width=4)
    full = OBJECTIVES[name](student, teacher, cases.batch((5, 5, 5)))
    torch.testing.assert_close(OBJECTIVES[name](student, teacher, {}), full)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full(name: str, dtype: torch.dtype) -> None:
    student, teacher = (cases.changed(each, lambda x: x.detach().to(dtype)) for each in cases.pair(width=4))
    loss = OBJECTIVES[name](student, teacher, cases.batch())
    exact = OBJECTIVES[name](*(cases.changed(each, torch.Tensor.double) for each in (student, teacher)), cases.batch())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-4)


@every
@pytest.mark.parametrize("bits", ["float", "ternary", "binary"])
def test_of_two_models_the_student_alone_learns(name: str, bits: str) -> None:
    """Outputs of BERTs, the teacher's as the trainer gets them; gradients reach latent weights."""
    student, teacher = tiny(num_hidden_layers=2), tiny(num_hidden_layers=4)
    if bits != "float":
        lowbit.prepare(student, lowbit.TernaryConfig() if bits == "ternary" else lowbit.BinaryConfig())
    columns = batch(rows=3, length=7)
    ours = cases.run(student, columns)
    with torch.no_grad():
        theirs = cases.run(teacher, columns)
    objective: Any = OBJECTIVES[name]
    objective.check(student, teacher)
    loss = objective(ours, theirs, columns)
    loss.backward()
    assert loss > 0 and all(parameter.grad is None for parameter in teacher.parameters())
    gradient = student.bert.encoder.layer[0].attention.self.key.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@every
def test_objectives_are_copied_and_pickled(name: str) -> None:
    student, teacher = cases.pair(width=4)
    objective = OBJECTIVES[name]
    loss = objective(student, teacher, cases.batch())
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(twin(student, teacher, cases.batch()), loss) and repr(twin) == repr(objective)


@every
def test_objectives_need_a_teacher(name: str) -> None:
    objective: Any = OBJECTIVES[name]
    with pytest.raises(ValueError, match=f"{type(objective).__name__} compares with a teacher, and there is none"):
        objective.check(tiny(), None)


@pytest.mark.parametrize("kind", [HiddenStateLoss, StatisticsLoss, AttentionScoreLoss, PairRelationLoss])
def test_a_map_for_another_depth_is_refused(kind: Any) -> None:
    message = f"{kind.__name__}: a layer map for 3 student layers .* this student has 2, the teacher 4"
    with pytest.raises(ValueError, match=message):
        kind(map=[1, 2, 3]).check(tiny(num_hidden_layers=2), tiny(num_hidden_layers=4))
    with pytest.raises(ValueError, match="layer map 'uniformly'; accepted: uniform"):
        kind(map="uniformly")


@pytest.mark.parametrize("kind", [HiddenStateLoss, StatisticsLoss, AttentionScoreLoss])
def test_every_student_layer_has_a_weight(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: 3 layer_weights for 2 student layers"):
        kind(layer_weights=(1, 0, 0)).check(tiny(), tiny())


def test_the_package_names_what_it_named() -> None:
    from lowbit.distill import objectives

    for name in ("AttentionScoreLoss", "HiddenStateLoss", "LogitsLoss", "TaskLoss"):
        assert getattr(lowbit, name) is getattr(objectives, name)
    assert {"Batch", "Objective", "LOGITS", "logits_of", "sizes_of"} <= {*objectives.__all__}
