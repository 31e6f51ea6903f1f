"""Linears by the native CPU kernels: weights in the form that these take, and the call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Self

import torch

from .. import native
from .._derived import Derived
from ..packing import check_packed, unpacked

LAYOUTS = ("ternary", "binary", "split", "codes", "codes of a split pair")  # `Layout` of native/linear.h

ACTIVATIONS = (None, "gelu", "gelu_tanh")  # `Activation`

_row_sums = Derived()


def row_scale(scale: torch.Tensor, N: int) -> torch.Tensor:
    """[N] or [1] -> [N]; of a pair [2, N] or [2, 1] -> [2N]."""
    if scale.shape[-1] == N and scale.is_contiguous():
        return scale.view(-1)
    return scale.expand(*scale.shape[:-1], N).reshape(-1).contiguous()


class Weights:
    """Weights of linears that share their input.

    Attributes:
        products: for the kernels.
        layout: index into LAYOUTS.
        features: sum of N.
        tensors: what the products point to.
    """

    def __init__(self, layout: str) -> None:
        self.layout = LAYOUTS.index(layout)
        self.products: list[native.Product] = []
        self.tensors: list[torch.Tensor | None] = []

    @property
    def features(self) -> int:
        return sum(product.N for product in self.products)

    def array(self) -> ctypes.Array[native.Product]:
        """The products one after the other."""
        return (native.Product * len(self.products))(*self.products)

    @classmethod
    def packed(
        cls,
        packed: Sequence[torch.Tensor],
        scale: Sequence[torch.Tensor],
        bias: Sequence[torch.Tensor | None],
        layout: str,
        K: int,
        with_sums: bool,
    ) -> Self:
        """Of packed codes uint8 [N, bytes], scales and biases, as the ops take them; sums serve zero points."""
        weights = cls(layout)
        for own, own_scale, own_bias in zip(packed, scale, bias, strict=True):
            check_packed(own, K, 8 if layout == "binary" else 4)  # the kernels would read past its end
            sums = None
            if with_sums:
                sums = _row_sums.get([own], (K, layout), functools.partial(_sums_of_packed, own, K, layout))
            weights._add(own, own.shape[0], own_scale, own_bias, sums)
        return weights

    @classmethod
    def codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, layout: str, with_sums: bool
    ) -> Self:
        """Of codes int8 [N, K], for layout "split" [2, N, K]."""
        weights = cls("codes of a split pair" if layout == "split" else "codes")
        weights._add(codes, codes.shape[-2], scale, bias, _sums(codes) if with_sums else None)
        return weights

    def _add(
        self, codes: torch.Tensor, N: int, scale: torch.Tensor, bias: torch.Tensor | None, sums: torch.Tensor | None
    ) -> None:
        bias = None if bias is None else bias.float().contiguous()
        tensors = [codes.contiguous(), row_scale(scale, N), sums, bias]
        first, *others = map(native.pointer, tensors)
        self.products.append(native.Product(first, codes.shape[-1], N, *others))
        self.tensors += tensors


def _sums(codes: torch.Tensor) -> torch.Tensor:
    return codes.sum(-1, dtype=torch.int32).float()


def _sums_of_packed(packed: torch.Tensor, K: int, layout: str) -> torch.Tensor:
    return _sums(unpacked(packed, K, layout))


def linears(
    x: torch.Tensor, x_scale: torch.Tensor, x_zero_point: torch.Tensor | None, weights: Weights
) -> torch.Tensor:
    """x int8 [M, K], x_scale float32 and x_zero_point int32 [M] or [1] -> float32 [M, features]."""
    M, K = x.shape
    x, x_scale = x.contiguous(), x_scale.contiguous()
    x_zero_point = None if x_zero_point is None else x_zero_point.contiguous()
    y = x.new_empty(M, weights.features, dtype=torch.float32)
    if y.numel():
        native.function("linears")(
            x.data_ptr(), M, K, x_scale.data_ptr(), int(len(x_scale) > 1), native.pointer(x_zero_point),
            weights.array(), len(weights.products), weights.layout, y.data_ptr(), y.shape[1],
        )  # fmt: skip
    return y


def dynamic_linears(x: torch.Tensor, bits: int, symmetric: bool, weights: Weights) -> torch.Tensor:
    """x float32 [M, K], each row quantized by its own range -> float32 [M, features]."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], weights.features)
    if y.numel():
        native.function("dynamic_linears")(
            x.data_ptr(), *x.shape, bits, symmetric, weights.array(), len(weights.products), weights.layout,
            y.data_ptr(), y.shape[1],
        )  # fmt: skip
    return y
