"""`PackedEncoder`: the same hidden states as layer by layer, on the tokens of a batch without its padding."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import weakref
from inspect import signature
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import lowbit
from helpers import HEADS, batch, identical, outputs, outputs_by_module, tiny
from lowbit.deploy.graphs import Graphs, Shape, nearest, shapes
from lowbit.nn import PackedEncoder
from lowbit.nn.unpadded.fused_embeddings import FusedEmbeddings
from lowbit.nn.unpadded.sequences import Sequences, with_padding, without_padding

CONFIGS = {
    "ternary": lowbit.TernaryConfig(),
    "binary": lowbit.BinaryConfig(),
    "4-bit activations": lowbit.BinaryConfig(activation_bits=4),
    "per tensor weights": lowbit.TernaryConfig(granularity="per_tensor"),
    "everything asymmetric": lowbit.TernaryConfig(
        asymmetric=["linear", "ffn_output", "query", "key", "attention_probs", "value"]
    ),
    "float attention": lowbit.TernaryConfig(quantize_attention=False),
}


def pair(head: str = "BertForSequenceClassification", config: lowbit.LowbitConfig | None = None, **changes: Any) -> Any:
    """A packed model, and a fused copy of it."""
    model = lowbit.quantize(tiny(head, **changes), config or lowbit.TernaryConfig())
    return model, lowbit.fuse(copy.deepcopy(model))


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.02) -> bool:
    """Codes flip where an activation lies on a tie between two, hence a norm."""
    return bool((got - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("head", HEADS)
def test_every_head_without_padding_equals_the_unfused_model(head: str) -> None:
    model, fused = pair(head)
    inputs = batch(head)
    del inputs["attention_mask"]
    assert all(map(close, outputs(fused, inputs), outputs_by_module(model, inputs)))


def test_double_precision_runs_by_the_modules() -> None:
    model, fused = (m.double() for m in pair("BertForSequenceClassification"))
    inputs = batch()
    assert all(map(torch.equal, outputs(fused, inputs), outputs_by_module(model, inputs)))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_a_padded_batch_equal_the_unfused_model(name: str, dtype: torch.dtype) -> None:
    model, fused = (m.to(dtype) for m in pair("BertForTokenClassification", CONFIGS[name]))
    inputs = batch("BertForTokenClassification")
    tokens = inputs["attention_mask"].bool()
    tolerance = 0.2 if name == "4-bit activations" else 0.05
    (got,), (expected,) = outputs(fused, inputs), outputs_by_module(model, inputs)
    assert close(got[tokens], expected[tokens], tolerance)


@pytest.mark.parametrize("hidden_act", ["gelu_pytorch_tanh", "relu"])
def test_activations(hidden_act: str) -> None:
    model, fused = pair(hidden_act=hidden_act)
    inputs = batch()
    assert all(map(close, outputs(fused, inputs), outputs_by_module(model, inputs)))


def test_a_split_pair_and_a_slimmed_model() -> None:
    slim = lowbit.slim(tiny(), 0.5)
    model = lowbit.convert(lowbit.split(lowbit.prepare(slim, lowbit.TernaryConfig())))
    fused = lowbit.fuse(copy.deepcopy(model))
    inputs = batch()
    assert all(map(close, outputs(fused, inputs), outputs_by_module(model, inputs)))


def test_a_sentence_does_not_depend_on_its_batch_nor_on_its_padding() -> None:
    _, fused = pair("BertModel")
    inputs = batch("BertModel")
    states = outputs(fused, inputs)[0]
    for row in range(3):
        own = inputs["attention_mask"][row].bool()
        alone = outputs(fused, {"input_ids": inputs["input_ids"][row : row + 1, own]})[0]
        assert close(states[row, own], alone[0], 1e-5)
        assert not states[row, ~own].any()  # zeros at padding


def test_padding_on_the_left_and_inside() -> None:
    model, fused = pair("BertForTokenClassification")
    inputs = batch("BertForTokenClassification")
    inputs["attention_mask"] = torch.tensor([[0] * 4 + [1] * 7, [1] * 3 + [0] * 2 + [1] * 6, [1] * 11])
    tokens = inputs["attention_mask"].bool()
    (got,), (expected,) = outputs(fused, inputs), outputs_by_module(model, inputs)
    assert close(got[tokens], expected[tokens])


def test_rows_and_batches_without_any_token() -> None:
    _, fused = pair("BertModel")
    inputs = batch("BertModel")
    inputs["attention_mask"][1] = 0
    states = outputs(fused, inputs)[0]
    assert not states[1].any() and states[2].isfinite().all() and states[2].any()
    inputs["attention_mask"][:] = 0
    assert not outputs(fused, inputs)[0].any()


def test_what_needs_the_layers_runs_them() -> None:
    model, fused = pair()
    model.base_model.embeddings = fused.base_model.embeddings  # which stay fused and round by themselves
    inputs = batch()
    square = inputs["attention_mask"][:, None, None, :].bool() & torch.ones(11, 11, dtype=torch.bool).tril()
    with torch.no_grad():
        for extra in ({"output_attentions": True}, {"output_hidden_states": True}, {"attention_mask": square}):
            got, expected = fused(**{**inputs, **extra}), model(**{**inputs, **extra})
            assert torch.equal(got.logits, expected.logits)
            for name in ("attentions", "hidden_states"):
                for ours, theirs in zip(getattr(got, name) or (), getattr(expected, name) or (), strict=True):
                    assert torch.equal(ours, theirs)
        fused.config.output_hidden_states = True
        assert len(fused(**inputs).hidden_states) == 3


def test_files_are_those_of_the_unfused_model(tmp_path: Any) -> None:
    model, fused = pair()
    assert list(fused.state_dict()) == list(model.state_dict())
    fused.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    inputs = batch()
    assert all(map(torch.equal, outputs(loaded, inputs), outputs(model, inputs)))
    assert all(map(torch.equal, outputs(lowbit.fuse(loaded), inputs), outputs(fused, inputs)))


def test_modules_and_tensors_that_are_replaced_are_noticed() -> None:
    """What is found of a model that ran before, against a copy, which finds its weights anew."""
    fused, inputs = pair(num_hidden_layers=3)[1].eval(), batch()
    layers, seen = fused.bert.encoder.layer, [outputs(fused, inputs)[0]]
    other = copy.deepcopy(layers[0])

    def replace_buffer() -> None:
        dense = layers[1].output.dense
        dense.weight_scale = dense.weight_scale * 2

    def replace_parameter() -> None:
        layers[1].attention.self.key.bias = None
        layers[2].output.LayerNorm.weight = torch.nn.Parameter(layers[2].output.LayerNorm.weight.detach() + 1)

    def replace_linear() -> None:
        layers[2].attention.self.value = other.attention.self.value

    def replace_layer() -> None:
        layers[2] = other

    for change in (replace_buffer, replace_parameter, replace_linear, replace_layer, lambda: layers.append(other),
                   lambda: layers.__delitem__(0)):  # fmt: skip
        change()
        got = outputs(fused, inputs)[0]
        assert torch.equal(got, outputs(copy.deepcopy(fused), inputs)[0])
        assert not any(torch.equal(got, before) for before in seen)
        seen.append(got)


def test_weights_that_a_move_leaves_are_freed() -> None:
    fused = pair()[1]
    outputs(fused, batch())
    left = [weakref.ref(buffer) for buffer in fused.bert.encoder.layer.buffers()]
    fused.to("meta")
    gc.collect()
    assert not any(buffer() is not None for buffer in left)


def test_accelerate_offloads_buffers_too() -> None:
    fused, inputs = pair()[1], batch()
    expected = outputs(fused, inputs)[0]
    cpu_offload(fused, "cpu", offload_buffers=True)
    assert close(outputs(fused, inputs)[0], expected)


def test_copies_are_independent() -> None:
    _, fused = pair("BertModel")
    inputs = batch("BertModel")
    expected = outputs(fused, inputs)
    copied, pickled = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused.encoder))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert all(map(torch.equal, outputs(copied, inputs), expected))
    states = torch.randn(1, 5, 64)
    with torch.no_grad():
        assert torch.equal(pickled(states)[0], copied.encoder(states)[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lowbit.TernaryConfig(activation_granularity="per_tensor"), "activation_granularity='per_token'"),
        (lowbit.TernaryConfig(activation_clip=2.5), "activation_clip=None"),
        (lowbit.TernaryConfig(activation_bits=None), "activation_bits of 8 or 4"),
        (lowbit.TernaryConfig(weight_bits=None), "weight_bits of 1 or 2"),
        (lowbit.TernaryConfig(modules_to_not_convert=["output.dense"]), "is left in float"),
    ],
)
def test_what_cannot_be_fused_says_what_lacks(config: lowbit.LowbitConfig, message: str) -> None:
    model = lowbit.quantize(tiny(), config)
    with pytest.raises(ValueError, match=message):
        lowbit.fuse(model)
    assert not any(isinstance(module, PackedEncoder) for module in model.modules())
    assert identical(outputs(model, batch_of := batch()), outputs_by_module(model, batch_of))


def test_stages_are_checked() -> None:
    with pytest.raises(ValueError, match="stage='packed'"):
        lowbit.fuse(lowbit.prepare(tiny(), lowbit.TernaryConfig()))
    fused = lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=True)
    encoder = fused.bert.encoder
    assert lowbit.fuse(fused).bert.encoder is encoder  # asked for again


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    _, fused = pair()
    compiled = lowbit.compile(copy.deepcopy(fused))
    for rows, length in ((3, 11), (2, 24), (1, 7)):
        inputs = batch(rows=rows, length=length)
        assert all(map(close, outputs(compiled, inputs), outputs(fused, inputs)))
        del inputs["attention_mask"]
        assert all(map(close, outputs(compiled, inputs), outputs(fused, inputs)))


def test_padding_goes_and_comes_back() -> None:
    states = torch.randn(4, 7, 3)
    mask = torch.rand(4, 7) < 0.5
    mask[2] = False
    tokens, sequences, places = without_padding(states, mask)
    assert sequences.cu_seqlens.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert sequences.max_seqlen == int(mask.sum(1).max())
    expected = torch.cat([states[row, mask[row]] for row in range(4)])
    assert torch.equal(tokens, expected)
    assert torch.equal(with_padding(tokens, places, states.shape), states * mask.unsqueeze(-1))


def test_nearest_graph() -> None:
    available = shapes([1, 8], [32, 128])
    assert available == sorted(available) and Shape(1024, 128, 8) in available and Shape(8, 32, 1) in available
    ragged = Sequences(torch.tensor([0, 100, 130, 140], dtype=torch.int32), 100)
    assert nearest(available, 140, ragged) == Shape(256, 128, 8)
    assert nearest(available, 5, Sequences(torch.tensor([0, 5]), 5)) == Shape(8, 32, 1)
    assert nearest(available, 130, Sequences(torch.tensor([0, 130]), 130)) is None
    assert nearest(available, 9, Sequences(torch.arange(10), 1)) is None
    with pytest.raises(ValueError, match="must be positive"):
        shapes([0], [128])


def test_graphs_hold_smaller_batches() -> None:
    """Captured by calling again: the padding of graphs is what is tested, on stale and poisoned inputs."""
    _, fused = pair("BertModel")
    encoder = fused.encoder

    def capture(run: Any) -> Any:
        output = torch.empty_like(run())
        return lambda: output.copy_(run()), output

    def run(tokens: torch.Tensor, sequences: Sequences, *_: Any) -> torch.Tensor:
        """As on CUDA, where spare tokens are undefined: the CPU's attention takes none."""
        used = int(sequences.cu_seqlens[-1])
        spare = tokens.new_full((len(tokens) - used, 64), float("nan"))
        return torch.cat([encoder._run(tokens[:used], sequences), spare])

    graphs = Graphs(run, shapes([2, 4], [8, 16]), 64, torch.float32, torch.device("cpu"), capture=capture)
    replayed = []
    for shape, graph in list(graphs.graphs.items()):
        graph.output.fill_(float("nan"))

        def replay(shape: Shape = shape, inner: Any = graph.replay) -> None:
            replayed.append(shape)
            inner()

        graphs.graphs[shape] = graph._replace(replay=replay)
    encoder.run = graphs
    for lengths in ([11, 3], [16, 16, 16, 16], [5], [1, 1, 2], [8, 8], [17], [2] * 5):
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
        states = torch.randn(len(lengths), max(lengths), 64)
        with torch.no_grad():
            got = encoder(states, mask).last_hidden_state
            tokens, sequences, places = without_padding(states, mask)
            expected = with_padding(encoder._run(tokens, sequences), places, states.shape)
        assert torch.equal(got, expected)
    assert len(replayed) == 5  # all but the two that no graph holds


def test_graphs_need_a_fused_model_on_cuda() -> None:
    _, fused = pair()
    with pytest.raises(ValueError, match=r"lowbit\.fuse"):
        lowbit.compile_for(tiny(), [1], [128])
    with pytest.raises(ValueError, match="CUDA graphs, the model is on cpu"):
        lowbit.compile_for(fused, [1], [128])


@pytest.mark.parametrize("bits", [1, 2, 8, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_embeddings_equal_the_modules(bits: int | None, dtype: torch.dtype) -> None:
    model, fused = (m.to(dtype) for m in pair("BertModel", lowbit.TernaryConfig(embedding_bits=bits)))
    ids = torch.randint(1, 101, (3, 11))
    types, positions = torch.randint(0, 2, (3, 11)), torch.randint(0, 40, (3, 11))
    (past,) = {"past_key_values_length", "cache_length"} & signature(
        model.embeddings.original.forward
    ).parameters.keys()
    with torch.no_grad():
        for given in ({}, {"token_type_ids": types}, {"position_ids": positions}, {past: 5}):
            got, expected = fused.embeddings(ids, **given), model.embeddings.original(ids, **given)
            assert got.dtype == dtype
            torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        embeds = torch.randn(3, 11, 64, dtype=dtype)
        assert torch.equal(fused.embeddings(inputs_embeds=embeds), model.embeddings.original(inputs_embeds=embeds))


def test_what_a_model_passes_to_its_embeddings_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this transformers calls it: a name that is not known would send every call to the modules, unseen."""
    _, fused = pair("BertModel")
    assert isinstance(fused.embeddings, FusedEmbeddings) and fused.embeddings.prevented() is None

    def forward(*args: object, **given: object) -> None:
        raise AssertionError(f"the modules were called with {', '.join(given)}")

    monkeypatch.setattr(fused.embeddings, "prevented", lambda: None)  # which would see the replaced forward
    monkeypatch.setattr(fused.embeddings.original, "forward", forward)
    with torch.no_grad():
        fused(torch.randint(2, 99, (2, 7)))


def test_caches_are_refused_by_either_name() -> None:
    _, fused = pair()
    for name in ("past_key_values", "cache"):
        assert "caches" in fused.bert.encoder._obstacle(torch.zeros(1, 2, 64), None, {name: object()})
    assert fused.bert.encoder._obstacle(torch.zeros(1, 2, 64), None, {"cache": None}) is None


def test_gradients_take_the_modules() -> None:
    _, fused = pair()
    inputs = batch()
    assert torch.equal(fused(**inputs).logits, outputs(fused, inputs)[0])  # frozen: fused with gradients enabled too
    assert fused.classifier.weight.requires_grad and not fused.bert.pooler.dense.bias.requires_grad
    embeds = torch.randn(3, 11, 64, requires_grad=True)
    fused(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits.sum().backward()
    assert embeds.grad is not None and embeds.grad.norm() > 0
    bias = fused.bert.encoder.layer[0].intermediate.dense.bias
    fused.bert.requires_grad_(True)
    fused(**inputs).logits.sum().backward()
    assert bias.grad is not None and bias.grad.norm() > 0
    assert fused.bert.embeddings.position_embeddings.weight.grad is not None
