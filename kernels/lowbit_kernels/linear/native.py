"""Linears by the native CPU kernels: weights in the form that these take, and the call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Self

import torch

from .. import native
from .._derived import Derived
from ..packing import check_layout, has_offset, unpacked

# `Layout` of native/linear.h.
_LAYOUTS = {
    **{"ternary": 0, "binary": 1, "split": 2, "codes": 3, "codes of a split pair": 4, "int8": 5, "uniform8": 5},
    **{"uniform4": 6, "uniform2": 0},
}

ACTIVATIONS = (None, "gelu", "gelu_tanh")  # `Activation`

_row_sums = Derived()


def row_scale(scale: torch.Tensor, N: int) -> torch.Tensor:
    """[N], [1] or one for each of G groups of rows -> [N]; of a pair [2, N] and so on -> [2N].

    Row n is of group floor(n G / N).
    """
    G = scale.shape[-1]
    if N == G and scale.is_contiguous():
        return scale.view(-1)
    if G == 1:
        return scale.expand(*scale.shape[:-1], N).reshape(-1).contiguous()
    return scale[..., torch.arange(N, device=scale.device) * G // N].reshape(-1)


class Weights:
    """Weights of linears that share their input.

    Attributes:
        products: for the kernels.
        features: sum of N.
        tensors: what the products point to.
    """

    def __init__(self) -> None:
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
        layouts: Sequence[str],
        K: int,
        with_sums: bool,
    ) -> Self:
        """Of packed codes [N, bytes], scales, biases and layouts, as the ops take them; sums serve zero points."""
        weights = cls()
        for own, own_scale, own_bias, layout in zip(packed, scale, bias, layouts, strict=True):
            check_layout(own, K, layout)  # the kernels would read past its end
            sums = None
            if with_sums:
                sums = _row_sums.get([own], (K, layout), functools.partial(_sums_of_packed, own, K, layout))
            weights._add(own, own.shape[0], own_scale, own_bias, sums, layout)
        return weights

    @classmethod
    def codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, layout: str, with_sums: bool
    ) -> Self:
        """Of codes int8 [N, K], for layout "split" [2, N, K]."""
        of_bytes = {"ternary": "codes", "binary": "codes", "split": "codes of a split pair", "int8": "int8"}
        own = of_bytes.get(layout, "uniform8")
        weights = cls()
        weights._add(codes, codes.shape[-2], scale, bias, _sums(codes) if with_sums else None, own)
        return weights

    def _add(
        self,
        codes: torch.Tensor,
        N: int,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        sums: torch.Tensor | None,
        layout: str,
    ) -> None:
        bias = None if bias is None else bias.float().contiguous()
        if scale.shape[-1] != N or not scale.is_contiguous():  # a view would hold the tensor that it is of
            scale = row_scale(scale, N)
        tensors = [codes.contiguous(), scale, sums, bias]
        first, *others = map(native.pointer, tensors)
        offset = scale.data_ptr() + 4 * N if has_offset(layout) else None
        self.products.append(native.Product(first, codes.shape[-1], N, *others, offset, _LAYOUTS[layout]))
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
            weights.array(), len(weights.products), y.data_ptr(), y.shape[1],
        )  # fmt: skip
    return y


def dynamic_linears(x: torch.Tensor, bits: int, symmetric: bool, weights: Weights) -> torch.Tensor:
    """x float32 [M, K], each row quantized by its own range -> float32 [M, features]."""
    x = x.contiguous()
    y = x.new_empty(x.shape[0], weights.features)
    if y.numel():
        native.function("dynamic_linears")(
            x.data_ptr(), *x.shape, bits, symmetric, weights.array(), len(weights.products), y.data_ptr(), y.shape[1],
        )  # fmt: skip
    return y
