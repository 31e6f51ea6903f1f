"""The output embedding of a head that scores words, in 8 bits: `QuantDecoder` trains, `PackedDecoder` runs.

    y = x (scale[v] code[v, k])^T + bias          codes int8 [V, K], one symmetric scale a row

Inputs stay float, and so are the products: what the codes stand for is made a few rows at a time, in x's dtype, while
it is in cache, so that the float table never lies in memory.
Both modules compute by the same function, so converting changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ._packed import Packed
from .embedding import table_codes
from .linear import autocast, check_features

# Values made at a time: of the CPU's cache, and where each step is a launch, or a node of a traced program.
_IN_CACHE, _BY_LAUNCH = 2**20, 2**24


class QuantDecoder(nn.Module):
    """Linear with a weight that is fake-quantized to 8 bits, for training; `weight` and `bias` keep their names.

    Args:
        linear: float linear whose parameters are taken over (not copied): the weight may be the word embedding's too.
    """

    bits, granularity = 8, "per_row"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [..., K] -> float [..., V] in x's dtype; straight-through gradient to `weight`.

        Raises:
            ValueError: another K.
        """
        check_features(self, x)
        x = autocast(x)
        codes, scale = table_codes(self.weight, self.bits, self.granularity)
        if not torch.is_grad_enabled():
            return _scores(x, codes, scale, self.bias)
        return _Scores.apply(x, self.weight, self.bias, codes, scale)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, bias={self.bias is not None}"


class PackedDecoder(Packed):
    """Linear on 8-bit codes: `weight` int8 [V, K], `weight_scale` float32 [V], `bias` float.

    Args:
        in_features, out_features: K and V.
        bias: whether there is one.
        device, dtype: of the bias; the scales are float32 whatever the dtype.
    """

    layout = "int8"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.row_length = in_features, out_features, in_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_float(cls, linear: nn.Linear | QuantDecoder) -> PackedDecoder:
        """Quantize a linear; its bias is taken over (not copied).

        Raises:
            TypeError: another kind of module.
            ValueError: NaN or infinity in the weight.
        """
        if not isinstance(linear, nn.Linear | QuantDecoder):
            raise TypeError(
                f"PackedDecoder.from_float takes torch.nn.Linear or QuantDecoder, got {type(linear).__name__}"
            )
        packed = cls(linear.in_features, linear.out_features, False, linear.weight.device)
        packed.weight, packed.weight_scale = table_codes(linear.weight, 8, "per_row")
        packed.check_finite(packed.weight_scale)
        packed.bias = linear.bias
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [..., K] -> float [..., V] in x's dtype, differentiable in x and the bias; ValueError for another K."""
        check_features(self, x)
        x = autocast(x)
        wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, self.bias))
        if wanted and torch.is_grad_enabled():
            return _Scores.apply(x, None, self.bias, self.weight, self.weight_scale)
        return _scores(x, self.weight, self.weight_scale, self.bias)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [V, K] that the codes stand for."""
        return self.weight * self.weight_scale.unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.layout}, bias={self.bias is not None}"


def _parts(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, what their codes stand for) of a table, a few rows at a time."""
    by_launch = codes.device.type != "cpu" or torch.compiler.is_compiling()
    step = max(1, (_BY_LAUNCH if by_launch else _IN_CACHE) // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        rows = slice(start, start + step)
        yield rows, (codes[rows] * scale[rows].unsqueeze(-1)).to(dtype)


def _scores(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty(*x.shape[:-1], codes.shape[0])
    for rows, values in _parts(codes, scale, x.dtype):
        y[..., rows] = nn.functional.linear(x, values, None if bias is None else bias[rows].to(x.dtype))
    return y


class _Scores(torch.autograd.Function):
    """`_scores`; backward as of a linear with the values of the codes, straight through to the latent weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, codes, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, codes, scale)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, bias)]
        return _scores(x, codes, scale, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, codes, scale = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Sums over thousands of words, made of parts: in half precision the parts would be rounded each time.
            total = torch.zeros(len(rows), codes.shape[1], device=grad.device, dtype=torch.promote_types(
                grad.dtype, torch.float32))  # fmt: skip
            for part, values in _parts(codes, scale, grad.dtype):
                total += rows[:, part] @ values
            grad_x = total.to(grad.dtype).view(*grad.shape[:-1], codes.shape[1])
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None
