"""Damaged checkpoints load as what was saved or raise CheckpointError; `make soak` runs 10,000 and more."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import lowbit
from benchmarks import soak_checkpoints as soak
from benchmarks import soak_damage
from lowbit.files.atomic import write_text
from lowbit.files.records import _crc32

Logits = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Logits]]:
    root = tmp_path_factory.mktemp("checkpoints")
    soak.write_bases(root / "bases", 0)
    yield root, {base: soak.logits(root / "bases" / base) for base in soak_damage.BASES}


@pytest.mark.parametrize("kind", soak_damage.KINDS)
def test_damage_is_refused_or_harmless(kind: str, bases: tuple[Path, Logits]) -> None:
    root, expected = bases
    first = list(soak_damage.KINDS).index(kind)
    for case in (first, first + len(soak_damage.KINDS)):
        outcome = soak.run(root, case, 1, expected, lambda known: None)  # another seed may draw a million layers
        assert outcome["kind"] == kind and "FAILED" not in outcome["verdict"] + outcome["plain"], (case, outcome)


def test_wrong_loads_are_noticed(bases: tuple[Path, Logits], monkeypatch: pytest.MonkeyPatch) -> None:
    root, expected = bases
    monkeypatch.setattr("lowbit.files.records.checksums_of", lambda file, header: ({}, lambda tensor: 0))
    first = list(soak_damage.KINDS).index("header: names swapped")
    verdicts = {
        soak.run(root, first + turn * len(soak_damage.KINDS), 0, expected, lambda _: None)["verdict"]
        for turn in range(5)
    }
    assert any(verdict.startswith("FAILED") for verdict in verdicts)


# ---------------------------------------------------------------------------------------- faults that were found


@pytest.fixture
def copy(bases: tuple[Path, Logits], tmp_path: Path) -> Callable[[str], Path]:
    def copied(base: str) -> Path:
        return Path(shutil.copytree(bases[0] / "bases" / base, tmp_path / base))

    return copied


def load(folder: Path, **changes: Any) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, **changes)


def refused(folder: Path, message: str) -> None:
    """Both the loader and verify say so."""
    with pytest.raises(lowbit.CheckpointError, match=message):
        load(folder)
    with pytest.raises(lowbit.CheckpointError, match=message):
        lowbit.verify(folder)


@pytest.mark.parametrize("base", soak_damage.BASES)
def test_what_was_saved_is_verified(base: str, bases: tuple[Path, Logits]) -> None:
    lowbit.verify(bases[0] / "bases" / base)


@pytest.mark.parametrize(
    ("base", "name", "dtype"),
    [
        ("ternary", "classifier.weight", "I32"),
        ("bfloat16", "classifier.bias", "F16"),
        ("ternary", "classifier.bias", "I32"),
    ],
)
def test_another_type_of_the_same_bytes_is_refused(base: str, name: str, dtype: str, copy: Any) -> None:
    folder = copy(base)
    soak_damage.rewrite_header(folder / "model.safetensors", lambda header: header[name].update(dtype=dtype))
    refused(folder, f"{name} does not match its checksum")


def test_a_tensor_of_the_head_that_lost_its_name_is_refused(copy: Any) -> None:
    folder = copy("ternary")  # transformers would draw a new classifier at random, and warn
    soak_damage.rewrite_header(
        folder / "model.safetensors",
        lambda header: header.update({"classifier.weighs": header.pop("classifier.weight")}),
    )
    refused(folder, "classifier.weighs does not match")


def test_a_tensor_of_the_head_that_is_missing_is_refused(copy: Any) -> None:
    path = copy("ternary") / "model.safetensors"
    tensors, metadata = load_file(path), soak_damage.metadata_of(path)
    del tensors["classifier.weight"]
    save_file(tensors, path, metadata=metadata)
    refused(path.parent, "1 tensors are missing, the first is classifier.weight")


@pytest.mark.parametrize(
    ("base", "field", "value"),
    [
        ("ternary", "hidden_act", "relu"),
        ("ternary", "layer_norm_eps", 0.1),
        ("ternary", "num_attention_heads", 4),
        ("ternary", "num_hidden_layers", 0),
        ("ternary", "activation_bits", 4),
        ("ternary", "activation_clip", 2.5),
        ("ternary", "asymmetric", ["query"]),
        ("ternary", "dtype", "bfloat16"),
        ("prepared", "weight_quantizer", "bwn"),
        ("lengths", "length_config", {"keep": [1.0]}),
        ("lengths", "length_config", None),
    ],
)
def test_a_configuration_of_another_function_is_refused(base: str, field: str, value: object, copy: Any) -> None:
    folder = copy(base)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    own = config["quantization_config"]
    (own if field in own and field != "num_attention_heads" else config)[field] = value
    path.write_text(json.dumps(config))
    refused(folder, "config.json: ")
    del config["length_config" if field == "length_config" else "quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(lowbit.CheckpointError):
        lowbit.verify(folder)


def test_a_checkpoint_from_before_a_field_existed_loads(copy: Any, bases: tuple[Path, Logits]) -> None:
    folder = copy("ternary")

    def without_field(header: dict[str, Any]) -> None:
        recorded = json.loads(header["__metadata__"]["lowbit.config"])
        del recorded["quantization_config"]["kept_heads"]
        header["__metadata__"]["lowbit.config"] = json.dumps(recorded)

    soak_damage.rewrite_header(folder / "model.safetensors", without_field)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["kept_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    lowbit.verify(folder)
    assert torch.equal(soak.logits(folder), bases[1]["ternary"])


def test_a_record_that_is_no_configuration_is_refused(copy: Any) -> None:
    folder = copy("ternary")

    def damage(header: dict[str, Any]) -> None:
        recorded = json.loads(header["__metadata__"]["lowbit.config"])
        recorded["quantization_config"]["split"] = 1
        header["__metadata__"]["lowbit.config"] = json.dumps(recorded)

    soak_damage.rewrite_header(folder / "model.safetensors", damage)
    refused(folder, "the configuration recorded with the weights: LowbitConfig: split=1")


def test_keywords_and_labels_are_the_users(copy: Any, bases: tuple[Path, Logits]) -> None:
    folder = copy("ternary")
    assert load(folder, layer_norm_eps=0.1).config.layer_norm_eps == 0.1
    assert load(folder, num_labels=7, ignore_mismatched_sizes=True).classifier.out_features == 7
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["id2label"] = {"0": "no", "1": "maybe", "2": "yes"}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    config["hidden_dropout_prob"] = 0.3
    path.write_text(json.dumps(config))
    lowbit.verify(folder)
    assert torch.equal(soak.logits(folder), bases[1]["ternary"])
    config["id2label"]["3"] = "never"
    path.write_text(json.dumps(config))
    refused(folder, "num_labels is 4, the weights were saved with 3")


def test_shards_of_two_checkpoints_are_refused(copy: Any, bases: tuple[Path, Logits]) -> None:
    folder = copy("sharded")
    name = sorted(path.name for path in folder.glob("*.safetensors"))[1]
    shutil.copy(bases[0] / "bases" / "other sharded" / name, folder / name)
    refused(folder, "belongs to another checkpoint")


def test_an_index_that_leads_outside_is_refused(copy: Any, tmp_path: Path) -> None:
    folder = copy("sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = sorted(set(index["weight_map"].values()))[0]
    shutil.move(folder / name, tmp_path / name)
    for outside in (f"../{name}", str(tmp_path / name)):
        wrong = {key: outside if file == name else file for key, file in index["weight_map"].items()}
        path.write_text(json.dumps({**index, "weight_map": wrong}))
        refused(folder, "outside|not the name of a file")
    path.write_text(json.dumps(index))
    (folder / name).symlink_to(tmp_path / name)  # as caches have it
    lowbit.verify(folder)
    load(folder)


@pytest.mark.parametrize("name", ["classifier.bias", "bert.embeddings.LayerNorm.weight"])
def test_values_that_are_not_finite_are_refused(name: str, copy: Any) -> None:
    folder = copy("ternary")
    soak_damage.rewrite_tensors(folder, lambda tensors: tensors[name].view(-1)[1].fill_(float("inf")))
    with pytest.raises(lowbit.CheckpointError, match=f"{name} holds NaN or infinity"):
        load(folder)


def test_a_pooler_of_another_shape_is_refused(copy: Any) -> None:
    folder = copy("binary")
    soak_damage.rewrite_tensors(
        folder, lambda t: t.update({"bert.pooler.dense.bias": t["bert.pooler.dense.bias"][:-1]})
    )
    with pytest.raises(lowbit.CheckpointError, match=r"pooler\.dense\.bias is .* asks for"):
        load(folder)


def test_a_float_tensor_of_whole_numbers_is_refused(copy: Any) -> None:
    path = copy("ternary") / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(32, dtype=torch.int32)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(lowbit.CheckpointError, match="int32"):
        load(path.parent)


def test_files_with_checksums_of_bytes_alone_still_load(copy: Any, bases: tuple[Path, Logits]) -> None:
    folder = copy("ternary")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    checksums = {name: _crc32(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", "lowbit.crc32": json.dumps(checksums)})
    assert torch.equal(soak.logits(folder), bases[1]["ternary"])
    with pytest.raises(lowbit.CheckpointError, match="no checksums and configuration"):
        lowbit.verify(folder)
    tensors["classifier.bias"][0] += 1
    save_file(tensors, path, metadata={"format": "pt", "lowbit.crc32": json.dumps(checksums)})
    with pytest.raises(lowbit.CheckpointError, match=r"classifier\.bias does not match"):
        load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "not readable JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds list"),
        (
            lambda folder: soak_damage.rewrite_json(folder / "config.json", lambda v: v.update(auto_map=7)),
            "auto_map is 7",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "reads safetensors only|read from safetensors only"),
        (
            lambda folder: soak_damage.header_length(folder, soak_damage.random.Random(0)),
            "not a readable safetensors file",
        ),
    ],
)
def test_what_transformers_meets_first_is_one_error_of_verify(damage: Any, message: str, copy: Any) -> None:
    folder = copy("ternary")
    damage(folder)
    with pytest.raises(lowbit.CheckpointError, match=message):
        lowbit.verify(folder)


def test_no_code_of_a_checkpoint_is_run(copy: Any) -> None:
    for plant in (soak_damage.pickles_planted, soak_damage.code_planted):
        for turn in range(4):
            folder = copy("ternary")
            plant(folder, soak_damage.random.Random(turn))
            with contextlib.suppress(ValueError, OSError, RuntimeError):
                lowbit.verify(folder)
            with contextlib.suppress(ValueError, OSError, RuntimeError):
                load(folder)
            assert not soak_damage.canary_of(folder).exists()
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------ concurrency


def _save(folder: Path, which: int, start: Any) -> None:
    torch.manual_seed(which)
    model = lowbit.quantize(soak.small(), (lowbit.TernaryConfig, lowbit.BinaryConfig)[which]())
    start.wait()
    for turn in range(8):
        model.save_pretrained(folder, **({"max_shard_size": "6KB"} if which == 0 and turn % 2 else {}))


def test_of_two_processes_that_save_one_checkpoint_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [context.Process(target=_save, args=(tmp_path, which, start)) for which in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    lowbit.verify(tmp_path)
    load(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_of_two_writers_of_a_text_file_one_wins(tmp_path: Path) -> None:
    """Both wrote to one file aside: the first to rename left the other without it."""
    texts = ["a" * 100_000, "b" * 100_000]
    errors: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(200):
                write_text(tmp_path / "x.json", text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and (tmp_path / "x.json").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
