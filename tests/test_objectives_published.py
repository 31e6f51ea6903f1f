"""The published forms in docs, in recipes' YAML, are made, checked, built and finite, and each of them learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import objective_cases as cases
from benchmarks import objectives as benchmark
from helpers import batch, tiny
from lowbit.distill import objectives
from lowbit.distill.schedules import Scheduled

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted(DOCS.glob("methods*.md")), *sorted(DOCS.glob("methods/*.md"))]
NAMES: dict[str, Any] = {
    "hidden": objectives.HiddenStateLoss,
    "scores": objectives.AttentionScoreLoss,
    "logits": objectives.LogitsLoss,
    "task": objectives.TaskLoss,
    "statistics": objectives.StatisticsLoss,
    "relations": objectives.RelationLoss,
    "pairs": objectives.PairRelationLoss,
    "triples": objectives.TripleRelationLoss,
}


def published() -> dict[str, list[Any]]:
    """Heading -> the objectives in the YAML below it, of a stage at a time."""
    found = {}
    for page in PAGES:
        for section in re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]:
            for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", section, re.DOTALL | re.MULTILINE)):
                table = yaml.safe_load(block)
                for stage in table.get("stages", [table]):
                    name = f"{section.splitlines()[0]}, {number} {stage.get('name', '')}".rstrip()
                    found[name] = stage.get("objectives", [])
    return {name: given for name, given in found.items() if any(part in NAMES for each in given for part in each)}


@pytest.mark.parametrize("name", published())
def test_published_forms_are_made_checked_built_and_learn(name: str) -> None:
    """A student of 3 layers and a teacher of 6; the sum of the stage's losses falls, halfway through its schedules."""
    torch.manual_seed(0)
    widths = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    student, teacher = tiny(**{**widths, "num_hidden_layers": 3}), tiny(**widths)
    made = [_made(given) for given in published()[name]]
    for objective in made:
        for method in ("check", "build"):
            getattr(objective, method, lambda *_: None)(student, teacher)
        getattr(objective, "advance", lambda _: None)(0.5)
    columns = {**batch(rows=4, length=9), "labels": torch.tensor([0, 1, 2, 0])}
    with torch.no_grad():
        theirs = cases.run(teacher, {key: value for key, value in columns.items() if key != "labels"})
    extra = [p for each in made if isinstance(each, torch.nn.Module) for p in each.parameters()]
    optimizer = torch.optim.Adam([*student.parameters(), *extra], 1e-3)
    losses = []
    for _ in range(15):
        loss = sum(objective(cases.run(student, columns), theirs, columns) for objective in made)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses


def _made(given: Any) -> Any:
    """As recipes make them."""
    (name, fields) = (given, {}) if isinstance(given, str) else next(iter(given.items()))
    schedules = {key: value for key, value in fields.items() if isinstance(value, dict) and "kind" in value}
    made = NAMES[name](**{key: value for key, value in fields.items() if key not in schedules})
    return Scheduled(made, **schedules) if schedules else made


def test_the_time_of_every_objective_is_measured() -> None:
    rows = benchmark.measure(2, 6, 1, hidden_size=48, num_attention_heads=2, intermediate_size=50)
    assert [*rows] == [*benchmark.ROWS] and rows[benchmark.PLAIN]["times a plain step"] == 1
    kinds = {type(each) for each in benchmark.ROWS.values()}
    assert kinds >= {getattr(objectives, name) for name in objectives.__all__ if name.endswith("Loss")}
