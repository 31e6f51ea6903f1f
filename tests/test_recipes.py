"""Every recipe learns from a float teacher to a saved student, resumes, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertTokenizerFast,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import lowbit
from helpers import tiny_config
from lowbit.data import sentiment
from lowbit.data.tasks import get_task, load_task, tokenize
from lowbit.exits import exit_scores
from lowbit.recipes import RecipeError, stages
from lowbit.recipes.measure import as_read, evaluate
from lowbit.recipes.options import FileOptions
from lowbit.recipes.systems import parts, recipe
from lowbit.recipes.systems.checking import check
from lowbit.recipes.systems.distilling import distil_by_recipe

# Of recipes whose sizes are for a larger teacher.
SMALL: dict[str, dict[str, Any]] = {
    "elm": {"search": {"population": 4, "generations": 2, "share": 0.25, "examples": 32, "repeats": 1}},
    "subwords": {"student": {"subwords": {"size": 200, "hidden": 24, "heads": 12, "steps": 0.5, "reduction": "mean"}}},
    "tinybert-narrow": {"student": {"random": {"layers": 3, "hidden": 36, "heads": 12, "intermediate": 72}}},
    "minilm-v2": {"student": {"random": {"layers": 3, "hidden": 36, "heads": 12, "intermediate": 72}}},
    "weight-squeezing": {"student": {"squeeze": {"layers": 3, "hidden": 36, "heads": 12, "intermediate": 72}}},
}
STEPS = {"bilstm": 100, "cnn": 100, "subwords": 200, "tinybert-narrow": 200, "minilm-v2": 150, "distilbert": 120}


@dataclasses.dataclass
class Taught:
    """A task and a teacher of six layers that has learned it."""

    data_dir: Path
    teacher: Path

    def run(self, folder: Path, **changes: Any) -> stages.Run:
        given = {"steps": 48, "batch_size": 16, "save_steps": 0, "teacher_learning_rate": 1e-3, "learning_rate": 1e-3}
        options = FileOptions(
            data_dir=str(self.data_dir), model=str(self.teacher), output_dir=str(folder), task="sst2", teacher_steps=0,
            **{**given, **changes},
        )  # fmt: skip
        task, data = get_task("sst2"), load_task("sst2", self.data_dir)
        _, tokenizer = stages.load_teacher(options, task)
        return stages.start(options, task, tokenize(data, tokenizer, task), tokenizer, raw=data)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    """Plain sentences of the synthetic task ("the plot was very dull"), which a small model learns in seconds."""
    folder = tmp_path_factory.mktemp("taught")
    rows = [row for row in sentiment.generate(4000, False, 0) if len(row["sentence"].split()) <= 5]
    splits = {"train": rows[:320], "validation": rows[320:420]}
    words = sorted({word for row in rows for word in row["sentence"].split()})
    (folder / "sst2").mkdir()
    for split, part in splits.items():
        (folder / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    teacher = folder / "teacher"
    teacher.mkdir()
    (teacher / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast.from_pretrained(teacher)
    torch.manual_seed(0)
    labels = {0: "negative", 1: "positive"}
    config = tiny_config(
        vocab_size=len(tokenizer), num_hidden_layers=6, hidden_size=48, num_attention_heads=12, intermediate_size=96,
        max_position_embeddings=128, id2label=labels, label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    args = TrainingArguments(
        str(folder / "training"), max_steps=150, per_device_train_batch_size=32, learning_rate=1e-3, warmup_steps=15,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{**tokenizer(row["sentence"]), "labels": row["label"]} for row in splits["train"]]
    trainer = Trainer(
        model=BertForSequenceClassification(config), args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    trainer.model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    return Taught(folder, teacher)


def small(name: str) -> recipe.Recipe:
    return dataclasses.replace(recipe.load(name), **SMALL.get(name, {}))


def test_the_teacher_has_learned(taught: Taught, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(taught.teacher)
    assert evaluate(taught.run(tmp_path), model)["accuracy"] > 85


@torch.inference_mode()
def loss(run: stages.Run, model: Any) -> float:
    """Mean cross-entropy of a model's answers, of the worst of its ramps where it has some, on the validation rows."""
    rows = run.data["validation"]
    batch = dict(DataCollatorWithPadding(run.tokenizer)([rows[i] for i in range(len(rows))]))
    if getattr(model, "exits", None) is None:
        logits = model.eval()(**batch).logits[None]
    else:
        logits = exit_scores(model, [batch]).logits[:-1]
    return max(float(torch.nn.functional.cross_entropy(each, batch["labels"])) for each in logits)


def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students begin with a head that knows nothing: of this task even a teacher's first layers know all."""
    build = parts.student

    def student(*given: Any) -> Any:
        built = build(*given)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.nn.init.normal_(built.model.classifier.weight, std=0.02)
        return built

    monkeypatch.setattr(parts, "student", student)


def begun(teacher: Any, found: recipe.Recipe) -> Any:
    """The student as it is before any training."""
    model = parts.student(found.student, teacher, None).model
    if found.exits is not None:
        torch.manual_seed(0)
        lowbit.add_exits(model, found.exits["kind"])
    return model


@pytest.mark.parametrize("name", recipe.names())
def test_a_recipe_learns_and_its_student_loads(
    name: str, taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student, from the folder that the run gives, knows what its teacher knows, and did not before."""
    run, found = taught.run(tmp_path, steps=STEPS.get(name, 48)), small(name)
    teacher = stages.teacher_stage(run)
    forgetful(monkeypatch)
    words = parts.reads_own_tokens(found.student)  # their weights are random before
    first = None if words else loss(run, begun(teacher, found))
    stage = distil_by_recipe(run, teacher, found, "float")
    student, own = AutoModelForSequenceClassification.from_pretrained(tmp_path / stage), as_read(run, stage)
    assert evaluate(own, student)["accuracy"] > 75  # of a teacher's 91; half of the labels are positive
    assert first is None or loss(own, student) < 0.9 * first
    own_names = {key for key in student.state_dict() if "projections" in key or "generator" in key}
    assert not own_names  # what objectives train is not in the student's file


# One of each way to a low-bit student: prepared before the stages or after them, on text, by a generator, neighbours, a
# search, a chain, replaced layers, ramps, other tokens. The others are built and asked without training, below.
LOW_BIT = (
    "tinybert", "tinybert-narrow", "distilbert", "minilm-v1", "mate-kd", "minimax-knn", "elm", "teacher-assistant",
    "theseus", "weight-squeezing", "deebert", "deformer", "subwords",
)  # fmt: skip


@pytest.mark.parametrize("name", LOW_BIT)
def test_a_recipe_ends_in_a_packed_student(name: str, taught: Taught, tmp_path: Path) -> None:
    run = taught.run(tmp_path, steps=4)
    stage = distil_by_recipe(run, stages.teacher_stage(run), small(name), "ternary")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / stage)
    assert student.config.quantization_config.stage == "packed" and student.config.quantization_config.weight_bits == 2
    evaluate(as_read(run, stage), student)


@pytest.mark.parametrize("name", recipe.names())
def test_every_student_of_a_recipe_fits_its_objectives(name: str, taught: Taught, tmp_path: Path) -> None:
    run = taught.run(tmp_path)
    teacher = AutoModelForSequenceClassification.from_pretrained(taught.teacher)
    for bits in recipe.load(name).bits:
        assert check(run, teacher, small(name), bits) == bits


def test_a_binary_student_is_packed(taught: Taught, tmp_path: Path) -> None:
    run = taught.run(tmp_path, steps=4)
    stage = distil_by_recipe(run, stages.teacher_stage(run), recipe.load("kd"), "binary")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / stage)
    assert student.config.quantization_config.weight_bits == 1


@pytest.mark.parametrize(
    ("name", "limit"),
    [(name, 7) for name in ("tinybert", "elm", "theseus", "minimax-knn", "bilstm", "deebert")]
    + [("tinybert", 11), ("distilbert", 7), ("mate-kd", 13), ("subwords", 9), ("subwords", 16)],
)
def test_a_run_that_was_interrupted_ends_in_the_same_bits(
    name: str, limit: int, taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projections, adversaries, searches and replaced modules: killed in the first stage or the second."""
    found = small(name)
    if name == "tinybert":  # with a projection
        stages_of = (dataclasses.replace(found.stages[0], objectives=({"hidden": {"project": "per_layer"}}, "scores")),)
        found = dataclasses.replace(found, stages=(*stages_of, *found.stages[1:]))

    def student(folder: Path) -> dict[str, torch.Tensor]:
        run = taught.run(folder, steps=12, save_steps=3)
        stage = distil_by_recipe(run, stages.teacher_stage(run), found, "float")
        return AutoModelForSequenceClassification.from_pretrained(folder / stage).state_dict()

    whole = student(tmp_path / "whole")
    calls: list[int] = []
    step = Trainer.training_step  # of all that a recipe trains

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.state.global_step)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        student(tmp_path / "killed")
    again = student(tmp_path / "killed")
    assert len(calls) > limit
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages: a list of at least one"),
        ({"stages": [{"name": "a"}]}, "stage 1 lacks objectives"),
        ({"stages": [{"name": "a", "objectives": ["hiden"]}]}, "objective 'hiden'; accepted: hidden, scores"),
        ({"stages": [{"name": "a", "objectives": [{"hidden": {"maps": 1}}]}]}, "objective hidden has no maps; it has"),
        ({"stages": [{"name": "a", "objectives": [{"hidden": {"map": "down"}}]}]}, "layer map 'down'"),
        ({"stages": [{"name": "a", "objectives": [{"logits": {"scale": {"kind": "saw"}}}]}]}, "schedule 'saw'"),
        ({"stages": [{"name": "a", "objectives": [{"logits": {"view": "mirror"}}]}]}, "view 'mirror'; accepted:"),
        ({"stages": [{"name": "a", "objectives": ["task"], "share": 2}]}, "share=2"),
        ({"stages": [{"name": "a", "objectives": ["task"], "data": "more"}]}, "data 'more'; accepted: train"),
        ({"stages": [{"name": "a", "objectives": ["task"], "train": "exits"}]}, "the recipe has no exits"),
        ({"student": {"layers": {"depth": 3}}}, "student layers has no depth; it has layers, which"),
        ({"student": "rnn"}, "student 'rnn'; accepted: same, layers"),
        ({"bits": ["two"]}, "bits two; accepted: float, ternary, binary"),
        ({"teacher": "me"}, "a recipe has no teacher; it has"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {
        "about": "a", "source": "b", "student": "same", "stages": [{"name": "a", "objectives": ["task"]}],
    }  # fmt: skip
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(good))
    assert recipe.load(path).name == "own"
    path.write_text(yaml.safe_dump({**good, **changes}))
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_what_does_not_fit_the_models_is_said_before_training(taught: Taught, tmp_path: Path) -> None:
    run = taught.run(tmp_path)
    teacher = stages.teacher_stage(run)
    own = dataclasses.replace(recipe.load("tinybert"), student={"layers": {"layers": 4}})
    with pytest.raises(RecipeError, match="4 student layers do not divide 6"):
        distil_by_recipe(run, teacher, own, "float")
    with pytest.raises(RecipeError, match="bilstm trains float students, not ternary"):
        distil_by_recipe(run, teacher, recipe.load("bilstm"), "ternary")
    with pytest.raises(RecipeError, match="student layers: "):
        distil_by_recipe(run, teacher, dataclasses.replace(own, student={"layers": {"layers": 7}}), "float")
    with pytest.raises(RecipeError, match="recipe none: accepted are alp-kd"):
        recipe.load("none")


def test_a_recipe_that_was_changed_does_not_go_on_with_what_it_was(taught: Taught, tmp_path: Path) -> None:
    run, found = taught.run(tmp_path, steps=1), recipe.load("kd")
    teacher = stages.teacher_stage(run)
    distil_by_recipe(run, teacher, found, "float")
    distil_by_recipe(run, teacher, found, "float")
    distil_by_recipe(run, teacher, dataclasses.replace(found, name="other"), "float")
    with pytest.raises(RecipeError, match=r"kd-float.json is of another form of recipe kd"):
        distil_by_recipe(run, teacher, dataclasses.replace(found, student="same"), "float")
