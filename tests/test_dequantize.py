"""`model.dequantize()` gives a plain Hugging Face model whose weights are scale times code."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from transformers.models import bert as bert_package

import lowbit
import lowbit_kernels
from helpers import batch, outputs, tiny, tiny_config
from lowbit.nn import PackedEmbedding, PackedLinear
from lowbit_kernels import reference


def by_definition(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """scale x code of a float weight, by the reference definitions in float64."""
    quantize = {2: reference.ternarize, 1: reference.binarize}[bits]
    codes, scale = quantize(weight.detach())
    return codes.double() * scale.double().unsqueeze(-1)


def expected_state(model: torch.nn.Module, config: lowbit.LowbitConfig) -> dict[str, torch.Tensor]:
    """The float model's state dict with its quantized tensors replaced by what they stand for."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.dim() == 2 and (".encoder." in name or ".pooler." in name):
            state[name] = by_definition(tensor, config.weight_bits)
        elif "word_embeddings" in name:
            state[name] = by_definition(tensor, config.embedding_bits)
    return state


FORMS = {
    "prepared": lambda m, c: lowbit.prepare(m, c),
    "packed": lambda m, c: lowbit.quantize(m, c),
    "fused": lambda m, c: lowbit.quantize(m, c, fused=True),
    "with lengths": lambda m, c: lowbit.set_length(lowbit.quantize(m, c), lowbit.LengthConfig(keep=(0.9, 0.5))),
    "fused with lengths": lambda m, c: lowbit.set_length(
        lowbit.quantize(m, c, fused=True), lowbit.LengthConfig(keep=(0.9, 0.5))
    ),
}


@pytest.mark.parametrize("config", [lowbit.TernaryConfig(), lowbit.BinaryConfig()], ids=["ternary", "binary"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_plain_model_of_its_quantized_weights(form: str, config: lowbit.LowbitConfig) -> None:
    model = tiny()
    expected = expected_state(model, config)
    plain = BertForSequenceClassification(tiny_config(num_labels=3)).eval()
    plain.load_state_dict(expected)
    model = FORMS[form](model, config)
    assert model.dequantize() is model
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"torch", "transformers"}
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=1e-6, atol=1e-7)
    inputs = batch()
    torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs), rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks and not model.bert._forward_pre_hooks
    assert model.config._attn_implementation == plain.config._attn_implementation


def test_weights_are_scale_times_code_to_the_last_bit() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    packed = {n: m for n, m in copy.deepcopy(model).named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    model.dequantize()
    for name, module in packed.items():
        codes = lowbit_kernels.unpack_ternary(module.weight, module.row_length)
        assert torch.equal(model.get_submodule(name).weight, codes * module.weight_scale[:, None]), name


@pytest.mark.parametrize("stage", ["prepared", "packed"])
def test_a_split_pair_becomes_the_sum_of_its_planes(stage: str) -> None:
    model = lowbit.split(lowbit.prepare(tiny(), lowbit.TernaryConfig()))
    planes = {name: tensor for name, tensor in model.state_dict().items() if tensor.dim() == 3}
    expected = {name: by_definition(pair[0], 1) + by_definition(pair[1], 1) for name, pair in planes.items()}
    model = lowbit.convert(model) if stage == "packed" else model
    model.dequantize()
    assert len(expected) == 14
    for name, values in expected.items():
        torch.testing.assert_close(model.get_parameter(name).double(), values, rtol=1e-5, atol=1e-7)


def test_8_bit_tables_and_float_ones() -> None:
    model = tiny()
    word, position = (
        model.bert.embeddings.get_submodule(f"{n}_embeddings").weight.clone() for n in ("word", "position")
    )
    lowbit.quantize(model, lowbit.TernaryConfig(embedding_bits=8, quantize_pooler=False)).dequantize()
    step = word.abs().amax(1, keepdim=True) / 127
    codes = (word / step).round()
    torch.testing.assert_close(model.bert.embeddings.word_embeddings.weight, codes * step, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.bert.embeddings.position_embeddings.weight, position)
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding


def test_the_folder_of_a_dequantized_model_needs_no_lowbit(tmp_path: Path) -> None:
    lowbit.quantize(tiny(), lowbit.TernaryConfig()).save_pretrained(tmp_path / "packed")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed").dequantize()
    model.save_pretrained(tmp_path / "float")
    assert not {"quantization_config", "length_config"} & set(
        json.loads((tmp_path / "float" / "config.json").read_text())
    )
    plain, report = BertForSequenceClassification.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not any(report.values()) and type(plain.bert.encoder.layer[0].output.dense) is nn.Linear
    inputs = batch()
    assert all(map(torch.equal, outputs(plain, inputs), outputs(model, inputs)))
    assert b"lowbit" not in pickle.dumps(model)


@pytest.mark.parametrize("kind", ["Roberta", "Electra", "DistilBert", "MPNet", "Albert"])
@pytest.mark.parametrize("fused", [False, True])
def test_other_architectures(kind: str, fused: bool, tmp_path: Path) -> None:
    sizes = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "DistilBert":
        sizes = {"vocab_size": 101, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fused and kind in ("MPNet", "Albert"):
        pytest.skip("is not fused")
    lowbit.quantize(model, lowbit.TernaryConfig(), fused=fused)
    swapped = {name for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedEmbedding)}
    assert swapped
    model.dequantize().save_pretrained(tmp_path)
    plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    state = plain.state_dict()
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        quantized = name.removesuffix(".weight") in swapped
        torch.testing.assert_close(state[name], by_definition(tensor, 2).float() if quantized else tensor)
    ids = torch.randint(5, 100, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.testing.assert_close(plain.eval()(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("stage", ["prepared", "packed"])
def test_a_tied_decoder_keeps_its_own_weight(stage: str, tmp_path: Path) -> None:
    model = tiny("BertForMaskedLM")
    latent = model.get_output_embeddings().weight.detach().clone()
    model = lowbit.prepare(model, lowbit.TernaryConfig())
    model = lowbit.convert(model) if stage == "packed" else model
    model.dequantize()
    assert torch.equal(model.get_output_embeddings().weight, latent)
    model.save_pretrained(tmp_path)
    loaded = bert_package.BertForMaskedLM.from_pretrained(tmp_path)
    inputs = batch()
    assert all(map(torch.equal, outputs(loaded, inputs), outputs(model, inputs)))


def test_a_slimmed_model_stays_slim_and_loads(tmp_path: Path) -> None:
    model = lowbit.quantize(lowbit.slim(tiny(), 0.5), lowbit.TernaryConfig()).dequantize()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    inputs = batch()
    assert all(map(torch.equal, outputs(loaded, inputs), outputs(model, inputs)))
    assert loaded.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    with pytest.raises(ValueError, match="float already"):
        loaded.dequantize()


def test_it_can_be_quantized_again() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=True).dequantize()
    weight = model.bert.pooler.dense.weight.detach().clone()
    lowbit.quantize(model, lowbit.TernaryConfig())
    torch.testing.assert_close(model.bert.pooler.dense.dequantize(), weight)  # scale x code is its own ternarization


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_the_activation_is_back_in_the_layer(hidden_act: str) -> None:
    model = lowbit.quantize(tiny(hidden_act=hidden_act), lowbit.TernaryConfig()).dequantize()
    wanted = type(tiny(hidden_act=hidden_act).bert.encoder.layer[0].intermediate.intermediate_act_fn)
    assert all(type(layer.intermediate.intermediate_act_fn) is wanted for layer in model.bert.encoder.layer)


def test_dtypes() -> None:
    packed = lowbit.quantize(tiny(), lowbit.TernaryConfig()).bfloat16()
    wide = copy.deepcopy(packed).dequantize(dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    packed.dequantize()
    assert {p.dtype for p in packed.parameters()} == {torch.bfloat16}
    assert outputs(packed, batch())[0].dtype == torch.bfloat16


def test_another_model_of_the_same_configuration_does_not_change() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    other = copy.deepcopy(model)
    other.config = model.config
    model.dequantize()
    assert other.config.quantization_config.stage == "packed"


def test_models_spread_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    expected = outputs(copy.deepcopy(model).dequantize(), batch_ := batch())
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded"):
        offloaded.dequantize()
    spread = accelerate.dispatch_model(model, {"bert": "cpu", "classifier": "cpu"}, main_device="cpu", force_hooks=True)
    spread.dequantize()
    assert hasattr(spread.bert.encoder.layer[0].output.dense, "_hf_hook")
    assert all(map(torch.equal, outputs(spread, batch_), expected))
