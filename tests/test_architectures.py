"""Encoders other than BERT: each goes through the same stages, and keeps the function that each stage promises."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

import lowbit
from helpers import SIZES, identical, outputs, outputs_by_module
from lowbit import models
from lowbit.models import ARCHITECTURES, Architecture
from lowbit.nn import FusedEmbeddings, PackedEmbedding, PackedEncoder, PackedLinear, QuantEmbedding, QuantLinear

DISTILBERT = {"vocab_size": 101, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 150}
# class prefix -> configuration; what q, k, v and the first FFN linear of a layer are called
KNOWN: dict[str, dict[str, Any]] = {
    "Roberta": {**SIZES, "pad_token_id": 1},
    "XLMRoberta": {**SIZES, "pad_token_id": 1},
    "Camembert": {**SIZES, "pad_token_id": 1},
    "DistilBert": {**DISTILBERT, "max_position_embeddings": 40},
    "Electra": {**SIZES, "embedding_size": 32},
    "MPNet": {**SIZES, "pad_token_id": 1},
}
FALLBACK: dict[str, dict[str, Any]] = {
    "Albert": {**SIZES, "embedding_size": 32, "hidden_act": "gelu"},
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
}
PLAIN = [prefix for prefix in KNOWN if prefix != "MPNet"]  # attention by transformers' interface
HEADS = [
    "Model", "ForMaskedLM", "ForPreTraining", "ForCausalLM", "ForSequenceClassification", "ForMultipleChoice",
    "ForTokenClassification", "ForQuestionAnswering",
]  # fmt: skip
CLASSES = [
    (prefix, head) for prefix in [*KNOWN, *FALLBACK] for head in HEADS if hasattr(transformers, f"{prefix}{head}")
]
LABELS = {"ForSequenceClassification": 3, "ForTokenClassification": 5}


def test_every_row_of_the_table_is_tested() -> None:
    tested = {getattr(transformers, f"{prefix}Config").model_type for prefix in KNOWN}
    elsewhere = {"bert", "deformer"}  # the latter in test_students_deformer.py
    assert elsewhere | tested == set(ARCHITECTURES)


def tiny(prefix: str, head: str = "ForSequenceClassification", **changes: Any) -> Any:
    """A randomly initialised tiny model with spread-out weights, in eval mode."""
    labels = {"num_labels": LABELS[head]} if head in LABELS else {}
    values = {**(KNOWN | FALLBACK)[prefix], **labels, **changes}
    model = getattr(transformers, f"{prefix}{head}")(getattr(transformers, f"{prefix}Config")(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def batch(model: Any, rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Random token ids; the first row is padded, with the padding token that RoBERTa's positions go by."""
    shape = (rows, 2, length) if type(model).__name__.endswith("ForMultipleChoice") else (rows, length)
    ids, mask = torch.randint(2, 101, shape), torch.ones(shape, dtype=torch.long)
    mask[0, ..., length // 2 :] = 0
    return {"input_ids": ids.where(mask.bool(), torch.tensor(model.config.pad_token_id)), "attention_mask": mask}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.02) -> bool:
    """Codes flip where an activation lies on a tie between two, hence a norm."""
    return bool((got - expected).norm() <= tolerance * expected.norm())


def names_of(model: Any, *kinds: type) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) in kinds}


# ---------------------------------------------------------------------------------- float -> prepared -> packed -> file


@pytest.mark.parametrize(("prefix", "head"), CLASSES, ids="".join)
def test_every_head_keeps_its_function_from_prepare_to_file(prefix: str, head: str, tmp_path: Path) -> None:
    model = tiny(prefix, head)
    inputs, base = batch(model), models.base_name(model)
    if head == "ForMultipleChoice" and getattr(model.base_model, "pooler", head) is None:
        pytest.skip("transformers 5.10 builds this head without the pooler that it reads")
    before, linears = outputs(model, inputs), names_of(model, nn.Linear)
    outside = {name for name in linears if not name.startswith(base)}
    words = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())

    lowbit.prepare(model, lowbit.TernaryConfig())
    assert names_of(model, QuantLinear) == linears - outside  # by default every linear but the head's
    assert names_of(model, nn.Linear) == outside
    assert names_of(model, QuantEmbedding) == {words}

    model.train()
    found = [x for x in model(**inputs).to_tuple() if torch.is_tensor(x)]
    sum((x * torch.randn_like(x)).sum() for x in found).backward()
    for name in names_of(model, QuantLinear, QuantEmbedding):
        gradient = model.get_submodule(name).weight.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name

    prepared = outputs(model.eval(), inputs)
    assert [x.shape for x in prepared] == [x.shape for x in before]
    assert not any(torch.allclose(x, y, atol=1e-3) for x, y in zip(prepared, before, strict=True))
    packed = outputs_by_module(lowbit.convert(model), inputs)
    assert identical(prepared, packed)
    assert names_of(model, PackedLinear) == linears - outside and names_of(model, PackedEmbedding) == {words}

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert identical(packed, outputs_by_module(loaded, inputs))
    assert identical(outputs(model, inputs), outputs(loaded, inputs))
    assert lowbit.left_in_float(loaded) == lowbit.left_in_float(model)


@pytest.mark.parametrize("prefix", [*KNOWN, *FALLBACK])
def test_a_bare_model_loads_what_a_head_saved(prefix: str, tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(prefix, "ForSequenceClassification"), lowbit.TernaryConfig())
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    no_pooler = {"add_pooling_layer": False} if prefix in {"Roberta", "XLMRoberta", "Camembert", "MPNet"} else {}
    bare = transformers.AutoModel.from_pretrained(tmp_path, **no_pooler).eval()
    assert torch.equal(outputs(bare, inputs)[0], outputs(model.base_model, inputs)[0])


@pytest.mark.parametrize("prefix", [*KNOWN, *FALLBACK])
def test_a_split_pair_is_the_ternary_model(prefix: str, tmp_path: Path) -> None:
    model = lowbit.prepare(tiny(prefix, "ForMaskedLM"), lowbit.TernaryConfig(activation_bits=None))
    inputs = batch(model)
    ternary = outputs(model, inputs)[0]
    pair = outputs(lowbit.split(model), inputs)[0]
    assert (pair - ternary).abs().max() <= 1e-4 * ternary.abs().max()
    assert all(module.weight.shape[0] == 2 for module in model.modules() if isinstance(module, QuantLinear))
    packed = outputs(lowbit.convert(model), inputs)
    model.save_pretrained(tmp_path)
    assert identical(packed, outputs(type(model).from_pretrained(tmp_path).eval(), inputs))


def ternary_by_definition(weight: torch.Tensor) -> torch.Tensor:
    """TWN, a row at a time: alpha * sign(w) where |w| exceeds 0.7 times its mean, alpha the mean of those |w|."""
    rows = []
    for row in weight.double():
        large = row.abs() > 0.7 * row.abs().mean()
        rows.append(row.sign() * large * row.abs()[large].mean())
    return torch.stack(rows)


@pytest.mark.parametrize("prefix", [*KNOWN, *FALLBACK])
def test_packed_weights_are_the_published_ones(prefix: str) -> None:
    """The packed model against transformers' own in float64, with weights ternarised here by the paper's formula."""
    model = tiny(prefix)
    inputs, expected_model = batch(model), copy.deepcopy(model).double()
    lowbit.quantize(model, lowbit.TernaryConfig(activation_bits=None))
    swapped = names_of(model, PackedLinear, PackedEmbedding)
    with torch.no_grad():
        for name in swapped:
            weight = expected_model.get_submodule(name).weight
            weight.copy_(ternary_by_definition(weight))
    (expected,), (got,) = outputs(expected_model, inputs), outputs(model, inputs)
    assert len(swapped) > 7 and (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# -------------------------------------------------------------------------------------------------- slim, fuse, lengths


def dead(model: Any, heads: list[int], neurons: list[int]) -> None:
    """Make some heads and neurons of every layer compute exactly zero."""
    distil = type(model).__name__.startswith("DistilBert")
    projections = ("q_lin", "k_lin", "v_lin") if distil else ("query", "key", "value")
    first = "lin1" if distil else "intermediate.dense"
    with torch.no_grad():
        for name, linear in model.named_modules():
            if name.endswith(projections):
                for head in heads:
                    linear.weight[head * 16 : (head + 1) * 16] = 0.0
                    linear.bias[head * 16 : (head + 1) * 16] = 0.0
            elif name.endswith(first):
                linear.weight[neurons], linear.bias[neurons] = 0.0, 0.0


@pytest.mark.parametrize("prefix", PLAIN)
def test_slim_drops_dead_heads_and_neurons_and_the_result_is_saved(prefix: str, tmp_path: Path) -> None:
    model = tiny(prefix)
    inputs = batch(model)
    dead(model, [1, 2], torch.randperm(150)[:75].tolist())
    before = outputs(model, inputs)[0]
    data = [{**batch(model), "labels": torch.randint(0, 3, (3,))}] if prefix == "DistilBert" else None
    lowbit.slim(model, 0.5, data)
    assert torch.allclose(outputs(model, inputs)[0], before, rtol=0, atol=1e-5)
    lowbit.quantize(model, lowbit.TernaryConfig())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert identical(outputs(model, inputs), outputs(loaded, inputs))
    assert all(close(x, y) for x, y in zip(outputs(lowbit.fuse(loaded), inputs), outputs(model, inputs), strict=True))


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForSequenceClassification"])
@pytest.mark.parametrize("prefix", KNOWN)
def test_fuse_equals_the_modules(prefix: str, head: str) -> None:
    model = tiny(prefix, head)
    for name, table in model.named_parameters():
        if "relative_attention_bias" in name:
            table.data.normal_(std=3.0)
    lowbit.quantize(model, lowbit.TernaryConfig(quantize_attention=False))
    fused = lowbit.fuse(copy.deepcopy(model))
    inputs = batch(model)
    assert any(isinstance(module, PackedEncoder) for module in fused.modules())
    assert set(fused.state_dict()) == set(model.state_dict())
    real = inputs["attention_mask"].bool() if head == "ForTokenClassification" else slice(None)
    (got,), (expected,) = outputs(fused, inputs), outputs_by_module(model, inputs)
    assert close(got[real], expected[real])
    embeddings = next(module for module in fused.modules() if isinstance(module, FusedEmbeddings))
    ids = inputs["input_ids"]
    # One operation and the modules agree on what a token's position is: in the padded batch and where it is given.
    for arguments in ({"input_ids": ids}, {"input_ids": ids, "position_ids": torch.arange(5, 16)[None]}):
        with torch.no_grad():
            assert torch.allclose(embeddings(**arguments), embeddings.original(**arguments), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", PLAIN)
def test_dropped_tokens(prefix: str, tmp_path: Path) -> None:
    model = tiny(prefix)
    inputs = batch(model)
    everything = outputs(model, inputs)[0]
    # What the last layer drops, it drops after its attention: the first token has seen all.
    last = outputs(lowbit.set_length(model, lowbit.LengthConfig((1.0, 0.3))), inputs)[0]
    assert torch.allclose(last, everything, rtol=0, atol=1e-5)
    both = outputs(lowbit.set_length(model, lowbit.LengthConfig((0.3, 0.3))), inputs)[0]
    assert not torch.allclose(both, everything, rtol=0, atol=1e-4)
    again = outputs(lowbit.set_length(model, None), inputs)[0]
    assert torch.allclose(again, everything, rtol=0, atol=1e-6)

    lowbit.set_length(lowbit.quantize(model, lowbit.TernaryConfig()), lowbit.LengthConfig((0.6, 0.3)))
    packed = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert identical(packed, outputs(loaded, inputs))
    assert close(outputs(lowbit.fuse(loaded), inputs)[0], packed[0])


def test_a_head_that_reads_another_token_gets_all() -> None:
    first, last = (tiny("Electra", "ForMultipleChoice", summary_type=kind) for kind in ("first", "last"))
    for model, cheap in ((first, True), (last, False)):
        inputs = batch(model)
        everything = outputs(model, inputs)[0]
        lowbit.set_length(model, lowbit.LengthConfig((1.0, 1.0)))
        assert lowbit.nn.unpadded.heads.reads_first_token_only(model) is cheap
        # Padding ends as zeros, which the last token of a padded row would read.
        assert torch.allclose(outputs(model, inputs)[0][1:], everything[1:], rtol=0, atol=1e-5)


def test_compile() -> None:
    model = lowbit.quantize(tiny("DistilBert"), lowbit.TernaryConfig())
    inputs = batch(model)
    before = outputs(model, inputs)[0]
    assert close(outputs(lowbit.compile(model, backend="eager"), inputs)[0], before)
    fused = lowbit.compile(lowbit.fuse(copy.deepcopy(model)), backend="eager")
    assert close(outputs(fused, inputs)[0], before)


VERBS: dict[str, Callable[[Any], Any]] = {
    "slim": lambda model: lowbit.slim(model),
    "fuse": lambda model: lowbit.fuse(lowbit.quantize(model, lowbit.TernaryConfig())),
    "fused=True": lambda model: lowbit.quantize(model, lowbit.TernaryConfig(), fused=True),
    "set_length": lambda model: lowbit.set_length(model, lowbit.LengthConfig((0.5, 0.5))),
}


@pytest.mark.parametrize(
    ("prefix", "verb"), [*(("Albert", verb) for verb in VERBS), ("MPNet", "slim"), ("MPNet", "set_length")]
)
def test_what_an_architecture_cannot_do_is_one_error(prefix: str, verb: str) -> None:
    with pytest.raises(ValueError, match=r"supports models of type bert, roberta.*distilbert.*has model_type"):
        VERBS[verb](tiny(prefix))


def test_decoders_and_first_segments_are_refused() -> None:
    decoder = tiny("Roberta", "ForCausalLM", is_decoder=True)
    with pytest.raises(ValueError, match="decoder"):
        lowbit.set_length(decoder, lowbit.LengthConfig((0.5, 0.5)))
    with pytest.raises(ValueError, match="decoder"):
        lowbit.quantize(decoder, lowbit.TernaryConfig(), fused=True)
    for prefix in ("DistilBert", "Roberta"):
        with pytest.raises(ValueError, match="token types"):
            lowbit.set_length(
                tiny(prefix, type_vocab_size=1), lowbit.LengthConfig((0.5, 0.5), protect=("first_segment",))
            )


@pytest.mark.parametrize("prefix", [*KNOWN, *FALLBACK])
def test_dequantize_gives_transformers_modules_back(prefix: str) -> None:
    config = lowbit.TernaryConfig(quantize_attention=False)
    model = tiny(prefix)
    inputs, classes = batch(model), [type(module) for module in model.modules()]
    weights_only = outputs(lowbit.quantize(copy.deepcopy(model), config.replace(activation_bits=None)), inputs)[0]
    lowbit.quantize(model, config, fused=prefix in KNOWN)
    model.dequantize()
    assert [type(module) for module in model.modules()] == classes
    assert torch.allclose(outputs(model, inputs)[0], weights_only, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- fallback


def test_the_fallback_says_what_it_left(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("DebertaV2", "ForMaskedLM")
    with caplog.at_level(logging.WARNING, "lowbit"):
        lowbit.prepare(model, lowbit.TernaryConfig(position_embedding_bits=8))
    # The table of relative positions is read as a weight, never called: codes in its place would be read as numbers.
    table = "deberta.encoder.rel_embeddings"
    assert type(model.get_submodule(table)) is nn.Embedding
    left = lowbit.left_in_float(model)
    assert left[table] == "Embedding" and not any("attention.self" in name for name in left)
    (message,) = (record.getMessage() for record in caplog.records if record.name == "lowbit")
    assert "deberta-v2" in message and "attention float" in message and all(name in message for name in left)
    config = model.config.quantization_config
    assert not config.quantize_attention and config.modules_to_not_convert == ["encoder.rel_embeddings"]


def test_known_architectures_say_only_what_surprises(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        model = lowbit.prepare(tiny("Roberta"), lowbit.TernaryConfig())
        assert not caplog.records and model.config.quantization_config.quantize_attention
        model = lowbit.prepare(tiny("MPNet"), lowbit.TernaryConfig())
    (message,) = (record.getMessage() for record in caplog.records if record.name == "lowbit")
    assert "attention" in message and not model.config.quantization_config.quantize_attention
    assert lowbit.left_in_float(lowbit.convert(model)) == {
        "mpnet.embeddings.position_embeddings": "Embedding",
        "mpnet.encoder.relative_attention_bias": "Embedding",
        "classifier.dense": "Linear",
        "classifier.out_proj": "Linear",
    }


@pytest.mark.parametrize("name", ["UMT5EncoderModel", "UMT5Model"])
def test_an_encoder_of_an_encoder_decoder_is_an_encoder(name: str, tmp_path: Path) -> None:
    """Its configuration says otherwise."""
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = getattr(transformers, name)(transformers.UMT5Config(**sizes)).eval()
    if name == "UMT5Model":
        with pytest.raises(ValueError, match="cross-attention"):
            lowbit.quantize(model, lowbit.TernaryConfig())
        return
    ids = torch.randint(5, 99, (2, 9))
    lowbit.quantize(model, lowbit.TernaryConfig()).save_pretrained(tmp_path)
    loaded = lowbit.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_buffers_of_whole_numbers_load(tmp_path: Path) -> None:
    """MRA keeps the numbers of positions in its files."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.MraModel(transformers.MraConfig(**sizes, vocab_size=99, max_position_embeddings=66)).eval()
    assert not model.state_dict()["embeddings.position_ids"].is_floating_point()
    lowbit.quantize(model, lowbit.TernaryConfig()).save_pretrained(tmp_path)
    loaded = lowbit.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_the_ffn_of_the_fallback_has_its_zero_point() -> None:
    model = lowbit.prepare(tiny("Albert"), lowbit.TernaryConfig())
    symmetric = {name: m.input_quantizer.symmetric for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert [name.rpartition(".")[2] for name, value in symmetric.items() if not value] == ["ffn_output"]


@pytest.mark.parametrize(("prefix", "reach"), [("Bert", 40), ("Roberta", 38), ("DebertaV2", 40)])
def test_the_longest_sequence_is_what_a_model_runs(prefix: str, reach: int) -> None:
    """RoBERTa's positions begin behind its padding row."""
    config = getattr(transformers, f"{prefix}Config")
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = getattr(transformers, f"{prefix}Model")(config(**sizes, intermediate_size=64, max_position_embeddings=40))
    assert models.longest(model) == reach
    model(torch.full((1, reach), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, reach + 1), 5))


def test_a_model_that_takes_no_token_ids_is_refused() -> None:
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    model = transformers.ViTModel(config)
    with pytest.raises(ValueError, match="cannot be run on token ids"):
        lowbit.prepare(model, lowbit.TernaryConfig())
    assert names_of(model, nn.Linear) and not names_of(model, QuantLinear)  # as it was


# --------------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("prefix", [*KNOWN, *FALLBACK])
def test_a_step_of_distillation(prefix: str, tmp_path: Path) -> None:
    teacher = tiny(prefix)
    student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())
    inputs = batch(student, rows=4)
    data = [{**{key: x[row] for key, x in inputs.items()}, "labels": torch.tensor(row % 3)} for row in range(4)]
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=1,
        logging_steps=1, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant",
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = lowbit.DistillationTrainer(student, teacher=teacher, args=arguments, train_dataset=data)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry if key.startswith("loss_")}
    expected = {"loss_hidden", "loss_logits", *(["loss_attention"] if prefix in PLAIN else [])}
    assert logged == expected
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert {f"{name}.weight" for name in names_of(student, QuantLinear, QuantEmbedding)} - moved <= {
        f"{name}.weight" for name in names_of(student, QuantLinear) if "pooler" in name and prefix != "MPNet"
    }


def test_scores_are_refused_where_attention_gives_none(tmp_path: Path) -> None:
    teacher = tiny("MPNet")
    student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="AttentionScoreLoss supports models of type bert"):
        lowbit.DistillationTrainer(
            student, teacher=teacher, args=arguments, objectives=[lowbit.AttentionScoreLoss()], train_dataset=[]
        )


def test_logits_of_the_discriminator_are_one_question_a_token() -> None:
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"labels": mask, "attention_mask": mask}
    got = lowbit.LogitsLoss()({"logits": student}, {"logits": teacher}, inputs)
    total = 0.0
    for s, t, real in zip(student.flatten().tolist(), teacher.flatten().tolist(), mask.flatten().tolist(), strict=True):
        yes, target = (1 / (1 + 2.718281828459045**-x) for x in (s, t))
        total -= real * (target * torch.tensor(yes).log() + (1 - target) * torch.tensor(1 - yes).log()).item()
    assert abs(got.item() - total / mask.sum().item()) < 1e-5


# ----------------------------------------------------------------------------------------- an architecture of one's own


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    hidden_size, num_attention_heads, num_hidden_layers, vocab_size, inner_size, act = 64, 4, 2, 101, 150, "gelu"
    pad_token_id = 0


class ToyAttention(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, self.attention_head_size = config, 16
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 16)).transpose(1, 2) for part in (self.q, self.k, self.v))
        run = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return run(self, q, k, v, mask, scaling=16**-0.5)[0].flatten(2)


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.attend, self.mix, self.norm1 = ToyAttention(config), nn.Linear(64, 64), nn.LayerNorm(64)
        self.up, self.act, self.down, self.norm2 = nn.Linear(64, 150), nn.GELU(), nn.Linear(150, 64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.norm1(self.mix(self.attend(x, mask)) + x)
        return self.norm2(self.down(self.act(self.up(x))) + x)


class ToyStack(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ToyLayer(config) for _ in range(2))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> BaseModelOutput:
        for layer in self.layer:
            x = layer(x, attention_mask)
        return BaseModelOutput(last_hidden_state=x)


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    _supports_sdpa = _supports_attention_backend = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words, self.stack = nn.Embedding(101, 64), ToyStack(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        x = self.words(input_ids)
        mask = transformers.masking_utils.create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask
        )
        return self.stack(x, attention_mask=mask, **kwargs)


TOY = Architecture(
    layers="stack.layer",
    word_embeddings="words",
    attention="attend",
    projections=("attend.q", "attend.k", "attend.v"),
    attention_output="mix",
    attention_norm="norm1",
    ffn_input="up",
    ffn_activation="act",
    ffn_output="down",
    ffn_norm="norm2",
    hidden_act="act",
    intermediate_size="inner_size",
)


def test_an_architecture_of_ones_own_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "toy", TOY)
    model = ToyModel(ToyConfig()).eval()
    inputs = batch(model)
    lowbit.slim(model, 0.5)
    prepared = outputs(lowbit.prepare(model, lowbit.TernaryConfig()), inputs)
    packed = outputs_by_module(lowbit.convert(model), inputs)
    assert identical(prepared, packed) and model.stack.layer[0].attend.quantizers
    assert model.config.inner_size == 75
    model.save_pretrained(tmp_path)
    loaded = ToyModel.from_pretrained(tmp_path).eval()
    assert identical(packed, outputs_by_module(loaded, inputs))
    real = inputs["attention_mask"].bool()
    fused = outputs(lowbit.fuse(loaded), inputs)[0]
    assert close(fused[real], packed[0][real], 0.05)
    shorter = outputs(lowbit.set_length(loaded, lowbit.LengthConfig((0.5, 0.5))), inputs)[0]
    assert not close(shorter[real], fused[real])

    monkeypatch.delitem(ARCHITECTURES, "toy")
    with pytest.raises(lowbit.CheckpointError, match="add it before loading"):
        ToyModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_the_fallback_says_so_in_its_configuration(tmp_path: Path) -> None:
    lowbit.quantize(tiny("DebertaV2"), lowbit.TernaryConfig()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quantize_attention"] is False and saved["modules_to_not_convert"] == ["encoder.rel_embeddings"]
