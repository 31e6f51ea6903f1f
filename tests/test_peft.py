"""LoRA of peft on prepared and packed models: a user imports lowbit and peft, and calls peft only."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

import lowbit
from helpers import batch, identical, tiny
from helpers import outputs as fast_outputs
from helpers import outputs_by_module as outputs  # as a model with adapters runs
from lowbit.nn import PackedLinear, QuantLinear

CONFIGS = {
    "ternary": lowbit.TernaryConfig(),
    "binary": lowbit.BinaryConfig(),
    "float activations": lowbit.TernaryConfig(activation_bits=None),
    "one scale": lowbit.TernaryConfig(granularity="per_tensor"),
    "split": None,
}
STAGES = ("prepared", "packed")
TARGETS = {
    "names": (["query", "value"], 4),
    "regular expression": (r".*self\.(query|key)", 4),
    "the linear with GELU": (["intermediate.dense"], 2),
    "all-linear": ("all-linear", 13),  # two layers of six, and the pooler
    "peft's own choice": (None, 4),
}
LABELS = torch.tensor([0, 1, 2])


def quantized(stage: str = "packed", kind: str = "ternary", head: str = "BertForSequenceClassification") -> Any:
    """The same weights whenever it is called in one test."""
    torch.manual_seed(1)
    model = lowbit.prepare(tiny(head), CONFIGS[kind] or lowbit.TernaryConfig())
    model = lowbit.split(model) if kind == "split" else model
    return (lowbit.convert(model) if stage == "packed" else model).eval()


def adapted(model: Any, **options: Any) -> Any:
    """A `PeftModel` whose adapters do something."""
    config = LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": "all-linear", "r": 4, **options})
    torch.manual_seed(2)
    return filled(get_peft_model(model, config)).eval()


def filled(model: Any, adapter: str = "default") -> Any:
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def add_adapter(model: Any, config: LoraConfig) -> None:
    """By transformers, which may ask for a newer peft than there is: 5.24 wants 0.22, when 0.21.2 was the newest."""
    try:
        model.add_adapter(config)
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} does not take peft {peft.__version__}")


def layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_are_added_trained_switched_off_and_taken_out(stage: str, kind: str, targets: str) -> None:
    model, inputs = quantized(stage, kind), batch()
    base = outputs(model, inputs)
    wanted, count = TARGETS[targets]
    adapter = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=wanted, r=4)).eval()
    assert len(layers(adapter)) == count
    assert identical(outputs(adapter, inputs), base)  # B is 0
    filled(adapter)
    adapter(**inputs, labels=LABELS).loss.backward()
    trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert all(p.is_floating_point() and p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert (outputs(adapter, inputs)[0] - base[0]).abs().max() > 1e-3
    with adapter.disable_adapter():
        assert identical(outputs(adapter, inputs), base)
    assert identical(outputs(adapter.unload(), inputs), base)
    assert not layers(model)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["ternary", "float activations"])
def test_a_layer_is_the_formula(stage: str, kind: str) -> None:
    """y = base(x) + scaling B A x."""
    model = quantized(stage, kind)
    linear = copy.deepcopy(model.bert.encoder.layer[0].intermediate.dense)
    adapter = adapted(model, target_modules=["intermediate.dense"], use_rslora=True, lora_bias=True, lora_alpha=6)
    layer = layers(adapter)["base_model.model.bert.encoder.layer.0.intermediate.dense"]
    torch.nn.init.normal_(layer.lora_B["default"].bias)
    x = torch.randn(2, 5, 64)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"]
    expected = linear(x).double() + 6 / 4**0.5 * (x.double() @ a.T @ b.weight.double().T + b.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_the_float_model_with_the_same_weights(stage: str) -> None:
    """Through the linears to the adapters below, where activations are float: nothing is rounded on the way."""
    model, inputs = quantized(stage, "float activations"), batch()
    plain = copy.deepcopy(model).dequantize()
    found = []
    for one in (model, plain):
        adapter = adapted(one)
        adapter(**inputs, labels=LABELS).loss.backward()
        found.append({name: p.grad for name, p in adapter.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_is_the_adapter_alone_and_loaded_it_gives_the_same(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model, inputs = quantized(), batch()
    model.save_pretrained(tmp_path / "base")
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    adapter = adapted(base)
    expected = outputs(adapter, inputs)
    adapter.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name or "classifier" in name for name in file.keys())  # noqa: SIM118
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    assert identical(outputs(PeftModel.from_pretrained(base, tmp_path / "adapter", **options).eval(), inputs), expected)
    both = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert identical(outputs(both, inputs), expected)


def test_add_adapter_of_transformers(tmp_path: Path) -> None:
    model, inputs = quantized(), batch()
    base = outputs(model, inputs)
    add_adapter(model, LoraConfig(target_modules="all-linear", r=4))
    expected = outputs(filled(model), inputs)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    again = quantized()
    again.load_adapter(tmp_path)
    assert identical(outputs(again, inputs), expected) and not identical(expected, base)
    again.disable_adapters()
    assert identical(outputs(again, inputs), base)


def test_several_adapters_and_a_batch_of_several() -> None:
    adapter, inputs = adapted(quantized(), target_modules=["query"]), batch()
    first = outputs(adapter, inputs)[0]
    adapter.add_adapter("other", LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2))
    assert len(layers(adapter)) == 13  # those that have an adapter already get the other beside it
    filled(adapter, "other")
    assert identical(outputs(adapter, inputs), [first])
    adapter.set_adapter("other")
    other = outputs(adapter, inputs)[0]
    with torch.no_grad():
        mixed = adapter(**inputs, adapter_names=["default", "other", "__base__"]).logits
    with adapter.disable_adapter():
        base = outputs(adapter, inputs)[0]
    torch.testing.assert_close(mixed, torch.stack([first[0], other[1], base[2]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_adapters_are_float32_beside_half_precision(dtype: Any) -> None:
    model = quantized() if dtype == "autocast" else quantized().to(dtype)
    adapter = adapted(model).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        output = adapter(**batch(), labels=LABELS)
    output.loss.backward()
    trained = [p for name, p in adapter.named_parameters() if "lora_" in name]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = quantized()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        adapter = adapted(model).train()
        for module in adapter.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        torch.manual_seed(3)
        adapter(**batch(), labels=LABELS).loss.backward()
        gradients.append([p.grad for p in adapter.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_the_trainer_trains_them(stage: str, injected: bool, tmp_path: Path) -> None:
    model, config = quantized(stage), LoraConfig(target_modules="all-linear")
    if injected:
        add_adapter(model, config)
    else:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    args = TrainingArguments(
        tmp_path, max_steps=20, learning_rate=5e-3, logging_steps=1, save_steps=20, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    inputs = batch()
    rows = [{"labels": LABELS[i], **{name: tensor[i] for name, tensor in inputs.items()}} for i in range(3)]
    trainer = Trainer(model=model, args=args, train_dataset=rows * 8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    names = {path.name for path in (tmp_path / "checkpoint-20").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


@pytest.mark.parametrize("stage", STAGES)
def test_distillation_trains_them(stage: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher, student = tiny(), get_peft_model(quantized(stage), LoraConfig(task_type="SEQ_CLS"))
    before = {name: p.clone() for name, p in student.named_parameters()}
    args = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    rows = [{name: tensor[i] for name, tensor in batch().items()} for i in range(3)]
    lowbit.DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=rows).train()
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name or "classifier" in name for name in changed)


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("stage, kind", [("packed", "ternary"), ("packed", "split"), ("prepared", "split")])
def test_merging_into_codes_is_refused_before_anything_changes(stage: str, kind: str, call: str) -> None:
    adapter, inputs = adapted(quantized(stage, kind)), batch()
    expected = outputs(adapter, inputs)
    with pytest.raises(ValueError, match=r"model\.dequantize\(\), then merge"):
        getattr(adapter, call)()
    assert identical(outputs(adapter, inputs), expected) and len(layers(adapter)) == 13
    layer = next(iter(layers(adapter).values()))
    with pytest.raises(ValueError, match=r"Keep the adapter beside it"):
        layer.merge()


def test_no_float_linear_is_merged_before_the_packed_one_is_found() -> None:
    config, inputs = lowbit.TernaryConfig(modules_to_not_convert=["layer.0"]), batch()
    adapter = adapted(lowbit.quantize(tiny(), config))
    expected = outputs(adapter, inputs)
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.self\.query is packed"):
        adapter.merge_adapter()
    assert not any(layer.merged for layer in layers(adapter).values())
    assert identical(outputs(adapter, inputs), expected)


@pytest.mark.parametrize("loaded_after", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_the_way_to_merge_goes_through_dequantize(stage: str, loaded_after: bool, tmp_path: Path) -> None:
    adapter, inputs = adapted(quantized(stage, "float activations")), batch()
    expected = outputs(adapter, inputs)[0]
    if loaded_after:
        adapter.save_pretrained(tmp_path)
        adapter = PeftModel.from_pretrained(quantized(stage, "float activations").dequantize(), tmp_path).eval()
    else:
        trained = {name for name, p in adapter.named_parameters() if p.requires_grad}
        adapter.dequantize()
        assert {name for name, p in adapter.named_parameters() if p.requires_grad} == trained
    torch.testing.assert_close(outputs(adapter, inputs)[0], expected, rtol=1e-4, atol=1e-5)
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs)[0], expected, rtol=1e-4, atol=1e-5)
    kinds = {type(module) for module in merged.modules() if hasattr(module, "in_features")}
    assert kinds == {torch.nn.Linear}


def test_dequantize_gives_an_adapted_layer_its_activation_back() -> None:
    adapter, inputs = adapted(quantized()), batch()
    expected = outputs(adapter, inputs)[0]  # GELU lies in the packed linear, below the adapter
    adapter.dequantize()
    torch.testing.assert_close(outputs(adapter, inputs)[0], expected, rtol=0.05, atol=0.02)  # activations were 8 bits


def test_merging_into_latent_weights_is_exact_in_latent_space() -> None:
    adapter = adapted(quantized("prepared"))
    deltas = {
        name.removeprefix("base_model.model."): layer.get_base_layer().weight + layer.get_delta_weight("default")
        for name, layer in layers(adapter).items()
    }
    merged = adapter.merge_and_unload()
    for name, expected in deltas.items():
        linear = merged.get_submodule(name)
        assert type(linear) is QuantLinear and torch.equal(linear.weight, expected)
    inputs = batch()
    expected_outputs = outputs(merged, inputs)
    assert identical(outputs(lowbit.convert(merged), inputs), expected_outputs)


def test_converting_below_an_adapter_changes_no_bit() -> None:
    model, inputs = quantized("prepared"), batch()
    add_adapter(model, LoraConfig(target_modules=["query", "intermediate.dense"]))
    expected = outputs(filled(model), inputs)
    lowbit.convert(model)
    assert all(type(layer.base_layer) is PackedLinear for layer in layers(model).values())
    assert identical(outputs(model, inputs), expected)


REFUSED = {
    "use_dora": {"use_dora": True},
    "use_qalora": {"use_qalora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "word_embeddings": {"target_modules": ["query", "word_embeddings"]},
    "modules_to_save": {"modules_to_save": ["pooler"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "target_parameters": {"target_modules": [], "target_parameters": ["query.weight"]},
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("injected", [False, True])
def test_lora_that_cannot_be_is_refused_before_anything_changes(what: str, injected: bool) -> None:
    model, inputs = quantized(), batch()
    expected, before = outputs(model, inputs), [type(module) for module in model.modules()]
    config = LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": ["query", "value"], **REFUSED[what]})
    with pytest.raises(ValueError, match=what):
        add_adapter(model, config) if injected else get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == before and identical(outputs(model, inputs), expected)


def test_every_variant_that_peft_knows_is_refused() -> None:
    """A variant that is newer than lowbit is one that nobody has looked at."""
    variants = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    assert len(variants) >= 5
    for name in variants:
        config = LoraConfig(target_modules=["query"])
        setattr(config, name, True)
        with pytest.raises(ValueError, match=name):
            get_peft_model(quantized(), config)


TUNERS = sorted(
    name
    for name, config in inspect.getmembers(peft, inspect.isclass)
    if issubclass(config, peft.PeftConfig)
    and "target_modules" in {field.name for field in dataclasses.fields(config)}
    and not issubclass(config, LoraConfig | peft.AdaptionPromptConfig)  # the latter peft has for decoders only
)


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"])
@pytest.mark.parametrize("name", [*TUNERS, "AdaLoraConfig"])
def test_other_tuners_are_refused_before_anything_changes(name: str, targets: Any) -> None:
    """All of them: some would adapt the classifier alone, and say nothing."""
    kind = getattr(peft, name)
    options = {"IA3Config": {"feedforward_modules": []}, "AdaLoraConfig": {"total_step": 10}}.get(name, {})
    if name == "TrainableTokensConfig":
        options, targets = {"token_indices": [1, 2]}, ["word_embeddings"]
    model = quantized()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"{name} cannot adapt.*Accepted on prepared and packed models: LoraConfig"):
        get_peft_model(model, kind(target_modules=targets, **options))
    assert [type(module) for module in model.modules()] == before


def test_float_modules_of_a_packed_model_take_what_peft_has() -> None:
    model, inputs = quantized(), batch()
    adapter = get_peft_model(model, peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]))
    adapter(**inputs, labels=LABELS).loss.backward()
    adapter = get_peft_model(quantized(), peft.IA3Config(target_modules=["classifier"], feedforward_modules=[]))
    assert outputs(adapter, inputs)[0].shape == (3, 3)


def test_float_models_are_left_to_peft() -> None:
    model = tiny()
    adapter = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert {type(layer) for layer in layers(adapter).values()} == {peft.tuners.lora.Linear}
    adapter.merge_and_unload()
    dora = get_peft_model(model, LoraConfig(target_modules=["query"], use_dora=True))
    assert dora.peft_config["default"].target_modules == {"query"}


def test_names_of_targets_fit_a_float_model_too(tmp_path: Path) -> None:
    """Attention's quantizers are called query, key and value, too: the adapter's file names the linears by more."""
    model = quantized()
    adapted(model, target_modules=["query", "value"]).save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert set(config.target_modules) == {"self.query", "self.value"}
    assert len(layers(PeftModel.from_pretrained(tiny(), tmp_path))) == 4


@pytest.mark.parametrize("kind", ["roberta", "electra", "distilbert", "albert", "mpnet", "modernbert"])
@pytest.mark.parametrize("stage", STAGES)
def test_all_linear_names_what_it_names_in_the_float_model(stage: str, kind: str) -> None:
    sizes = {
        "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
        "intermediate_size": 128, "max_position_embeddings": 40, "embedding_size": 64, "num_labels": 3,
    }  # fmt: skip
    if kind == "distilbert":
        sizes |= {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    targets = [layers(get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear")))]
    lowbit.prepare(model, lowbit.TernaryConfig())
    model = lowbit.convert(model) if stage == "packed" else model
    adapter = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert layers(adapter).keys() == targets[0].keys()
    adapter(**batch(), labels=LABELS).loss.backward()


@pytest.mark.parametrize("what", ["lora", "layer norm"])
def test_the_fast_path_does_not_pass_by_adapters(what: str) -> None:
    model, inputs = lowbit.fuse(quantized()), batch()
    before = fast_outputs(model, inputs)[0]
    if what == "lora":
        adapter = adapted(model)
    else:
        config = peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])
        adapter = get_peft_model(model, config).eval()
        for name, parameter in adapter.named_parameters():
            if "ln_tuning" in name:
                parameter.data += torch.linspace(0, 1, parameter.numel())
    changed = fast_outputs(adapter, inputs)[0]
    assert (changed - before).norm() > 0.05 * before.norm()
    expected = outputs(adapter, inputs)[0]
    assert (changed - expected).norm() <= 0.05 * expected.norm()
    adapter.unload()
    assert torch.equal(fast_outputs(model, inputs)[0], before)


@pytest.mark.parametrize("order", ["import lowbit, peft", "import peft, lowbit", "import transformers, lowbit, peft"])
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    program = f"""
{order}
import torch, transformers
sizes = dict(vocab_size=99, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = transformers.BertModel(transformers.BertConfig(**sizes))
lowbit.quantize(model, lowbit.TernaryConfig())
adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
print(sum("lora_A" in name for name, _ in adapter.named_parameters()))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "7"


def test_import_loads_no_peft() -> None:
    program = "import lowbit, sys; lowbit.quantize; print('peft' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
