"""Quantizers: latent float tensor -> quantized float tensor, with a straight-through gradient, and the codes to pack.

    weight     q(w) = scale * code(w)           dq/dw = 1 (TWN: Li et al. 2016; BWN: Rastegari et al. 2016)
    activation q(x) = scale * (code - zero)     dq/dx = 1, and 0 where |x| reaches the clip

A weight quantizer is any function `codes(w, granularity) -> (codes int8, scale float32)`; add one to
`WEIGHT_QUANTIZERS` under a name and `LowbitConfig(weight_quantizer=name)` finds it (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lowbit_kernels import binarize, fake_quantize_per_token, quantize_per_tensor, quantize_per_token, ternarize

Codes = tuple[torch.Tensor, torch.Tensor]
QuantizedActivation = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes, scale, zero point


def twn(weight: torch.Tensor, granularity: str) -> Codes:
    """Ternary weight network: threshold 0.7 mean|w|, scale = mean |w| above it (TernaryBERT eq. 4)."""
    return ternarize(weight, granularity=granularity)


def bwn(weight: torch.Tensor, granularity: str) -> Codes:
    """Binary weight network: sign, scale = mean|w| (BinaryBERT eq. 3); sign(0) = +1."""
    return binarize(weight, granularity=granularity)


WEIGHT_QUANTIZERS: dict[str, tuple[int, Callable[[torch.Tensor, str], Codes]]] = {"twn": (2, twn), "bwn": (1, bwn)}
"""Name -> (bits of the codes, function).

The function takes a float weight [N, K] without gradient and a granularity, "per_row" or "per_tensor", and returns
codes int8 [N, K], of -1, 0, 1 for 2 bits or -1, 1 for 1 bit, and scales float32, [N] or [1] by granularity, not
negative. Add to it before a model is prepared or a prepared checkpoint loaded; packed models need it no more.
"""

DEFAULT_FOR_BITS = {2: "twn", 1: "bwn"}  # of embeddings, too
CODES = {2: (-1, 0, 1), 1: (-1, 1)}


def check_weight_quantizer(name: str, bits: int | None) -> None:
    """Raise ValueError unless a quantizer of this name gives codes of so many bits (None: nothing is quantized).

    Raises:
        ValueError: no such quantizer, one of other bits, or one that returns something else than it has to.
    """
    if bits is None:
        return
    if name not in WEIGHT_QUANTIZERS or WEIGHT_QUANTIZERS[name][0] != bits:
        fitting = [repr(known) for known, (own, _) in WEIGHT_QUANTIZERS.items() if own == bits]
        hint = "" if name in WEIGHT_QUANTIZERS else (
            "; a quantizer of your own goes into lowbit.quantizers.WEIGHT_QUANTIZERS before a model is prepared, and "
            "before a prepared checkpoint is loaded"
        )  # fmt: skip
        raise ValueError(
            f"weight_quantizer={name!r} with weight_bits={bits}; accepted for {bits} bits: {', '.join(fitting)}{hint}"
        )
    if name not in DEFAULT_FOR_BITS.values():
        _try_out(name, bits)


def _try_out(name: str, bits: int) -> None:
    """Raise ValueError unless a user's quantizer returns what it has to, for a small weight."""
    values = [[0.9, -0.1, 0.4, -0.7, 0.0], [-0.2, 0.3, 1.5, -1.0, 0.1], [0.05, 0.0, -0.6, 0.6, -0.02]]
    weight = torch.tensor(values, device="cpu")  # whatever the default device: a model may be loading
    for granularity, scales in (("per_row", 3), ("per_tensor", 1)):
        codes, scale = WEIGHT_QUANTIZERS[name][1](weight, granularity)
        found = (codes.dtype, tuple(codes.shape), scale.dtype, tuple(scale.shape))
        wanted = (torch.int8, (3, 5), torch.float32, (scales,))
        wrong = sorted(set(codes.flatten().tolist()) - set(CODES[bits]))
        if found != wanted or wrong or not bool((scale >= 0).all()):
            raise ValueError(
                f"weight_quantizer={name!r} returns for a [3, 5] weight, {granularity!r}: codes {found[0]} "
                f"{list(found[1])}{f' with {wrong}' if wrong else ''}, scale {found[2]} {list(found[3])}; needed: "
                f"codes torch.int8 [3, 5] of {CODES[bits]}, scale torch.float32 [{scales}], not negative"
            )


def weight_codes(weight: torch.Tensor, quantizer: str, granularity: str) -> Codes:
    """Codes and scale of a latent weight, by quantizer name.

    Args:
        weight: float [N, K], or [2, N, K] for a split pair (each plane quantized by itself).

    Returns:
        codes int8 like `weight`; scale float32 [N] or [1], with the leading 2 for a pair.
    """
    _, codes = WEIGHT_QUANTIZERS[quantizer]
    weight = weight.detach()
    if weight.dim() == 2:
        return codes(weight, granularity)
    if granularity == "per_row":  # rows know nothing of each other, so both planes are one matrix
        both, scale = codes(weight.flatten(0, 1), granularity)
        return both.view(weight.shape), scale.view(weight.shape[:2])
    planes = [codes(plane, granularity) for plane in weight]
    return torch.stack([code for code, _ in planes]), torch.stack([scale for _, scale in planes])


class StraightThrough(torch.autograd.Function):
    """Forward: the given quantized value. Backward: the gradient goes to the latent tensor unchanged.

    The latent tensor may have one dimension more, first, over which the quantized value is a sum: each part gets the
    gradient.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, latent: torch.Tensor, quantized: torch.Tensor
    ) -> torch.Tensor:
        ctx.shape = latent.shape  # type: ignore[attr-defined]
        return quantized

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].expand(ctx.shape), None  # type: ignore[attr-defined]


def weight_values(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the codes of `weight_codes` stand for: [N, K]; the sum of the planes of a pair (BinaryBERT eq. 8)."""
    values = codes * scale.unsqueeze(-1).to(dtype)
    return values if values.dim() == 2 else values[0] + values[1]


def activation_values(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What the codes of `ActivationQuantizer.codes` stand for."""
    differences = codes if zero_point is None else codes - zero_point.unsqueeze(-1)
    return (differences * scale.unsqueeze(-1)).to(dtype)


def dequantize_weight(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The quantized weight [N, K] as a float with a straight-through gradient to the latent `weight`.

    Args:
        weight: latent float [N, K]; or [2, N, K], whose quantized planes are summed.
        codes, scale: from `weight_codes`.
    """
    return StraightThrough.apply(weight, weight_values(codes, scale, weight.dtype))


class ActivationQuantizer(nn.Module):
    """Min-max fake quantization of an activation, dynamic scale (TernaryBERT section 3.1; BinaryBERT for 4 bits).

    Symmetric: scale = max|x| / (2^(bits-1) - 1), x ~ scale * code. Asymmetric: scale = (max - min) / (2^bits - 1) and
    an integer zero point, x ~ scale * (code - zero_point). The extrema are taken over the last dimension
    ("per_token") or the whole tensor ("per_tensor").

    Args:
        bits: 8 or 4.
        symmetric: without or with a zero point.
        granularity: "per_token" or "per_tensor".
        clip: clip x to [-clip, clip] first, gradient 0 where |x| >= clip; None for no clipping.
    """

    def __init__(self, bits: int, symmetric: bool, granularity: str = "per_token", clip: float | None = None) -> None:
        super().__init__()
        self.bits, self.symmetric, self.granularity, self.clip = bits, symmetric, granularity, clip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Quantized and dequantized `x`, same shape and dtype; straight-through gradient."""
        if self.granularity == "per_tensor":
            quantized = activation_values(*self.codes(x), x.dtype)
        else:
            clipped = x if self.clip is None else x.clamp(-self.clip, self.clip)
            quantized = fake_quantize_per_token(clipped, self.bits, self.symmetric)
        return StraightThrough.apply(self.latent(x), quantized) if x.requires_grad else quantized

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """x, for what passes a gradient straight through: where |x| reaches the clip, it ends here."""
        if self.clip is None or not x.requires_grad:
            return x
        return torch.where(x.abs() < self.clip, x, x.detach())  # clamp would pass it at equality

    def codes(self, x: torch.Tensor) -> QuantizedActivation:
        """(codes int8 like x, scale float32, zero_point int32 or None): what a packed linear multiplies."""
        x = x.detach()
        quantize = quantize_per_token if self.granularity == "per_token" else quantize_per_tensor
        return quantize(x if self.clip is None else x.clamp(-self.clip, self.clip), self.bits, self.symmetric)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"bits={self.bits}, {kind}, {self.granularity}" + (f", clip={self.clip}" if self.clip else "")
