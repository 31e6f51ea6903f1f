"""What models and ops do on CUDA, as far as it can be seen without a GPU: graphs, strides, waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import lowbit
from fake_cuda import Simulated, Wait, fake_cuda, move, moved, simulated_cuda
from helpers import batch, outputs, tiny
from lowbit.nn.sequences import without_padding
from lowbit_kernels import attention


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def float_model(**changes: Any) -> Any:
    model = tiny(**changes)
    model.set_attn_implementation("lowbit")
    return model


def packed(fused: bool = False, head: str = "BertForSequenceClassification", **changes: Any) -> Any:
    model = lowbit.quantize(tiny(head, **changes), lowbit.TernaryConfig(), fused=fused)
    outputs(model, batch())  # what runs without padding is found out by running
    return model


def prepared() -> Any:
    return lowbit.prepare(tiny(), lowbit.TernaryConfig())


STAGES: dict[str, Callable[[], Any]] = {
    "float": float_model,
    "prepared": prepared,
    "packed": packed,
    "fused": lambda: packed(fused=True),
}

# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_whole_model_is_one_graph(stage: str, mask: bool) -> None:
    model, inputs = STAGES[stage](), batch()
    if not mask:
        del inputs["attention_mask"]
    compiled(model, inputs, training=False)


def compiled(model: Any, inputs: dict[str, torch.Tensor], training: bool) -> None:
    """Trace a model on CUDA; its backward pass is traced with it where it is ours (torch's own needs a device)."""
    with fake_cuda(), torch.set_grad_enabled(training):
        run = torch.compile(move(model).train(training), fullgraph=True, backend="eager")
        logits = run(**moved(inputs)).logits
    assert logits.is_cuda and logits.shape == (3, 3) and logits.requires_grad == training
    assert graphs() == 1


NO_DROPOUT = {"attention_probs_dropout_prob": 0.0}


@pytest.mark.parametrize("stage", ["float", "prepared"])
def test_a_training_step_is_one_graph(stage: str) -> None:
    model = float_model(**NO_DROPOUT) if stage == "float" else prepared()
    compiled(model, batch(), training=True)


@pytest.mark.parametrize("bits", [None, 8])
def test_attention_and_its_gradient_are_one_graph(bits: int | None) -> None:
    with fake_cuda():
        query, key, value = (torch.randn(8, 2, 16, device="cuda", requires_grad=True) for _ in range(3))
        bounds = torch.zeros(3, dtype=torch.int32, device="cuda")
        output = torch.compile(attention, fullgraph=True, backend="eager")(query, key, value, bounds, 5, bits=bits)
    assert output.requires_grad and graphs() == 1


def test_layers_of_a_fused_model_share_their_graphs() -> None:
    """`lowbit.compile`: attention, the rest of a layer, and that of the last one, for first tokens."""
    model, inputs = packed(fused=True, num_hidden_layers=4), batch()
    del inputs["attention_mask"]  # how much is padding is a value
    with fake_cuda(), torch.no_grad():
        logits = lowbit.compile(move(model), fullgraph=True, backend="eager")(**moved(inputs)).logits
    assert logits.is_cuda and graphs() == 3


# ------------------------------------------------------------------------------------------------ waits for the device
# What is waited for, in which file, in which function: how often. A wait that is new here makes every forward pass
# longer by the time that the device needs to catch up with Python, and forbids CUDA graphs.

SHORTER = lowbit.LengthConfig((0.7, 0.4))
COPY_OF_LENGTHS = {("copy to the host", "sequences.py", "without_padding"): 1}
ALL_WAITS: dict[str, tuple[Callable[[], Any], str, bool, dict[Wait, int]]] = {
    # model, mask, gradients wanted, its waits
    "float, padded": (float_model, "padded", False, {}),
    "float, no mask": (float_model, "none", False, {}),
    "float, shorter": (lambda: lowbit.set_length(tiny(), SHORTER), "padded", False, COPY_OF_LENGTHS),
    "packed, by its modules": (packed, "padded", True, {}),
    "fused, padded": (lambda: packed(fused=True), "padded", False, COPY_OF_LENGTHS),
    "fused, full mask": (lambda: packed(fused=True), "full", False, COPY_OF_LENGTHS),
    "fused, no mask": (lambda: packed(fused=True), "none", False, {}),
    "fused, tokens": (lambda: packed(fused=True, head="BertForTokenClassification"), "padded", False, COPY_OF_LENGTHS),
    "fused, shorter": (lambda: lowbit.set_length(packed(fused=True), SHORTER), "padded", False, COPY_OF_LENGTHS),
    "fused, by threshold": (
        lambda: lowbit.set_length(packed(fused=True), lowbit.LengthConfig((0.9, 0.9), unit="threshold")),
        "padded",
        False,
        # And one in `select_tokens`, which has to know how many tokens are kept.
        {**COPY_OF_LENGTHS, ("_local_scalar_dense", "pruning.py", "drop"): 1},
    ),
    "an empty row": (
        lambda: packed(fused=True),
        "empty",
        False,
        {**COPY_OF_LENGTHS, ("copy to the device", "sequences.py", "with_first_tokens"): 1},
    ),
    "prepared, training": (lambda: prepared().train(), "padded", True, {}),
}


@pytest.mark.parametrize("name", ALL_WAITS)
def test_all_waits_of_a_forward_pass_are_known(name: str) -> None:
    make, kind, training, known = ALL_WAITS[name]
    model, inputs = make(), batch()
    mask = inputs["attention_mask"]
    if kind == "none":
        del inputs["attention_mask"]
    elif kind != "padded":
        mask[:] = 1
        mask[1] = int(kind != "empty")
    torch.manual_seed(0)
    with torch.set_grad_enabled(training):
        expected = model(**inputs).logits.detach()
        with simulated_cuda() as waits:
            torch.manual_seed(0)
            logits = move(model, Simulated)(**moved(inputs, Simulated)).logits
    assert dict(waits) == known
    real = mask.any(1) if logits.dim() == 2 else mask.bool()
    error = logits.detach().inner[real] - expected[real]
    assert error.norm() < 0.02 * expected[real].norm()


MASKS = {
    "right": [[1, 1, 1, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 2, 1], [1, 1, 0, 0]],
    "an empty row": [[0, 0, 0, 0], [1, 1, 0, 0]],
    "nothing": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "full": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "no column": [[], []],
}


@pytest.mark.parametrize("name", MASKS)
def test_padding_is_found_on_cuda_as_on_the_cpu(name: str) -> None:
    mask = torch.tensor(MASKS[name], dtype=torch.long)
    states = torch.randn(*mask.shape, 3)
    with simulated_cuda():
        got = without_padding(Simulated(states), Simulated(mask))
    on_cpu = tree_map(lambda each: each.inner if isinstance(each, Simulated) else each, got)
    for a, b in zip(tree_leaves(on_cpu), tree_leaves(without_padding(states, mask)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
