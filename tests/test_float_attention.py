"""`attn_implementation="lowbit"` on float models of transformers: what eager computes, or a clear refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import lowbit  # noqa: F401 (registers)
from helpers import batch, outputs, tiny
from lowbit.nn import attention

SIZES = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}
MODELS = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 32},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2, "reference_compile": False},
}
PADDING = {"none": slice(0, 0), "right": slice(7, 11), "left": slice(0, 4), "holes": slice(2, 9, 3)}


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind], **changes})
    return transformers.AutoModel.from_config(config, attn_implementation="eager").eval()


def masked(padding: str) -> dict[str, torch.Tensor]:
    """Three sentences of 11 tokens, the first one with padding."""
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, PADDING[padding]] = 0
    return {"input_ids": torch.randint(1, 101, (3, 11)), "attention_mask": mask}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_those_of_eager(kind: str, padding: str) -> None:
    model, inputs = model_of(kind), masked(padding)
    expected = outputs(model, inputs)
    model.set_attn_implementation("lowbit")
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-5, atol=1e-5)


def test_loading_with_the_attention_and_maps(tmp_path: Path) -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="lowbit").eval()
    assert loaded.config._attn_implementation == "lowbit"
    inputs = batch()
    with torch.no_grad():
        got, expected = (one(**inputs, output_attentions=True) for one in (loaded, model))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert len(got.attentions) == 2
    torch.testing.assert_close(got.attentions, expected.attentions, rtol=1e-5, atol=1e-6)


def test_training_drops_the_probabilities_that_eager_drops() -> None:
    model, inputs, results = model_of("bert").train(), masked("right"), []
    for name in ("eager", "lowbit"):
        model.set_attn_implementation(name)
        model.zero_grad()
        torch.manual_seed(5)
        model(**inputs).last_hidden_state[:, 0].square().sum().backward()
        results.append([p.grad.clone() for p in model.encoder.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "cross", "fewer keys", "gpt2", "grouped heads"])
def test_decoders_are_refused(kind: str) -> None:
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, 101, (2, 5))}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=101, n_embd=32, n_layer=1, n_head=2)
        model = transformers.GPT2Model(config)
    elif kind == "grouped heads":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
        model = transformers.LlamaModel(config)
        model.layers[0].self_attn.is_causal = False
    else:
        model = model_of("bert", is_decoder=kind in ("causal", "cross"), add_cross_attention=kind == "cross")
    model.set_attn_implementation("lowbit")
    if kind in ("cross", "fewer keys"):
        layer = model.encoder.layer[0]
        module = layer.crossattention.self if kind == "cross" else layer.attention.self
        query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5 if kind == "cross" else 2, 16)
        with pytest.raises(ValueError, match="cross-attention"):
            attention.attention_forward(module, query, key, key, None)
        return
    wanted = "grouped heads" if kind == "grouped heads" else "causal attention"
    with pytest.raises(ValueError, match=rf"{wanted}.*set_attn_implementation\('sdpa'\)"):
        model(**inputs)


@pytest.mark.parametrize("padding", [*PADDING, None])
def test_a_prefix_is_seen_by_all_tokens(padding: str | None, kernel_calls: list[torch.Size]) -> None:
    """As peft's prefix tuning has it: more keys than queries, in the cache, and a mask over both."""
    model, inputs = model_of("bert"), masked(padding or "right")
    inputs["attention_mask"] = torch.cat([torch.ones(3, 4), inputs["attention_mask"]], 1)
    if padding is None:
        del inputs["attention_mask"]
    prefix = [(torch.randn(3, 2, 4, 16), torch.randn(3, 2, 4, 16)) for _ in model.encoder.layer]
    found = []
    for name in ("eager", "lowbit"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found.append(model(**inputs, past_key_values=transformers.DynamicCache(prefix), output_attentions=True))
    torch.testing.assert_close(found[1].last_hidden_state, found[0].last_hidden_state, rtol=1e-5, atol=1e-5)
    assert found[1].attentions[0].shape == (3, 2, 11, 15)
    without = outputs(model, {name: tensor[:, -11:] for name, tensor in inputs.items()})[0]
    assert not torch.allclose(found[1].last_hidden_state, without, atol=0.01)
    kernel_calls.clear()
    with torch.no_grad():  # on the GPU, without maps: the kernel has as many keys as queries
        model(**inputs, past_key_values=transformers.DynamicCache(prefix))
    assert kernel_calls == []


def test_is_causal_none_is_what_the_module_says() -> None:
    module, query = torch.nn.Module(), torch.randn(1, 2, 3, 16)
    module.is_causal = True
    with pytest.raises(ValueError, match="causal attention"):
        attention.attention_forward(module, query, query, query, None, is_causal=None)


@pytest.mark.parametrize("padding", [*PADDING, "a row of padding"])
@pytest.mark.parametrize("mask", [True, False])
def test_attention_without_padding_is_that_of_the_own_tokens(padding: str, mask: bool) -> None:
    """What runs on the GPU, on the CPU; with gradients."""
    tokens = torch.ones(3, 11, dtype=torch.bool)
    tokens[1, PADDING.get(padding, slice(None)) if mask else slice(0, 0)] = False
    shape = (3, 11, 2, 16)
    inputs = [torch.randn(shape).transpose(1, 2).requires_grad_() for _ in range(3)]
    weights = torch.randn(shape) * tokens[:, :, None, None]
    output = attention.attend_without_padding(*inputs, tokens if mask else None, 0.3)
    assert output.shape == shape and output.isfinite().all()
    grads = torch.autograd.grad((output * weights).sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *exact, attn_mask=tokens[:, None, None, :] | ~tokens.any(1)[:, None, None, None], scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(output[tokens].double(), expected[tokens], rtol=1e-4, atol=1e-5)
    for grad, wanted in zip(grads, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Tensors say that they are on a GPU; shapes of the boundaries of the sequences that the kernel is called with."""
    calls, real = [], attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a, **k: calls.append(a[3].shape) or real(*a, **k))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    return calls


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", MODELS)
def test_on_the_gpu_float_attention_takes_the_kernel(kind: str, padding: str, kernel_calls: list[torch.Size]) -> None:
    model, inputs = model_of(kind), masked(padding)
    expected = outputs(model, inputs)[0]
    model.set_attn_implementation("lowbit")
    tokens = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs(model, inputs)[0][tokens], expected[tokens], rtol=1e-4, atol=1e-5)
    assert len(kernel_calls) == (1 if kind == "modernbert" else 2)  # the other layer has a window
    outputs(model, {"input_ids": inputs["input_ids"]})
    assert kernel_calls[-1] == (4,)  # no mask: three sequences


def test_on_the_gpu_maps_and_dropout_are_there_where_they_are_wanted(kernel_calls: list[torch.Size]) -> None:
    model, inputs = model_of("bert"), masked("right")
    model.set_attn_implementation("lowbit")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
        assert maps[0].shape == (3, 2, 11, 11)
        model.train()(**inputs)
        model.eval().double()(**inputs)
        wide = model_of("bert", hidden_size=48)  # heads of 24
        wide.set_attn_implementation("lowbit")
        wide(**inputs)
    assert kernel_calls == []


def test_on_the_gpu_nothing_waits_for_the_device(kernel_calls: list[torch.Size]) -> None:
    """Fake tensors have no values: whatever asked for one would fail."""
    model = model_of("bert")
    model.set_attn_implementation("lowbit")
    inputs = masked("left")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fakes = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        assert model(**fakes).last_hidden_state.shape == (3, 11, 32)
    assert kernel_calls == [(7,), (7,)]


def test_the_order_of_tokens_is_made_once_a_forward_pass(
    kernel_calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, mask = model_of("bert"), masked("right")["attention_mask"].bool()
    model.set_attn_implementation("lowbit")
    sorts, real = [], torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda *a, **k: sorts.append(1) or real(*a, **k))
    ids = torch.randint(1, 101, (3, 11))
    first = outputs(model, {"input_ids": ids, "attention_mask": mask})[0]
    assert len(sorts) == 1
    mask[0] = True  # the caller's own tensor, changed between two passes
    second = outputs(model, {"input_ids": ids, "attention_mask": mask})[0]
    assert len(sorts) == 2 and not torch.allclose(first[0], second[0])
    assert torch.equal(first[1:], second[1:])
