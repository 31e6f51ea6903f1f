"""The examples explain themselves, run end to end on a handful of records, and resume."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertTokenizerFast

from helpers import tiny_config
from lowbit import sentiment

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("script", ["demo.py", "ternarybert_glue.py", "binarybert_glue.py"])
def test_help_explains_with_an_example(script: str) -> None:
    text = run(script, "--help")
    assert "example:" in text and f"python examples/{script}" in text


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random BERT with a word-level tokenizer, and 60 sentences in GLUE's form."""
    folder = tmp_path_factory.mktemp("examples")
    rows = {"train": sentiment.generate(48, False, 0), "validation": sentiment.generate(12, True, 0)}
    words = sorted({word for row in rows["train"] for word in row["sentence"].split()})
    data, model = folder / "data/sst2", folder / "model"
    data.mkdir(parents=True)
    for split, part in rows.items():
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast.from_pretrained(model).save_pretrained(model)
    config = tiny_config(vocab_size=2500, max_position_embeddings=128)
    BertForSequenceClassification(config).save_pretrained(model)
    return folder / "data", model


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


def test_a_fine_tuned_model_can_be_the_teacher(setup: tuple[Path, Path], tmp_path: Path) -> None:
    run("ternarybert_glue.py", *options(setup, tmp_path), "--teacher_steps", "0")
    given, saved = (load_file(folder / "model.safetensors") for folder in (setup[1], tmp_path / "teacher"))
    assert given.keys() == saved.keys() and all(given[name].equal(saved[name]) for name in given)
    assert "teacher" not in [k for k, v in json.loads((tmp_path / "results.json").read_text()).items()
                             if "seconds_per_step" in v]  # fmt: skip


@pytest.mark.parametrize("method", ["tws", "bwn"])
def test_binarybert_runs(method: str, setup: tuple[Path, Path], tmp_path: Path) -> None:
    run("binarybert_glue.py", *options(setup, tmp_path), "--method", method, "--slim_steps", "2")
    name = {"tws": "tws-w0.5-packed", "bwn": "bwn-packed"}[method]
    config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
    assert (config["weight_bits"], config["stage"], config["split"]) == (1, "packed", method == "tws")


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


def test_another_run_in_the_same_folder_is_refused(setup: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text('{"task": "other"}')
    command = [sys.executable, str(EXAMPLES / "ternarybert_glue.py"), *options(setup, tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "other options" in result.stderr
