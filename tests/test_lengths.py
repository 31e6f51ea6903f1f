"""`lowbit.set_length` against the Length-Adaptive Transformer's algorithm, written out for one sentence in float64."""

from __future__ import annotations

import copy
import pickle
import shutil
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput

import lowbit
from helpers import HEADS, batch, outputs, tiny, tiny_config
from lowbit.nn import PackedEncoder, UnpaddedEncoder
from lowbit.nn.unpadded.pruning import plan
from lowbit.nn.unpadded.sequences import Sequences
from lowbit_kernels import attention, attention_eager

LAYERS = 4


def model_of(head: str = "BertModel", **changes: Any) -> Any:
    return tiny(head, num_hidden_layers=LAYERS, **changes)


def kept(length: int, keep: float, config: lowbit.LengthConfig) -> int:
    wanted = -(-length * keep // 1) if config.unit == "ratio" else keep
    return int(min(length, max(wanted, config.min_tokens)))


@torch.no_grad()
def reference(model: Any, ids: torch.Tensor, config: lowbit.LengthConfig, types: torch.Tensor | None = None) -> Any:
    """Last hidden states [n, H] of one sentence, and which places each layer keeps."""
    hidden = model.embeddings(ids[None], None if types is None else types[None])[0]
    n, final, alive, chosen = len(ids), hidden.clone(), list(range(len(ids))), []
    for layer, keep in zip(model.encoder.layer, config.keep, strict=True):
        own = layer.attention.self
        heads = own.num_attention_heads
        q, k, v = (m(hidden).unflatten(-1, (heads, -1)).transpose(0, 1) for m in (own.query, own.key, own.value))
        probs = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        score = probs[:, 0].sum(0) if config.score == "cls" else probs.sum((0, 1))
        context = (probs @ v).transpose(0, 1).flatten(1)
        after = layer.attention.output(context, hidden)
        protected = {0} if types is None else {0, *(i for i, place in enumerate(alive) if types[place] == 0)}
        if config.unit == "threshold":
            shares = (score / score.mean()).tolist()
            count = sum(i in protected or share >= keep for i, share in enumerate(shares))
            count = max(count, min(config.min_tokens, len(alive)))
        else:
            count = min(kept(n, keep, config), len(alive))
        order = sorted(range(len(alive)), key=lambda i: (i != 0, i not in protected, -float(score[i]), i))
        rows = sorted(order[:count])
        alive = [alive[i] for i in rows]
        chosen.append(alive)
        hidden = layer.output(layer.intermediate(after[rows]), after[rows])
        final[alive] = hidden
    return final, chosen


CONFIGS = {
    "nothing dropped": lowbit.LengthConfig((1.0,) * LAYERS),
    "ratios": lowbit.LengthConfig((0.9, 0.7, 0.7, 0.3)),
    "tokens": lowbit.LengthConfig((9, 7, 3, 1), unit="tokens"),
    "at least three": lowbit.LengthConfig((0.9, 0.5, 0.1, 0.1), min_tokens=3),
    "by the first query": lowbit.LengthConfig((0.8, 0.6, 0.5, 0.5), score="cls"),
    "thresholds": lowbit.LengthConfig((0.0, 0.98, 1.0, 1.1), unit="threshold"),
    "thresholds by the first query": lowbit.LengthConfig((0.98, 0.0, 1.0, 0.99), unit="threshold", score="cls"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_the_published_algorithm(name: str) -> None:
    model, inputs = model_of().double(), batch("BertModel", rows=4, length=12)
    inputs["attention_mask"][1, 1:] = 0  # one token
    expected = [
        reference(model, ids[mask.bool()], CONFIGS[name])[0] for ids, mask in zip(*inputs.values(), strict=True)
    ]
    lowbit.set_length(model, CONFIGS[name])
    (states, _) = outputs(model, inputs)
    for row, (got, mask) in enumerate(zip(states, inputs["attention_mask"].bool(), strict=True)):
        torch.testing.assert_close(got[mask], expected[row], rtol=1e-9, atol=1e-9)
        assert not got[~mask].any()


def test_the_first_segment_is_kept() -> None:
    config = lowbit.LengthConfig((0.8, 0.6, 0.5, 0.5), protect=("first_segment",))
    model, ids = model_of().double(), torch.randint(1, 101, (1, 12))
    types = (torch.arange(12) >= 5).long()[None]
    expected, chosen = reference(model, ids[0], config, types[0])
    assert set(range(5)) <= set(chosen[-1])
    lowbit.set_length(model, config)
    torch.testing.assert_close(outputs(model, {"input_ids": ids, "token_type_ids": types})[0][0], expected)
    with pytest.raises(ValueError, match="needs token_type_ids"):
        model(ids)


@pytest.mark.parametrize("head", HEADS)
def test_keeping_all_changes_nothing(head: str) -> None:
    model, inputs = model_of(head), batch(head)
    model = model.double()
    expected = outputs(model, inputs)
    lowbit.set_length(model, CONFIGS["nothing dropped"])
    tokens = inputs["attention_mask"].bool()
    for got, value in zip(outputs(model, inputs), expected, strict=True):
        if got.shape[:2] == tokens.shape and head != "BertForMultipleChoice":
            got, value = got[tokens], value[tokens]
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)


def stages() -> dict[str, Any]:
    packed = lowbit.quantize(model_of("BertForSequenceClassification"), lowbit.TernaryConfig())
    return {
        "float": model_of("BertForSequenceClassification"),
        "prepared": lowbit.prepare(model_of("BertForSequenceClassification"), lowbit.TernaryConfig()),
        "packed": packed,
        "fused": lowbit.fuse(copy.deepcopy(packed)),
    }


@pytest.mark.parametrize("stage", ["float", "prepared", "packed", "fused"])
@pytest.mark.parametrize("name", ["ratios", "tokens", "thresholds"])
def test_every_stage_drops_tokens_and_keeps_them_again(stage: str, name: str) -> None:
    model, inputs = stages()[stage], batch(rows=3, length=12)
    before = outputs(model, inputs)
    names = list(model.state_dict())
    assert lowbit.set_length(model, CONFIGS[name]) is model
    dropped = outputs(model, inputs)
    assert list(model.state_dict()) == names
    assert not torch.equal(dropped[0], before[0])
    alone = [
        outputs(model, {"input_ids": ids[mask.bool()][None]})[0][0] for ids, mask in zip(*inputs.values(), strict=True)
    ]
    torch.testing.assert_close(torch.stack(alone), dropped[0], rtol=1e-2, atol=1e-2)
    lowbit.set_length(model, None)
    assert torch.equal(outputs(model, inputs)[0], before[0])
    assert isinstance(model.bert.encoder, PackedEncoder) == (stage in ("packed", "fused"))
    assert isinstance(model.bert.encoder, UnpaddedEncoder) == (stage in ("packed", "fused"))
    assert not hasattr(model.config, "length_config")


def test_the_ways_of_a_packed_model_agree() -> None:
    """Prepared, packed, fused, and set before or after packing and fusing."""
    config = CONFIGS["ratios"]
    prepared = lowbit.prepare(model_of("BertForQuestionAnswering"), lowbit.TernaryConfig())
    inputs = batch("BertForQuestionAnswering", rows=3, length=14)
    early = lowbit.set_length(copy.deepcopy(prepared), config)
    expected = outputs(early, inputs)
    packed = lowbit.convert(early)
    fused = lowbit.fuse(copy.deepcopy(packed))
    assert all(map(torch.equal, outputs(packed, inputs), outputs(fused, inputs)))
    late = lowbit.set_length(lowbit.convert(prepared, fused=True), config)
    tokens = inputs["attention_mask"].bool()
    for got, other, value in zip(outputs(fused, inputs), outputs(late, inputs), expected, strict=True):
        assert torch.equal(got, other)
        assert (got - value)[tokens].norm() < 0.05 * value[tokens].norm()


def test_only_the_first_token_is_computed_where_nothing_else_is_read() -> None:
    packed = lowbit.quantize(model_of("BertForSequenceClassification"), lowbit.TernaryConfig())
    fused, inputs = lowbit.fuse(copy.deepcopy(packed)), batch(rows=3, length=12)
    rows, encoder = [], fused.bert.encoder
    run_rest, run_layers = encoder.run_rest, encoder._run_layers

    def counted(*args: Any) -> Any:
        result = run_rest(*args)
        rows.append(len(result[0]))
        return result

    def counted_together(weights: list[Any], tokens: torch.Tensor, *args: Any) -> Any:
        result = run_layers(weights, tokens, *args)
        rows.extend([len(tokens)] * (len(weights) - 1) + [len(result[0])])
        return result

    encoder.run_rest, encoder._run_layers = counted, counted_together
    got = outputs(fused, inputs)[0]
    tokens = int(inputs["attention_mask"].sum())
    assert rows == [tokens] * (LAYERS - 1) + [3]
    with torch.no_grad():
        whole = fused.bert(**inputs).last_hidden_state
        torch.testing.assert_close(fused.classifier(fused.bert.pooler(whole)), got, rtol=1e-5, atol=1e-5)
    assert rows[LAYERS:] == [tokens] * LAYERS and whole[:, 1].any()


def test_a_sentence_does_not_depend_on_its_batch() -> None:
    model = lowbit.set_length(model_of().double(), CONFIGS["ratios"])
    inputs = batch("BertModel", rows=3, length=12)
    states = outputs(model, inputs)[0]
    order = torch.tensor([2, 0, 1])
    turned = outputs(model, {key: value[order] for key, value in inputs.items()})[0]
    torch.testing.assert_close(turned, states[order], rtol=1e-12, atol=1e-12)
    longer = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in inputs.items()}
    torch.testing.assert_close(outputs(model, longer)[0][:, :12], states, rtol=1e-12, atol=1e-12)


def test_files_keep_lengths(tmp_path: Any) -> None:
    model = lowbit.quantize(model_of("BertForSequenceClassification"), lowbit.TernaryConfig())
    lowbit.set_length(model, CONFIGS["tokens"])
    model.save_pretrained(tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed")
    inputs = batch()
    assert torch.equal(outputs(loaded, inputs)[0], outputs(model, inputs)[0])
    assert lowbit.LengthConfig.from_dict(loaded.config.length_config) == CONFIGS["tokens"]
    other = (tmp_path / "packed" / "config.json").read_text().replace('"unit": "tokens"', '"unit": "words"')
    (tmp_path / "packed" / "config.json").write_text(other)
    with pytest.raises(lowbit.CheckpointError, match="unit='words'"):
        type(model).from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("stage", ["float", "prepared"])
def test_training_reaches_every_parameter(stage: str) -> None:
    model = lowbit.set_length(stages()[stage], CONFIGS["ratios"]).train()
    model(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()


def test_gradients_are_those_of_the_dropped_tokens_model() -> None:
    """Against differences of the loss in float64, where no choice of tokens flips."""
    model = lowbit.set_length(model_of("BertForTokenClassification").double(), CONFIGS["ratios"])
    inputs = batch("BertForTokenClassification", rows=2, length=10)
    labels = torch.randint(0, 5, (2, 10))
    model(**inputs, labels=labels).loss.backward()
    weight = model.bert.encoder.layer[1].attention.self.key.weight
    direction = torch.randn_like(weight)
    losses = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            weight += step * direction
            losses.append(model(**inputs, labels=labels).loss)
    numeric = (losses[0] - losses[1]) / 2e-6
    torch.testing.assert_close((weight.grad * direction).sum(), numeric, rtol=1e-4, atol=1e-8)


def test_bounds_hold_for_any_lengths() -> None:
    """What a CUDA graph allocates, where only the number of tokens and of sequences and the longest are known."""
    for name in ("ratios", "tokens", "at least three"):
        for _ in range(50):
            lengths = torch.randint(0, 13, (5,))
            cu = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
            T, longest = int(cu[-1]), max(int(lengths.max()), 1)
            exact = plan(CONFIGS[name], LAYERS, Sequences(cu, longest, cu), T, False)
            bounded = plan(CONFIGS[name], LAYERS, Sequences(cu, longest), T, False)
            sequences = Sequences(cu, longest)
            for tight, loose in zip(exact, bounded, strict=True):
                sequences = sequences if tight is None else tight.sequences
                if loose is None:
                    assert tight is None
                else:
                    assert torch.equal(loose.sequences.cu_seqlens, sequences.cu_seqlens)
                    assert loose.num_tokens >= int(sequences.cu_seqlens[-1])
                    assert loose.sequences.max_seqlen >= int(sequences.cu_seqlens.diff().max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": (1.0, 0.5, 0.0, 0.0)}, r"ratios in \(0, 1\]"),
        ({"keep": (1.0, 1.5)}, r"ratios in \(0, 1\]"),
        ({"keep": (0.5, 0.9)}, "increases"),
        ({"keep": (8, 9), "unit": "tokens"}, "increases"),
        ({"keep": (8, 2.5), "unit": "tokens"}, "whole numbers"),
        ({"keep": (-0.1,), "unit": "threshold"}, "thresholds from 0"),
        ({"keep": (float("inf"),), "unit": "threshold"}, "thresholds from 0"),
        ({"keep": (float("nan"),)}, "ratios"),
        ({"keep": ()}, "ratios"),
        ({"keep": (1.0,), "unit": "percent"}, "unit='percent'"),
        ({"keep": (1.0,), "score": "max"}, "score='max'"),
        ({"keep": (1.0,), "protect": ("sep",)}, "first_segment"),
        ({"keep": (1.0,), "protect": "first_segment"}, "accepted: tuples"),
        ({"keep": 0.5}, "accepted: tuples"),
        ({"keep": (1.0,), "min_tokens": 0}, "min_tokens"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowbit.LengthConfig(**changes)


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model = model_of("BertForQuestionAnswering")
    with pytest.raises(ValueError, match="has 2 layers, BertForQuestionAnswering has 4"):
        lowbit.set_length(model, lowbit.LengthConfig((1.0, 0.5)))
    with pytest.raises(ValueError, match=r"reads all tokens: it needs LengthConfig\(restore=True\)"):
        lowbit.set_length(model, lowbit.LengthConfig((1.0,) * LAYERS, restore=False))
    with pytest.raises(TypeError, match="must be a LengthConfig or None, got float"):
        lowbit.set_length(model, 0.5)
    with pytest.raises(TypeError, match="expected a transformers model"):
        lowbit.set_length(torch.nn.Linear(2, 2), CONFIGS["ratios"])
    per_tensor = lowbit.prepare(model_of(), lowbit.TernaryConfig(activation_granularity="per_tensor"))
    with pytest.raises(ValueError, match="activation_granularity='per_token'"):
        lowbit.set_length(per_tensor, CONFIGS["ratios"])
    assert not any(isinstance(module, UnpaddedEncoder) for m in (model, per_tensor) for module in m.modules())
    with pytest.raises(ValueError, match="activation_granularity='per_token'"):
        lowbit.prepare(
            lowbit.set_length(model, CONFIGS["ratios"]), lowbit.TernaryConfig(activation_granularity="per_tensor")
        )


def test_what_needs_all_tokens_is_refused_while_tokens_are_dropped() -> None:
    model, inputs = lowbit.set_length(model_of(), CONFIGS["ratios"]), batch("BertModel")
    for extra in ({"output_attentions": True}, {"output_hidden_states": True}):
        with pytest.raises(ValueError, match=rf"{next(iter(extra))}=True asks .* lowbit.set_length\(model, None\)"):
            model(**inputs, **extra)
    with pytest.raises(ValueError, match="no padding mask"):
        model(inputs["input_ids"], attention_mask=torch.ones(3, 1, 11, 11))
    shorter = torch.ones(3, 9, dtype=torch.long)
    shorter[1, 5:] = 0
    with pytest.raises(ValueError, match=r"shape \(3, 9\) is no padding mask"):
        model(inputs["input_ids"], attention_mask=shorter)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\) makes such"):
        model(**inputs)
    lowbit.set_length(model, None)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == LAYERS + 1


def test_states_of_dropped_tokens_are_zero_without_restore() -> None:
    config = lowbit.LengthConfig((0.5,) * LAYERS, restore=False)
    model, ids = lowbit.set_length(model_of(), config), torch.randint(1, 101, (2, 10))
    states = outputs(model, {"input_ids": ids})[0]
    assert (states.abs().sum(-1) > 0).sum(1).tolist() == [5, 5]


def test_a_copy_has_lengths_of_its_own() -> None:
    model = lowbit.set_length(model_of(), CONFIGS["ratios"])
    copied = lowbit.set_length(copy.deepcopy(model), CONFIGS["nothing dropped"])
    inputs = batch("BertModel")
    assert not torch.equal(outputs(model, inputs)[0], outputs(copied, inputs)[0])
    assert model.config.length_config != copied.config.length_config


def test_autocast_chooses_the_same_tokens() -> None:
    """Importance is summed in float32 whatever the linears run in; a batch with padding used to fail."""
    model, inputs = lowbit.set_length(model_of(), CONFIGS["ratios"]), batch("BertModel", rows=3, length=12)
    with torch.autocast("cpu", torch.bfloat16):
        states = outputs(model, inputs)[0]
    assert states[inputs["attention_mask"].bool()].isfinite().all()
    q, k, v = torch.randn(3, 40, 2, 16).unbind(0)
    cu_seqlens = torch.tensor([0, 30, 40], dtype=torch.int32)
    for run in (attention, attention_eager):
        expected = run(q, k, v, cu_seqlens, 30, importance="all").importance
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(q, k, v, cu_seqlens, 30, importance="all").importance, expected)


class MeanBertForSequenceClassification(BertForSequenceClassification):
    """Reads all tokens, whatever its name says."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        states = self.bert(input_ids, attention_mask, **kwargs).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(states.mean(1)))


class MeanPooler(torch.nn.Module):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.mean(1)


@pytest.mark.parametrize("what", ["head", "pooler"])
def test_heads_that_are_not_known_get_all_tokens(what: str) -> None:
    model = model_of("BertForSequenceClassification")
    if what == "head":
        model = MeanBertForSequenceClassification(model.config).eval()
    else:
        model.bert.pooler = MeanPooler()
    inputs = {"input_ids": torch.randint(1, 101, (2, 9))}
    expected = outputs(model, inputs)[0]
    torch.testing.assert_close(outputs(lowbit.set_length(model, CONFIGS["nothing dropped"]), inputs)[0], expected)


def test_what_the_configuration_asks_for_is_seen() -> None:
    config = tiny_config(num_hidden_layers=LAYERS)
    teacher, student = BertModel(config).eval(), BertModel(config).eval()
    lowbit.set_length(student, CONFIGS["ratios"])
    inputs = batch("BertModel")
    teacher.config.output_hidden_states = True
    student(**inputs)  # has a configuration of its own
    student.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states=True asks"):
        student(**inputs)
    lowbit.set_length(student, None)
    assert student.encoder.config is student.config and len(student(**inputs).hidden_states) == LAYERS + 1


def test_lengths_of_a_float_checkpoint_are_not_in_force_until_they_are_set(tmp_path: Any) -> None:
    lowbit.set_length(model_of("BertForSequenceClassification"), CONFIGS["tokens"]).save_pretrained(tmp_path / "float")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "float").eval()
    inputs = batch()
    expected = outputs(lowbit.quantize(loaded, lowbit.TernaryConfig()), inputs)[0]
    loaded.save_pretrained(tmp_path / "packed")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(outputs(again, inputs)[0], expected)


def test_ratios_survive_half_precision() -> None:
    """0.7 as float16 is 0.7002, by which a sentence of 10 tokens would keep 8."""
    model = lowbit.set_length(model_of(), lowbit.LengthConfig((0.7,) * LAYERS, restore=False))
    states = outputs(model.half().float(), {"input_ids": torch.randint(1, 101, (2, 10))})[0]
    assert (states != 0).any(-1).sum(1).tolist() == [7, 7]


def test_copies_of_compiled_models_are_not_compiled() -> None:
    model = lowbit.set_length(lowbit.quantize(model_of(), lowbit.TernaryConfig(), fused=True), CONFIGS["ratios"])
    copied = copy.deepcopy(lowbit.compile(model))
    for name in copied.encoder._replaced:
        assert getattr(copied.encoder, name).__self__ is copied.encoder
    pickle.loads(pickle.dumps(copied.encoder))


def test_a_model_made_from_the_configuration_of_one_with_lengths_masks_its_padding() -> None:
    donor = lowbit.set_length(model_of(), CONFIGS["ratios"])
    model = BertModel(donor.config).eval()
    ids, mask = torch.randint(1, 101, (5, 5)), torch.arange(5) < torch.tensor([[5], [3], [2], [4], [1]])
    states = outputs(model, {"input_ids": ids, "attention_mask": mask.long()})[0]
    for row, own in enumerate(mask):
        alone = outputs(model, {"input_ids": ids[row : row + 1, own]})[0][0]
        torch.testing.assert_close(states[row, own], alone, rtol=1e-4, atol=1e-5)


def test_layers_that_are_computed_again_for_the_gradient_drop_what_they_dropped() -> None:
    model = lowbit.set_length(model_of("BertForSequenceClassification"), CONFIGS["ratios"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**batch(), labels=torch.tensor([0, 1, 2])).loss
    lowbit.set_length(model, None)
    loss.backward()


PIPELINES = {
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",  # transformers 5.10 and before; later ones have no such pipeline
}


@pytest.mark.parametrize("task", PIPELINES)
@pytest.mark.parametrize("stage", ["float", "fused"])
def test_pipelines_run_unchanged(task: str, stage: str, tmp_path: Any) -> None:
    from transformers import BertTokenizerFast, pipeline
    from transformers.pipelines import PIPELINE_REGISTRY

    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"this transformers has no pipeline {task}")
    words = ["the", "film", "was", "not", "very", "good", "but", "i", "liked", "it", "a", "lot"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path)
    model = model_of(PIPELINES[task])
    model = model if stage == "float" else lowbit.quantize(model, lowbit.TernaryConfig(), fused=True)
    run = pipeline(task, model=lowbit.set_length(model, CONFIGS["ratios"]), tokenizer=tokenizer)
    texts = ["the film was not very good", "i liked it a lot but it was not very good"]
    if task == "question-answering":
        assert run(question="was it good", context=texts[1])["answer"]
        return
    together, alone = run(texts, batch_size=2), [run(text) for text in texts]
    assert len(together) == 2
    for got, expected in zip(together, alone, strict=True):
        expected = expected[0] if task == "text-classification" else expected
        pairs = [(got, expected)] if isinstance(got, dict) else list(zip(got, expected, strict=True))
        for one, other in pairs:
            assert one["score"] == pytest.approx(other["score"], abs=1e-3)
    if task == "token-classification":  # one entry for every word that is no special token
        assert [entry["word"] for entry in alone[1]] == texts[1].split()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("stage", ["float", "fused"])
def test_compiled(stage: str) -> None:
    torch.compiler.reset()
    model = stages()[stage]
    lowbit.set_length(model, CONFIGS["ratios"])
    compiled = lowbit.compile(copy.deepcopy(model))
    inputs = batch(rows=3, length=12)
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        got, expected = outputs(compiled, given)[0], outputs(model, given)[0]
        assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_layers_that_came_or_went_after_the_lengths_are_one_clear_error(packed: bool) -> None:
    for change in (lambda layers: layers.append(copy.deepcopy(layers[0])), lambda layers: layers.__delitem__(1)):
        model = tiny()
        model = lowbit.quantize(model, lowbit.TernaryConfig()) if packed else model
        lowbit.set_length(model, lowbit.LengthConfig((0.9, 0.5)))
        change(model.bert.encoder.layer)
        with pytest.raises(ValueError, match=r"the model has [13] layers, and its lengths are for 2"):
            model(**batch())
