"""The examples explain themselves, run end to end on a handful of records, and resume."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers.modeling_outputs import QuestionAnsweringModelOutput

import lowbit
from helpers import batch, tiny, tiny_task
from lowbit import DistillationTrainer, LengthConfig, LengthDrop, LengthDropTrainer
from lowbit.data import sentiment
from lowbit.data.squad import ask_elsewhere, featurize
from lowbit.length import Front, observed_lengths
from lowbit.recipes import RecipeError, lengths, stages
from lowbit.recipes.data import load_glue
from lowbit.recipes.options import GlueOptions
from lowbit.stages.unpadding import encoder_of

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def in_this_process(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """Run a script that ends at once; what it exits with, which Python prints where it is a text."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize(
    "script",
    [
        "demo.py", "ternarybert_glue.py", "binarybert_glue.py", "dynamic_length_glue.py", "dynamic_tinybert_squad.py",
        "ranking.py",
    ],
)  # fmt: skip
def test_help_explains_with_an_example(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = in_this_process(script, ["--help"], monkeypatch)
    text = capsys.readouterr().out
    assert not code
    assert "example:" in text and f"python examples/{script}" in text
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert " ".join(text.split()).count("(default: ") == len(options)  # but of --help


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst3"], "invalid choice: 'sst3' (choose from"),
        (["--method", "bnw"], "invalid choice: 'bnw' (choose from"),
        (["--data_dir", "none"], "error: none has no train file"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code = in_this_process("binarybert_glue.py", arguments, monkeypatch)
    said = capsys.readouterr().err.splitlines()
    assert code and message in (code if isinstance(code, str) else said[-1])


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random BERT with a word-level tokenizer, and 60 sentences in GLUE's form."""
    return tiny_task(tmp_path_factory.mktemp("examples"))


def options(setup: tuple[Path, Path], output: Path) -> list[str]:
    data, model = setup
    return ["--data_dir", str(data), "--model", str(model), "--output_dir", str(output), "--steps", "3",
            "--teacher_steps", "3", "--batch_size", "8"]  # fmt: skip


def test_ternarybert_runs_and_does_not_repeat_finished_stages(setup: tuple[Path, Path], tmp_path: Path) -> None:
    heldout = ["--max_train_samples", "40", "--heldout", "5"]
    first = run("ternarybert_glue.py", *options(setup, tmp_path), *heldout)
    assert "== teacher" in first and "ternary-packed" in first
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["ternary-packed"]) >= {"accuracy", "accuracy_heldout", "disk_mb", "latency_b1_ms"}
    assert "== " not in run("ternarybert_glue.py", *options(setup, tmp_path), *heldout)


def test_heldout_is_taken_before_training_examples_are_counted(setup: tuple[Path, Path]) -> None:
    given = {"data_dir": str(setup[0]), "heldout": 5}
    task, everything = load_glue(GlueOptions(**given))
    assert task.validation == ("validation", "validation_heldout")
    _, few = load_glue(GlueOptions(**given, max_train_samples=10))
    assert few["validation_heldout"][:] == everything["validation_heldout"][:]
    assert few["train"][:] == everything["train"][:10]


def test_more_held_out_than_there_are_is_an_error_in_a_line(setup: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "ternarybert_glue.py"), *options(setup, tmp_path), "--heldout", "500"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "training examples stand inside no other" in result.stderr.splitlines()[-1]


def test_demo_shows_why_a_measurement_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = importlib.import_module("demo")
    for name in ("build", "open_run"):
        monkeypatch.setattr(demo, name, lambda _: None)
    (tmp_path / "options.json").write_text("no options")
    monkeypatch.setattr(demo, "clear", lambda _: None)
    with pytest.raises(SystemExit, match=r"measuring teacher failed:[\s\S]*JSONDecodeError"):
        demo.main(demo.DemoOptions(output_dir=str(tmp_path)))


def test_a_fine_tuned_model_can_be_the_teacher(setup: tuple[Path, Path], tmp_path: Path) -> None:
    run("ternarybert_glue.py", *options(setup, tmp_path), "--teacher_steps", "0")
    given, saved = (load_file(folder / "model.safetensors") for folder in (setup[1], tmp_path / "teacher"))
    assert given.keys() == saved.keys() and all(given[name].equal(saved[name]) for name in given)
    assert "teacher" not in [k for k, v in json.loads((tmp_path / "results.json").read_text()).items()
                             if "seconds_per_step" in v]  # fmt: skip


@pytest.mark.parametrize("method", ["tws", "bwn"])
def test_binarybert_runs(method: str, setup: tuple[Path, Path], tmp_path: Path) -> None:
    rate = ["--split_learning_rate", "1e-3"] if method == "tws" else []
    run("binarybert_glue.py", *options(setup, tmp_path), "--method", method, "--slim_steps", "2", *rate)
    name = {"tws": "tws-w0.5-lr0.001-packed", "bwn": "bwn-packed"}[method]
    config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
    assert (config["weight_bits"], config["stage"], config["split"]) == (1, "packed", method == "tws")


@pytest.mark.parametrize(
    "extra", [["--ternary", "True"], ["--length_steps", "0", "--score", "cls", "--cost", "latency"]]
)
def test_dynamic_length_runs(extra: list[str], setup: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = ["--length_steps", "2", "--search_samples", "16", "--iterations", "1", "--keep", "1", "0.5"]
    text = run("dynamic_length_glue.py", *options(setup, tmp_path), *steps, *extra)
    assert "all tokens" in text
    front = Front.load(tmp_path / "front.json")
    if "latency" in extra:  # of random times there may be no front
        assert front.cost_unit == "ms" and front.points[0].config.score == "cls"
    else:
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["given"]["keep"] == "1 0.5"
        assert results["2x fewer"]["gmacs"] < 0.51 * results["without lengths"]["gmacs"]
        assert front.for_budget("1.5x").score == "all"
    assert (tmp_path / "front.png").stat().st_size > 1000


@pytest.mark.parametrize("method", ["ltp", "power_bert"])
@pytest.mark.parametrize("ternary", ["True", "False"])
def test_lengths_are_learned(method: str, ternary: str, setup: tuple[Path, Path], tmp_path: Path) -> None:
    new = ["--length_method", method, "--length_steps", "2", "--length_weight", "0.5", "--search_samples", "16"]
    arguments = [*options(setup, tmp_path), *new, "--ternary", ternary, "--keep", "1", "0.5"]
    assert "== hard" in run("dynamic_length_glue.py", *arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"without lengths", "all tokens", "given", "learned"} <= set(results) and "2x fewer" not in results
    assert not (tmp_path / "front.json").exists()
    unit = {"ltp": "threshold", "power_bert": "tokens"}[method]
    folders = ["soft", "hard", *(["packed"] if ternary == "True" else [])]
    lengths = [json.loads((tmp_path / folder / "config.json").read_text())["length_config"] for folder in folders]
    assert lengths[0]["unit"] == unit and all(each == lengths[0] for each in lengths)
    assert results["learned"]["length_config"] == lengths[0] and results["all tokens"]["keep"] == "1 1"
    assert "== " not in run("dynamic_length_glue.py", *arguments)


@pytest.mark.parametrize("file", ["thesis.tex", "options.json"])
def test_demo_does_not_delete_what_is_not_its_own(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / file).write_text('{"task": "sst2"}')
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = importlib.import_module("demo")
    with pytest.raises(SystemExit, match="other files"):
        demo.clear(tmp_path)
    assert (tmp_path / file).exists()


def test_demo_replaces_an_earlier_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    demo = importlib.import_module("demo")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/options.json").write_text(json.dumps(asdict(demo.DemoOptions())))
    demo.clear(tmp_path / "old")
    assert not (tmp_path / "old").exists()


def test_demo_runs_end_to_end(setup: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = ["--train_samples", "48", "--validation_samples", "16", "--batch_size", "8"]
    steps = ["--teacher_steps", "2", "--slim_steps", "2", "--steps", "2"]
    text = run("demo.py", "--model", str(setup[1]), "--output_dir", str(tmp_path / "demo"), *sizes, *steps)
    assert "ternary 2-2-8" in text and "synthetic" in text
    results = json.loads((tmp_path / "demo/results.json").read_text())
    for stage in ("binary-packed", "ternary-packed"):
        assert results[stage]["disk_mb"] < results["teacher"]["disk_mb"]
    assert (tmp_path / "demo/accuracy-size.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def questions(setup: tuple[Path, Path]) -> Path:
    """Questions on the sentences of `setup`; some contexts are longer than a window."""
    rows = []
    for i, row in enumerate(sentiment.generate(24, False, 0)):
        context = " ".join([row["sentence"]] * (1 + 4 * (i % 2)))
        answer = context.split()[2]
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        rows.append(json.dumps({"context": context, "question": "what was good", "answers": answers}))
    folder = setup[0].parent / "questions/squad"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "validation.jsonl").write_text("\n".join(rows[:10]))
    return folder.parent


def squad_options(setup: tuple[Path, Path], questions: Path, output: Path) -> list[str]:
    return [*options((questions, setup[1]), output), "--max_length", "90", "--stride", "8", "--max_eval_samples", "7",
            "--length_steps", "1", "--search_samples", "4", "--iterations", "1"]  # fmt: skip


@pytest.mark.parametrize("share", ["0", "0.5"])
def test_squad_runs_and_does_not_repeat_finished_stages(
    share: str, setup: tuple[Path, Path], questions: Path, tmp_path: Path
) -> None:
    new = ["--layers", "1", "--bf16", "True", "--drop_ratio", "0.3", "--importance_weight", "1", "--score", "cls"]
    new += ["--other_paragraphs", share]
    arguments = [*squad_options(setup, questions, tmp_path), *new]
    text = run("dynamic_tinybert_squad.py", *arguments)
    assert "| teacher" in text and "| student" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"teacher", "student", "all tokens", "2x fewer"} <= set(results)
    for values in (results["teacher"], results["student"], results["2x fewer"]):
        assert values["questions"] == 7 and 0 <= values["exact_match"] <= values["f1"] <= 100
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert (config["num_hidden_layers"], config["architectures"]) == (1, ["BertForQuestionAnswering"])
    assert "== " not in run("dynamic_tinybert_squad.py", *arguments)


def test_the_student_starts_as_every_kth_layer_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    squad = importlib.import_module("dynamic_tinybert_squad")
    teacher = tiny("BertForQuestionAnswering", num_hidden_layers=6)
    inputs = batch("BertForQuestionAnswering")
    with torch.no_grad():
        student = squad.every_kth_layer(teacher, 3)
        hidden = teacher.bert.embeddings(inputs["input_ids"])
        for index in (1, 3, 5):
            mask = (1 - inputs["attention_mask"][:, None, None, :]) * torch.finfo(torch.float32).min
            hidden = teacher.bert.encoder.layer[index](hidden, mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        starts, _ = teacher.qa_outputs(hidden).unbind(-1)
        torch.testing.assert_close(student(**inputs).start_logits, starts)
    assert student.config.num_hidden_layers == 3 and teacher.config.num_hidden_layers == 6
    assert not {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": 3}, "--layers 3 does not divide the teacher's 2 layers"),
        ({"max_length": 200}, "128 positions"),
        ({"drop_ratio": [0.1, 0.2, 0.3]}, "--drop_ratio has 3 numbers; accepted: one, or one for each of 2"),
        ({"keep": [0.5]}, "--keep has 1 numbers; accepted: none, or one for each of 2"),
        ({"keep": [0.5, 0.6]}, "LengthConfig: keep=.* increases"),
        ({"drop_ratio": [1.5]}, "LengthDrop: ratio=1.5"),
        ({"other_paragraphs": 1.5}, "--other_paragraphs 1.5: accepted is a share from 0 to 1"),
        ({"other_paragraphs": 0.5, "length_steps": 0}, "--other_paragraphs .* needs --length_steps above 0"),
        ({"score": "both"}, "score='both'"),
        ({"cost": "joules"}, "--cost joules: accepted are macs and latency"),
        ({"length_method": "guess"}, "--length_method guess: accepted are lengthdrop, ltp, power_bert"),
        ({"length_method": "ltp"}, "takes --score all, .* got --score cls --length_steps 1000"),
        ({"length_method": "ltp", "score": "all", "protect_question": True}, "--protect_question True"),
        ({"length_method": "ltp", "score": "all", "length_steps": 0}, "--length_steps 0"),
        ({"length_weight": 0.1}, "--length_weight is of --length_method ltp and power_bert"),
        ({"length_method": "power_bert", "score": "all", "length_weight": -1.0}, "SoftExtract: weight=-1.0"),
    ],
)
def test_squad_options_that_do_not_fit_the_model_are_refused(
    wrong: dict, message: str, setup: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    squad = importlib.import_module("dynamic_tinybert_squad")
    options = {"model": str(setup[1]), "output_dir": str(tmp_path), "max_length": 90, **wrong}
    with pytest.raises((SystemExit, RecipeError), match=message):  # run_example makes one of the other
        squad.main(squad.SquadOptions(**options))
    assert not any(tmp_path.iterdir())


def test_lengths_for_another_number_of_layers_are_refused_before_training(
    setup: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    glue = importlib.import_module("dynamic_length_glue")
    options = {"model": str(setup[1]), "data_dir": str(setup[0]), "output_dir": str(tmp_path), "keep": [0.5]}
    with pytest.raises(RecipeError, match="--keep has 1 numbers"):
        glue.main(glue.LengthGlueOptions(**options))
    assert not any(tmp_path.iterdir())


def test_evaluation_on_questions_is_right_for_a_model_that_knows_the_answers(
    setup: tuple[Path, Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers come back to their questions, though windows are sorted by length."""
    monkeypatch.syspath_prepend(EXAMPLES)
    squad = importlib.import_module("dynamic_tinybert_squad")
    options = {"model": str(setup[1]), "data_dir": str(questions), "output_dir": str(tmp_path)}
    run = squad.open_run(squad.SquadOptions(**options, max_length=90, stride=8))
    known = {tuple(row["input_ids"]): row for row in run.data["validation"]}
    windows = len(run.data["validation"])  # some contexts have several
    assert len(known) == windows > len(run.task["validation"]) == 10

    class Knows(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: torch.Tensor) -> object:
            logits = torch.zeros(2, *input_ids.shape)
            for i, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
                row = known[tuple(ids[: sum(mask)])]
                if row["start_positions"]:
                    logits[0, i, row["start_positions"]] = logits[1, i, row["end_positions"]] = 1
            return QuestionAnsweringModelOutput(start_logits=logits[0], end_logits=logits[1])

    assert squad.evaluate(run, Knows()) == {"questions": 10, "exact_match": 100.0, "f1": 100.0}


def test_thresholds_are_compared_by_what_they_keep(
    setup: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    glue = importlib.import_module("dynamic_length_glue")
    options = {"model": str(setup[1]), "data_dir": str(setup[0]), "output_dir": str(tmp_path)}
    run = glue.open_run(glue.LengthGlueOptions(**options))
    rows = list(run.data["validation"].select_columns(run.tokenizer.model_input_names))
    model, before = tiny("BertForTokenClassification"), tiny("BertForTokenClassification")
    config = LengthConfig((0.98, 1.0), unit="threshold")
    lengths.compare(
        run, model, {"learned": config}, lambda model: {"f1": float(model is before)}, rows, before, batches=2
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["before"] == {"f1": 1.0} and results["all tokens"]["f1"] == 0.0
    found = results["learned"]
    lowbit.set_length(model, config)
    tokens, kept = 0, [0, 0]
    for row in rows:
        inputs = {name: torch.tensor([values]) for name, values in row.items()}
        tokens += len(row["input_ids"])
        kept = [sum(pair) for pair in zip(kept, (n for (n,) in observed_lengths(model, [inputs])), strict=True)]
    shares = [float(share) for share in found["keep"].split()]
    assert shares == pytest.approx([n / tokens for n in kept], abs=1e-3) and 1 > shares[0] > shares[1]
    assert found["times_fewer_macs"] > 1.1 and found["fewer_than_padded"] > 1.1
    assert found["length_config"]["keep"] == [0.98, 1.0]


def test_lengths_are_trained_for_what_is_searched(
    setup: tuple[Path, Path], questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Score and protected tokens, in the precision asked for, without dropout; the options reach the trainer."""
    monkeypatch.syspath_prepend(EXAMPLES)
    squad = importlib.import_module("dynamic_tinybert_squad")
    options = squad.SquadOptions(
        model=str(setup[1]), data_dir=str(questions), output_dir=str(tmp_path), max_length=90, stride=8, score="cls",
        drop_ratio=[0.1, 0.4], sub_models=2, importance_weight=0.5, bf16=True, length_steps=1, teacher_steps=0,
    )  # fmt: skip
    run, trainers = squad.open_run(options), []

    def note(_run: object, _name: str, trainer: LengthDropTrainer) -> torch.nn.Module:
        trainers.append((trainer, encoder_of(trainer.model).lengths, trainer.args.bf16))
        return trainer.model

    monkeypatch.setattr(lengths, "train", note)
    teacher = squad.teacher_stage(run)
    model = lengths.length_drop(run, teacher, None, protect=("first_segment",))
    ((trainer, config, bf16),) = trainers
    assert (config.score, config.protect, config.keep) == ("cls", ("first_segment",), (1.0, 1.0)) and bf16
    assert trainer.length_drop == LengthDrop((0.1, 0.4), sub_models=2, importance_weight=0.5)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert {m.p for m in teacher.modules() if isinstance(m, torch.nn.Dropout)} != {0.0}
    assert not hasattr(model.config, "length_config")
    shortest = lengths.trained_for(options)[-1]
    assert shortest == pytest.approx(trainer.length_drop.draw(2, 0)[0][0])  # the search starts from it, too


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize(
    ("method", "expected"),
    [("lengthdrop", ["adaptive"]), ("ltp", ["soft", "hard"]), ("power_bert", ["soft", "hard"])],
)
def test_other_paragraphs_are_answered_by_the_float_model(
    method: str,
    expected: list[str],
    ternary: bool,
    setup: tuple[Path, Path],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropping tokens is learned without labels, quantization before it with them."""
    monkeypatch.syspath_prepend(EXAMPLES)
    squad = importlib.import_module("dynamic_tinybert_squad")
    options = squad.SquadOptions(
        model=str(setup[1]), data_dir=str(questions), output_dir=str(tmp_path), max_length=90, stride=8, score="all",
        other_paragraphs=0.75, length_steps=2, batch_size=4, length_method=method, ternary=ternary, teacher_steps=0,
        sub_models=1, seed=3, importance_weight=0.0,
    )  # fmt: skip
    asked, trained = [], {}

    def ask(data: Dataset, *arguments: float) -> Dataset:
        assert arguments == (8, 0.75, 3) and data.column_names == ["context", "question", "answers"]
        asked.append(ask_elsewhere(data, *arguments))
        return asked[0]

    def note(_run: object, name: str, trainer: DistillationTrainer) -> torch.nn.Module:
        trained[name] = trainer
        return trainer.model

    monkeypatch.setattr(squad, "ask_elsewhere", ask)
    monkeypatch.setattr(stages, "train", note)
    monkeypatch.setattr(lengths, "train", note)
    run = squad.open_run(options)
    teacher = squad.teacher_stage(run)
    lengths.adaptive_stages(run, teacher)
    assert list(trained) == ["teacher", *(["ternary"] if ternary else []), *expected]
    windows = featurize(asked[0], run.tokenizer, 90, 8)
    for name, trainer in trained.items():
        labelled = name not in expected
        assert ("start_positions" in trainer.train_dataset.column_names) == labelled
        if not labelled:
            assert trainer.train_dataset["input_ids"][:] == windows["input_ids"][:]
            assert trainer.teacher is teacher and [o.name for o in trainer.current_objectives()] == ["logits"]


def test_a_run_made_before_an_option_existed_goes_on_with_its_default(tmp_path: Path) -> None:
    @dataclass
    class Options:
        output_dir: str
        steps: int
        ratios: list[float] = field(default_factory=lambda: [0.2])
        method: str = "first"

    (tmp_path / "options.json").write_text('{"output_dir": "elsewhere", "steps": 3}')
    stages.start(Options(str(tmp_path), 3), None, None, None)
    for wrong, message in (
        (Options(str(tmp_path), 3, method="second"), r"method='first' \(now 'second'\)"),
        (Options(str(tmp_path), 3, [0.1]), r"ratios=\[0.2\] \(now \[0.1\]\)"),
        (Options(str(tmp_path), 4), r"steps=3 \(now 4\)"),
    ):
        with pytest.raises(RecipeError, match=message):
            stages.start(wrong, None, None, None)


def test_another_run_in_the_same_folder_is_refused(setup: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text('{"task": "other"}')
    command = [sys.executable, str(EXAMPLES / "ternarybert_glue.py"), *options(setup, tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "other options" in result.stderr


def test_ranking_ends_in_the_two_metrics_and_resumes(setup: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ir_measures")
    _, model = setup
    rows, qrels = [], []
    for query in range(4):
        for document in range(3):
            text = f"the plot was {'superb' if document == query % 3 else 'dull'}"
            rows += [{"query_id": f"q{query}", "doc_id": f"d{document}", "query": "good", "passage": text}] * 2
            qrels.append(f"q{query} 0 d{document} {int(document == query % 3)}")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "qrels").write_text("\n".join(qrels))
    files = {"train_pairs": "pairs.jsonl", "pairs": "pairs.jsonl", "train_qrels": "qrels", "qrels": "qrels"}
    given = [word for name, file in files.items() for word in (f"--{name}", str(tmp_path / file))]
    given += ["--model", str(model), "--output_dir", str(tmp_path / "run"), "--steps", "2", "--teacher_steps", "2"]
    first = run("ranking.py", *given, "--recipe", "ternarybert", "--batch_size", "4")
    assert "== teacher" in first and "mrr@10" in first
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(0 < results[name]["ndcg@10"] <= 100 for name in ("teacher", "ternarybert-float-joint"))
    assert "== " not in run("ranking.py", *given, "--recipe", "ternarybert", "--batch_size", "4")
    (tmp_path / "qrels").write_text("q0 0 d0")
    command = [sys.executable, str(EXAMPLES / "ranking.py"), *given]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "line 1: accepted is query" in result.stderr.splitlines()[-1]
