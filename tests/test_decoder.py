"""The decoder of a masked-LM head in 8 bits: one function from prepare to file, in every architecture that has one."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForMaskedLM
from typer.testing import CliRunner

import lowbit
from helpers import SIZES, batch, identical, outputs, outputs_by_module
from lowbit import models
from lowbit.cli.app import app
from lowbit.nn import PackedDecoder, QuantDecoder
from lowbit.nn import decoder as module_under_test

Config = lowbit.TernaryConfig
EIGHT = Config(output_embedding_bits=8)

# class -> configuration
HEADS: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": SIZES,
    "BertForPreTraining": SIZES,
    "BertLMHeadModel": SIZES,
    "RobertaForMaskedLM": {**SIZES, "pad_token_id": 1},
    "RobertaForCausalLM": {**SIZES, "pad_token_id": 1},
    "XLMRobertaForMaskedLM": {**SIZES, "pad_token_id": 1},
    "CamembertForMaskedLM": {**SIZES, "pad_token_id": 1},
    "DistilBertForMaskedLM": {"vocab_size": 101, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 150},
    "ElectraForMaskedLM": {**SIZES, "embedding_size": 32},
    "MPNetForMaskedLM": {**SIZES, "pad_token_id": 1},
    "AlbertForMaskedLM": {**SIZES, "embedding_size": 32},
    "AlbertForPreTraining": {**SIZES, "embedding_size": 32},
    "DebertaV2ForMaskedLM": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
}
MASKED = [head for head in HEADS if head.endswith("ForMaskedLM")]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def tiny(head: str = "BertForMaskedLM", **changes: Any) -> Any:
    """A randomly initialised tiny model with spread-out weights, in eval mode."""
    prefix = re.split(r"For|LMHead", head)[0]
    model = getattr(transformers, head)(getattr(transformers, f"{prefix}Config")(**{**HEADS[head], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    off_ties(model.get_output_embeddings().weight)
    return model.eval()


@torch.no_grad()
def off_ties(weight: torch.Tensor) -> None:
    """Move values that lie between two codes, of which float32 and float64 may choose different ones."""
    step = weight.double().abs().amax(1, keepdim=True) / 127
    codes = weight.double() / step
    lower = codes.floor()
    weight.copy_(torch.where((codes - lower - 0.5).abs() < 0.05, (lower + 0.4) * step, codes * step))


def decoder(model: Any) -> Any:
    return model.get_output_embeddings()


def name_of(model: Any) -> str:
    return next(name for name, module in model.named_modules() if module is decoder(model))


def by_definition(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric 8 bits a row, in float64: codes round(w / s), s = max|w| / 127."""
    step = weight.detach().double().abs().amax(1, keepdim=True) / 127
    return (weight.detach().double() / step).round() * step


def read_and_scored(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder of a model reads, and the scores of words that the model gives."""
    seen: list[torch.Tensor] = []
    hook = decoder(model).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        result = model(**inputs)
    hook.remove()
    return seen[0], result["logits" if "logits" in result else "prediction_logits"]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got.double() - expected).norm() <= tolerance * expected.norm())


def warnings_of(caplog: pytest.LogCaptureFixture, make: Callable[[], Any]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lowbit"):
        make()
    return [record.getMessage() for record in caplog.records if record.name == "lowbit"]


# ------------------------------------------------------------------------------------------ float -> prepared -> packed


@TIED
@pytest.mark.parametrize("head", HEADS)
def test_a_decoder_of_8_bits_from_prepare_to_float_again(head: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(head, tie_word_embeddings=tied)
    inputs, name, bare = batch(), name_of(model), [n for n, _ in model.named_modules()]
    weight, bias = decoder(model).weight.detach().clone(), decoder(model).bias
    bias = torch.zeros(101) if bias is None else bias.detach().clone()
    biases = [n for n, p in model.named_parameters(remove_duplicate=False) if p.shape == (101,)]
    expected_weight = by_definition(weight)

    def as_defined(each: Any) -> torch.Tensor:
        read, scores = read_and_scored(each, inputs)
        assert close(scores, read.double() @ expected_weight.T + bias.double())
        return scores

    lowbit.prepare(model, EIGHT)
    assert type(decoder(model)) is QuantDecoder and name_of(model) == name
    assert (decoder(model).weight is model.get_input_embeddings().weight) == tied
    prepared = as_defined(model)
    model.save_pretrained(tmp_path / "prepared")
    loaded = type(model).from_pretrained(tmp_path / "prepared")
    assert identical(outputs(loaded, inputs), outputs(model, inputs))
    assert (decoder(loaded).weight is loaded.get_input_embeddings().weight) == tied

    lowbit.convert(model)
    assert type(decoder(model)) is PackedDecoder and name not in lowbit.left_in_float(model)
    assert identical(outputs_by_module(model, inputs), outputs_by_module(loaded, inputs))
    assert torch.equal(outputs_by_module(model, inputs)[0], prepared)
    as_defined(model)
    model.save_pretrained(tmp_path / "packed")
    stored = load_file(tmp_path / "packed/model.safetensors")
    assert stored[f"{name}.weight"].dtype == torch.int8 and stored[f"{name}.weight"].shape == weight.shape
    assert stored[f"{name}.weight_scale"].dtype == torch.float32
    assert len([n for n in stored if n in biases]) == (1 if tied else len(biases))
    lowbit.verify(tmp_path / "packed")
    for load in (type(model).from_pretrained, lowbit.from_pretrained):
        loaded = load(tmp_path / "packed")
        assert identical(outputs(loaded, inputs), outputs(model, inputs))
        assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == stored.keys()

    model.dequantize()
    assert [n for n, _ in model.named_modules()] == bare and type(decoder(model)) is nn.Linear
    torch.testing.assert_close(decoder(model).weight.double(), expected_weight, rtol=1e-5, atol=1e-7)
    assert decoder(model).weight is not model.get_input_embeddings().weight
    as_defined(model)
    model.save_pretrained(tmp_path / "float")
    plain, report = type(model).from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not any(report.values()) and b"lowbit" not in pickle.dumps(plain)
    assert identical(outputs(plain, inputs), outputs(model, inputs))


@TIED
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_the_latent_table(head: str, tied: bool) -> None:
    """Those of a float decoder with the quantized values, straight through; beside what the embedding passes on."""
    model = lowbit.prepare(tiny(head, tie_word_embeddings=tied), EIGHT)
    inputs = batch()
    seen: list[torch.Tensor] = []
    own = decoder(model)
    own.register_forward_hook(lambda _, args, scores: seen.extend((args[0], scores)))
    result = model(**inputs)
    read, scores = seen
    read.retain_grad()
    weights = torch.randn_like(scores)
    (scores * weights).sum().backward()
    values = by_definition(own.weight)
    assert close(read.grad, weights.double() @ values)
    assert own.bias is None or close(own.bias.grad, weights.double().sum((0, 1)))
    grad = torch.einsum("bsv,bsk->vk", weights.double(), read.detach().double())
    unread = torch.ones(101, dtype=torch.bool)
    unread[inputs["input_ids"].unique()] = False  # the others get the embedding's gradient too
    rows = unread if tied else torch.ones_like(unread)
    assert unread.any() and close(own.weight.grad[rows], grad[rows])
    assert result is not None and model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("head", MASKED)
def test_a_step_of_training_moves_both_uses_of_the_table(head: str) -> None:
    model = lowbit.prepare(tiny(head), EIGHT).train()
    before = decoder(model).weight.detach().clone()
    inputs = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(decoder(model).weight, before)
    read, scores = read_and_scored(model.eval(), inputs)
    bias = 0 if decoder(model).bias is None else decoder(model).bias.detach().double()
    assert close(scores, read.double() @ by_definition(model.get_input_embeddings().weight).T + bias)
    assert identical(outputs(model, inputs), outputs_by_module(lowbit.convert(model), inputs))


@pytest.mark.parametrize("head", MASKED)
def test_splitting_leaves_the_decoder_one_matrix_of_the_latent_weight(head: str, tmp_path: Path) -> None:
    model = tiny(head)
    values, inputs = by_definition(decoder(model).weight), batch()
    lowbit.split(lowbit.prepare(model, EIGHT))
    assert model.get_input_embeddings().weight.dim() == 3 and decoder(model).weight.dim() == 2
    read, scores = read_and_scored(model, inputs)
    bias = decoder(model).bias.detach().double()
    assert close(scores, read.double() @ values.T + bias)
    model.save_pretrained(tmp_path / "prepared")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "prepared")
    assert identical(outputs(loaded, inputs), outputs(model, inputs))
    lowbit.convert(loaded).save_pretrained(tmp_path / "packed")
    assert identical(outputs_by_module(loaded, inputs), outputs_by_module(model, inputs))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
    assert identical(outputs(again, inputs), outputs(loaded, inputs))


@pytest.mark.parametrize("verb", ["prepare", "quantize"])
@pytest.mark.parametrize(
    "fields",
    [{"embedding_bits": None}, {"embedding_bits": 8}, {"embedding_bits": 1}, {"activation_bits": None},
     {"modules_to_not_convert": ["word_embeddings"]}, {"weight_bits": None, "activation_bits": None}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("head", ["BertForMaskedLM", "ElectraForMaskedLM", "AlbertForMaskedLM"])
def test_it_does_not_depend_on_other_fields(head: str, fields: dict[str, Any], verb: str, tmp_path: Path) -> None:
    model = tiny(head)
    values, bias, inputs = by_definition(decoder(model).weight), decoder(model).bias.detach().double(), batch()
    getattr(lowbit, verb)(model, Config(output_embedding_bits=8, **fields))
    read, scores = read_and_scored(model, inputs)
    assert close(scores, read.double() @ values.T + bias)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert identical(outputs(loaded, inputs), outputs(model, inputs)) and not any(report.values())
    model.dequantize()
    assert torch.allclose(decoder(model).weight.double(), values, rtol=1e-5, atol=1e-7)


def test_a_fused_model_and_one_that_drops_tokens() -> None:
    model, inputs = tiny(), batch()
    lowbit.quantize(model, EIGHT, fused=True)
    for each in (model, lowbit.set_length(model, lowbit.LengthConfig(keep=(0.9, 0.5)))):
        read, scores = read_and_scored(each, inputs)
        expected = read.double() @ decoder(each).dequantize().double().T + decoder(each).bias.detach().double()
        assert close(scores, expected)
    model.dequantize()
    assert type(decoder(model)) is nn.Linear


# ------------------------------------------------------------------------------------------ what the user is told of it


@pytest.mark.parametrize("head", HEADS)
def test_a_decoder_that_stays_float_is_one_warning(head: str, caplog: pytest.LogCaptureFixture) -> None:
    fallback = 1 if head.startswith(("Albert", "Deberta", "MPNet")) else 0  # they have one of their own at prepare
    model = lowbit.prepare(tiny(head), Config())
    (message,) = warnings_of(caplog, lambda: lowbit.convert(model))
    weight = decoder(model).weight
    assert name_of(model) in message and f"{4 * weight.numel()} bytes" in message
    assert "output_embedding_bits=8" in message
    assert len(warnings_of(caplog, lambda: lowbit.quantize(tiny(head), EIGHT))) == fallback
    meant = Config(modules_to_not_convert=[name_of(model)])
    assert len(warnings_of(caplog, lambda: lowbit.quantize(tiny(head), meant))) == fallback


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("BertModel", {}),
        ("BertForSequenceClassification", {}),
        ("RobertaForTokenClassification", {}),
        ("BertForMaskedLM", {"embedding_bits": None}),
        ("BertForMaskedLM", {"modules_to_not_convert": ["word_embeddings"]}),
    ],
)
def test_nothing_is_said_where_no_decoder_has_a_copy(
    head: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    kind = transformers.BertConfig if head.startswith("Bert") else transformers.RobertaConfig
    model = getattr(transformers, head)(kind(**SIZES))
    assert warnings_of(caplog, lambda: lowbit.quantize(model, Config(**fields))) == []


@pytest.mark.parametrize("bits", [None, 8])
def test_the_card_info_and_files_say_the_same(bits: int | None, tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), Config(output_embedding_bits=bits))
    model.save_pretrained(tmp_path)
    (line,) = re.findall(r"^- decoder: .*$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    shown = CliRunner().invoke(app, ["info", str(tmp_path)]).stdout
    found = json.loads(CliRunner().invoke(app, ["info", str(tmp_path), "--json"]).stdout)
    (row,) = [each for each in found["modules"] if each["name"] == "cls.predictions.decoder"]
    if bits:
        assert line == "- decoder: 8 bits, scales per row" and "\ndecoder:" not in shown
        assert found["float_decoder"] is None and (row["kind"], row["bits"], row["shape"]) == ("int8", 8, [101, 64])
        assert row["bytes"] == 101 * (64 + 4)
    else:
        assert "float, a table of its own of 0.03 MB (`output_embedding_bits=8`" in line
        assert "decoder: cls.predictions.decoder, float, 0.03 MB; output_embedding_bits=8" in shown
        assert found["float_decoder"] == "cls.predictions.decoder" and row["kind"] == "float"
    assert (
        f"| {sum(tensor.nbytes for tensor in load_file(tmp_path / 'model.safetensors').values()) / 1e6:.2f} |"
        in (tmp_path / "README.md").read_text()
    )


@TIED
def test_info_reads_a_prepared_checkpoint(tied: bool, tmp_path: Path) -> None:
    lowbit.prepare(tiny(tie_word_embeddings=tied), EIGHT).save_pretrained(tmp_path)
    found = json.loads(CliRunner().invoke(app, ["info", str(tmp_path), "--json"]).stdout)
    kinds = {each["name"]: each["kind"] for each in found["modules"]}
    assert kinds.get("cls.predictions.decoder") == (None if tied else "int8, in training")
    assert found["float_decoder"] is None


def test_the_command_takes_the_option(tmp_path: Path) -> None:
    model, inputs = tiny(), batch()
    model.save_pretrained(tmp_path / "float")
    arguments = ["quantize", str(tmp_path / "float"), str(tmp_path / "out"), "--output-embedding-bits", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert identical(outputs(loaded, inputs), outputs(lowbit.quantize(model, EIGHT), inputs))
    lowbit.prepare(tiny(), EIGHT).save_pretrained(tmp_path / "prepared")
    arguments[1:3] = [str(tmp_path / "prepared"), str(tmp_path / "other")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "--output-embedding-bits" in result.output


# -------------------------------------------------------------------------------------- which modules it is, and is not


@pytest.mark.parametrize("entry", ["decoder", "cls.predictions.decoder", "predictions", "cls"])
def test_it_can_be_left_out(entry: str, tmp_path: Path) -> None:
    model, inputs = tiny(), batch()
    weight = decoder(model).weight.detach().clone()
    lowbit.quantize(model, Config(output_embedding_bits=8, modules_to_not_convert=[entry]))
    assert type(decoder(model)) is nn.Linear and torch.equal(decoder(model).weight, weight)
    model.save_pretrained(tmp_path)
    assert identical(outputs(type(model).from_pretrained(tmp_path), inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForNextSentencePrediction"])
def test_models_without_a_decoder_do_as_without_the_field(name: str) -> None:
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES)).eval()
    other, inputs = copy.deepcopy(model), batch()
    assert identical(outputs(lowbit.quantize(model, EIGHT), inputs), outputs(lowbit.quantize(other, Config()), inputs))
    assert model.config.quantization_config == other.config.quantization_config


def test_an_output_embedding_that_scores_no_words_is_left() -> None:
    """DeBERTa's newer head calls a linear of its width the output embedding, and reads the word embedding."""
    model = tiny("DebertaV2ForMaskedLM", legacy=False)
    assert decoder(model).out_features == 64 and models.decoder(model) is None
    lowbit.prepare(model, EIGHT)
    assert type(decoder(model)) is nn.Linear and model.config.quantization_config.output_embedding_bits is None


def test_a_decoder_whose_weight_is_read_is_left(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """MobileBERT joins the weight of its decoder with another one: codes would be taken for numbers there."""
    config = transformers.MobileBertConfig(
        **{**SIZES, "intermediate_size": 64}, embedding_size=32, intra_bottleneck_size=32, num_feedforward_networks=1
    )
    model, inputs = transformers.MobileBertForMaskedLM(config).eval(), batch()
    other = lowbit.quantize(copy.deepcopy(model), Config())
    messages = warnings_of(caplog, lambda: lowbit.quantize(model, EIGHT))
    assert any("cls.predictions.decoder" in each and "instead of calling it" in each for each in messages)
    assert "cls.predictions.decoder" in model.config.quantization_config.modules_to_not_convert
    assert identical(outputs(model, inputs), outputs(other, inputs))
    model.save_pretrained(tmp_path)
    assert identical(outputs(type(model).from_pretrained(tmp_path), inputs), outputs(model, inputs))


class NeedsMore(transformers.BertForMaskedLM):
    def forward(self, input_ids: Any, attention_mask: Any = None, *, more: Any, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, **kwargs)


def test_a_head_that_cannot_be_tried_is_refused_before_anything_changes() -> None:
    model = NeedsMore(transformers.BertConfig(**SIZES))
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"token ids.*modules_to_not_convert=\['cls.predictions.decoder'\]"):
        lowbit.prepare(model, EIGHT)
    assert [type(module) for module in model.modules()] == before
    lowbit.prepare(model, Config(output_embedding_bits=8, modules_to_not_convert=["decoder"]))


@pytest.mark.parametrize("bits", [2, 4, 1, True, "8", 8.5])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"output_embedding_bits=.*accepted: None, 8"):
        Config(output_embedding_bits=bits)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_configurations_of_before_have_the_default() -> None:
    values = EIGHT.to_dict()
    assert lowbit.LowbitConfig.from_dict(values).output_embedding_bits == 8
    del values["output_embedding_bits"]
    assert lowbit.LowbitConfig.from_dict(values).output_embedding_bits is None


@pytest.mark.parametrize("head", MASKED)
def test_quantized_while_loading(head: str, tmp_path: Path) -> None:
    model, inputs = tiny(head), batch()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=EIGHT)
    assert type(decoder(loaded)) is PackedDecoder
    assert identical(outputs(loaded, inputs), outputs(lowbit.quantize(model, EIGHT), inputs))


@TIED
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("head", ["BertForMaskedLM", "ElectraForMaskedLM"])
def test_every_way_of_loading(head: str, options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    model, inputs = lowbit.quantize(tiny(head, tie_word_embeddings=tied), EIGHT), batch()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path, **options)
    in_memory = type(model).from_pretrained(None, config=copy.deepcopy(model.config), state_dict=model.state_dict())
    other = lowbit.quantize(tiny(head, tie_word_embeddings=tied), EIGHT)
    other.load_state_dict(model.state_dict())
    for each in (in_memory, other, copy.deepcopy(model)):
        each.tie_weights()  # nothing is tied any more, but the bias
        assert identical(outputs(each, inputs), outputs(model, inputs))
    assert decoder(loaded).weight_scale.dtype == torch.float32
    assert identical(outputs(loaded, inputs), outputs(model.to(options.get("dtype", torch.float32)), inputs))


@pytest.mark.parametrize("head", MASKED)
@pytest.mark.parametrize("verb", ["prepare", "quantize"])
def test_bare_bodies_and_other_heads_drop_it(head: str, verb: str, tmp_path: Path) -> None:
    model, inputs = getattr(lowbit, verb)(tiny(head), EIGHT), batch()
    model.save_pretrained(tmp_path / "masked")
    states = outputs(model.base_model, inputs)[0]
    pooler = {"add_pooling_layer": False} if hasattr(model.base_model, "pooler") else {}
    for load in (AutoModel, transformers.AutoModelForTokenClassification):
        other = load.from_pretrained(tmp_path / "masked", **(pooler if load is AutoModel else {})).eval()
        assert torch.equal(outputs(other.base_model, inputs)[0], states)
        assert not any(isinstance(module, PackedDecoder | QuantDecoder) for module in other.modules())
        other.save_pretrained(tmp_path / "other")
        again = type(other).from_pretrained(tmp_path / "other", **(pooler if load is AutoModel else {})).eval()
        assert identical(outputs(again, inputs), outputs(other, inputs))


def test_heads_of_the_same_decoder_load_each_other(tmp_path: Path) -> None:
    model, inputs = lowbit.quantize(tiny("BertForPreTraining"), EIGHT), batch()
    model.save_pretrained(tmp_path)
    other = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(other, inputs)[0], outputs(model, inputs)[0])


def test_a_file_without_the_decoder_says_how_to_load_it(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), EIGHT)
    model.bert.save_pretrained(tmp_path)
    with pytest.raises(
        lowbit.CheckpointError, match=r"holds no cls.predictions.decoder.*load the class that was saved"
    ):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, add_pooling_layer=False) is not None


def test_a_float_head_on_the_body_of_such_a_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model, inputs = lowbit.quantize(tiny(), EIGHT), batch()
    head = tiny(tie_word_embeddings=False)
    head.bert = model.bert
    head.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(decoder(loaded)) is nn.Linear and identical(outputs(loaded, inputs), outputs(head, inputs))


def test_two_biases_that_differ_stay_two(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # it would warn of a tie that is none
    model, inputs = lowbit.quantize(tiny(tie_word_embeddings=False), EIGHT), batch()
    assert not torch.equal(model.cls.predictions.bias, decoder(model).bias)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not caplog.records and not any(report.values())
    assert identical(outputs(loaded, inputs), outputs(model, inputs))
    assert torch.equal(loaded.cls.predictions.bias, model.cls.predictions.bias)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("verb", ["prepare", "quantize", "split"])
def test_ties_of_other_tables_stay(verb: str, bits: int | None, tmp_path: Path) -> None:
    """LUKE ties the table of entities to what scores them, and words to nothing."""
    config = transformers.LukeConfig(**SIZES, entity_vocab_size=17, entity_emb_size=64)
    model, inputs = transformers.LukeForMaskedLM(config).eval(), batch()
    quantized = Config(output_embedding_bits=bits)
    if verb == "split":
        lowbit.split(lowbit.prepare(model, quantized))
    else:
        getattr(lowbit, verb)(model, quantized)
    for folder in ("first", "again"):
        model.save_pretrained(tmp_path / folder)
        loaded, report = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(report.values()) and identical(outputs(loaded, inputs), outputs(model, inputs))
        entities = loaded.luke.entity_embeddings.entity_embeddings.weight
        assert loaded.entity_predictions.decoder.weight is entities and loaded.config.tie_word_embeddings
        model = loaded


class TiedTwice(transformers.BertForMaskedLM):
    _tied_weights_keys: ClassVar = {
        **transformers.BertForMaskedLM._tied_weights_keys,
        "twin.weight": "cls.predictions.transform.dense.weight",
    }

    def __init__(self, config: transformers.BertConfig) -> None:
        post_init, self.post_init = self.post_init, lambda: None  # when all is there
        super().__init__(config)
        self.twin = nn.Linear(64, 64)
        del self.post_init
        post_init()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("verb", ["prepare", "quantize", "split"])
def test_what_else_was_tied_gets_a_copy_where_the_words_part(verb: str, bits: int | None, tmp_path: Path) -> None:
    """The configuration can say only that all is tied, or nothing."""
    model, inputs = TiedTwice(transformers.BertConfig(**SIZES)).eval(), batch()
    dense = model.cls.predictions.transform.dense.weight
    assert model.twin.weight is dense
    lowbit.prepare(model, Config(output_embedding_bits=bits))
    {"prepare": lambda each: each, "quantize": lowbit.convert, "split": lowbit.split}[verb](model)
    assert (model.twin.weight is dense) == (verb == "prepare") and torch.equal(model.twin.weight, dense)
    for stage in (verb, "float"):
        model.save_pretrained(tmp_path / stage)
        loaded, report = TiedTwice.from_pretrained(tmp_path / stage, output_loading_info=True)
        assert not any(report.values()) and identical(outputs(loaded, inputs), outputs(model, inputs))
        assert torch.equal(loaded.twin.weight, dense)
        if stage != "float":
            model = loaded.dequantize()


DECODER = "cls.predictions.decoder"
DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "no codes": lambda t: t.pop(f"{DECODER}.weight"),
    "no scales": lambda t: t.pop(f"{DECODER}.weight_scale"),
    "float codes": lambda t: t.update({f"{DECODER}.weight": t[f"{DECODER}.weight"].float()}),
    "uint8 codes": lambda t: t.update({f"{DECODER}.weight": t[f"{DECODER}.weight"].to(torch.uint8)}),
    "half scales": lambda t: t.update({f"{DECODER}.weight_scale": t[f"{DECODER}.weight_scale"].half()}),
    "a row too few": lambda t: t.update({f"{DECODER}.weight": t[f"{DECODER}.weight"][1:].contiguous()}),
    "one scale": lambda t: t.update({f"{DECODER}.weight_scale": t[f"{DECODER}.weight_scale"][:1].clone()}),
    "NaN": lambda t: t[f"{DECODER}.weight_scale"].__setitem__(0, float("nan")),
    "a negative scale": lambda t: t[f"{DECODER}.weight_scale"].__setitem__(0, -1.0),
}


@pytest.mark.parametrize("with_records", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(damage: str, with_records: bool, tmp_path: Path) -> None:
    lowbit.quantize(tiny(), EIGHT).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() if with_records else {"format": "pt"}
    tensors = load_file(file)
    DAMAGES[damage](tensors)
    save_file(tensors, file, metadata)
    with pytest.raises(lowbit.CheckpointError):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bits", [None, 8])
def test_an_edited_configuration_is_refused(bits: int | None, tmp_path: Path) -> None:
    lowbit.quantize(tiny(), Config(output_embedding_bits=bits)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["output_embedding_bits"] = None if bits else 8
    path.write_text(json.dumps(values))
    for load in (AutoModelForMaskedLM.from_pretrained, lowbit.from_pretrained):
        with pytest.raises(lowbit.CheckpointError):
            load(tmp_path)


@pytest.mark.parametrize("verb", ["prepare", "quantize"])
@pytest.mark.parametrize("embedding_bits", [None, 2])
def test_the_words_cannot_be_resized_until_it_is_float(verb: str, embedding_bits: int | None) -> None:
    model = getattr(lowbit, verb)(tiny(), Config(output_embedding_bits=8, embedding_bits=embedding_bits))
    with pytest.raises(ValueError, match=r"is quantized \((Quant|Packed)(Decoder|Embedding)\) and cannot be resized"):
        model.resize_token_embeddings(110)
    model.dequantize().resize_token_embeddings(110)
    assert outputs(model, batch())[0].shape[-1] == 110


# ----------------------------------------------------------------------------------------------------- the module alone


class LargestFloat(TorchDispatchMode):
    """Notes the largest float tensor that operations make."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(each) and each.is_floating_point():
                self.values = max(self.values, each.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (0, 48), (2, 3, 48), (48,)], ids=str)
def test_it_is_the_product_with_the_values_of_the_codes(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "_IN_CACHE", 7 * 48)  # the last part is a smaller one
    linear = nn.Linear(48, 100, bias=bias)
    off_ties(linear.weight)
    linear.to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    packed = PackedDecoder.from_float(linear)
    y = packed(x)
    values = by_definition(linear.weight.float())
    assert y.dtype == dtype and torch.equal(y, QuantDecoder(linear)(x))
    expected = x.detach().double() @ values.T + (0 if linear.bias is None else linear.bias.detach().double())
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    assert y.shape == expected.shape and close(y.detach(), expected, tolerance)
    weights = torch.randn_like(y)
    y.backward(weights)
    assert x.grad.dtype == dtype and close(x.grad, weights.double() @ values, tolerance)
    assert not bias or close(linear.bias.grad, weights.double().reshape(-1, 100).sum(0), tolerance)
    with torch.no_grad():
        assert torch.equal(packed(x), y)


@pytest.mark.parametrize("grad", [True, False])
def test_the_float_table_is_never_made(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_IN_CACHE", 2000)
    packed = PackedDecoder.from_float(nn.Linear(48, 1000))
    x = torch.randn(2, 48, requires_grad=grad)
    with LargestFloat() as largest:
        y = packed(x)
        if grad:
            y.sum().backward()
    assert largest.values == 2 * 1000  # the scores


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_codes_and_scales(dtype: torch.dtype) -> None:
    model = lowbit.quantize(tiny(), EIGHT)
    codes, scale = decoder(model).weight.clone(), decoder(model).weight_scale.clone()
    for each in (model.to(dtype), copy.deepcopy(model)):
        assert torch.equal(decoder(each).weight, codes) and torch.equal(decoder(each).weight_scale, scale)
        assert decoder(each).bias.dtype == dtype and outputs(each, batch())[0].dtype == dtype


@pytest.mark.parametrize("verb", ["prepare", "quantize"])
def test_autocast(verb: str) -> None:
    model, inputs = getattr(lowbit, verb)(tiny(), EIGHT), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        assert read_and_scored(model, inputs)[1].dtype == torch.bfloat16
    loss.backward()
    grad = model.cls.predictions.transform.dense.weight.grad
    assert grad is not None and grad.isfinite().all() and grad.any()


def test_a_wrong_width_and_a_wrong_module_are_one_clear_error() -> None:
    linear = nn.Linear(48, 100)
    for each in (PackedDecoder.from_float(linear), QuantDecoder(linear)):
        with pytest.raises(ValueError, match=r"shape \(2, 47\), expected \[..., 48\]"):
            each(torch.randn(2, 47))
    with pytest.raises(TypeError, match="got Embedding"):
        PackedDecoder.from_float(nn.Embedding(3, 4))
    with torch.no_grad():
        linear.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        PackedDecoder.from_float(linear)


def test_a_row_of_zeros_scores_its_bias() -> None:
    linear = nn.Linear(48, 100)
    with torch.no_grad():
        linear.weight[5] = 0
    y = PackedDecoder.from_float(linear)(torch.randn(3, 48))
    assert y.isfinite().all() and torch.equal(y[:, 5], linear.bias[5].expand(3))


def test_it_is_traced() -> None:
    """By torch.compile in one graph, and by torch.export as torch's own operations."""
    packed, x = PackedDecoder.from_float(nn.Linear(48, 100)).eval(), torch.randn(4, 48)
    with torch.no_grad():
        expected = packed(x)
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
        torch.testing.assert_close(exported.module()(x), expected)
    for node in exported.graph.nodes:
        assert node.op != "call_function" or "lowbit" not in str(node.target)


def test_a_packed_model_is_exported() -> None:
    from lowbit.deploy.exporting import program

    model, inputs = lowbit.quantize(tiny(), EIGHT), batch()
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    scores, there = program(model).module()(**inputs)["logits"], inputs["attention_mask"].bool()
    assert close(scores[there], outputs(model, inputs)[0][there].double(), 0.02)  # codes of activations may flip


@pytest.mark.parametrize("verb", ["prepare", "quantize"])
def test_peft_names_the_field(verb: str) -> None:
    peft = pytest.importorskip("peft")
    model = getattr(lowbit, verb)(tiny(), EIGHT)
    with pytest.raises(ValueError, match=r"(Packed|Quant)Decoder, which LoRA cannot adapt.*output_embedding_bits=None"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["decoder"]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert not any("decoder" in name for name, _ in adapted.named_parameters() if "lora" in name)
    adapted(**batch(), labels=batch()["input_ids"]).loss.backward()
