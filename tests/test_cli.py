"""Every command on tiny models: what it writes, its JSON, its exit codes, and its one line for what goes wrong."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import lowbit
from helpers import batch, outputs, tiny, tiny_task
from lowbit.cli import checkpoint, commands, doctor, loading
from lowbit.cli.app import app
from lowbit.length import Front
from lowbit.nn import PackedEmbedding, PackedLinear
from lowbit.recipes import RecipeError
from lowbit.recipes.data import load_files
from lowbit_kernels import native

ROOT = Path(__file__).parents[1]
NAMES = [function.__name__.replace("_", "-") for function in commands.COMMANDS]


pytestmark = pytest.mark.usefixtures("logging_as_before")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_task(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {
        "float": tiny(),
        "prepared": lowbit.prepare(tiny(), lowbit.TernaryConfig(activation_bits=None)),
        "ternary": lowbit.quantize(tiny(), lowbit.TernaryConfig(position_embedding_bits=8)),
        "binary": lowbit.quantize(tiny(), lowbit.BinaryConfig(granularity="per_tensor", embedding_bits=8)),
        "pair": lowbit.convert(lowbit.split(lowbit.prepare(lowbit.slim(tiny(), 0.5), lowbit.TernaryConfig()))),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def call(*arguments: object, code: int = 0, **kwargs: object) -> str:
    """Standard output of a command that ends with `code`; standard error where it is not 0."""
    result = CliRunner().invoke(app, list(map(str, arguments)), **kwargs)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def called(*arguments: object) -> dict:
    return json.loads(call(*arguments, "--json"))


def logits(folder: Path) -> torch.Tensor:
    return scores_of(AutoModelForSequenceClassification.from_pretrained(folder).eval())


def scores_of(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    return outputs(model, batch())[0]


# ----------------------------------------------------------------------------------------------------------- quantize


def test_quantize_writes_what_lowbit_quantize_makes(setup: tuple[Path, Path], tmp_path: Path) -> None:
    model = setup[1]
    result = called("quantize", model, tmp_path / "out", "--activation-bits", "4", "--keep", "pooler")
    config = lowbit.TernaryConfig(activation_bits=4, modules_to_not_convert=["pooler"])
    reference = lowbit.quantize(AutoModelForSequenceClassification.from_pretrained(model).eval(), config)
    assert torch.equal(logits(tmp_path / "out"), scores_of(reference))
    assert (result["bits"], result["from_stage"], result["stage"]) == ("2-2-4", "float", "packed")
    files = {name: (folder / "model.safetensors").stat().st_size / 1e6
             for name, folder in (("disk_mb_before", model), ("disk_mb", tmp_path / "out"))}  # fmt: skip
    assert {name: result[name] for name in files} == {name: round(size, 2) for name, size in files.items()}
    text = "the food was good"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(model)(text)


def test_a_folder_of_sentence_transformers_stays_one(setup: tuple[Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny("BertModel").save_pretrained(source)
    (source / "1_Pooling").mkdir()
    pooling = json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    files = {
        "modules.json": json.dumps([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]),
        "1_Pooling/config.json": pooling,
        "config_sentence_transformers.json": "{}",
        "sentence_bert_config.json": json.dumps({"max_seq_length": 17}),
    }  # fmt: skip
    for name, text in files.items():
        (source / name).write_text(text)
    for file in setup[1].glob("*token*"):
        shutil.copyfile(file, source / file.name)
    called("quantize", source, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(str(tmp_path / "out"), device="cpu")
        assert encoder.max_seq_length == 17 and encoder.encode(["good film"]).shape == (1, 64)
        assert any(isinstance(module, PackedLinear) for module in encoder.modules())
    (source / "modules.json").write_text(files["modules.json"].replace("1_Pooling", "../elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    assert "outside of the checkpoint's folder" in call("quantize", source, tmp_path / "no", code=1)
    for damaged in ("[{}]", "[1]", '{"path": 1}', "{"):
        (source / "modules.json").write_text(damaged)
        assert "is no list of modules" in call("quantize", source, tmp_path / "no", code=1)
    assert not (tmp_path / "no").exists()


def test_a_damaged_checkpoint_is_named_by_every_command_that_loads_it(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved["ternary"], tmp_path / "damaged")
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 96')
    )
    assert "hidden_size is 96, the weights were saved with 64" in call("bench", folder, code=1)


def test_quantize_to_one_bit_for_people(setup: tuple[Path, Path], tmp_path: Path) -> None:
    text = call("quantize", setup[1], tmp_path / "out", "--bits", "binary", "--embedding-bits", "8",
                "--activation-bits", "none")  # fmt: skip
    assert "times smaller" in text and "1-8-32" in text
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["weight_bits"], config["embedding_bits"], config["activation_bits"]) == (1, 8, None)


def test_a_prepared_checkpoint_is_packed_as_it_was_trained(saved: dict[str, Path], tmp_path: Path) -> None:
    assert called("quantize", saved["prepared"], tmp_path / "out")["from_stage"] == "prepared"
    assert torch.equal(logits(tmp_path / "out"), logits(saved["prepared"]))
    assert "--bits" in call("quantize", saved["prepared"], tmp_path / "other", "--bits", "binary", code=2)


def test_what_is_in_the_way_is_not_overwritten(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert "not empty" in call("quantize", saved["float"], tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    call("quantize", saved["float"], tmp_path, "--overwrite")
    assert (tmp_path / "note.txt").read_text() == "mine" and (tmp_path / "model.safetensors").is_file()
    assert "is a file" in call("quantize", saved["float"], tmp_path / "note.txt", code=2)
    assert "model itself" in call("quantize", saved["float"], saved["float"], "--overwrite", code=2)


# -------------------------------------------------------------------------------------------------------------- split


def test_split_keeps_the_function(saved: dict[str, Path], tmp_path: Path) -> None:
    result = called("split", saved["prepared"], tmp_path / "out")
    assert (result["stage"], result["bits"], result["split"]) == ("prepared", "1-1-32", True)
    torch.testing.assert_close(logits(tmp_path / "out"), logits(saved["prepared"]), atol=1e-4, rtol=1e-4)
    call("quantize", tmp_path / "out", tmp_path / "packed")
    assert "is float: call lowbit.prepare" in call("split", saved["float"], tmp_path / "other", code=1)


# --------------------------------------------------------------------------------------------------------------- info


@pytest.mark.parametrize("kind", ["float", "prepared", "ternary", "binary", "pair"])
def test_info_says_what_the_model_holds(kind: str, saved: dict[str, Path]) -> None:
    found = called("info", saved[kind])
    modules = {module["name"]: module for module in found["modules"]}
    tensors = load_file(saved[kind] / "model.safetensors")
    assert sum(module["bytes"] for module in modules.values()) == sum(t.nbytes for t in tensors.values())
    assert sum(found["parts"].values()) == sum(t.nbytes for t in tensors.values())
    assert modules["classifier"]["kind"] == "float" and modules["classifier"]["bits"] == 32
    assert modules["classifier"]["part"] == "head" and modules["bert.pooler.dense"]["part"] == "pooler"
    assert (found["stage"], found["model_class"]) == (
        {"float": "float", "prepared": "prepared"}.get(kind, "packed"),
        "BertForSequenceClassification",
    )
    assert found["checksums"] == (0 if kind == "float" else len(tensors)) and not found["damaged"]
    if kind == "prepared":
        assert modules["bert.encoder.layer.0.output.dense"]["kind"] == "ternary, in training"
    model = AutoModelForSequenceClassification.from_pretrained(saved[kind])
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    assert bool(packed) == (kind not in ("float", "prepared"))
    for name, module in packed.items():
        said = modules[name]
        assert said["kind"] == module.layout
        assert said["bits"] == {"ternary": 2, "binary": 1, "split": 2, "int8": 8}[module.layout]
        torch.testing.assert_close(torch.tensor(said["scale"]), torch.stack(module.weight_scale.aminmax()))
        if isinstance(module, PackedLinear) and module.layout != "split":
            weight = module.dequantize()
            assert said["shape"] == list(weight.shape)
            assert said["sparsity"] == pytest.approx((weight == 0).double().mean().item(), abs=1e-6)
    if kind == "pair":
        assert modules["bert.encoder.layer.0.output.dense"]["shape"] == [2, 64, 75]


def test_a_prepared_checkpoint_says_what_it_will_be_packed_to(saved: dict[str, Path], tmp_path: Path) -> None:
    call("quantize", saved["prepared"], tmp_path / "out")
    before, after = (
        {m["name"]: m for m in called("info", f)["modules"]} for f in (saved["prepared"], tmp_path / "out")
    )
    for name, module in after.items():
        assert (before[name]["bits"], before[name]["shape"]) == (module["bits"], module["shape"])
        assert before[name]["sparsity"] == pytest.approx(module["sparsity"])


def test_info_for_people_has_a_row_a_module_and_bars(saved: dict[str, Path]) -> None:
    text = call("info", saved["ternary"])
    assert "bert.encoder.layer.1.attention.self.query" in text and "█" in text and "2-2-8" in text
    assert "tensors match" in text
    assert "none in these files" in call("info", saved["float"])


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (None, "none is used"),
        (lowbit.Entropy(0.25), "sentences leave by entropy(threshold=0.25)"),
        (lowbit.Patience(2), "sentences leave by patience(times=2)"),
    ],
)
def test_info_says_by_what_sentences_leave(
    criterion: object, words: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved["ternary"])
    lowbit.set_exit(lowbit.add_exits(model, "mean"), criterion).save_pretrained(tmp_path)
    assert f"early exits (mean) behind layers 1; {words}" in call("info", tmp_path)
    assert called("info", tmp_path)["exit_config"]["kind"] == "mean"


def test_info_reads_shards_and_notes_damage(saved: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved["ternary"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert called("info", tmp_path / "shards")["modules"] == called("info", saved["ternary"])["modules"]
    shutil.copytree(saved["ternary"], tmp_path / "damaged")
    file = tmp_path / "damaged/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    assert "do not match their checksum" in call("info", tmp_path / "damaged", code=1)


def test_info_refuses_what_config_json_does_not_describe(saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["ternary"], tmp_path / "less")
    tensors = load_file(tmp_path / "less/model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "layer.1.output.dense" not in n}, tmp_path / "less/model.safetensors"
    )
    assert "no tensors of bert.encoder.layer.1.output.dense" in call("info", tmp_path / "less", code=1)
    (tmp_path / "less/model.safetensors").write_bytes(b"none")
    assert "not a readable safetensors file" in call("info", tmp_path / "less", code=1)
    (tmp_path / "less/model.safetensors").unlink()
    assert "holds no *.safetensors file" in call("info", tmp_path / "less", code=1)


# ----------------------------------------------------------------------------------------------- evaluation and timing


def accuracy(model: Path, file: Path) -> float:
    """One sentence at a time."""
    tokenizer, classifier = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForSequenceClassification.from_pretrained(model),
    )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    with torch.no_grad():
        right = [classifier(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax() == row["label"]
                 for row in rows]  # fmt: skip
    return round(100 * sum(map(int, right)) / len(rows), 2)


def test_evaluate_on_a_task_and_on_a_file_of_text_labels(setup: tuple[Path, Path], tmp_path: Path) -> None:
    data, model = setup
    found = called("evaluate", model, "--task", "sst2", "--data-dir", data)
    assert found["metrics"] == {"accuracy": accuracy(model, data / "sst2/validation.jsonl")}
    assert found["examples"] == 12
    rows = [json.loads(line) for line in (data / "sst2/validation.jsonl").read_text().splitlines()]
    write_csv(tmp_path / "x.csv", [{"review": r["sentence"], "stars": f"LABEL_{r['label']}"} for r in rows])
    columns = ["--text-column", "review", "--label-column", "stars"]
    assert called("evaluate", model, "--file", tmp_path / "x.csv", *columns)["metrics"] == found["metrics"]
    call("quantize", model, tmp_path / "packed")
    text = call("evaluate", tmp_path / "packed", "--task", "sst2", "--data-dir", data, "--fused")
    assert f"{accuracy(tmp_path / 'packed', data / 'sst2/validation.jsonl'):.2f} %" in text


def test_evaluate_refuses_models_for_something_else(
    setup: tuple[Path, Path], saved: dict[str, Path], tmp_path: Path
) -> None:
    data, model = setup
    task = ["--task", "sst2", "--data-dir", data]
    assert "has 3 labels, the task has 2" in call("evaluate", saved["float"], *task, code=1)
    tiny("BertModel").save_pretrained(tmp_path)
    assert "is a BertModel; accepted" in call("evaluate", tmp_path, *task, code=1)
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    classifier.config.id2label = {0: "Positive", 1: "Negative"}
    classifier.save_pretrained(tmp_path / "turned")
    assert "another order" in call("evaluate", tmp_path / "turned", *task, code=1)
    # The labels of the task in another spelling are fine: those of the best-known SST-2 model.
    classifier.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    classifier.save_pretrained(tmp_path / "upper")
    loading.load_classifier(str(tmp_path / "upper"), ("negative", "positive"))
    assert "unknown task 'sst3'" in call("evaluate", model, "--task", "sst3", code=1)
    assert "has no tokenizer" in call("evaluate", saved_without_tokenizer(model, tmp_path), *task, code=1)


def saved_without_tokenizer(model: Path, folder: Path) -> Path:
    AutoModelForSequenceClassification.from_pretrained(model).save_pretrained(folder / "bare")
    return folder / "bare"


def test_bench_compares_with_the_float_form(setup: tuple[Path, Path], tmp_path: Path) -> None:
    call("quantize", setup[1], tmp_path / "packed")
    sizes = ["--batch-size", 1, "--batch-size", 3, "--length", 16, "--repeats", 3]
    found = called("bench", tmp_path / "packed", "--baseline", setup[1], *sizes)
    rows = {(row["model"], row["batch_size"]): row for row in found["results"]}
    assert set(rows) == {(str(name), size) for name in (tmp_path / "packed", setup[1]) for size in (1, 3)}
    for (name, size), row in rows.items():
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        expected = rows[str(setup[1]), size]["median_ms"] / row["median_ms"]
        assert row["times_as_fast"] == pytest.approx(expected, rel=0.02, abs=0.006), name
    text = call("bench", tmp_path / "packed", "--fused", "--length", 16, "--repeats", 1)
    assert "median ms" in text and "times as fast" not in text
    assert "has 128 positions" in call("bench", setup[1], "--length", 200, code=1)


# ----------------------------------------------------------------------------------------------------------- training


FEW = ["--steps", 1, "--teacher-steps", 1, "--slim-steps", 1, "--batch-size", 8]


def test_distill_trains_packs_and_does_not_repeat(setup: tuple[Path, Path], tmp_path: Path) -> None:
    data, model = setup
    arguments = ["distill", model, tmp_path / "run", "--task", "sst2", "--data-dir", data, *FEW]
    found = called(*arguments)
    packed = tmp_path / "run/ternary-packed"
    assert found["model"] == str(packed)
    assert found["results"]["ternary-packed"]["accuracy"] == accuracy(packed, data / "sst2/validation.jsonl")
    assert found["results"]["ternary-packed"]["disk_mb"] < found["results"]["teacher"]["disk_mb"]
    assert AutoModelForSequenceClassification.from_pretrained(packed).config.quantization_config.stage == "packed"
    card = (packed / "README.md").read_text()
    share = found["results"]["ternary-packed"]["accuracy"] / 100
    assert f"value: {round(share, 4)}\n" in card and "sst2" in card
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert "ternary-packed" in call(*arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")} == written
    assert "steps=1 (now 2)" in call(*arguments, "--steps", 2, code=1)


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def reviews(setup: tuple[Path, Path], tmp_path: Path) -> list[object]:
    """Options for files with three labels that are text."""
    files = []
    for split in ("train", "validation"):
        lines = (setup[0] / f"sst2/{split}.jsonl").read_text().splitlines()
        rows = [{"text": json.loads(line)["sentence"], "label": ("bad", "fair", "good")[i % 3]}
                for i, line in enumerate(lines)]  # fmt: skip
        files += [f"--{split}-file", write_csv(tmp_path / f"{split}.csv", rows)]
    return files


def test_distill_to_one_bit_on_files(setup: tuple[Path, Path], reviews: list, tmp_path: Path) -> None:
    arguments = [setup[1], tmp_path / "run", *reviews, "--bits", "binary", "--method", "bwn", *FEW]
    found = called("distill", *arguments)
    model = AutoModelForSequenceClassification.from_pretrained(found["model"])
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    config = model.config.quantization_config
    assert (config.weight_bits, config.stage, config.split) == (1, "packed", False)
    evaluated = called("evaluate", found["model"], "--file", reviews[3])["metrics"]
    assert evaluated == {"accuracy": found["results"][Path(found["model"]).name]["accuracy"]}


def test_a_given_teacher_keeps_its_weights_and_its_labels(
    setup: tuple[Path, Path], reviews: list, tmp_path: Path
) -> None:
    teacher = tiny(vocab_size=2500, max_position_embeddings=128)
    teacher.config.id2label = {0: "good", 1: "fair", 2: "bad"}
    teacher.config.label2id = {"good": 0, "fair": 1, "bad": 2}
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(setup[1]).save_pretrained(tmp_path / "teacher")
    given = [*reviews, *FEW, "--teacher-steps", 0]
    found = called("distill", tmp_path / "teacher", tmp_path / "run", *given)
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "teacher", tmp_path / "run/teacher"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert AutoModelForSequenceClassification.from_pretrained(found["model"]).config.id2label[0] == "good"
    text = call("distill", setup[1], tmp_path / "other", *given, code=1)
    assert "labels bad, fair, good; known are LABEL_0, LABEL_1" in text
    tiny("BertModel", vocab_size=2500).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(setup[1]).save_pretrained(tmp_path / "base")
    task = ["--task", "sst2", "--data-dir", setup[0], *FEW, "--teacher-steps", 0]
    assert "not fine-tuned for this task" in call("distill", tmp_path / "base", tmp_path / "third", *task, code=1)
    assert "quantized already" in call("distill", found["model"], tmp_path / "third", *task, code=1)
    turned = AutoModelForSequenceClassification.from_pretrained(setup[1])
    turned.config.id2label = {0: "positive", 1: "negative"}
    turned.save_pretrained(tmp_path / "base")  # with its tokenizer
    assert "another order" in call("distill", tmp_path / "base", tmp_path / "third", *task, code=1)


def test_search_length_finds_saves_and_resumes(setup: tuple[Path, Path], tmp_path: Path) -> None:
    data, model = setup
    call("quantize", model, tmp_path / "packed")
    arguments = ["search-length", tmp_path / "packed", tmp_path / "run", "--task", "sst2", "--data-dir", data,
                 "--samples", 8, "--iterations", 1, "--budget", "1.2x"]  # fmt: skip
    found = called(*arguments)
    front = Front.load(found["front"])
    assert [point["keep"] for point in found["points"]] == [list(point.config.keep) for point in front.points]
    assert found["full_cost"] == front.full_cost
    shorter = AutoModelForSequenceClassification.from_pretrained(found["saved"]["1.2x"])
    assert shorter.config.length_config == front.for_budget("1.2x").to_dict()
    scored = json.loads((tmp_path / "run/search-model.json").read_text())["scores"]
    assert called(*arguments) == found
    assert json.loads((tmp_path / "run/search-model.json").read_text())["scores"] == scored
    untouched = [*arguments[:2], tmp_path / "new", *arguments[3:]]
    assert "accepted: '<number>x'" in call(*untouched, "--budget", "half", code=1)
    assert not (tmp_path / "new").exists()  # said before the search


# -------------------------------------------------------------------------------------------------- files of the user's


def rows(*labels: object) -> list[dict]:
    return [{"text": f"words {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("text,label\n", "has no rows"),
        ("text,stars\na,1\n", "has columns text, stars; needed: text, label"),
        ("text,label\na,1\nb,\n", "1 rows without label, the first is row 2"),
        ("text,label\n,1\nb,0\n", "1 rows without text, the first is row 1"),
        ("text,label\na,x\nb,x\n", "one label only, 'x'"),
        ("text,label\na,0.5\nb,1.5\n", "holds 0.5; accepted: text or whole numbers"),
        ('text,label\n"a,1\n', "could not be read as .csv"),
    ],
)
def test_a_file_that_is_no_task_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_files({"train": str(tmp_path / "x.csv")})


def test_labels_of_any_numbers_and_columns_of_any_name(tmp_path: Path) -> None:
    train, other = tmp_path / "a.jsonl", tmp_path / "b.csv"
    train.write_text("\n".join(json.dumps({"q": "a", "p": "b", "stars": stars}) for stars in (5, 1, 3, 1)))
    write_csv(other, [{"q": "NA", "p": "007", "stars": 3}])
    task, data = load_files({"train": str(train), "validation": str(other)}, ["q", "p"], "stars")
    assert (task.labels, task.columns, data["train"]["label"]) == (("1", "3", "5"), ("q", "p"), [2, 0, 1, 0])
    assert data["validation"][0] == {"q": "NA", "p": "007", "label": 1}
    write_csv(other, [{"q": "x", "p": "y", "stars": 4}])
    with pytest.raises(RecipeError, match="has labels 4; known are 1, 3, 5"):
        load_files({"train": str(train), "validation": str(other)}, ["q", "p"], "stars")
    with pytest.raises(RecipeError, match="one, or two for pairs"):
        load_files({"train": str(train)}, ["q", "p", "stars"], "stars")


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_files({"train": str(tmp_path / "none.csv")})
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(RecipeError, match=r"accepted are files that end in \.csv"):
        load_files({"train": str(tmp_path / "x.txt")})
    (tmp_path / "x.jsonl").write_text("{no json")
    with pytest.raises(RecipeError, match=r"could not be read as \.jsonl"):
        load_files({"train": str(tmp_path / "x.jsonl")})


# ------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_as_a_program_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lowbit", "doctor", "--json"], capture_output=True, text=True, cwd=ROOT
    )
    found = json.loads(result.stdout)
    assert (result.returncode, found["ok"], found["backend"]) == (0, True, lowbit.backend())
    said = {check["name"]: check for check in found["checks"]}
    assert torch.__version__.startswith(said["torch"]["value"])  # "2.11.0+cu130", where its metadata say 2.11.0
    assert said["transformers"]["value"] == transformers.__version__
    assert "exact" in said["product"]["value"]


def test_doctor_knows_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = " ".join(project["dependencies"])
    assert all(f"{name}>={version}" in needed for name, version in doctor.OLDEST.items())
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.OLDEST_PYTHON))
    for extra, packages in doctor.EXTRAS.items():
        asked = [entry.partition(";")[0].strip() for entry in project["optional-dependencies"][extra]]
        assert list(packages) == asked


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.10.0", "scikit-learn": None, "triton": None}
    real = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda name: versions.get(name, real(name)) if name in versions else real(name)
    )
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "lowbit cannot run here" in result.stdout
    for text in ("2.10.0, older than 2.11", "pip install -U 'torch>=2.11'", "pip install 'lowbit[train]'"):
        assert text in result.stdout
    said = {check["name"]: check for check in doctor.examine()["checks"]}
    assert (said["triton"]["status"], said["torch"]["status"]) == ("note", "error")


def test_doctor_fails_where_the_product_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import lowbit_kernels

    real = lowbit_kernels.ternary_linear
    monkeypatch.setattr(lowbit_kernels, "ternary_linear", lambda *args, **kwargs: real(*args, **kwargs) + 1)
    assert "product" in CliRunner().invoke(app, ["doctor"]).stdout
    assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 1


BY_TORCH = ["oneDNN's int8 products", "torch._int_mm, as this torch has no oneDNN"]


@pytest.mark.parametrize(
    ("chosen", "status", "value", "backend"),
    [
        (("amx", ""), "ok", ["lowbit's AMX kernels"], "cpu: lowbit's AMX kernels, "),
        (
            ("vnni", "amx: the processor has no amx_tile"),
            "ok",
            ["lowbit's VNNI kernels"],
            "cpu: lowbit's VNNI kernels, ",
        ),
        (("torch", "vnni: no C++ compiler 'g++'"), "note", BY_TORCH, f"cpu: torch {torch.__version__} int8 products, "),
    ],
)
def test_doctor_says_which_cpu_kernels_run_and_why_no_better(
    chosen: tuple[str, str], status: str, value: list[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "chosen", lambda: chosen)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_product", list)  # these kernels may not run here
    found = doctor.examine()
    said = {check["name"]: check for check in found["checks"]}["kernels"]
    assert found["ok"] and (said["status"], said["hint"]) == (status, chosen[1])
    assert said["value"] in value
    assert found["backend"] == lowbit.backend() and found["backend"].startswith(backend)
    assert found["why"].endswith(f"the CPU path with {said['value']}")


@pytest.fixture
def choose_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a process that has not yet chosen CPU kernels, on a machine where none were compiled."""
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LOWBIT_CPU", raising=False)
    caches = native.chosen, native.load
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_doctor_is_content_without_a_compiler(choose_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = doctor.examine()
    said = {check["name"]: check for check in found["checks"]}
    assert found["ok"]
    assert [said[name]["status"] for name in ("compiler", "kernels", "product")] == ["note", "note", "ok"]
    assert "install g++, or name another in CXX" in said["compiler"]["hint"]
    assert "no C++ compiler 'no-such-compiler'" in said["kernels"]["hint"] or "has no" in said["kernels"]["hint"]


def test_doctor_survives_a_choice_of_kernels_that_are_none(choose_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CPU", "neon")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (1, False)
    said = {check["name"]: check for check in found["checks"]}["kernels"]
    assert said["status"] == "error" and "LOWBIT_CPU='neon', accepted: amx, vnni, torch" in said["value"]
    with pytest.raises(ValueError, match="LOWBIT_CPU='neon'"):
        lowbit.backend()


# ------------------------------------------------------------------------------------------------ usage, errors, shells


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack"], "No such command"),
        (["quantize", "x"], "Missing argument"),
        (["quantize", "x", "y", "--bits", "three"], "three"),
        (["distill", "x", "y"], "give one of --task and --train-file"),
        (["distill", "x", "y", "--train-file", "a.csv"], "go together"),
        (["evaluate", "x", "--task", "sst2", "--file", "a.csv"], "give one of --task and --file"),
        (["bench", "x", "--length", "0"], "greater than or equal to 1"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str) -> None:
    text = call(*arguments, code=2)
    assert text.startswith("error: ") and text.count("\n") == 1 and message in text


def test_an_error_is_one_line_and_a_traceback_only_on_demand(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: {tmp_path} holds no config.json, so it is no checkpoint\n"
    result = CliRunner().invoke(app, ["--debug", "info", str(tmp_path)])
    assert result.exit_code == 1 and isinstance(result.exception, FileNotFoundError)
    program = [sys.executable, "-m", "lowbit", "--debug", "info", str(tmp_path)]
    assert "Traceback" in subprocess.run(program, capture_output=True, text=True, cwd=ROOT).stderr


def test_what_nobody_foresaw_names_its_kind(monkeypatch: pytest.MonkeyPatch, saved: dict[str, Path]) -> None:
    def broken(folder: Path) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(checkpoint, "read", broken)
    assert call("info", saved["float"], code=1) == "error: KeyError: 'lost' (lowbit --debug shows where)\n"


@pytest.mark.parametrize(("command", "resumes"), [("distill", True), ("evaluate", False)])
def test_an_interrupted_run_says_how_to_go_on(
    command: str, resumes: bool, setup: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.data.tasks.tokenize", interrupted)
    arguments = [setup[1], *([tmp_path / "run"] if resumes else []), "--task", "sst2", "--data-dir", setup[0]]
    text = call(command, *arguments, code=130)
    assert "interrupted" in text and ("run the same command again" in text) == resumes


@pytest.mark.parametrize("command", [["distill", "x", "y"], ["evaluate", "x"], ["search-length", "x", "y"]])
def test_a_missing_extra_is_named(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sklearn" else real(name))
    text = call(*command, "--task", "sst2", code=1)
    assert "scikit-learn not installed" in text and "pip install 'lowbit[train]'" in text


def test_a_model_that_is_nowhere(tmp_path: Path) -> None:
    text = call("info", "no/such-model", code=1)
    assert text.startswith("error: no/such-model is no folder here, and no model that the Hub gives")
    assert "is no folder here" in call("quantize", tmp_path / "none", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_keeps_its_name(saved: dict[str, Path], tmp_path: Path) -> None:
    """Model cards show it; the folder that the Hub's files are kept in is named by a digest."""
    repository = tmp_path / "models--me--bert"
    shutil.copytree(saved["ternary"], repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    program = "from lowbit.cli.loading import load_model; print(load_model('me/bert').config._name_or_path)"
    cache = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}  # read when it is imported
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=cache)
    assert result.stdout.splitlines()[-1] == "me/bert"


def test_help_and_completion_need_no_torch() -> None:
    program = """
import sys, lowbit.cli.app as program
from typer.testing import CliRunner
for arguments in (["--help"], ["quantize", "--help"], ["--version"]):
    assert CliRunner().invoke(program.app, arguments).exit_code == 0
print([name for name in ("torch", "transformers", "numpy", "datasets") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    script = call(env={"_LOWBIT_COMPLETE": f"source_{shell}"}, prog_name="lowbit")
    assert "_LOWBIT_COMPLETE" in script and "lowbit" in script
    if shell == "bash":
        words = {"_LOWBIT_COMPLETE": "complete_bash", "COMP_WORDS": "lowbit s", "COMP_CWORD": "1"}
        assert call(env=words, prog_name="lowbit").split() == ["split", "search-length"]


def test_every_command_explains_itself() -> None:
    listed = call("--help")
    for name in NAMES:
        assert name in listed
        assert "Usage: lowbit" in call(name, "--help", prog_name="lowbit")
