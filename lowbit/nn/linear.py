"""Quantized linears: `QuantLinear` trains on latent floats, `PackedLinear` runs on 2- or 1-bit codes.

    y = q_a(x) q_w(W)^T + b = s_x[m] s_w[n] (x_codes . w_codes) + b

Both multiply integer codes by the same kernel, so converting changes no bit. That matters: a float product differs in
the last place, which pushes some activations of the next layer over a rounding tie, and after a few layers the logits
differ in the second digit. A split pair holds two binary planes, W = q(W1) + q(W2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowbit_kernels import (
    codes_linear,
    joint_dynamic_linear,
    joint_linear,
    pack_binary,
    pack_split,
    pack_ternary,
    unpack_binary,
    unpack_split,
    unpack_ternary,
)

from ..config import LowbitConfig
from ..quantizers import (
    WEIGHT_QUANTIZERS,
    ActivationQuantizer,
    activation_values,
    check_weight_quantizer,
    dequantize_weight,
    weight_codes,
    weight_values,
)
from ._packed import Packed, refuse_tracing


def activation_quantizer(config: LowbitConfig, site: str) -> ActivationQuantizer | None:
    """The quantizer of one activation site (see `LowbitConfig.asymmetric`), None where activations stay float."""
    if config.activation_bits is None:
        return None
    symmetric = site not in config.asymmetric
    return ActivationQuantizer(config.activation_bits, symmetric, config.activation_granularity, config.activation_clip)


def attention_quantizers(config: LowbitConfig) -> nn.ModuleDict | None:
    """The `quantizers` child that `lowbit.nn.attention` looks for, None where attention stays float."""
    if config.activation_bits is None or not config.quantize_attention:
        return None
    quantizers = nn.ModuleDict()
    for site in ("query", "key", "value", "attention_probs"):
        quantizers[site] = activation_quantizer(config, site)  # type: ignore[assignment]
    return quantizers


def layout(config: LowbitConfig) -> str:
    """Kind of the packed linear weights: "ternary", "binary" or "split"."""
    return "split" if config.split else {2: "ternary", 1: "binary"}[config.weight_bits or 2]


class _CodesLinear(torch.autograd.Function):
    """The product of the integer codes of x and weight; backward as of `torch.nn.functional.linear` of their values.

    Until then codes are kept, a quarter of the memory of float32 values. A pair [2, N, K] is the sum of its planes.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, codes, scale, x_codes, x_scale, x_zero_point, layout):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes, scale, x_codes, x_scale, x_zero_point)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return codes_linear(x_codes, codes, scale, bias, x_scale, x_zero_point, layout, x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        codes, scale, x_codes, x_scale, x_zero_point = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight_values(codes, scale, ctx.weight_dtype).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            x = activation_values(x_codes, x_scale, x_zero_point, ctx.x_dtype).to(grad.dtype)
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype).expand(codes.shape)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


class QuantLinear(nn.Module):
    """Linear with fake-quantized weight and input, for training; latent `weight` and `bias` keep their names.

    Args:
        linear: float linear whose parameters are taken over (not copied).
        config: bits and granularity.
        site: activation site of the input.

    `weight` is float [N, K], or [2, N, K] after `lowbit.split`.
    """

    def __init__(self, linear: nn.Linear, config: LowbitConfig, site: str = "linear") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.quantizer, self.granularity = config.weight_quantizer, config.granularity
        self.input_quantizer = activation_quantizer(config, site)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [..., K] -> float [..., N] in x's dtype; straight-through gradients to `x` and `weight`.

        Raises:
            ValueError: another K.
        """
        check_features(self, x)
        x = autocast(x)
        codes, scale = weight_codes(self.weight, self.quantizer, self.granularity)
        if self.input_quantizer is None:
            return nn.functional.linear(x, dequantize_weight(self.weight, codes, scale), self.bias)
        x_codes, x_scale, x_zero_point = self.input_quantizer.codes(x)
        layout = "split" if codes.dim() == 3 else {2: "ternary", 1: "binary"}[WEIGHT_QUANTIZERS[self.quantizer][0]]
        if not torch.is_grad_enabled():
            return codes_linear(x_codes, codes, scale, self.bias, x_scale, x_zero_point, layout, x.dtype)
        x = self.input_quantizer.latent(x)
        return _CodesLinear.apply(x, self.weight, self.bias, codes, scale, x_codes, x_scale, x_zero_point, layout)

    def extra_repr(self) -> str:
        planes = ", split" if self.weight.dim() == 3 else ""
        return f"{self.in_features}, {self.out_features}, {self.quantizer}, {self.granularity}{planes}"


class PackedLinear(Packed):
    """Linear on packed codes: `weight` uint8 (lb2 or lb1), `weight_scale` float32, `bias` float.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        config: bits and granularity; `config.split` for a pair.
        site: activation site of the input.
        device, dtype: of the parameters; the scales are float32 whatever the dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: LowbitConfig,
        site: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.layout = in_features, out_features, layout(config)
        self.row_length = in_features
        block = 256 if self.layout == "binary" else 128
        columns = -(-in_features // block) * 32
        rows = out_features if config.granularity == "per_row" else 1
        scale_shape = (2, rows) if config.split else (rows,)
        # Inference tensors have no version counter, which the CPU path needs to keep its int8 expansion.
        with torch.inference_mode(False):
            self.register_buffer("weight", torch.empty(out_features, columns, dtype=torch.uint8, device=device))
            self.register_buffer("weight_scale", torch.empty(scale_shape, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.input_quantizer = activation_quantizer(config, site)
        self.joint: JointProjection | None = None

    @classmethod
    def from_float(
        cls, linear: nn.Linear | QuantLinear, config: LowbitConfig | None = None, site: str = "linear"
    ) -> PackedLinear:
        """Quantize and pack a linear; a `QuantLinear` is packed as it was trained.

        Args:
            linear: `torch.nn.Linear` or `QuantLinear`.
            config: of a `torch.nn.Linear`, default `TernaryConfig()`; a `QuantLinear` knows its own.
            site: activation site of the input of a `torch.nn.Linear`.

        Raises:
            TypeError: another kind of module.
            ValueError: NaN or infinity in the weight, or a quantizer of other bits than the configuration's.
        """
        if not isinstance(linear, nn.Linear | QuantLinear):
            raise TypeError(
                f"PackedLinear.from_float takes torch.nn.Linear or QuantLinear, got {type(linear).__name__}"
            )
        config, weight = config or LowbitConfig(), linear.weight
        if isinstance(linear, QuantLinear):
            config = LowbitConfig(
                weight_bits=WEIGHT_QUANTIZERS[linear.quantizer][0],
                weight_quantizer=linear.quantizer,
                embedding_bits=None,
                granularity=linear.granularity,
                split=weight.dim() == 3,
            )
        check_weight_quantizer(config.weight_quantizer, config.weight_bits)
        packed = cls(
            linear.in_features, linear.out_features, linear.bias is not None, config, site, weight.device, weight.dtype
        )
        if isinstance(linear, QuantLinear):
            packed.input_quantizer = linear.input_quantizer
        codes, scale = weight_codes(weight, config.weight_quantizer, config.granularity)
        packed.check_finite(scale)
        packed.weight.copy_(
            pack_split(*codes) if config.split else (pack_ternary if packed.layout == "ternary" else pack_binary)(codes)
        )
        packed.weight_scale.copy_(scale)
        if linear.bias is not None:
            packed.bias = linear.bias
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [..., K] -> float [..., N] in x's dtype; ValueError for another K."""
        refuse_tracing()
        check_features(self, x)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)  # a head that no sentence reached
        if self.input_quantizer is None:
            return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)
        if self.joint is not None and self.joint.covers(self, x):
            return self.joint(self, x)
        return multiply([self], x)[0]

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that the codes stand for."""
        if self.layout == "split":
            first, second = unpack_split(self.weight, self.in_features)
            return first * self.weight_scale[0].unsqueeze(-1) + second * self.weight_scale[1].unsqueeze(-1)
        unpack = unpack_ternary if self.layout == "ternary" else unpack_binary
        return unpack(self.weight, self.in_features) * self.weight_scale.unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.layout}, bias={self.bias is not None}"


def check_features(linear: Any, x: torch.Tensor) -> None:
    """Raise ValueError unless a linear of `in_features` can read x."""
    if x.shape[-1] != linear.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., {linear.in_features}]")


def multiply(linears: Sequence[PackedLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of linears of one kind that read the same x, quantized once; differentiable in x and the biases."""
    x = autocast(x)
    biases = [linear.bias for linear in linears]
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (x, *biases))
    if wanted and torch.is_grad_enabled():
        y = _StraightThroughProduct.apply(x, tuple(linears), *biases)
    else:
        y = _multiply(linears, x)
    return [y] if len(linears) == 1 else list(y.split([linear.out_features for linear in linears], -1))


def _multiply(linears: Sequence[PackedLinear], x: torch.Tensor) -> torch.Tensor:
    layout, quantizer = linears[0].layout, linears[0].input_quantizer
    assert quantizer is not None
    packed, weight_scale = [linear.weight for linear in linears], [linear.weight_scale for linear in linears]
    bias = [linear.bias for linear in linears]
    if type(quantizer) is ActivationQuantizer and quantizer.granularity == "per_token" and quantizer.clip is None:
        bits, symmetric = quantizer.bits, quantizer.symmetric
        return joint_dynamic_linear(x, packed, weight_scale, bias, bits, symmetric, layout, None)
    codes, scale, zero_point = quantizer.codes(x)
    return joint_linear(codes, packed, weight_scale, bias, scale, zero_point, layout, None, x.dtype)


class _StraightThroughProduct(torch.autograd.Function):
    """The products as they are; backward as if x had not been quantized (0 where it is clipped)."""

    @staticmethod
    def forward(ctx, x, linears, *biases):  # type: ignore[no-untyped-def]
        ctx.linears = linears
        ctx.save_for_backward(x)
        return _multiply(linears, x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,), grad_x = ctx.saved_tensors, None
        grads = grad.split([linear.out_features for linear in ctx.linears], -1)
        if ctx.needs_input_grad[0]:
            parts = [part @ each.dequantize().to(grad.dtype) for part, each in zip(grads, ctx.linears, strict=True)]
            grad_x, clip = sum(parts), ctx.linears[0].input_quantizer.clip
            grad_x = grad_x if clip is None else grad_x * (x.abs() < clip)
        wanted = zip(grads, ctx.needs_input_grad[2:], strict=True)
        return grad_x, None, *(part.reshape(-1, part.shape[-1]).sum(0) if needs else None for part, needs in wanted)


def autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that torch.autocast gives the inputs of linears, where it is on."""
    device = x.device.type
    if device == "meta":  # torch has no autocast there, and raises when asked
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class JointProjection:
    """Query, key and value of one attention in one product, although the attention calls them one after the other.

    The first one called with a tensor computes all; each result is handed out once. An edit of the tensor between the
    calls is noticed by its version, which inference tensors and traced ones do not have: there, do not edit it.

    Args:
        linears: of the same kind, in the order in which they are called.
    """

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self.linears = tuple(linears)
        self._last: tuple[torch.Tensor, int | None, list[torch.Tensor | None]] | None = None
        for linear in linears:
            linear.joint = self

    def covers(self, linear: PackedLinear, x: torch.Tensor) -> bool:
        """Whether to ask the joint product: not for a copy of a linear, nor where accelerate keeps others elsewhere."""
        if linear not in self.linears:
            return False
        tensors = (tensor for each in self.linears for tensor in (each.weight, each.bias) if tensor is not None)
        return all(tensor.device == x.device for tensor in tensors)

    def __call__(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """Output of one of the linears."""
        index = self.linears.index(linear)
        version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
        last = self._last  # read once: another thread may be running the same model
        if last is None or last[0] is not x or last[1] != version or last[2][index] is None:
            last = x, version, [*multiply(self.linears, x)]
        result, last[2][index] = last[2][index], None
        self._last = None if index == len(self.linears) - 1 else last
        assert result is not None
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {"linears": self.linears, "_last": None}
