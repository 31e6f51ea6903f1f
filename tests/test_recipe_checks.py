"""What is wrong with a recipe, its values or its models is one clear error before anything is trained."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, BertForSequenceClassification, Trainer
from typer.testing import CliRunner

from helpers import tiny_config, tiny_task, training_arguments
from lowbit.cli.app import app
from lowbit.data import sentiment
from lowbit.recipes import RecipeError
from lowbit.recipes.systems import fields, parts, recipe

GOOD = {"about": "a", "source": "b", "student": "same", "stages": [{"name": "a", "objectives": ["task"]}]}
# Of each type a value that a file may hold by mistake, and that is none of it.
WRONG: dict[str, list[Any]] = {
    "a number": ["1", None, [1], {"a": 1}, True, float("nan"), float("inf")],
    "a whole number": ["1", None, [1], 1.5, True],
    "text": [1, None, ["a"], {"a": 1}],
    "true or false": ["yes", 1, None, [True]],
    "a list of a number": ["1", {"a": 1}, ["a"]],
    "a list of a whole number": ["1", {"a": 1}, ["a"], [1.5]],
    "a list of text": ["abc", [1], {"a": 1}],
}


def with_(value: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**value, **changes}


def stage(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "a", "objectives": ["task"], **changes}]


def fields_of(table: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """(part, field, a wrong value) of all parts of a table."""
    found = []
    for name, part in table.items():
        hints = fields.types_of(part)
        for key in parts.parameters_of(part):
            if key in hints and (wrong := WRONG.get(fields.described(hints[key]))):
                found += [(name, key, value) for value in wrong]
    return found


@pytest.mark.parametrize(("name", "key", "value"), fields_of(parts.OBJECTIVES))
def test_an_objective_s_field_of_another_type_is_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=key):
        recipe.parse("own", with_(GOOD, stages=stage(objectives=[{name: {key: value}}])))


@pytest.mark.parametrize(("name", "key", "value"), fields_of(parts.STUDENTS))
def test_a_student_s_field_of_another_type_is_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=key):
        recipe.parse("own", with_(GOOD, student={name: {key: value}}))


@pytest.mark.parametrize("key", ["share", "rate", "dropout", "teacher_dropout", "schedule", "data", "head", "train"])
@pytest.mark.parametrize("value", [None, "x", [1], {"a": 1}])
def test_a_stage_s_field_of_another_type_is_refused(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=key):
        recipe.parse("own", with_(GOOD, stages=stage(**{key: value})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": "float"}, "bits='float'; accepted: a list of text"),
        ({"bits": []}, "bits none; accepted: float"),
        ({"bits": None}, "bits=None"),
        ({"about": None}, "about=None"),
        ({"name": "other"}, "a recipe has no name"),
        ({"stages": "a"}, "stages='a'"),
        ({"chain": "same"}, "chain='same'"),
        ({"stages": stage(name=1)}, "name=1; accepted: text"),
        ({"stages": stage(name="../a")}, "name='../a' is the end of its folder's name"),
        ({"stages": stage(name="packed")}, "packed"),
        ({"stages": stage(name="a-checkpoints")}, "checkpoints"),
        ({"exits": [1]}, "exits=[1]"),
        ({"exits": {"kinds": "pooler"}}, "has no kinds"),
        ({"exits": {"criterion": {"entropy": {"threshold": "low"}}}}, "threshold='low'"),
        ({"masked_lm": [1]}, "masked_lm=[1]"),
        ({"masked_lm": {"share": "half"}}, "share='half'"),
        ({"masked_lm": {"layers": 0}}, "layers=0"),
        ({"search": {"examples": 0}, "stages": stage(objectives=[{"hidden": {"map": "searched"}}])}, "examples=0"),
        ({"search": {"population": 4}}, "go together"),
        ({"stages": stage(objectives=[{"hidden": {"map": "searched"}}])}, "go together"),
        ({"augment": {"substitution": {"p": "much"}}}, "p='much'"),
        ({"augment": {"substitution": {"p": 2}}}, "p=2"),
        ({"augment": {"substitution": {"vectors": "none.txt"}}}, "no file of word vectors"),
        ({"augment": {"neighbours": {"count": 0}}}, "count"),
        ({"stages": stage(data="augmented")}, "has no augment"),
        ({"stages": stage(data="text")}, "task needs labels"),
        ({"stages": stage(objectives=[{"logits": {"view": {"hardest_neighbour": {}}}}])}, "data: neighbours"),
        ({"stages": stage(objectives=[{"logits": {"view": {"masked_generator": {"alternate": [1]}}}}])}, "alternate"),
        ({"stages": stage(objectives=[{"logits": {"temperature": {"kind": "linear", "start": 2, "end": 0}}}])}, "0"),
        ({"student": {"layers": {"size": 3}}}, "student layers has no size"),
        ({"student": {"bilstm": {"size": "big"}}}, "size='big'"),
        ({"student": {"bilstm": {"tokenizer": "mine"}}}, "has no tokenizer"),
        ({"student": "bilstm", "stages": stage(data="text", objectives=["logits"])}, "reads other tokens"),
        ({"chain": ["bilstm"]}, "an assistant has to read its student's tokens"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    assert recipe.parse("own", GOOD).bits == ("float",)
    with pytest.raises(RecipeError) as caught:
        recipe.parse("own", with_(GOOD, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_number_without_a_point_and_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1, which PyYAML reads, has it as text."""
    path = tmp_path / "own.yaml"
    text = yaml.safe_dump(with_(GOOD, stages=stage(objectives=[{"task": {"weight": 0.125}}])))
    path.write_text(text.replace("0.125", "5e-3"))
    assert recipe.load(path).stages[0].objectives == ({"task": {"weight": 0.005}},)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(GOOD) + "student: {layers: {layers: 1}}\n")
    with pytest.raises(RecipeError, match="'student' stands twice"):
        recipe.load(path)


def test_a_recipe_by_path_is_shown_and_not_the_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "kd.yaml"
    path.write_text(yaml.safe_dump(with_(GOOD, about="my own")))
    assert "my own" in CliRunner().invoke(app, ["recipes", str(path)]).stdout
    other = tmp_path / "other.yaml"
    other.write_text(path.read_text())
    assert "my own" in CliRunner().invoke(app, ["recipes", str(other)]).stdout


def pairs(folder: Path, labels: Any) -> tuple[Path, Path]:
    """Pairs of sentences in the form of MRPC and STS-B, and a tiny teacher."""
    _, model = tiny_task(folder)
    texts = [row["sentence"] for row in sentiment.generate(48, False, 0)]
    rows = [{"sentence1": a, "sentence2": b, "label": labels(i)} for i, (a, b) in enumerate(itertools.pairwise(texts))]
    for task in ("mrpc", "stsb"):
        (folder / "data" / task).mkdir()
        for split, part in (("train", rows[:32]), ("validation", rows[32:])):
            (folder / "data" / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    config = tiny_config(vocab_size=2500, num_hidden_layers=6, max_position_embeddings=128)
    BertForSequenceClassification(config).save_pretrained(model)
    return folder / "data", model


def distil(data: Path, model: Path, out: Path, *options: str) -> Any:
    given = ["--data-dir", str(data), "--teacher-steps", "1", "--steps", "2", "--batch-size", "8", "--save-steps", "0"]
    return CliRunner().invoke(app, ["distill", str(model), str(out), *given, *options])


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
@pytest.mark.parametrize("name", ["bilstm", "cnn", "deformer"])
def test_students_that_read_pairs_are_measured_evaluated_and_timed(name: str, task: str, tmp_path: Path) -> None:
    """They need to know where the second text begins, of random tokens too; STS-B's labels may be whole numbers."""
    data, model = pairs(tmp_path, lambda i: i % 2)
    result = distil(data, model, tmp_path / "out", "--task", task, "--recipe", name)
    assert result.exit_code == 0, result.output
    student = str(next((tmp_path / "out").glob(f"{name}-float-*/config.json")).parent)
    evaluated = CliRunner().invoke(app, ["evaluate", student, "--task", task, "--data-dir", str(data)])
    assert evaluated.exit_code == 0, evaluated.output
    timed = CliRunner().invoke(app, ["bench", student, "--repeats", "1"])
    assert timed.exit_code == 0, timed.output


def test_a_student_of_words_learns_from_augmented_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = pairs(tmp_path, lambda i: i % 2)
    seen: list[int] = []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, **k: (seen.append(len(self.train_dataset)), train(self, **k))[1])
    path, stages = tmp_path / "own.yaml", stage(data="augmented", objectives=["logits"])
    path.write_text(yaml.safe_dump(with_(GOOD, student="cnn", stages=stages, augment={"rules": {"copies": 3}})))
    result = distil(data, model, tmp_path / "out", "--task", "mrpc", "--recipe", str(path))
    assert result.exit_code == 0, result.output
    assert seen[0] == 32 < seen[1]  # the teacher's, the student's


@pytest.mark.parametrize(
    ("task", "name", "options", "message"),
    [
        ("mrpc", "bilstm", ("--bits", "ternary"), "bilstm trains float students, not ternary"),
        ("mrpc", "minimax-knn", (), "data: neighbours is for single texts"),
        ("stsb", "deebert", (), "Entropy needs one answer out of two classes"),
        ("mrpc", "elm", (), "search: examples=1000 of 32 training examples"),
        ("mrpc", "kd", ("--text-file", "none.txt"), "none.txt does not exist"),
        ("mrpc", "two.yaml", (), "stage second: HiddenStateLoss"),
        ("mrpc", "seven.yaml", (), "student layers: layers=7"),
        ("mrpc", "words.yaml", (), "student bilstm reads other tokens"),
        ("mrpc", "unmasked.yaml", (), "has no mask token"),
        ("mrpc", "minilm-v1", ("--text-file", "short.txt"), "reads text without labels: 1 texts have 2 tokens"),
        ("mrpc", "distilbert", ("--text-file", "short.txt"), "fewer than the 126 of one row"),
        ("mrpc", "mate-kd", ("--text-file", "short.txt"), "fewer than the 126 of one row"),
    ],
)
def test_what_does_not_fit_is_said_before_the_teacher_is_trained(
    task: str, name: str, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command ends before any training and before its folder is made, whichever stage is wrong."""
    monkeypatch.chdir(tmp_path)
    second = {"name": "second", "objectives": [{"hidden": {"map": [1, 2]}}]}
    own = {
        "two.yaml": with_(GOOD, stages=[*stage(), second]),
        "seven.yaml": with_(GOOD, student={"layers": {"layers": 7}}),
        "words.yaml": with_(GOOD, student="bilstm", stages=stage(objectives=["hidden"])),
        "unmasked.yaml": with_(GOOD, masked_lm={}, stages=stage(head="masked_lm", objectives=["task"])),
    }
    for file, table in own.items():
        Path(file).write_text(yaml.safe_dump(table))
    Path("short.txt").write_text("two words")
    data, model = pairs(tmp_path, lambda i: i % 2)
    if name == "unmasked.yaml":
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["mask_token"] = None
        (model / "tokenizer_config.json").write_text(json.dumps(config))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(Trainer, "train", refuse)
    result = distil(data, model, tmp_path / "out", "--task", task, "--recipe", name, *options)
    assert result.exit_code == 1 and message in result.stderr, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and not (tmp_path / "out").exists()


def test_checking_a_recipe_leaves_the_teacher_and_random_numbers_as_they_are(tmp_path: Path) -> None:
    from lowbit.data.tasks import get_task, load_task, tokenize
    from lowbit.recipes import stages
    from lowbit.recipes.options import FileOptions
    from lowbit.recipes.systems.checking import check

    data_dir, model = pairs(tmp_path, lambda i: i % 2)
    options = FileOptions(data_dir=str(data_dir), model=str(model), task="mrpc", output_dir=str(tmp_path / "out"))
    task, data = get_task("mrpc"), load_task("mrpc", data_dir)
    teacher, tokenizer = stages.load_teacher(options, task)
    run = stages.Run(options, task, tokenize(data, tokenizer, task), tokenizer, raw=data)
    before, state = {k: v.clone() for k, v in teacher.state_dict().items()}, torch.get_rng_state()
    for name in ("theseus", "mate-kd", "deebert", "weight-squeezing", "mobilebert"):
        found = recipe.load(name)
        if name == "weight-squeezing":
            found = recipe.parse(
                name, with_(GOOD, student={"squeeze": {"layers": 3, "hidden": 32, "heads": 4, "intermediate": 64}})
            )
        check(run, teacher, found, found.bits[-1])
    assert torch.equal(state, torch.get_rng_state()) and not (tmp_path / "out").exists()
    after = teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert AutoConfig.from_pretrained(model).num_hidden_layers == teacher.config.num_hidden_layers


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Trainer goes on without those that end in .pt, but not with a half of one.
FILES = ("model.safetensors", "trainer_state.json", "optimizer.pt", "scheduler.pt")


@pytest.mark.parametrize(
    ("file", "damage"), [*((file, damaged) for file in FILES), *((file, Path.unlink) for file in FILES[:2])]
)
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(file: str, damage: Any, tmp_path: Path) -> None:
    """A process that is killed while it saves leaves one; the same command has to go on nevertheless."""
    from lowbit.recipes.resuming import last_checkpoint

    rows = [{"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    args = training_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=2)
    model = BertForSequenceClassification(tiny_config())
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    damage(tmp_path / "checkpoint-4" / file)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    damage(tmp_path / "checkpoint-2" / file)
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "message"),
    [("teacher/model.safetensors", "delete it to have it made again"), ("options.json", "options.json is damaged")],
)
def test_a_damaged_folder_of_a_run_is_one_clear_error(file: str, message: str, tmp_path: Path) -> None:
    data, model = pairs(tmp_path, lambda i: i % 2)
    options = ("--task", "mrpc", "--recipe", "kd")
    assert distil(data, model, tmp_path / "out", *options).exit_code == 0
    damaged(tmp_path / "out" / file)
    result = distil(data, model, tmp_path / "out", *options)
    assert result.exit_code == 1 and message in result.stderr.strip().splitlines()[-1]
