"""Models as people have them: replaced parts, hooks, masks, configurations; the same function, or one clear error.

The reference is the same model module by module (`outputs_by_module`: a hook watches every module, so none is passed
over), the prepared model, or transformers' own float one. `tests/surgery.py` draws such edits at random.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

import lowbit
from helpers import identical, outputs, outputs_by_module
from lowbit.files.stage import current_config
from lowbit.nn import PackedEncoder
from lowbit.nn.unpadded.heads import reads_first_token_only

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}


def made(head: str = "BertForSequenceClassification", kind: type | None = None, **changes: Any) -> Any:
    """A small model whose matrices are spread enough for faults to show."""
    kind = kind or getattr(transformers, head)
    model = kind(kind.config_class(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return model


def packed(*args: Any, **changes: Any) -> Any:
    # Float attention: what it quantizes depends on the padding of a batch, module by module.
    return lowbit.quantize(made(*args, **changes), lowbit.TernaryConfig(quantize_attention=False))


def ids(rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(5, 200, (rows, length))


def same(model: Any, inputs: dict[str, torch.Tensor], tolerance: float = 0.02) -> bool:
    got, expected = outputs(model, inputs), outputs_by_module(model, inputs)
    pairs = zip(got, expected, strict=True)
    return len(got) > 0 and all((a - b).norm() <= tolerance * b.norm() for a, b in pairs)


class MeanHead(nn.Module):
    """In place of a head that reads the first token: reads all."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 2)

    def forward(self, states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.out(states.mean(1))


# ---------------------------------------------------------------------------------------- a. what the fast path assumes


def test_the_fast_path_is_the_default_path() -> None:
    model, inputs = packed(), {"input_ids": ids()}
    assert isinstance(model.bert.encoder, PackedEncoder)
    assert model.bert.encoder.prevented() is None and model.bert.embeddings.prevented() is None
    ran = []
    model.bert.encoder.run = lambda *args: ran.append(1) or model.bert.encoder._run(*args)
    assert identical(outputs(model, inputs), outputs(lowbit.fuse(copy.deepcopy(model)), inputs)) and ran


@pytest.mark.parametrize("side", ["left", "inside", "right", "empty row"])
@pytest.mark.parametrize("fused", [False, True])
def test_padding_on_every_side(side: str, fused: bool) -> None:
    model = lowbit.fuse(packed()) if fused else packed()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, {"left": slice(0, 4), "inside": slice(3, 5), "right": slice(5, 9), "empty row": slice(0, 9)}[side]] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask}
    got, expected = outputs(model, inputs)[0], outputs_by_module(model, inputs)[0]
    rows = slice(1, 3) if side == "empty row" else slice(0, 3)  # of a row without tokens nobody reads anything
    assert (got - expected)[rows].norm() <= 0.02 * expected[rows].norm()


def test_left_padding_is_refused_where_tokens_are_dropped() -> None:
    model, inputs = made(), {"input_ids": ids(), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    inputs["attention_mask"][0, :4] = 0
    lowbit.set_length(model, lowbit.LengthConfig((1.0, 1.0)))
    with pytest.raises(ValueError, match=r"begin with padding.*padding_side = 'right'"):
        model(**inputs)


@pytest.mark.parametrize("prefix", ["Roberta", "Electra", "Camembert", "XLMRoberta"])
def test_a_replaced_head_gets_all_tokens(prefix: str) -> None:
    model = made(f"{prefix}ForSequenceClassification")
    model.classifier = MeanHead().eval()
    for each in (
        lowbit.set_length(copy.deepcopy(model), lowbit.LengthConfig((1.0, 1.0))),
        lowbit.fuse(lowbit.quantize(model, lowbit.TernaryConfig())),
    ):
        assert not reads_first_token_only(each)
    assert same(model, {"input_ids": ids()})


HEADS = {
    "BertForSequenceClassification": True,
    "BertForNextSentencePrediction": True,
    "BertForMultipleChoice": True,
    "RobertaForSequenceClassification": True,
    "DistilBertForSequenceClassification": True,
    "ElectraForSequenceClassification": True,
    "MPNetForSequenceClassification": True,
    "BertForTokenClassification": False,
    "BertForQuestionAnswering": False,
    "BertForMaskedLM": False,
    "BertForPreTraining": False,
    "BertModel": False,
}


@pytest.mark.parametrize("head", HEADS)
def test_which_heads_read_the_first_token_only_is_found_out(head: str) -> None:
    assert reads_first_token_only(packed(head)) is HEADS[head]


def test_a_head_is_looked_at_again_when_it_changes() -> None:
    model, inputs = packed("ElectraForMultipleChoice"), {"input_ids": torch.randint(5, 200, (2, 3, 9))}
    assert reads_first_token_only(model)
    model.sequence_summary.summary_type = "last"
    assert not reads_first_token_only(model) and same(model, inputs)


@pytest.mark.parametrize("where", ["layer.1", "layer.0.attention.self", "layer.1.output.dense", "layer.0.intermediate"])
@pytest.mark.parametrize("pre", [False, True])
def test_hooks_inside_the_encoder_see_and_change(where: str, pre: bool) -> None:
    model, inputs, seen = lowbit.fuse(packed()), {"input_ids": ids()}, []
    before = outputs(model, inputs)[0]
    module = model.bert.encoder.get_submodule(where)

    def double(_: Any, values: Any, *output: Any) -> Any:
        seen.append(1)
        first = values[0] if pre else output[0]
        return (first[0] * 2, *first[1:]) if isinstance(first, tuple) else first * 2

    handle = module.register_forward_pre_hook(double) if pre else module.register_forward_hook(double)
    changed = outputs(model, inputs)[0]
    assert seen and (changed - before).norm() > 1e-3 * before.norm()
    handle.remove()
    assert torch.equal(outputs(model, inputs)[0], before)


@pytest.mark.parametrize("name", ["word_embeddings", "position_embeddings", "LayerNorm", ""])
def test_hooks_on_embeddings_see_and_change(name: str) -> None:
    model, inputs = lowbit.fuse(packed()), {"input_ids": ids()}
    before = outputs(model, inputs)[0]
    model.bert.embeddings.get_submodule(name).register_forward_hook(lambda *args: args[-1] * 1.5 + 0.1)
    assert (outputs(model, inputs)[0] - before).norm() > 1e-3 * before.norm()


def test_a_hook_of_all_modules_is_a_hook() -> None:
    model, inputs, seen = packed(), {"input_ids": ids()}, set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module).__name__))
    outputs(model, inputs)
    handle.remove()
    assert {"BertLayer", "PackedLinear", "BertSelfAttention"} <= seen


def test_a_hook_on_the_base_model_sees_every_token() -> None:
    model, inputs, seen = lowbit.fuse(packed()), {"input_ids": ids()}, []
    model.bert.register_forward_hook(lambda *args: seen.append(args[-1].last_hidden_state))
    outputs(model, inputs), outputs_by_module(model, inputs)
    assert (seen[0] - seen[1]).norm() <= 0.02 * seen[1].norm()


def test_hooks_where_tokens_are_dropped() -> None:
    model, inputs, seen = made(), {"input_ids": ids()}, []
    lowbit.set_length(model, lowbit.LengthConfig((1.0, 0.5)))
    model.bert.encoder.layer[1].output.dense.register_forward_hook(lambda *_: seen.append(1))
    outputs(model, inputs)
    assert seen == [1]
    model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layer\.0 has forward hooks.*drops tokens"):
        outputs(model, inputs)


@pytest.mark.parametrize("table", ["word_embeddings", "position_embeddings", "token_type_embeddings"])
@pytest.mark.parametrize("train", [False, True])
def test_tables_that_are_replaced_after_fusing(table: str, train: bool) -> None:
    model, inputs = lowbit.fuse(packed(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)), {"input_ids": ids()}
    model.train(train)
    before = outputs(model, inputs)[0]
    old = getattr(model.bert.embeddings, table)
    new = nn.Embedding(old.num_embeddings, 64)
    if table == "word_embeddings":
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new
    else:
        setattr(model.bert.embeddings, table, new)
    assert (outputs(model, inputs)[0] - before).norm() > 1e-2 * before.norm() and same(model, inputs)


MASKS: dict[str, Callable[[], torch.Tensor]] = {
    "[B, S, S] integers": lambda: torch.ones(3, 9, 9, dtype=torch.long).tril(),
    "[B, S, S], B = heads": lambda: torch.ones(2, 9, 9, dtype=torch.long).tril(),
    "[B, S, S] bool": lambda: torch.ones(3, 9, 9, dtype=torch.bool).tril(),
    "[B, 1, S, S] integers": lambda: torch.ones(3, 1, 9, 9, dtype=torch.long).tril(),
}


@pytest.mark.parametrize("stage", ["prepared", "packed"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_float_models_refuse_are_one_error(name: str, stage: str) -> None:
    mask = MASKS[name]()
    model = lowbit.prepare(made(), lowbit.TernaryConfig()) if stage == "prepared" else packed()
    with pytest.raises(ValueError, match=r"attention_mask.*accepted: \[B, S\]"):
        outputs(model, {"input_ids": ids(len(mask)), "attention_mask": mask})


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_square_masks_hide_what_they_hide_from_a_float_model(dtype: torch.dtype) -> None:
    seen = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).bool().expand(3, 1, 9, 9)
    mask = seen if dtype == torch.bool else torch.zeros(3, 1, 9, 9).masked_fill(~seen, -1e9)
    config = lowbit.TernaryConfig(activation_bits=None, quantize_attention=False)
    model, tokens = lowbit.quantize(made("BertModel", add_pooling_layer=False), config), ids()
    both = outputs(model, {"input_ids": tokens, "attention_mask": mask})[0]
    positions = torch.arange(9).expand(3, 9)
    for part in (slice(0, 4), slice(4, 9)):
        alone = outputs(model, {"input_ids": tokens[:, part], "position_ids": positions[:, part]})[0]
        torch.testing.assert_close(both[:, part], alone, rtol=1e-4, atol=1e-4)


def test_dropout_at_inference_is_not_passed_over() -> None:
    model, inputs = packed(hidden_dropout_prob=0.5), {"input_ids": ids()}
    before = outputs(model, inputs)[0]
    for module in model.bert.encoder.modules():
        module.train(isinstance(module, nn.Dropout))
    assert not torch.equal(outputs(model, inputs)[0], outputs(model, inputs)[0])
    model.eval()
    assert torch.equal(outputs(model, inputs)[0], before)


def test_hidden_state_number_0_is_a_state() -> None:
    model, inputs = packed(), {"input_ids": ids()}
    with torch.no_grad():
        assert model(**inputs, output_hidden_states=True).hidden_states is not None
        try:
            found = made()(**inputs, output_hidden_states=[0]).hidden_states
        except TypeError:  # older versions know True and False only
            return
        ours = model(**inputs, output_hidden_states=[0]).hidden_states
    assert [state is None for state in ours] == [state is None for state in found]


# ------------------------------------------------------------------------------- b. what a verb changes, loses, refuses


def test_an_unknown_model_is_left_as_it_was_by_the_trial() -> None:
    model = made("BigBirdForSequenceClassification", attention_type="block_sparse", block_size=8, num_random_blocks=1)
    lowbit.quantize(model, lowbit.TernaryConfig())
    assert model.bert.attention_type == "block_sparse" and model.config.attention_type == "block_sparse"
    assert type(model.bert.encoder.layer[0].attention.self).__name__ == "BigBirdBlockSparseAttention"


def test_an_unknown_model_that_takes_only_some_lengths_is_tried_on_those() -> None:
    model = made("NystromformerForSequenceClassification", num_landmarks=8, segment_means_seq_len=64)
    lowbit.quantize(model, lowbit.TernaryConfig())
    assert outputs(model, {"input_ids": ids(2, 64)})[0].isfinite().all()


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU("tanh"), nn.Tanh()])
def test_replaced_activations_stay(layers: tuple[int, ...], activation: nn.Module) -> None:
    model, inputs = made(), {"input_ids": ids()}
    for number in layers:
        model.bert.encoder.layer[number].intermediate.intermediate_act_fn = activation
    prepared = outputs(lowbit.prepare(model, lowbit.TernaryConfig(quantize_attention=False)), inputs)
    lowbit.convert(model)
    assert identical(prepared, outputs_by_module(model, inputs)) and same(model, inputs)
    assert model.bert.encoder.layer[1].intermediate.intermediate_act_fn is activation
    if layers == (1,):
        with pytest.raises(ValueError, match=r"layer\.1 differs from layer\.0 in gelu"):
            lowbit.fuse(model)
        assert same(model, inputs)


def pruned(linear: nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", 0.3)


def own_forward(linear: nn.Linear) -> None:
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [pruned, parametrizations.weight_norm, own_forward])
def test_weights_that_are_computed_are_refused_before_anything_changes(change: Callable[[nn.Linear], Any]) -> None:
    model, inputs = made(), {"input_ids": ids()}
    change(model.bert.encoder.layer[1].output.dense)
    before, classes = outputs(model, inputs), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense"):
        lowbit.prepare(model, lowbit.TernaryConfig())
    assert identical(before, outputs(model, inputs)) and classes == [type(module) for module in model.modules()]
    lowbit.prepare(model, lowbit.TernaryConfig(modules_to_not_convert=["layer.1.output.dense"]))


def test_hooks_on_what_is_swapped_are_kept_and_see_no_trial() -> None:
    model, inputs, seen = made(), {"input_ids": ids()}, []
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: seen.append("linear"))
    model.bert.embeddings.word_embeddings.register_forward_pre_hook(lambda *_: seen.append("words"))
    for verb in (lambda: lowbit.prepare(model, lowbit.TernaryConfig()), lambda: lowbit.convert(model)):
        verb()
        seen.clear()
        outputs(model, inputs)
        assert sorted(seen) == ["linear", "words"]


class TwoTowers(transformers.BertForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.doc_bert = transformers.BertModel(config)


class ElsewhereNamed(transformers.BertPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.text_model = transformers.BertModel(config)
        self.post_init()


def test_a_second_encoder_is_named() -> None:
    model = made(kind=TwoTowers)
    for verb in (lambda: lowbit.prepare(model, lowbit.TernaryConfig()), lambda: lowbit.slim(model)):
        with pytest.raises(ValueError, match=r"second encoder, doc_bert.*modules_to_not_convert=\['doc_bert'\]"):
            verb()
    lowbit.quantize(model, lowbit.TernaryConfig(modules_to_not_convert=["doc_bert"]))
    assert any("doc_bert" in name for name in lowbit.left_in_float(model))


def test_an_encoder_that_is_not_where_its_class_says_is_one_error() -> None:
    with pytest.raises(ValueError, match="base_model_prefix = 'text_model'"):
        lowbit.quantize(made(kind=ElsewhereNamed), lowbit.TernaryConfig())


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DataParallel": nn.DataParallel,
    "OptimizedModule": torch.compile,
    "expected a transformers model": lambda model: nn.Sequential(model),
}


@pytest.mark.parametrize("message", WRAPPERS)
def test_what_is_put_around_a_model_is_named(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lowbit.quantize(WRAPPERS[message](made()), lowbit.TernaryConfig())


# ------------------------------------------------------------------------------------- c. files that say what they hold


def reloaded(model: Any, folder: Path, **options: Any) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, **options).eval()


def test_a_new_model_from_the_configuration_of_a_packed_one_is_float(tmp_path: Path) -> None:
    source, inputs = packed(), {"input_ids": ids()}
    model = transformers.BertForSequenceClassification(source.config).eval()
    loaded = reloaded(model, tmp_path)
    torch.testing.assert_close(outputs(loaded, inputs), outputs(model, inputs))
    assert not hasattr(loaded.config, "quantization_config") and source.config.quantization_config.stage == "packed"


@pytest.mark.parametrize("slim", [False, True])
def test_a_head_on_a_shared_body_is_saved_as_what_it_holds(slim: bool, tmp_path: Path) -> None:
    source, inputs = made(), {"input_ids": ids()}
    source = lowbit.quantize(lowbit.slim(source, 0.5) if slim else source, lowbit.TernaryConfig())
    lowbit.set_length(source, lowbit.LengthConfig((1.0, 0.8)))
    tagger = made("BertForTokenClassification")
    tagger.bert = source.bert
    loaded = reloaded(tagger, tmp_path)
    assert identical(outputs(loaded, inputs), outputs(tagger, inputs))
    assert loaded.config.quantization_config.stage == "packed" and loaded.bert.encoder.lengths is not None


ALONE = {
    "quantize": (None, lambda body: lowbit.quantize(body, lowbit.TernaryConfig()), "packed"),
    "convert": (lambda model: lowbit.prepare(model, lowbit.TernaryConfig()), lowbit.convert, "packed"),
    "split": (lambda model: lowbit.prepare(model, lowbit.TernaryConfig()), lowbit.split, "prepared"),
    "dequantize": (
        lambda model: lowbit.quantize(model, lowbit.TernaryConfig()),
        lambda body: body.dequantize(),
        "float",
    ),
    "slim": (None, lambda body: lowbit.slim(body, 0.5), "float"),
}


@pytest.mark.parametrize("verb", ALONE)
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_a_body_that_went_on_alone_is_saved_as_what_it_is(verb: str, head: str, tmp_path: Path) -> None:
    before, alone, stage = ALONE[verb]
    model = made(head)
    if before is not None:
        before(model)
    alone(model.bert)
    assert current_config(model).stage == stage
    expected = outputs(model, {"input_ids": (tokens := ids())})
    for _ in range(2):  # saving has not changed what it is
        again = reloaded(model, tmp_path)
        assert (again.config.to_dict().get("quantization_config") is None) == (verb == "dequantize")
        for a, b in zip(outputs(again, {"input_ids": tokens}), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_body_that_went_on_alone_leaves_its_decoder_behind(tmp_path: Path) -> None:
    model = lowbit.prepare(made("BertForMaskedLM"), lowbit.TernaryConfig(output_embedding_bits=8))
    lowbit.convert(model.bert)
    with pytest.raises(ValueError, match="holds modules that lowbit quantized"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["convert", "dequantize"])
def test_such_a_model_is_self_contained_where_it_needs_lowbit(verb: str, tmp_path: Path) -> None:
    before, alone, stage = ALONE[verb]
    model = before(made())
    alone(model.bert)
    model.save_pretrained(tmp_path, self_contained=True)
    assert (tmp_path / "modeling_lowbit.py").exists() == (stage == "packed")


def test_saving_a_second_head_leaves_the_first_one_its_decoder(tmp_path: Path) -> None:
    first = lowbit.quantize(made("BertForMaskedLM"), lowbit.TernaryConfig(output_embedding_bits=8))
    second = made("BertForTokenClassification")
    second.bert = first.bert
    for model in (second, first, second):
        inputs = {"input_ids": ids()}
        assert identical(outputs(reloaded(model, tmp_path / type(model).__name__), inputs), outputs(model, inputs))
    assert current_config(first).output_embedding_bits == 8 and current_config(second).output_embedding_bits is None


@pytest.mark.parametrize("verb", [lowbit.fuse, lambda model: model.dequantize()])
def test_verbs_take_a_second_head_for_what_its_body_is(verb: Callable[[Any], Any], tmp_path: Path) -> None:
    first, second = packed(), made("BertForTokenClassification")
    second.bert = first.bert
    inputs = {"input_ids": ids()}
    expected = [outputs(model, inputs) for model in (first, second)]
    with pytest.raises(ValueError, match="already packed"):
        lowbit.convert(second)
    verb(second)
    assert current_config(first).stage == current_config(second).stage
    for model, before in zip((first, second), expected, strict=True):
        again = reloaded(model, tmp_path / type(model).__name__)
        for a, b, c in zip(outputs(model, inputs), outputs(again, inputs), before, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert (a - c).norm() <= 0.02 * c.norm()  # activations are float now, where it is


def test_other_models_that_hold_quantized_parts_are_not_saved(tmp_path: Path) -> None:
    decoder = made("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    both = transformers.EncoderDecoderModel(encoder=packed("BertModel"), decoder=decoder)
    mixed = made()
    mixed.bert.encoder.layer[0] = packed().bert.encoder.layer[0]
    for model in (both, mixed):
        with pytest.raises(ValueError, match=r"holds modules that lowbit quantized.*save_pretrained"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["prepared", "packed"])
def test_a_configuration_that_asks_for_attention_maps_is_saved(stage: str, tmp_path: Path) -> None:
    model, inputs = made(output_attentions=True, attn_implementation="eager"), {"input_ids": ids()}
    model = getattr(lowbit, {"prepared": "prepare", "packed": "quantize"}[stage])(model, lowbit.TernaryConfig())
    loaded = reloaded(model, tmp_path)
    for each in (model, loaded):
        assert len(each(**inputs).attentions) == 2 and each.config._attn_implementation == "lowbit"


def test_fewer_layers_than_lengths(tmp_path: Path) -> None:
    model = lowbit.set_length(packed(num_hidden_layers=4), lowbit.LengthConfig((0.9, 0.8, 0.7, 0.6)))
    model.save_pretrained(tmp_path)
    load = type(model).from_pretrained
    assert load(tmp_path, num_hidden_layers=2).bert.encoder.lengths.keep == (0.9, 0.8)
    assert load(tmp_path, num_hidden_layers=2, length_config=None).bert.encoder.lengths is None


def test_a_trial_leaves_no_trace_in_what_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    """The first call of a model, which tries its layers, may be one that notes attention maps."""
    model, inputs = packed(), {"input_ids": ids()}
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        maps = model(**inputs, output_attentions=True).attentions
    assert [m.shape for m in maps] == [(3, 2, 9, 9)] * 2 and not caplog.records
