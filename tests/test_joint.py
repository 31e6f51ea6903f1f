"""Query, key and value in one product, and GELU inside the product before it: the same bits as one by one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import lowbit
from helpers import batch, outputs, outputs_by_module, tiny
from lowbit.nn.linear import JointProjection, PackedLinear, multiply

CONFIGS = {
    "ternary": lowbit.TernaryConfig(),
    "binary": lowbit.BinaryConfig(),
    "per tensor": lowbit.TernaryConfig(granularity="per_tensor", activation_granularity="per_tensor"),
    "asymmetric": lowbit.TernaryConfig(asymmetric=("linear", "ffn_output", "attention_probs")),
}


def three(config: lowbit.LowbitConfig, K: int = 50) -> list[PackedLinear]:
    return [PackedLinear.from_float(torch.nn.Linear(K, n, bias=n != 7), config) for n in (40, 7, 40)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_projections_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    linears = [linear.to(dtype) for linear in three(CONFIGS[name])]
    x = torch.randn(2, 9, 50, dtype=dtype)
    alone = [multiply([linear], x)[0] for linear in linears]
    JointProjection(linears)
    for _ in range(2):
        for linear, expected in zip(linears, alone, strict=True):
            assert torch.equal(linear(x), expected)


def test_joint_projections_notice_another_tensor_and_an_edited_one() -> None:
    linears = three(CONFIGS["ternary"])
    joint = JointProjection(linears)
    x, y = torch.randn(3, 50), torch.randn(3, 50)
    linears[0](x)
    assert torch.equal(linears[1](y), multiply([linears[1]], y)[0])
    x.copy_(y)
    linears[0](x)
    x.mul_(torch.linspace(0.1, 2, 50))
    assert torch.equal(linears[1](x), multiply([linears[1]], x)[0])
    linears[2](x)
    assert joint._last is None  # nothing is kept alive


def test_a_result_is_handed_out_once() -> None:
    linears = three(CONFIGS["ternary"])
    JointProjection(linears)
    x = torch.randn(3, 50)
    expected = multiply([linears[0]], x)[0]
    linears[0](x).detach().zero_()
    assert torch.equal(linears[0](x), expected)


def test_edited_weights_are_noticed() -> None:
    linears = three(CONFIGS["ternary"])
    JointProjection(linears)
    x = torch.randn(3, 50)
    before = [linear(x) for linear in linears]
    linears[1].weight.copy_(linears[1].weight.flip(0))
    linears[1].weight_scale.copy_(linears[1].weight_scale.flip(0))
    after = [linear(x) for linear in linears]
    assert torch.equal(after[1], before[1].flip(1)) and torch.equal(after[2], before[2])
    linears[2].weight_scale.zero_()
    assert torch.equal([linear(x) for linear in linears][2], linears[2].bias.expand(3, -1))


def test_copies_are_independent() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    inputs = batch()
    expected = outputs(model, inputs)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model.bert))]
    for module in (*model.modules(), *copies[1].modules()):
        if isinstance(module, PackedLinear):
            assert module.joint is None or module in module.joint.linears
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight_scale.zero_()
    assert all(map(torch.equal, outputs(copies[0], inputs), expected))
    assert all(torch.isfinite(value).all() for value in outputs(copies[1], inputs))


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "relu", "gelu_new"])
def test_no_activation_changes_a_bit(hidden_act: str) -> None:
    prepared = lowbit.prepare(tiny(hidden_act=hidden_act), lowbit.TernaryConfig())
    packed = lowbit.convert(copy.deepcopy(prepared))
    inputs = batch()
    assert all(map(torch.equal, outputs_by_module(packed, inputs), outputs(prepared, inputs)))


def test_wrong_width_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 49\), expected \[..., 50\]"):
        three(CONFIGS["ternary"])[0](torch.randn(2, 49))
