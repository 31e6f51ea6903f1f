"""Checkpoints round-trip bit for bit, load in stock transformers calls, and never load wrong."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertModel
from transformers.models import bert as bert_package

import lowbit
import lowbit_kernels
from helpers import HEADS, batch, identical, outputs, outputs_by_module, tiny
from lowbit.files.atomic import staging
from lowbit.nn._packed import Packed

QUERY = "bert.encoder.layer.0.attention.self.query"


def packed(head: str = "BertForSequenceClassification") -> torch.nn.Module:
    return lowbit.quantize(tiny(head), lowbit.TernaryConfig())


def same(model: torch.nn.Module, other: torch.nn.Module, head: str = "BertForSequenceClassification") -> bool:
    inputs = batch(head)
    return identical(outputs(model.eval(), inputs), outputs(other.eval(), inputs))


@pytest.mark.parametrize("head", HEADS)
def test_every_head_round_trips_packed(head: str, tmp_path: Path) -> None:
    model = packed(head)
    model.save_pretrained(tmp_path)
    loaded = getattr(bert_package, head).from_pretrained(tmp_path)
    assert same(model, loaded, head)


def stages() -> dict[str, torch.nn.Module]:
    slim = lowbit.slim(tiny(), 0.5)
    half = lowbit.prepare(lowbit.slim(tiny(), 0.5), lowbit.TernaryConfig())
    pair = lowbit.split(lowbit.prepare(lowbit.slim(tiny(), 0.5), lowbit.TernaryConfig()))
    packed_pair = lowbit.convert(lowbit.split(lowbit.prepare(tiny(), lowbit.TernaryConfig())))
    return {"slim": slim, "half ternary": half, "split": pair, "packed pair": packed_pair}


@pytest.mark.parametrize("stage", ["slim", "half ternary", "split", "packed pair"])
def test_every_stage_round_trips(stage: str, tmp_path: Path) -> None:
    model = stages()[stage]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(model, loaded)
    loaded.save_pretrained(tmp_path)
    assert same(model, AutoModelForSequenceClassification.from_pretrained(tmp_path))


def test_tied_decoder_round_trips_prepared_and_packed(tmp_path: Path) -> None:
    model = lowbit.prepare(tiny("BertForMaskedLM"), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path / "prepared")
    prepared = AutoModelForMaskedLM.from_pretrained(tmp_path / "prepared")
    assert same(model, prepared, "BertForMaskedLM")
    assert prepared.cls.predictions.decoder.weight is prepared.get_input_embeddings().weight
    lowbit.convert(prepared).save_pretrained(tmp_path / "packed")
    loaded, inputs = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed"), batch("BertForMaskedLM")
    assert identical(outputs(model, inputs), outputs_by_module(loaded, inputs))


def test_a_base_model_loads_from_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    inputs = batch()
    assert torch.equal(outputs(BertModel.from_pretrained(tmp_path), inputs)[0], outputs(model.bert, inputs)[0])


def test_ternary_files_hold_five_codes_a_byte_and_modules_four(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")[f"{QUERY}.weight"]
    assert stored.shape == (64, 13)
    weight = model.get_submodule(QUERY).weight
    assert weight.shape == (64, 32)  # saving changes nothing in memory
    assert torch.equal(lowbit_kernels.unpack_trits(stored, 64), lowbit_kernels.unpack_ternary(weight, 64))
    loaded = load(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    files = [folder / "model.safetensors" for folder in (tmp_path, tmp_path / "again")]
    assert safetensors.torch.load_file(files[0]).keys() == safetensors.torch.load_file(files[1]).keys()


def test_files_of_version_1_load_and_are_saved_as_version_3(tmp_path: Path) -> None:
    old = lowbit.quantize(tiny(), lowbit.TernaryConfig(format_version=1))
    old.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in old.state_dict().items())
    loaded = load(tmp_path)
    assert same(old, loaded)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 3
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")[f"{QUERY}.weight"].shape == (64, 13)
    assert same(old, load(tmp_path))


def binary() -> torch.nn.Module:
    return lowbit.quantize(tiny(), lowbit.BinaryConfig())


def pair() -> torch.nn.Module:
    return lowbit.convert(lowbit.split(lowbit.prepare(tiny(), lowbit.TernaryConfig())))


ONE_BIT = {"binary": (binary, 8), "pair": (pair, 4)}


def codes_of(model: torch.nn.Module) -> dict[str, Packed]:
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Packed)}


def test_one_bit_of_minilms_shape_takes_one_bit(tmp_path: Path) -> None:
    model = tiny(hidden_size=384, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=12)
    lowbit.quantize(model, lowbit.BinaryConfig()).save_pretrained(tmp_path)
    stored, modules = safetensors.torch.load_file(tmp_path / "model.safetensors"), codes_of(model)
    for name, module in modules.items():
        assert stored[name].nbytes == module.weight.shape[0] * -(-module.row_length // 8)
    in_layer = sum(stored[name].nbytes for name in modules if ".layer.0." in name)
    assert in_layer == (4 * 384 * 384 + 2 * 384 * 1536) // 8
    assert same(model, load(tmp_path))


@pytest.mark.parametrize("kind", ONE_BIT)
@pytest.mark.parametrize("route", ["whole", "sharded", "state dict", "a state dict of the file"])
def test_one_bit_files_hold_no_padding_and_load_as_it_was(route: str, kind: str, tmp_path: Path) -> None:
    make, per_byte = ONE_BIT[kind]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if route == "sharded" else {}))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (route == "sharded")
    stored = {name: value for file in files for name, value in safetensors.torch.load_file(file).items()}
    for name, module in codes_of(model).items():
        assert stored[name].shape == (module.weight.shape[0], -(-module.row_length // per_byte)), name
    lowbit.verify(tmp_path)
    if route.startswith(("a ", "state")):
        loaded = make()
        loaded.load_state_dict(stored if route.startswith("a ") else before)
    else:
        loaded = load(tmp_path)
    after = loaded.state_dict()  # saving changed nothing in memory, and loading gives it back
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert same(model, loaded)


@pytest.mark.parametrize("kind", ONE_BIT)
@pytest.mark.parametrize("version", [1, 2])
def test_one_bit_files_of_earlier_versions_are_padded_and_saved_anew_without(
    version: int, kind: str, tmp_path: Path
) -> None:
    model = ONE_BIT[kind][0]()
    model.config.quantization_config.format_version = version
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    assert all(safetensors.torch.load_file(path)[name].shape[1] % 32 == 0 for name in codes_of(model))
    loaded = load(tmp_path)
    assert same(model, loaded)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 3
    assert safetensors.torch.load_file(path)[f"{QUERY}.weight"].shape == (64, 64 // ONE_BIT[kind][1])
    assert same(model, load(tmp_path))


@pytest.mark.parametrize("kind", ONE_BIT)
def test_bits_past_the_last_value_are_refused(kind: str, tmp_path: Path) -> None:
    ONE_BIT[kind][0]().save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"  # 150 columns: the last byte of a row has bits to spare

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][5, -1] |= 0b10000000 if kind == "binary" else 0b00000011

    rewrite(tmp_path, damage)  # without checksums, which would notice it first
    with pytest.raises(lowbit.CheckpointError, match=r"output\.dense: .*past K=150.*damaged"):
        load(tmp_path)


def test_one_bit_loaded_in_inference_mode_is_no_inference_tensor(tmp_path: Path) -> None:
    binary().save_pretrained(tmp_path)
    with torch.inference_mode():
        model = load(tmp_path)
    assert not model.get_submodule(QUERY).weight.is_inference()


@pytest.mark.parametrize(
    ("kind", "written", "claimed"),
    [
        (lowbit.TernaryConfig, 1, 2),
        (lowbit.TernaryConfig, 2, 1),
        (lowbit.BinaryConfig, 2, 3),
        (lowbit.BinaryConfig, 3, 2),
    ],
)
def test_a_file_of_another_version_than_it_says_is_refused(
    kind: type, written: int, claimed: int, tmp_path: Path
) -> None:
    lowbit.quantize(tiny(), kind(format_version=written)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = claimed
    path.write_text(json.dumps(config))
    with pytest.raises(lowbit.CheckpointError, match="asks for"):
        load(tmp_path)


def test_a_base_model_loads_into_a_head(tmp_path: Path) -> None:
    model = packed("BertModel")
    model.save_pretrained(tmp_path)
    assert same(model, load(tmp_path).bert, "BertModel")


def test_a_state_dict_from_memory_loads(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    loaded = type(model).from_pretrained(None, config=AutoConfig.from_pretrained(tmp_path), state_dict=state)
    assert same(model, loaded)
    other = packed()
    other.load_state_dict(state)
    assert same(model, other)


def test_loading_in_inference_mode_keeps_the_int8_expansion(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    with torch.inference_mode():
        model = load(tmp_path)
    assert not model.get_submodule(QUERY).weight.is_inference()


def test_without_lowbit_nothing_is_loaded(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    program = f"import transformers; transformers.BertModel.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode != 0 and "mismatched" in result.stderr


def test_device_map_loads_the_same(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    assert same(model, AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="cpu"))


def test_sharded_checkpoints_round_trip(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(model, AutoModelForSequenceClassification.from_pretrained(tmp_path))


def test_half_precision_after_loading_and_loading_as_half(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).bfloat16()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one in (model, loaded):
        assert one.bert.pooler.dense.weight_scale.dtype == torch.float32
        assert outputs(one, batch())[0].dtype == torch.bfloat16
    assert same(model, loaded)


def test_quantizing_on_load(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=lowbit.TernaryConfig())
    assert same(lowbit.quantize(model, lowbit.TernaryConfig()), loaded)


def test_a_new_process_loads_with_nothing_but_import_lowbit(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    ids = torch.arange(1, 9).view(1, 8)
    program = f"""
        import lowbit
        from transformers import AutoModelForSequenceClassification
        import torch
        model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})
        with torch.no_grad():
            print(model(torch.arange(1, 9).view(1, 8)).logits.tolist())
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert torch.equal(torch.tensor(json.loads(result.stdout)), outputs(model, {"input_ids": ids})[0])


# ------------------------------------------------------------------------------------------------- damaged files


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def rewrite(folder: Path, change: object) -> None:
    """Change the tensors and write them back without checksums, as another program might."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.weight"), "missing"),
        (lambda t: t.pop(f"{QUERY}.weight_scale"), "missing"),
        (lambda t: t.update({f"{QUERY}.weight": t[f"{QUERY}.weight"].float()}), "float32"),
        (lambda t: t.update({f"{QUERY}.weight": t[f"{QUERY}.weight"][:, :4].contiguous()}), "asks for"),
        (lambda t: t[f"{QUERY}.weight"][3, 2].fill_(243), "holds 243"),
        (lambda t: t[f"{QUERY}.weight_scale"].fill_(float("nan")), "finite"),
        (lambda t: t[f"{QUERY}.weight_scale"].neg_(), "negative"),
    ],
)
def test_wrong_tensors_are_refused(change: object, message: str, tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(lowbit.CheckpointError, match=message):
        load(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    original = path.read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    for _ in range(25):
        position = random.randrange(start, len(original))
        damaged = bytearray(original)
        damaged[position] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(lowbit.CheckpointError, match="damaged"):
            load(tmp_path)
    path.write_bytes(original)
    load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_raise(keep: int, tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|metadata|incomplete|damaged"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 99, "format_version"),
        ("weight_bits", 7, "weight_bits"),
        ("invented", 1, "newer version"),
        ("weight_bits", 1, "asks for|missing"),
        ("split", True, "split"),
    ],
)
def test_wrong_configurations_are_refused(field: str, value: object, message: str, tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes in ({"hidden_size": 128}, {"num_hidden_layers": 3}, {"model_type": "roberta"}):
        path.write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError):
            load(tmp_path)


# ------------------------------------------------------------------------------------------------ failing saves


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = packed()
    old.save_pretrained(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        packed().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert same(old, load(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_file_that_cannot_grow_is_an_os_error_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """What safetensors itself raises has a type of its own."""
    old = packed()
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    program = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import lowbit
        from helpers import tiny
        model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # config.json fits
        try:
            model.save_pretrained({str(tmp_path)!r})
        except OSError as error:
            sys.exit(0 if "File too large" in str(error) else f"says {{error}}")
        sys.exit("no error")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_while_saving_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    old = packed()
    old.save_pretrained(tmp_path)
    program = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import lowbit, transformers.modeling_utils as m
        from helpers import tiny
        real = m.safe_save_file
        def slow(*args, **kwargs):
            real(*args, **kwargs)
            print("written", flush=True)
            time.sleep(60)
        m.safe_save_file = slow
        lowbit.quantize(tiny(), lowbit.TernaryConfig()).save_pretrained({str(tmp_path)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "written"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert same(old, load(tmp_path))
    assert list(tmp_path.glob(".saving-*"))
    with staging(tmp_path) as other:  # a writer that lives
        packed().save_pretrained(tmp_path)
        assert list(tmp_path.glob(".saving-*")) == [other]  # what the killed one left is gone
    assert not list(tmp_path.glob(".saving-*"))


def test_saving_onto_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="is a file"):
        packed().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


# --------------------------------------------------------------------------------------------------------- size


def test_the_file_is_as_small_as_the_bits_say(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    modules = [m for m in model.modules() if hasattr(m, "row_length")]
    codes = sum(m.weight.shape[0] * -(-m.row_length // 5) for m in modules)
    scales = sum(4 * b.numel() for n, b in model.named_buffers() if n.endswith("weight_scale"))
    floats = sum(4 * p.numel() for p in model.parameters())
    overhead = (tmp_path / "model.safetensors").stat().st_size - codes - scales - floats
    assert 0 < overhead < 15_000  # the header: names, shapes and checksums
