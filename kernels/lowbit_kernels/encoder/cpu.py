"""The two halves of an encoder layer, each as one op of the native CPU kernels: what is between its operations stays in
cache. And layers one after the other, as one op: few tokens take little longer than calls from Python.

    encoder_attention   codes -> queries, keys and values -> attention -> context
    encoder_rest        context -> product -> + tokens, LayerNorm -> product, GELU -> product -> + , LayerNorm -> tokens
    encoder_layers      both, for every layer; of the last one, on request, for first tokens only

The same operations as `joint_linear`, `attention`, `quantize_per_token` and `add_layernorm` one by one, with the same
bits but for GELU, which is their own here. Arguments are not checked: they come from the modules of a converted model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import native
from .._derived import Derived
from .._ops import define
from ..linear.native import ACTIVATIONS, Weights
from ..quantize.cpu import outputs
from ..varlen_attention.cpu import Mode, native_attention, runs_natively


def takes(dtype: torch.dtype, bits: int | None, asymmetric: Sequence[str], activation: str | None) -> bool:
    """Whether these ops take a layer on the CPU: dtype of its tokens, bits and asymmetric sites of its attention, and
    what follows the first product of the FFN."""
    return activation is not None and runs_natively(dtype, bits, asymmetric) and native.available()


def _attention_cpu(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    layouts: Sequence[str],
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    heads: int,
    scaling: float,
    bits: int,
    asymmetric: Sequence[str],
    position_bias: torch.Tensor | None,
    importance: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, K = x.shape
    context, received = _attention_outputs(x, packed, importance)
    x, x_scale, cu_seqlens = x.contiguous(), x_scale.contiguous(), cu_seqlens.contiguous()
    x_zero_point = None if x_zero_point is None else x_zero_point.contiguous()
    position_bias = None if position_bias is None else position_bias.float()
    weights = Weights.packed(packed, scale, bias, layouts, K, x_zero_point is not None)
    products = weights.array()
    by_head = context.new_zeros(heads, T) if importance else None
    mode = Mode(scaling, bits, asymmetric, importance=importance)
    op = native_attention(T, heads, context.shape[1] // heads, mode, position_bias, context, None, by_head)
    native.function("attention_half")(
        x.data_ptr(), K, x_scale.data_ptr(), native.pointer(x_zero_point), products, len(packed), op,
        cu_seqlens.data_ptr(), len(cu_seqlens) - 1,
    )  # fmt: skip
    if by_head is not None:
        torch.sum(by_head, 0, out=received)
    return context, received


def _attention_outputs(
    x: torch.Tensor, packed: Sequence[torch.Tensor], importance: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, importance), uninitialised; the latter empty where it is not asked for."""
    T = x.shape[0]
    context = x.new_empty(T, packed[0].shape[0], dtype=torch.float32)
    return context, x.new_empty(T if importance else 0, dtype=torch.float32)


encoder_attention = define(
    "encoder_attention(Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor[] scale, "
    "Tensor?[] bias, str[] layouts, Tensor cu_seqlens, SymInt max_seqlen, int heads, float scaling, int bits, "
    "str[] asymmetric, Tensor? position_bias, str? importance) -> (Tensor, Tensor)",
    cpu=_attention_cpu,
    fake=lambda x, x_scale, x_zero_point, packed, *others: _attention_outputs(x, packed, others[-1]),
)


class _Linears(NamedTuple):
    """Some of a layer's: query, key, value, attention output, FFN input and output."""

    packed: Sequence[torch.Tensor]
    scale: Sequence[torch.Tensor]
    bias: Sequence[torch.Tensor | None]
    layouts: Sequence[str]

    def part(self, start: int, stop: int) -> _Linears:
        own = slice(start, stop)
        return _Linears(self.packed[own], self.scale[own], self.bias[own], self.layouts[own])


class _Options(NamedTuple):
    """What all layers share."""

    activation: str
    eps: float
    bits: int
    symmetric: bool
    ffn_symmetric: bool


def _rest_of(
    linears: _Linears, norms: Sequence[torch.Tensor], options: _Options, C: int
) -> tuple[native.Rest, list[torch.Tensor | None]]:
    """The second half of a layer as the kernel takes it, of a context [T, C], and the tensors that it points to."""
    activation, eps, bits, symmetric, ffn_symmetric = options
    norms = [tensor.contiguous() for tensor in norms]
    H, F = len(norms[0]), linears.packed[1].shape[0]
    weights = [
        Weights.packed(*linears.part(i, i + 1), K, not is_symmetric)
        for i, (K, is_symmetric) in enumerate([(C, symmetric), (H, symmetric), (F, ffn_symmetric)])
    ]
    rest = native.Rest(H=H, C=C, activation=ACTIVATIONS.index(activation), bits=bits)
    rest.ffn_symmetric = ffn_symmetric
    rest.attention_output, rest.ffn_input, rest.ffn_output = (own.products[0] for own in weights)
    rest.attention_norm, rest.ffn_norm = native.norm(norms[0], norms[1], eps), native.norm(norms[2], norms[3], eps)
    return rest, [*norms, *(tensor for own in weights for tensor in own.tensors)]


def _rest_cpu(
    context: torch.Tensor,
    tokens: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    norms: Sequence[torch.Tensor],
    layouts: Sequence[str],
    activation: str,
    eps: float,
    bits: int,
    symmetric: bool,
    ffn_symmetric: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    context, tokens = context.contiguous(), tokens.contiguous()
    T, C = context.shape
    options = _Options(activation, eps, bits, symmetric, ffn_symmetric)
    op, _alive = _rest_of(_Linears(packed, scale, bias, layouts), norms, options, C)
    out = torch.empty_like(tokens)
    codes = outputs(out, symmetric, T)
    if T:
        native.function("rest")(op, context.data_ptr(), tokens.data_ptr(), T, *map(native.pointer, (out, *codes)))
    return out, *codes


def _rest_fake(
    context: torch.Tensor, tokens: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, symmetric, _ffn_symmetric = others
    return torch.empty_like(tokens, memory_format=torch.contiguous_format), *outputs(tokens, symmetric, tokens.shape[0])


encoder_rest = define(
    "encoder_rest(Tensor context, Tensor tokens, Tensor[] packed, Tensor[] scale, Tensor?[] bias, Tensor[] norms, "
    "str[] layouts, str activation, float eps, int bits, bool symmetric, bool ffn_symmetric) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_rest_cpu,
    fake=_rest_fake,
)

_layers = Derived()


def _layers_of(
    linears: _Linears, norms: Sequence[torch.Tensor], options: _Options
) -> tuple[ctypes.Array[native.Layer], list[torch.Tensor]]:
    """Layers as the kernel takes them, and what they point to besides the tensors given.

    To be held until the kernel is done: of inference tensors nothing is kept, and another thread may replace an entry.
    """
    given = [*linears.packed, *linears.scale, *norms, *(tensor for tensor in linears.bias if tensor is not None)]

    def make() -> tuple[ctypes.Array[native.Layer], list[torch.Tensor]]:
        own = {id(tensor) for tensor in given}  # these live while the entry does; to hold them would keep it for ever
        layers, kept = [], []
        for i in range(len(linears.packed) // 6):
            of_layer, own_norms = linears.part(6 * i, 6 * i + 6), norms[4 * i : 4 * i + 4]
            first = Weights.packed(*of_layer.part(0, 3), len(own_norms[0]), not options.symmetric)
            rest, alive = _rest_of(of_layer.part(3, 6), own_norms, options, of_layer.packed[0].shape[0])
            layers.append(native.Layer(first.array(), rest))
            kept += [tensor for tensor in (*alive, *first.tensors) if tensor is not None and id(tensor) not in own]
        return (native.Layer * len(layers))(*layers), kept

    # Of `native.Layer` a reloaded module has another one.
    return _layers.get(given, (options, tuple(linears.layouts), native.Layer), make)


def _layers_cpu(
    tokens: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor | None,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
    norms: Sequence[torch.Tensor],
    layouts: Sequence[str],
    activation: str,
    eps: float,
    bits: int,
    ffn_symmetric: bool,
    cu_seqlens: torch.Tensor,
    heads: int,
    scaling: float,
    asymmetric: Sequence[str],
    position_bias: torch.Tensor | None,
    first_only: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, x, x_scale, cu_seqlens = (t.contiguous() for t in (tokens, x, x_scale, cu_seqlens))
    x_zero_point = None if x_zero_point is None else x_zero_point.contiguous()
    position_bias = None if position_bias is None else position_bias.float()
    symmetric, T, B = x_zero_point is None, len(tokens), len(cu_seqlens) - 1
    linears, options = _Linears(packed, scale, bias, layouts), _Options(activation, eps, bits, symmetric, ffn_symmetric)
    layers, _alive = _layers_of(linears, norms, options)
    rows = max(T, B) if first_only else T  # layers before the last put all tokens here
    out = tokens.new_empty(rows, tokens.shape[1])
    codes = outputs(out, symmetric, rows)
    context = tokens.new_empty(T, packed[0].shape[0])
    mode = Mode(scaling, bits, asymmetric)
    op = native_attention(T, heads, context.shape[1] // heads, mode, position_bias, context, None, None)
    if T:
        native.function("layers")(
            layers, len(layers), first_only, op, cu_seqlens.data_ptr(), B,
            *map(native.pointer, (x, x_scale, x_zero_point, tokens, out, *codes)),
        )  # fmt: skip
    if first_only:
        return out[:B], codes[0][:B], codes[1][:B], codes[2][:B]
    return out, *codes


def _layers_fake(tokens: torch.Tensor, x: torch.Tensor, x_scale: torch.Tensor, x_zero_point: Any, *others: Any) -> Any:
    *_, cu_seqlens, _heads, _scaling, _asymmetric, _position_bias, first_only = others
    rows = cu_seqlens.shape[0] - 1 if first_only else tokens.shape[0]
    out = tokens.new_empty(rows, tokens.shape[1])
    return out, *outputs(out, x_zero_point is None, rows)


encoder_layers = define(
    "encoder_layers(Tensor tokens, Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor[] packed, Tensor[] scale, "
    "Tensor?[] bias, Tensor[] norms, str[] layouts, str activation, float eps, int bits, bool ffn_symmetric, "
    "Tensor cu_seqlens, int heads, float scaling, str[] asymmetric, Tensor? position_bias, bool first_only) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_layers_cpu,
    fake=_layers_fake,
)
