"""What models and ops do on CUDA, as far as it can be seen without a GPU: graphs, strides, waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lowbit
from fake_cuda import fake_cuda, move, moved
from helpers import batch, outputs, tiny
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


def packed(fused: bool = False, **changes: Any) -> Any:
    model = lowbit.quantize(tiny(**changes), lowbit.TernaryConfig(), fused=fused)
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

# ------------------------------------------------------------------------------------------------------- torch.compile


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
