"""What users do that a model must survive: sharing configurations, pickling, offloading, fine-tuning what is packed."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification, BertLMHeadModel

import lowbit
from helpers import HEADS, batch, identical, outputs, outputs_by_module, tiny, tiny_config
from lowbit.nn import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear
from lowbit.quantizers import WEIGHT_QUANTIZERS, twn, weight_codes


def test_a_teacher_of_the_same_configuration_stays_float(tmp_path: Path) -> None:
    config = tiny_config()
    teacher, student = BertForSequenceClassification(config).eval(), BertForSequenceClassification(config).eval()
    inputs = batch()
    expected = outputs(teacher, inputs)
    lowbit.prepare(lowbit.slim(student, 0.5), lowbit.TernaryConfig())
    teacher.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(loaded, inputs), expected))
    assert loaded.config._attn_implementation != "lowbit" and student.bert.config is student.config
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_model_built_from_a_packed_ones_configuration_is_float() -> None:
    packed = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    fresh = BertForSequenceClassification(packed.config)
    lowbit.quantize(fresh, lowbit.BinaryConfig())
    assert fresh.config.quantization_config.weight_bits == 1 and packed.config.quantization_config.weight_bits == 2


@pytest.mark.parametrize("stage", ["slim", "prepared", "packed"])
def test_every_stage_can_be_pickled_whole(stage: str, tmp_path: Path) -> None:
    model = tiny()
    verbs = {
        "slim": lambda: lowbit.slim(model),
        "prepared": lambda: lowbit.prepare(model, lowbit.TernaryConfig()),
        "packed": lambda: lowbit.quantize(model, lowbit.TernaryConfig()),
    }
    verbs[stage]()
    restored = pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    inputs = batch()
    assert all(map(torch.equal, outputs(restored, inputs), outputs(model, inputs)))
    restored.classifier.bias.data.add_(1)
    restored.save_pretrained(tmp_path)  # its own weights, not those of the one it was copied from
    assert torch.equal(type(model).from_pretrained(tmp_path).classifier.bias, restored.classifier.bias)


def test_offloaded_weights_are_found() -> None:
    accelerate = pytest.importorskip("accelerate")
    for fused in (False, True):
        model = lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=fused)
        inputs = batch()
        expected = outputs(model, inputs)
        accelerate.cpu_offload(model, execution_device="cpu")
        for got, wanted in zip(outputs(model, inputs), expected, strict=True):
            assert (got - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("stage", ["float", "packed", "fused"])
def test_an_offloaded_model_may_be_made_shorter(stage: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs, lengths = tiny(), batch(), lowbit.LengthConfig((0.7, 0.4))
    if stage != "float":
        model = lowbit.quantize(model, lowbit.TernaryConfig(), fused=stage == "fused")
    (expected,) = outputs(lowbit.set_length(copy.deepcopy(model), lengths), inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    (got,) = outputs(lowbit.set_length(model, lengths), inputs)
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_gradients_go_straight_through_packed_linears() -> None:
    model = lowbit.quantize(tiny(hidden_dropout_prob=0.0), lowbit.TernaryConfig())
    inputs = batch()
    embeddings = torch.randn(3, 11, 64, requires_grad=True)
    mask = inputs["attention_mask"]
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
    expected = outputs_by_module(model, {"inputs_embeds": embeddings, "attention_mask": mask})[0]
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    assert embeddings.grad is not None and embeddings.grad.norm() > 0
    for name, parameter in model.named_parameters():
        if "embeddings" not in name:
            assert parameter.grad is not None, name


@pytest.mark.parametrize("clip", [None, 0.7])
def test_the_gradient_is_that_of_the_dequantized_linear(clip: float | None) -> None:
    config = lowbit.TernaryConfig(activation_clip=clip)
    linear = PackedLinear.from_float(torch.nn.Linear(50, 20), config)
    x = torch.randn(4, 3, 50, requires_grad=True)
    weights = torch.randn(4, 3, 20)
    (linear(x) * weights).sum().backward()
    wide = x.detach().double().requires_grad_()
    assert linear.input_quantizer is not None
    seen = linear.input_quantizer(x.detach()).double()
    clipped = wide if clip is None else torch.where(wide.abs() < clip, wide, wide.detach())
    bias = linear.bias.detach().double().requires_grad_()
    y = (seen + (clipped - clipped.detach())) @ linear.dequantize().double().t() + bias
    (y * weights.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear.bias.grad.double(), bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("changes", [{}, {"asymmetric": ["linear"]}, {"activation_granularity": "per_tensor"}])
def test_the_gradients_of_training_are_those_of_the_float_product(
    changes: dict, clip: float | None, pair: bool
) -> None:
    linear = torch.nn.Linear(50, 20)
    if pair:
        linear.weight = torch.nn.Parameter(torch.randn(2, 20, 50))
    make = lowbit.BinaryConfig if pair else lowbit.TernaryConfig
    linear = QuantLinear(linear, make(activation_clip=clip, **changes))
    x = torch.randn(4, 3, 50, requires_grad=True)
    weights = torch.randn(4, 3, 20)
    (linear(x) * weights).sum().backward()
    with torch.no_grad():
        codes, scale = weight_codes(linear.weight, linear.quantizer, linear.granularity)
        values = codes.double() * scale.double().unsqueeze(-1)
        values = values.sum(0) if pair else values
        seen = linear.input_quantizer(x).double().reshape(-1, 50)
    rows = weights.double().reshape(-1, 20)
    passes = torch.ones(4, 3, 50) if clip is None else x.detach().abs() < clip
    expected_weight = (rows.t() @ seen).expand(linear.weight.shape)
    torch.testing.assert_close(x.grad.double(), (rows @ values).view(x.shape) * passes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear.weight.grad.double(), expected_weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear.bias.grad.double(), rows.sum(0), rtol=1e-4, atol=1e-5)


def test_training_keeps_codes_and_not_values_for_the_backward_pass() -> None:
    linear, kept = QuantLinear(torch.nn.Linear(256, 128), lowbit.TernaryConfig()), []
    x = torch.randn(64, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x)
    assert sum(tensor.nbytes for tensor in kept) == (64 + 128) * 256 + (64 + 128) * 4  # codes and scales


@pytest.mark.parametrize(
    "config",
    [
        lowbit.BinaryConfig(),
        lowbit.TernaryConfig(granularity="per_tensor", activation_bits=4, asymmetric=["linear"]),
        lowbit.TernaryConfig(activation_bits=None),
    ],
)
def test_modules_are_packed_as_they_were_trained(config: lowbit.LowbitConfig) -> None:
    linear = QuantLinear(torch.nn.Linear(128, 16), config)
    x = torch.randn(5, 128)
    with torch.no_grad():
        assert torch.equal(PackedLinear.from_float(linear)(x), linear(x))
    pair = QuantLinear(torch.nn.Linear(128, 16), config)
    pair.weight, pair.quantizer = torch.nn.Parameter(torch.randn(2, 16, 128)), "bwn"
    with torch.no_grad():
        packed = PackedLinear.from_float(pair)
        torch.testing.assert_close(packed(x), pair(x), rtol=1e-5, atol=1e-5)
    assert packed.layout == "split"
    table = QuantEmbedding(torch.nn.Embedding(30, 128), 1, "per_tensor")
    ids = torch.arange(30)
    with torch.no_grad():
        assert torch.equal(PackedEmbedding.from_float(table)(ids), table(ids))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: lowbit.TernaryConfig(weight_bits=1), r"weight_quantizer='twn' with weight_bits=1; accepted .*'bwn'"),
        (lambda: lowbit.BinaryConfig(weight_bits=2), r"weight_quantizer='bwn' with weight_bits=2"),
        (lambda: lowbit.TernaryConfig(weight_quantizer="foo"), r"'foo'"),
        (lambda: lowbit.TernaryConfig(modules_to_not_convert=["typo"]), r"no module of .* is named typo"),
        (lambda: lowbit.TernaryConfig(modules_to_not_convert="pooler"), r"accepted: a list of names"),
    ],
)
def test_contradictions_are_found_before_training(config: Any, message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        lowbit.prepare(model, config())
    assert isinstance(model.bert.pooler.dense, torch.nn.Linear)


@pytest.mark.parametrize("config", [lowbit.TernaryConfig(), lowbit.TernaryConfig(activation_bits=None)])
def test_linears_refuse_another_width_and_another_device(config: lowbit.LowbitConfig) -> None:
    linear = torch.nn.Linear(64, 32)
    modules = QuantLinear(linear, config), PackedLinear.from_float(linear, config)
    for module in modules:
        for features in (63, 65, 64000):
            with pytest.raises(ValueError, match=rf"expected \[..., {64}\]"), torch.no_grad():
                module(torch.randn(2, features))
        if config.activation_bits:  # else it is torch's to say
            with pytest.raises(ValueError, match="share one device"), torch.no_grad():
                copy.deepcopy(module).to("meta")(torch.randn(2, 64))
        with torch.no_grad():
            assert module.to("meta")(torch.empty(2, 64, device="meta")).shape == (2, 32)


@pytest.mark.parametrize("config", [None, {"weight_bits": 2}, lowbit.TernaryConfig])
def test_what_is_no_configuration_is_refused(config: Any) -> None:
    with pytest.raises(TypeError, match="config must be a TernaryConfig"):
        lowbit.prepare(tiny(), config)


@pytest.mark.parametrize("quantize_attention", [True, False])
def test_a_decoder_is_refused_before_it_is_changed(quantize_attention: bool) -> None:
    model = BertLMHeadModel(tiny_config(is_decoder=True))
    with pytest.raises(ValueError, match="is a decoder"):
        lowbit.prepare(model, lowbit.TernaryConfig(quantize_attention=quantize_attention))
    assert model(**batch()).logits.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_are_in_the_mode_of_the_model(training: bool) -> None:
    model = lowbit.slim(tiny().train(training), 0.5)
    for step in (lambda m: lowbit.prepare(m, lowbit.TernaryConfig()), lowbit.split, lowbit.convert):
        model = step(model)
        assert {module.training for module in model.modules()} == {training}


def test_none_left_in_float_may_be_none() -> None:
    """As it is written for bitsandbytes, and by default there."""
    lowbit.quantize(tiny(), config := lowbit.TernaryConfig(modules_to_not_convert=None))
    assert config == lowbit.TernaryConfig()


def test_modules_to_not_convert_takes_whole_parts() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(modules_to_not_convert=["pooler", "layer.0"]))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["bert.pooler.dense"] is kinds["bert.encoder.layer.0.output.dense"] is torch.nn.Linear
    assert kinds["bert.encoder.layer.1.output.dense"] is PackedLinear


@pytest.mark.parametrize("where", ["bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.bias"])
def test_a_model_that_is_not_finite_stays_as_it_was(where: str) -> None:
    model = tiny()
    model.get_parameter(where).data.view(-1)[3] = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{where} holds NaN"):
            lowbit.quantize(model, lowbit.TernaryConfig())


def test_split_refuses_a_quantizer_it_cannot_invert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHT_QUANTIZERS, "mine", (2, twn))
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig(weight_quantizer="mine"))
    with pytest.raises(ValueError, match="'twn', got 'mine'"):
        lowbit.split(model)


def test_saving_deletes_nothing_but_the_checkpoint_before(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    kept = ["model-teacher.safetensors", "model.safetensors.txt", "modelling.safetensors", "notes.md"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    model.save_pretrained(tmp_path, variant="b", max_shard_size="20KB")
    shards = list(tmp_path.glob("model.b-*"))
    assert len(shards) > 1
    model.save_pretrained(tmp_path)
    assert all(path.exists() for path in shards)
    model.save_pretrained(tmp_path, variant="b")
    assert (tmp_path / "model.safetensors").exists() and not any(path.exists() for path in shards)
    assert not (tmp_path / "model.safetensors.index.b.json").exists()
    assert all((tmp_path / name).read_text() == "mine" for name in kept)


@pytest.mark.parametrize("stage", ["prepared", "packed"])
def test_a_given_state_dict_is_what_is_saved(stage: str, tmp_path: Path) -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    model = lowbit.convert(model) if stage == "packed" else model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["classifier.bias"] += 5
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(type(model).from_pretrained(tmp_path).classifier.bias, state["classifier.bias"])
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).classifier.bias, model.classifier.bias)


@pytest.mark.parametrize("stage", ["slim", "prepared", "packed"])
def test_damage_and_missing_tensors_are_found_at_every_stage(stage: str, tmp_path: Path) -> None:
    model = lowbit.slim(tiny()) if stage == "slim" else lowbit.prepare(tiny(), lowbit.TernaryConfig())
    model = lowbit.convert(model) if stage == "packed" else model
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[-100] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(lowbit.CheckpointError, match="does not match its checksum"):
        type(model).from_pretrained(tmp_path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(lowbit.CheckpointError, match="not a readable safetensors file"):
        type(model).from_pretrained(tmp_path)
    path.write_bytes(content)
    tensors = load_file(path)
    for name in ("bert.encoder.layer.1.attention.self.query.bias", "bert.embeddings.LayerNorm.weight"):
        save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
        with pytest.raises(lowbit.CheckpointError, match=f"the first is {name.removeprefix('bert.')}"):
            type(model).from_pretrained(tmp_path)


def test_a_configuration_can_be_passed_on(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path)
    inputs = batch()
    loaded = type(model).from_pretrained(tmp_path, config=model.config)
    again = type(model).from_pretrained(tmp_path, config=loaded.config)
    assert all(map(torch.equal, outputs(again, inputs), outputs(model, inputs)))


@pytest.mark.parametrize("split", [False, True])
def test_other_heads_load_packed_files(split: bool, tmp_path: Path) -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    model = lowbit.convert(lowbit.split(model) if split else model)
    model.save_pretrained(tmp_path)
    other = BertForMaskedLM.from_pretrained(tmp_path).eval()
    inputs = batch()
    with torch.no_grad():
        expected = model.bert(**inputs).last_hidden_state
        assert torch.equal(other.bert(**inputs).last_hidden_state, expected)
        assert other(**inputs).logits.isfinite().all()


def test_masks_of_booleans() -> None:
    model = tiny()
    model.set_attn_implementation("lowbit")
    inputs = batch()
    square = inputs["attention_mask"].bool()[:, None, None, :].expand(3, 1, 11, 11)
    expected = outputs(model, inputs)
    assert all(map(torch.equal, outputs(model, {**inputs, "attention_mask": square}), expected))


def test_asking_for_a_spec_does_not_unhook_the_plugin() -> None:
    import subprocess
    import sys

    program = (
        "import lowbit, importlib.util\nimportlib.util.find_spec('transformers.modeling_utils')\n"
        "import transformers.modeling_utils\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\nassert 'lowbit' in m"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("head", HEADS)
def test_copies_of_every_head_are_whole(head: str) -> None:
    model = lowbit.quantize(tiny(head), lowbit.TernaryConfig())
    inputs = batch(head)
    assert identical(outputs(copy.deepcopy(model), inputs), outputs(model, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_conversion_changes_no_bit_in_half_precision(hidden_act: str, dtype: torch.dtype) -> None:
    prepared = lowbit.prepare(tiny(hidden_act=hidden_act).to(dtype), lowbit.TernaryConfig())
    packed = lowbit.convert(copy.deepcopy(prepared))
    inputs = batch()
    assert all(map(torch.equal, outputs_by_module(packed, inputs), outputs(prepared, inputs)))


def test_double_precision_runs() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    inputs = batch()
    expected = outputs(model, inputs)[0]
    got = outputs(model.double(), inputs)[0]
    assert got.dtype == torch.float64 and (got - expected).norm() < 0.02 * expected.norm()
