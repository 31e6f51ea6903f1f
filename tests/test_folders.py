"""The commands on folders as people have them: of other libraries, of before, with pickles, with little said."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)
from typer.testing import CliRunner

import lowbit
from helpers import HEADS, SIZES, batch, identical, outputs, tiny, tiny_task
from lowbit.cli import loading
from lowbit.cli.app import app

pytestmark = pytest.mark.usefixtures("logging_as_before")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_task(tmp_path_factory.mktemp("task"))


def call(*arguments: object, code: int = 0) -> str:
    """All output of a command that ends with `code`: for an error, one line."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert code == 0 or (result.stderr.startswith("error: ") and result.stderr.count("\n") == 1), result.stderr
    return result.output


def called(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def edit(folder: Path, **fields: object) -> None:
    """Change config.json; None removes a field. Fields stay in the order in which they are given."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# ------------------------------------------------------------------------------------------------------------- labels

ORDERS = {
    "by text": sorted(map(str, range(12))),  # 0, 1, 10, 11, 2, ... as many programs write JSON
    "backwards": list(map(str, reversed(range(12)))),
    "any": random.Random(3).sample(list(map(str, range(12))), 12),
}


def texts(setup: tuple[Path, Path]) -> list[str]:
    return [json.loads(line)["sentence"] for line in (setup[0] / "sst2/train.jsonl").read_text().splitlines()]


def classifier(folder: Path, setup: tuple[Path, Path], order: list[str]) -> list[str]:
    """A model of 12 labels whose names config.json lists in this order of indices; the names by index."""
    names = [f"{random.choice('klmnop')}{i}" for i in range(12)]
    model = tiny(num_labels=12, vocab_size=2500, max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(setup[1])
    with torch.no_grad():  # more than one answer
        model.classifier.bias -= model(**tokenizer(texts(setup), padding=True, return_tensors="pt")).logits.mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit(folder, id2label={i: names[int(i)] for i in order}, label2id={names[int(i)]: int(i) for i in order})
    return names


def own_answers(folder: Path, names: list[str], setup: tuple[Path, Path]) -> Path:
    """A file of texts and what the model says, by the index of the largest logit."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    rows = []
    for text in texts(setup):
        with torch.no_grad():
            answer = int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())
        rows.append({"text": text, "label": names[answer]})
    assert len({row["label"] for row in rows}) > 3
    path = folder.parent / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_labels_are_read_by_index(order: str, setup: tuple[Path, Path], tmp_path: Path) -> None:
    names = classifier(tmp_path / "model", setup, ORDERS[order])
    answers = own_answers(tmp_path / "model", names, setup)
    assert loading.label_names(str(tmp_path / "model")) == tuple(names)
    assert called("evaluate", tmp_path / "model", "--file", answers)["metrics"] == {"accuracy": 100.0}
    few = ["--teacher-steps", 0, "--steps", 1, "--batch-size", 8]
    given = ["--train-file", answers, "--validation-file", answers, *few]
    found = called("distill", tmp_path / "model", tmp_path / "run", *given)
    assert found["results"]["teacher"]["accuracy"] == 100.0
    student = AutoModelForSequenceClassification.from_pretrained(found["model"]).config.id2label
    assert student == dict(enumerate(names))
    front = called("search-length", tmp_path / "model", tmp_path / "lengths", "--file", answers, "--iterations", 0)
    assert front["full_score"] == 100.0


def test_the_order_of_a_tasks_labels_is_read_by_index(setup: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(setup[1], tmp_path / "model")
    task = ["--task", "sst2", "--data-dir", setup[0]]
    edit(folder, id2label={"1": "positive", "0": "negative"})
    call("evaluate", folder, *task)
    call("distill", folder, tmp_path / "run", *task, "--teacher-steps", 0, "--steps", 1, "--batch-size", 8)
    edit(folder, id2label={"1": "negative", "0": "positive"})
    assert "positive, negative, the task negative, positive: another order" in call("evaluate", folder, *task, code=1)


@pytest.mark.parametrize(("indices", "missing"), [((0, 1, 3), 2), ((1, 2, 3), 0), ((-1, 0, 1), 2), ((5, 7, 9), 0)])
def test_labels_without_an_index_are_one_error(
    indices: tuple[int, ...], missing: int, setup: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tiny(num_labels=3, vocab_size=2500, max_position_embeddings=128)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(setup[1]).save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", id2label={str(i): f"name {i}" for i in indices})
    (tmp_path / "x.csv").write_text("text,label\na,0\nb,1\n")
    files = ["--train-file", tmp_path / "x.csv", "--validation-file", tmp_path / "x.csv", "--teacher-steps", 0]
    commands = (
        ["evaluate", "--file", tmp_path / "x.csv"],
        ["search-length", tmp_path / "run", "--file", tmp_path / "x.csv"],
        ["distill", tmp_path / "run", *files],
    )
    for command, *rest in commands:
        said = call(command, tmp_path / "model", *rest, code=1)
        assert f"and not {missing}, accepted: a name for each of 0 to 2" in said
    assert not (tmp_path / "run").exists()


def test_a_name_of_several_labels_is_refused_where_it_is_used(setup: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(setup[1], tmp_path / "model")
    edit(folder, id2label={"0": "same", "1": "same"})
    (tmp_path / "names.csv").write_text("text,label\na,same\n")
    assert "a name that several labels of the model have" in call(
        "evaluate", folder, "--file", tmp_path / "names.csv", code=1
    )
    (tmp_path / "numbers.csv").write_text("text,label\na,0\nb,1\n")
    call("evaluate", folder, "--file", tmp_path / "numbers.csv")


# ---------------------------------------------------------------------------------------------- files beside the model

SETFIT = {
    "config_setfit.json": '{"labels": ["bad", "good"], "normalize_embeddings": false}',
    "model_head.pkl": "harmless",
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        ]
    ),
    "1_Pooling/config.json": '{"word_embedding_dimension": 64}',
    "2_Dense/config.json": '{"in_features": 64}',
    "2_Dense/model.safetensors": "of a module that is not the model",
    "2_Dense/pytorch_model.bin": "of a module that is not the model",
    "config_sentence_transformers.json": "{}",
    "sentence_bert_config.json": '{"max_seq_length": 17}',
}
NEEDED = {
    **SETFIT,
    "tokenizer.json": "{}",
    "vocab.txt": "[PAD]",
    "LICENSE": "mine",
    "prompts/classify.txt": "is it?",
    "preprocessing/rules.bin": "rules",
    "preprocessing/README.md": "how",
    "preprocessing/config.json": '{"lower": true}',
    "thresholds.joblib": "0.5",
    "modeling_own.py": "raise SystemExit('run')",
}
NOT_NEEDED = [
    "README.md", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "pytorch_model.fp16.bin", "model.fp16.safetensors", "model-00001-of-00002.safetensors",
    "model.safetensors.index.json", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.onnx",
    "model_quantized.onnx_data", "bert_model.ckpt.index", "openvino_model.bin", "onnx/model.onnx", "onnx/config.json",
    "openvino/openvino_model.xml", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth",
    "trainer_state.json", "training_args.bin", "checkpoint-500/config.json", "checkpoint-500/vocab.txt",
    "runs/Jan01/events.out.tfevents.1", ".git/config", ".gitattributes", ".gitignore",
    ".cache/huggingface/download/config.json.metadata", "half/model.safetensors", "half/config.json", "half/vocab.txt",
]  # fmt: skip
WRITTEN = {"README.md", "config.json", "model.safetensors"}


def setfit(folder: Path) -> Path:
    """A folder with everything that is needed and everything that is not."""
    tiny("BertModel").save_pretrained(folder)
    write(folder, {**dict.fromkeys(NOT_NEEDED, "not needed"), **NEEDED})
    return folder


def check_copied(source: Path, out: Path, files: dict[str, str] = NEEDED) -> None:
    found = files_of(out)
    assert set(found) == {*files, *WRITTEN}
    assert {name: found[name].decode() for name in files} == files
    assert found["config.json"] != (source / "config.json").read_bytes() and b"not needed" not in found["README.md"]
    assert type(lowbit.from_pretrained(out)) is BertModel


def test_quantize_takes_along_what_pipelines_need_and_nothing_else(tmp_path: Path) -> None:
    source = setfit(tmp_path / "source")
    (source / "model.safetensors.index.json").unlink()  # of shards that are not there
    before = files_of(source)
    call("quantize", source, tmp_path / "out")
    check_copied(source, tmp_path / "out")
    call("quantize", source, source / "inside")  # OUT is not copied into itself, nor beside it later
    check_copied(source, source / "inside")
    call("quantize", source, source / "again")
    check_copied(source, source / "again")
    for name in ("inside", "again"):
        shutil.rmtree(source / name)
    assert files_of(source) == before


def test_split_takes_them_along_too(tmp_path: Path) -> None:
    lowbit.prepare(tiny("BertModel"), lowbit.TernaryConfig()).save_pretrained(tmp_path / "source")
    write(tmp_path / "source", NEEDED)
    call("split", tmp_path / "source", tmp_path / "out")
    check_copied(tmp_path / "source", tmp_path / "out")


def test_links_out_of_the_folder_are_named_and_not_followed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny("BertModel").save_pretrained(source)
    write(source, {"vocab.txt": "[PAD]", "prompts/a.txt": "a"})
    write(tmp_path, {"secret.txt": "secret", "secrets/key": "secret"})
    (source / "added_tokens.json").symlink_to(tmp_path / "secret.txt")
    (source / "prompts/up.txt").symlink_to("../../secret.txt")
    (source / "keys").symlink_to(tmp_path / "secrets", target_is_directory=True)
    (source / "loop").symlink_to(".", target_is_directory=True)
    (source / "gone.txt").symlink_to("nowhere")
    (source / "round.txt").symlink_to("round.txt")
    (source / "vocab-copy.txt").symlink_to("vocab.txt")
    os.mkfifo(source / "pipe")  # would wait for its writer
    said = call("quantize", source, tmp_path / "out")
    check_copied(source, tmp_path / "out", {"vocab.txt": "[PAD]", "prompts/a.txt": "a", "vocab-copy.txt": "[PAD]"})
    assert all(name in said for name in ("added_tokens.json", "prompts/up.txt", "keys", "loop", "gone.txt", "pipe"))
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_nothing_is_written_through_links_of_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny("BertModel").save_pretrained(source)
    write(source, {"vocab.txt": "[PAD]"})
    write(tmp_path, {"theirs.txt": "theirs", "out/note.txt": "mine"})
    (tmp_path / "out/vocab.txt").symlink_to(tmp_path / "theirs.txt")
    call("quantize", source, tmp_path / "out", "--overwrite")
    assert (tmp_path / "theirs.txt").read_text() == "theirs" and (tmp_path / "out/vocab.txt").read_text() == "[PAD]"


class Pickle:
    """Writes a file when it is unpickled by a reader that runs what it finds."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_what_is_copied_is_not_unpickled(tmp_path: Path) -> None:
    source, canary = tmp_path / "source", tmp_path / "canary"
    tiny("BertModel").save_pretrained(source)
    (source / "model_head.pkl").write_bytes(pickle.dumps(Pickle(canary)))
    call("quantize", source, tmp_path / "out")
    assert not canary.exists()
    assert (tmp_path / "out/model_head.pkl").read_bytes() == (source / "model_head.pkl").read_bytes()
    pickle.loads((source / "model_head.pkl").read_bytes())
    assert canary.exists()


HASH = "0123456789abcdef0123456789abcdef01234567"


def repository(cache: Path, folder: Path) -> None:
    """`folder` as me/model in a cache of the Hub: links to contents, of which one is a link into the shared store."""
    place = cache / "models--me--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(HASH)
    for number, (name, content) in enumerate(files_of(folder).items()):
        blob, link = place / f"blobs/{number}", place / "snapshots" / HASH / name
        for each in (blob, link, cache / f"blobs/00/{number}"):
            each.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            (cache / f"blobs/00/{number}").write_bytes(content)
            blob.symlink_to(f"../../blobs/00/{number}")
        else:
            blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.mark.parametrize("given", ["name", "folder"])
def test_a_model_in_the_cache_of_the_hub(given: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    BertModel(tiny("BertModel").config).save_pretrained(source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    write(source, NEEDED)
    repository(tmp_path / "hub", source)
    model = "me/model" if given == "name" else str(tmp_path / "hub/models--me--model/snapshots" / HASH)
    program = [sys.executable, "-m", "lowbit", "quantize", model, str(tmp_path / "out")]
    cache = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}  # read when it is imported
    result = subprocess.run(program, capture_output=True, text=True, env=cache)
    assert result.returncode == 0, result.stderr
    assert "not copied" not in result.stderr
    check_copied(source, tmp_path / "out")
    if given == "name":
        assert "me/model" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("file", "downloads"),
    [
        ("model_head.pkl", 1), ("config_setfit.json", 1), ("modules.json", 1), ("1_Pooling/config.json", 1),
        ("2_Dense/pytorch_model.bin", 1), ("2_Dense/model.safetensors", 1), ("vocab.txt", 1), ("model.safetensors", 1),
        ("0_Transformer/vocab.txt", 1), ("0_Transformer/config.json", 1), ("0_Transformer/model.safetensors", 1),
        ("0_Transformer/sentencepiece.bpe.model", 1), ("modeling_own.py", 1), ("LICENSE", 1),
        ("pytorch_model.bin", 2), ("pytorch_model-00001-of-00002.bin", 2), ("0_Transformer/pytorch_model.bin", 2),
        ("tf_model.h5", 0), ("0_Transformer/tf_model.h5", 0), ("onnx/model.onnx", 0), ("onnx/config.json", 0),
        ("rust_model.ot", 0), ("flax_model.msgpack", 0), ("checkpoint-1/model.safetensors", 0), ("runs/x.json", 0),
        ("optimizer.pt", 0), ("training_args.bin", 0), ("movie.mp4", 0),
    ],
)  # fmt: skip
def test_what_is_downloaded(file: str, downloads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first look, at the second (no safetensors were there), or never (0)."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    from lowbit.cli import folders

    (tmp_path / "config.json").write_text("{}")
    wanted = []

    def download(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        wanted.append(
            bool(list(filter_repo_objects([file], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folders._downloaded.cache_clear()
    assert folders.folder_of("me/model") == tmp_path
    folders._downloaded.cache_clear()
    assert wanted == [downloads == 1, downloads in (1, 2)]


# ----------------------------------------------------------------------------------------------------- pickled weights


def pickled(folder: Path, shards: int = 1) -> torch.nn.Module:
    """A classifier with pytorch_model.bin, as transformers wrote it once, and no safetensors."""
    model = tiny()
    model.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return model
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    index = {name: names[i % shards] for i, name in enumerate(state)}
    for file in names:
        torch.save({name: tensor for name, tensor in state.items() if index[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return model


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_the_same_model(shards: int, tmp_path: Path) -> None:
    model = pickled(tmp_path / "pickled", shards)
    model.save_pretrained(tmp_path / "safe")
    inputs = batch()
    assert identical(outputs(loading.load_model(str(tmp_path / "pickled")), inputs), outputs(model, inputs))
    sizes = [called("quantize", tmp_path / kind, tmp_path / f"{kind} out") for kind in ("pickled", "safe")]
    assert sizes[0]["disk_mb"] == sizes[1]["disk_mb"] and sizes[0]["disk_mb_before"] >= sizes[1]["disk_mb_before"] > 0
    packed = [lowbit.from_pretrained(tmp_path / f"{kind} out") for kind in ("pickled", "safe")]
    assert identical(*(outputs(each, inputs) for each in packed))
    assert set(files_of(tmp_path / "pickled out")) == WRITTEN
    found = [called("info", tmp_path / kind) for kind in ("pickled", "safe")]
    assert found[0]["modules"] == found[1]["modules"] and found[0]["bytes"] > 0
    call("bench", tmp_path / "pickled", "--length", 8, "--repeats", 1, "--batch-size", 1)


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    pickled(tmp_path)
    model = tiny()
    model.save_pretrained(tmp_path)
    inputs = batch()
    assert identical(outputs(loading.load_model(str(tmp_path)), inputs), outputs(model, inputs))
    stored = {name.rpartition(".")[0] for name in load_file(tmp_path / "model.safetensors")}
    assert {module["name"] for module in called("info", tmp_path)["modules"]} == stored


@pytest.mark.parametrize("protocol", ["zip", "old"])
def test_a_pickle_with_more_than_weights_is_one_error(protocol: str, setup: tuple[Path, Path], tmp_path: Path) -> None:
    pickled(tmp_path / "model")
    file, canary = tmp_path / "model/pytorch_model.bin", tmp_path / "canary"
    state = {**torch.load(file, weights_only=True), "extra": Pickle(canary)}
    torch.save(state, file, _use_new_zipfile_serialization=protocol == "zip")
    AutoTokenizer.from_pretrained(setup[1]).save_pretrained(tmp_path / "model")
    task = ["--task", "sst2", "--data-dir", setup[0]]
    commands = (["info"], ["bench"], ["quantize", tmp_path / "out"], ["evaluate", *task],
                ["distill", tmp_path / "out", *task])  # fmt: skip
    for command, *rest in commands:
        assert "holds more than weights" in call(command, tmp_path / "model", *rest, code=1)
    edit(tmp_path / "model", architectures=None)
    assert "holds more than weights" in call("bench", tmp_path / "model", code=1)
    assert not canary.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"none", b"PK\x03\x04"])
def test_a_damaged_pickle_is_one_error(content: bytes, tmp_path: Path) -> None:
    pickled(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin: damaged" in call("info", tmp_path, code=1)
    call("bench", tmp_path, code=1)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    """transformers draws them at random, and says so where it may."""
    tiny("BertModel").save_pretrained(tmp_path)
    edit(tmp_path, architectures=["BertForSequenceClassification"])
    assert "2 tensors of BertForSequenceClassification are not in the files" in call(
        "quantize", tmp_path, tmp_path / "x"
    )
    assert "random" not in call("quantize", tmp_path / "x", tmp_path / "y", code=1)


# ---------------------------------------------------------------------------------------------------- no architectures


def bare_models() -> dict[str, torch.nn.Module]:
    sizes = {**SIZES, "max_position_embeddings": 42}
    return {
        "bert": tiny("BertModel"),
        "no pooler": BertModel(tiny("BertModel").config, add_pooling_layer=False),
        "roberta": RobertaModel(RobertaConfig(**sizes)),
        "mpnet": MPNetModel(MPNetConfig(**sizes)),
        "distilbert": DistilBertModel(DistilBertConfig(vocab_size=101, dim=64, n_layers=2, n_heads=4, hidden_dim=150)),
    }


@pytest.mark.parametrize("name", ["bert", "no pooler", "roberta", "mpnet", "distilbert"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_bare_model_needs_no_architectures(name: str, prefix: bool, kind: str, tmp_path: Path) -> None:
    model = bare_models()[name].eval()
    model.save_pretrained(tmp_path)
    edit(tmp_path, architectures=None)
    tensors = load_file(tmp_path / "model.safetensors")
    if prefix:  # saved from a model with a head, whose own tensors somebody took out
        tensors = {f"{model.base_model_prefix}.{key}": tensor for key, tensor in tensors.items()}
        tensors[f"{model.base_model_prefix}.embeddings.position_ids"] = torch.arange(42)[None]  # saved once
    (tmp_path / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = loading.load_model(str(tmp_path))
    inputs = batch()
    assert type(loaded) is type(AutoModel.from_pretrained(tmp_path))
    assert torch.equal(outputs(loaded, inputs)[0], outputs(model, inputs)[0])
    call("quantize", tmp_path, tmp_path / "out")
    assert type(lowbit.from_pretrained(tmp_path / "out")) is type(model)


def test_names_of_before_2019_are_known(tmp_path: Path) -> None:
    model = tiny("BertModel")
    model.save_pretrained(tmp_path)
    edit(tmp_path, architectures=None)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(tmp_path / "model.safetensors")
    for now, then in old.items():
        tensors = {key.replace(now, then): tensor for key, tensor in tensors.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    inputs = batch()
    assert identical(outputs(loading.load_model(str(tmp_path)), inputs), outputs(model, inputs))


@pytest.mark.parametrize("head", [head for head in HEADS if head != "BertModel"])
def test_a_head_without_architectures_is_named_with_the_classes_that_fit(head: str, tmp_path: Path) -> None:
    model = tiny(head)
    model.save_pretrained(tmp_path / "model")
    edit(tmp_path / "model", architectures=None)
    said = call("quantize", tmp_path / "model", tmp_path / "out", code=1)
    own = {name for name, _ in model.named_parameters()} - {f"bert.{name}" for name in tiny("BertModel").state_dict()}
    named = said.partition("hold more than a BertModel: ")[2].partition(";")[0].removesuffix(", ...").split(", ")
    assert named == sorted(own & set(load_file(tmp_path / "model/model.safetensors")))[:3]
    assert head in said.partition("the weights fit ")[2].replace(",", "").split()
    assert not (tmp_path / "out").exists()
    edit(tmp_path / "model", architectures=[head])
    call("quantize", tmp_path / "model", tmp_path / "out")


def test_tensors_of_nobody_without_architectures(tmp_path: Path) -> None:
    tiny("BertModel").save_pretrained(tmp_path)
    edit(tmp_path, architectures=None)
    save_file({"x.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "BertModel: x.weight; add" in call("bench", tmp_path, code=1)
    for model_type in (None, "no such", 7):
        edit(tmp_path, model_type=model_type)
        assert '"architectures": ["BertModel"]' in call("bench", tmp_path, code=1)


# ------------------------------------------------------------------------- the old layout of sentence-transformers

OLD = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
    ),
    "0_Transformer/sentence_bert_config.json": '{"max_seq_length": 17}',
    "0_Transformer/special_tokens_map.json": "{}",
    "1_Pooling/config.json": '{"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true}',
    "similarity_evaluation.csv": "0.8",
}


def old_layout(folder: Path, setup: tuple[Path, Path], head: str = "BertModel") -> torch.nn.Module:
    model = tiny(head, vocab_size=2500, max_position_embeddings=128)
    model.save_pretrained(folder / "0_Transformer")
    AutoTokenizer.from_pretrained(setup[1]).save_pretrained(folder / "0_Transformer")
    write(folder, {**OLD, "README.md": "of the float model"})
    (folder / "2_Normalize").mkdir()
    return model


@pytest.mark.parametrize("config", [None, '{"__version__": "0.3.8"}'])
def test_the_old_layout_stays_what_it_is(config: str | None, setup: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = old_layout(source, setup)
    files = dict(OLD)
    if config:  # of sentence-transformers, not of the model
        write(source, {"config.json": config})
        files["config.json"] = config
    result = called("quantize", source, out)
    found = files_of(out)
    tokenizer = {name for name in files_of(source) if "token" in name or "vocab" in name}
    assert set(found) == {*files, *tokenizer, *(f"0_Transformer/{name}" for name in WRITTEN)}
    assert {name: found[name].decode() for name in files} == files
    assert (out / "2_Normalize").is_dir()
    inputs = batch()
    packed = lowbit.from_pretrained(out / "0_Transformer")
    assert identical(outputs(packed, inputs), outputs(lowbit.quantize(model, lowbit.TernaryConfig()), inputs))
    sizes = {key: (folder / "0_Transformer/model.safetensors").stat().st_size / 1e6
             for key, folder in (("disk_mb_before", source), ("disk_mb", out))}  # fmt: skip
    assert {key: result[key] for key in sizes} == {key: round(size, 2) for key, size in sizes.items()}
    assert called("info", source)["stage"] == "float" and called("info", out)["stage"] == "packed"
    assert called("info", out)["checksums"] > 0
    call("bench", out, "--baseline", source, "--length", 8, "--repeats", 1, "--batch-size", 1)


def test_the_old_layout_inside_itself_is_not_copied(setup: tuple[Path, Path], tmp_path: Path) -> None:
    old_layout(tmp_path, setup)
    call("quantize", tmp_path, tmp_path / "inside")
    call("quantize", tmp_path, tmp_path / "again")
    assert set(files_of(tmp_path / "inside")) == set(files_of(tmp_path / "again"))


def test_the_model_inside_the_old_layout_is_not_overwritten(setup: tuple[Path, Path], tmp_path: Path) -> None:
    old_layout(tmp_path, setup)
    before = files_of(tmp_path)
    for out in (tmp_path, tmp_path / "0_Transformer"):
        assert "is the model itself" in call("quantize", tmp_path, out, "--overwrite", code=2)
    assert files_of(tmp_path) == before


def test_every_command_takes_the_old_layout(setup: tuple[Path, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    old_layout(model, setup, "BertForSequenceClassification")
    edit(model / "0_Transformer", id2label={"0": "negative", "1": "positive"}, label2id={"negative": 0, "positive": 1})
    classifier = BertForSequenceClassification(tiny(vocab_size=2500, max_position_embeddings=128, num_labels=2).config)
    classifier.save_pretrained(model / "0_Transformer")
    task = ["--task", "sst2", "--data-dir", setup[0]]
    call("evaluate", model, *task)
    few = ["--steps", 1, "--teacher-steps", 0, "--batch-size", 8]
    call("distill", model, tmp_path / "run", *task, *few)
    lengths = called("search-length", model, tmp_path / "lengths", *task, "--samples", 4, "--iterations", 0,
                     "--budget", "1.2x")  # fmt: skip
    saved = Path(lengths["saved"]["1.2x"])
    assert (saved / "0_Transformer/config.json").is_file() and (saved / "modules.json").is_file()
    lowbit.prepare(classifier, lowbit.TernaryConfig()).save_pretrained(model / "0_Transformer")
    call("split", model, tmp_path / "pairs")
    call("evaluate", tmp_path / "pairs", *task)


def test_sentence_transformers_loads_the_old_layout(setup: tuple[Path, Path], tmp_path: Path) -> None:
    """Where it is installed; anyway what it would read is there: every module in its folder."""
    model = old_layout(tmp_path / "source", setup)
    call("quantize", tmp_path / "source", tmp_path / "out")
    modules = json.loads((tmp_path / "out/modules.json").read_text())
    folders = [tmp_path / "out" / module["path"] for module in modules]
    assert all(folder.is_dir() for folder in folders)
    text = "the food was good"
    loaded, tokenizer = AutoModel.from_pretrained(folders[0]), AutoTokenizer.from_pretrained(folders[0])
    expected = lowbit.quantize(model, lowbit.TernaryConfig())(**tokenizer(text, return_tensors="pt")).last_hidden_state
    assert torch.equal(loaded(**tokenizer(text, return_tensors="pt")).last_hidden_state, expected)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return
    encoder = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    vector = torch.nn.functional.normalize(expected[0].mean(0), dim=0)
    assert encoder.max_seq_length == 17 and (torch.tensor(encoder.encode([text])[0]) @ vector) > 0.999


@pytest.mark.parametrize("path", ["../elsewhere", "/elsewhere", "0_Transformer/../../elsewhere"])
@pytest.mark.parametrize("module", [0, 1])
def test_modules_outside_of_the_folder_are_refused(module: int, path: str, setup: Any, tmp_path: Path) -> None:
    old_layout(tmp_path / "source", setup)
    shutil.copytree(tmp_path / "source/0_Transformer", tmp_path / "elsewhere")
    modules = json.loads(OLD["modules.json"])
    modules[module]["path"] = path.replace("/elsewhere", str(tmp_path / "elsewhere")) if path[0] == "/" else path
    write(tmp_path / "source", {"modules.json": json.dumps(modules)})
    for command, *rest in (["quantize", tmp_path / "out"], ["info"], ["bench"]):
        assert "outside of the checkpoint's folder" in call(command, tmp_path / "source", *rest, code=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("modules", ["[]", '[{"path": "0_Nothing"}]', '[{"path": "1_Pooling"}]', "[1]", "{", "7"])
def test_modules_without_a_model_are_one_error(modules: str, setup: Any, tmp_path: Path) -> None:
    old_layout(tmp_path / "source", setup)
    write(tmp_path / "source", {"modules.json": modules})
    (tmp_path / "source/1_Pooling/config.json").unlink()
    said = call("info", tmp_path / "source", code=1)
    assert "holds no config.json" in said or "is no list of modules" in said
