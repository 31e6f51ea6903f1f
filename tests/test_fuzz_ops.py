"""Every public op equals its definition or refuses in words, for strange inputs; `make soak` draws more of them."""

from __future__ import annotations

import pytest
import torch

import lowbit_kernels
from benchmarks import soak_ops


@pytest.mark.parametrize("name", soak_ops.CASES)
def test_an_op_equals_its_definition_or_refuses(name: str) -> None:
    assert soak_ops.by_hypothesis(name, 25) == []


def test_every_public_op_is_drawn() -> None:
    drawn = set()
    for name in soak_ops.CASES:
        for part in name.removesuffix(", loss-aware").split(", "):
            drawn.add(part)
    assert drawn == set(lowbit_kernels.__all__) - {"AttentionOutput"}


def test_a_wrong_result_a_changed_input_and_a_missing_refusal_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = lowbit_kernels.gather_tokens

    def wrong(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return gather(x, index) + 1

    def changing(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        got = gather(x, index)
        x.detach().mul_(2)
        return got

    def lenient(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return gather(x, index.long() % len(x))

    for fault in (wrong, changing, lenient):
        monkeypatch.setattr(lowbit_kernels, "gather_tokens", fault)
        assert soak_ops.by_hypothesis("gather_tokens", 60), fault.__name__


# What the first runs found: a RuntimeError of torch's schema, an AttributeError or an OverflowError, or no error.

X, W = torch.randn(3, 8), torch.randn(4, 8)
CU = torch.tensor([0, 3], dtype=torch.int32)
SHORT = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lowbit_kernels.quantize_per_token(X, symmetric=[1]), "symmetric"),
        (lambda: lowbit_kernels.fake_quantize_per_token(X, symmetric="x"), "symmetric"),
        (lambda: lowbit_kernels.quantize_per_tensor(X, symmetric="x"), "symmetric"),
        (lambda: lowbit_kernels.quantize_per_token(X, bits=8.0), "bits"),
        (lambda: lowbit_kernels.quantize_per_token(X, bits=torch.tensor(8)), "bits"),
        (lambda: lowbit_kernels.binarize(None), "w must be a tensor"),
        (lambda: lowbit_kernels.split_ternary([1]), "w must be a tensor"),
        (lambda: lowbit_kernels.ternarize(W, curvature=W.abs(), iterations=1.5), "iterations"),
        (lambda: lowbit_kernels.add_layernorm(X, None, X[0], X[0], float("inf")), "eps"),
        (lambda: lowbit_kernels.add_layernorm(X, None, X[0], X[0], bits=8, symmetric=object()), "symmetric"),
        (lambda: lowbit_kernels.attention(SHORT, SHORT, SHORT, CU, 2**70), "max_seqlen"),
        (lambda: lowbit_kernels.attention(SHORT, SHORT, SHORT, CU, 3, return_lse=[1]), "return_lse"),
        (lambda: lowbit_kernels.attention(SHORT, SHORT, SHORT, CU, 3, scaling="x"), "scaling"),
        (
            lambda: lowbit_kernels.quantized_embedding(
                torch.tensor([0]), torch.zeros(2, 8, dtype=torch.int8), torch.ones(2), 8, embedding_dim=8.0
            ),
            "embedding_dim",
        ),
        (
            lambda: lowbit_kernels.pack_split(W.sign().to(torch.int8), W.sign().to(torch.int8).to("meta")),
            "share one device",
        ),
        (lambda: lowbit_kernels.quantize_per_token(X.to_sparse()), "x has layout torch.sparse_coo"),
        (lambda: lowbit_kernels.ternarize(W.to_sparse()), "w has layout torch.sparse_coo"),
        (lambda: lowbit_kernels.unpack_ternary(torch.zeros(1, 32, dtype=torch.uint8), 100.0), "whole number"),
        (lambda: lowbit_kernels.unpack_split(torch.zeros(1, 32, dtype=torch.uint8), "9"), "whole number"),
        (lambda: lowbit_kernels.unpack_trits(torch.zeros(1, 20, dtype=torch.uint8), None), "whole number"),
    ],
)
def test_arguments_are_refused_in_words(call: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_an_index_outside_is_an_index_error_for_any_shape() -> None:
    for shape in ((2,), (2, 3), (2, 0, 3), (2, 3, 4)):
        for index in (torch.tensor([11]), torch.tensor([0, -1], dtype=torch.int32)):
            with pytest.raises(IndexError, match="rows 0 to 1"):
                lowbit_kernels.gather_tokens(torch.randn(shape), index)


def test_numbers_beyond_all_lengths_keep_everything() -> None:
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    assert torch.equal(lowbit_kernels.kept_cu_seqlens(cu_seqlens, 2**70, "tokens"), cu_seqlens)
    assert torch.equal(lowbit_kernels.kept_cu_seqlens(cu_seqlens, 0.1, min_tokens=2**70), cu_seqlens)


@pytest.mark.parametrize("layout", ["ternary", "binary", "split"])
def test_codes_without_columns(layout: str) -> None:
    codes = torch.zeros(*((2,) if layout == "split" else ()), 5, 0, dtype=torch.int8)
    scale = torch.ones(*((2,) if layout == "split" else ()), 5)
    x = torch.zeros(3, 0, dtype=torch.int8)
    got = lowbit_kernels.codes_linear(x, codes, scale, torch.arange(5.0), torch.ones(3), None, layout, torch.float32)
    assert torch.equal(got, torch.arange(5.0).expand(3, 5))


def test_codes_and_joint_linear_compare_x_with_the_weights() -> None:
    codes, scale = lowbit_kernels.ternarize(torch.randn(5, 7))
    x, rest = torch.zeros(3, 7, dtype=torch.int8), (torch.ones(3), None)
    with pytest.raises(ValueError, match=r"x has shape \(3, 70000\), expected \[..., 7\]"):
        lowbit_kernels.codes_linear(x.repeat(1, 10000), codes, scale, None, *rest, "ternary", torch.float32)
    with pytest.raises(ValueError, match="share one device"):
        lowbit_kernels.codes_linear(x, codes.to("meta"), scale, None, *rest, "ternary", torch.float32)
    packed = lowbit_kernels.pack_ternary(codes).to("meta")
    with pytest.raises(ValueError, match="share one device"):
        lowbit_kernels.joint_linear(x, [packed], [scale], [None], *rest, "ternary", None, torch.float32)


def test_trits_on_meta_have_a_shape() -> None:
    assert lowbit_kernels.unpack_trits(torch.zeros(3, 2, dtype=torch.uint8, device="meta"), 7).shape == (3, 7)


def test_static_codes_of_a_scalar_are_a_scalar() -> None:
    codes, scale, _ = lowbit_kernels.quantize_per_tensor(torch.tensor(-1.5), scale=torch.ones(1))
    assert codes.shape == () and codes == -2 and scale.shape == (1,)
