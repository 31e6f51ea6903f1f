"""`PackedEncoder`: all layers of a packed BERT on the tokens of a batch without padding, one after the other.

Padding is taken out once at the entrance and put back, as zeros, at the exit; between the operations activations are
int8. A layer is nine operations: Q, K and V in one product; attention; quantize; product; residual + LayerNorm +
quantize; product with GELU; quantize; product; residual + LayerNorm + quantize.

The layers themselves stay what and where they were, with their names: they run instead where an attention map, hidden
states, gradients or a mask that is no padding mask are asked for, where they are offloaded, and for dtypes and head
sizes that the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lowbit_kernels import add_layernorm, attention, joint_linear, quantize_per_token
from lowbit_kernels.varlen_attention import HEAD_DIMS

from ..config import LowbitConfig
from ..models import Architecture


class Sequences(NamedTuple):
    """Where the sequences of a batch lie among its tokens."""

    cu_seqlens: torch.Tensor  # int32 [B + 1]
    max_seqlen: int


class Product(NamedTuple):
    """Weights of linears that share an input: packed codes, scales, biases."""

    packed: list[torch.Tensor]
    scale: list[torch.Tensor]
    bias: list[torch.Tensor | None]


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


class Weights(NamedTuple):
    """Of one layer."""

    projections: Product
    attention_output: Product
    attention_norm: Norm
    ffn_input: Product
    ffn_output: Product
    ffn_norm: Norm


Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # int8 [T, K], scale [T], zero point [T] or None


class PackedEncoder(nn.Module):
    """Stands in for the encoder of a packed model; same parameters, same names.

    Args:
        encoder: Hugging Face encoder with packed linears in its child `layer`.
        architecture: where a layer keeps what.
        config: of the packed model.

    Raises:
        ValueError: a configuration that does not run without padding (`check`).
    """

    def __init__(self, encoder: nn.Module, architecture: Architecture, config: LowbitConfig) -> None:
        super().__init__()
        check(config)
        assert config.activation_bits is not None  # check said so
        layers: Any = encoder.get_submodule("layer")
        self.layer: Any = layers
        self._by_layer = [encoder]  # in a list: its parameters are ours already
        self.architecture, self.bits = architecture, config.activation_bits
        first = layers[0]
        module = first.get_submodule(architecture.attention)
        self.heads, self.head_dim = module.num_attention_heads, module.attention_head_size
        self.layout = first.get_submodule(architecture.ffn_input).layout
        self.gelu = first.get_submodule(architecture.ffn_input).activation
        self.activation = first.get_submodule(architecture.ffn_activation)
        self._norm = f"{architecture.ffn_norm}.weight"
        self.eps = first.get_submodule(architecture.attention_norm).eps
        self.symmetric = {site: site not in config.asymmetric for site in ("linear", "ffn_output")}
        self.attention_options: dict[str, Any] = {}
        if config.quantize_attention:
            sites = ("query", "key", "value", "attention_probs")
            self.attention_options = {
                "bits": self.bits,
                "asymmetric": tuple(site for site in sites if site in config.asymmetric),
            }
        # What `lowbit.compile` and `lowbit.compile_for` replace.
        self.run_layer: Callable[..., tuple[torch.Tensor, Codes]] = self._run_layer
        self.run: Callable[[torch.Tensor, Sequences], torch.Tensor] = self._run

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """hidden_states [B, S, H], attention_mask [B, S] or None -> transformers' output with last_hidden_state."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        if self._needs_layers(hidden_states, attention_mask, kwargs):
            return self._by_layer[0](hidden_states, _additive(attention_mask, hidden_states.dtype), **kwargs)
        tokens, sequences, places = without_padding(hidden_states, attention_mask)
        tokens = self.run(tokens, sequences) if len(tokens) else tokens
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=with_padding(tokens, places, hidden_states.shape)
        )

    def _run(self, tokens: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """All layers: tokens [T, H] -> [T, H]. Tokens after the last sequence belong to none and do not matter."""
        codes: Codes = quantize_per_token(tokens, self.bits, self.symmetric["linear"])
        for layer in self.layer:
            tokens, codes = self.run_layer(self._weights(layer), tokens, codes, sequences)
        return tokens

    def _run_layer(
        self, weights: Weights, tokens: torch.Tensor, codes: Codes, sequences: Sequences
    ) -> tuple[torch.Tensor, Codes]:
        """tokens [T, H] and their codes -> the same of the next layer."""
        symmetric, dtype = self.symmetric, tokens.dtype
        projections = self._multiply(weights.projections, codes, dtype)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in projections)
        context = attention(query, key, value, *sequences, **self.attention_options).flatten(1)
        codes = quantize_per_token(context, self.bits, symmetric["linear"])
        (output,) = self._multiply(weights.attention_output, codes, dtype)
        tokens, *inner = add_layernorm(
            output, tokens, *weights.attention_norm, self.eps, bits=self.bits, symmetric=symmetric["linear"]
        )
        (inner_output,) = self._multiply(weights.ffn_input, tuple(inner), dtype, self.gelu)  # type: ignore[arg-type]
        codes = quantize_per_token(self.activation(inner_output), self.bits, symmetric["ffn_output"])
        (output,) = self._multiply(weights.ffn_output, codes, dtype)
        tokens, *last = add_layernorm(
            output, tokens, *weights.ffn_norm, self.eps, bits=self.bits, symmetric=symmetric["linear"]
        )
        return tokens, tuple(last)  # type: ignore[return-value]

    def _multiply(
        self, product: Product, codes: Codes, dtype: torch.dtype, activation: str | None = None
    ) -> list[torch.Tensor]:
        x, scale, zero_point = codes
        y = joint_linear(x, *product, scale, zero_point, self.layout, activation, dtype)
        return list(y.split([tensor.shape[0] for tensor in product.packed], -1))

    def _weights(self, layer: nn.Module) -> Weights:
        """Looked up anew in every forward: `.to(device)` replaces buffers."""
        paths, find = self.architecture, layer.get_submodule
        attention_norm: Any = find(paths.attention_norm)
        ffn_norm: Any = find(paths.ffn_norm)
        return Weights(
            _product(*map(find, paths.projections)),
            _product(find(paths.attention_output)),
            Norm(attention_norm.weight, attention_norm.bias),
            _product(find(paths.ffn_input)),
            _product(find(paths.ffn_output)),
            Norm(ffn_norm.weight, ffn_norm.bias),
        )

    def _needs_layers(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> bool:
        config = self._by_layer[0].config
        recorded = ("output_attentions", "output_hidden_states", "output_scores")
        norms = [layer.get_parameter(self._norm) for layer in self.layer]
        return (
            self.training
            or (torch.is_grad_enabled() and any(p.requires_grad for p in (hidden_states, *self.layer.parameters())))
            or hidden_states.dtype == torch.float64
            or (hidden_states.is_cuda and self.head_dim not in HEAD_DIMS)
            or (mask is not None and mask.dim() != 2)
            or any(kwargs.get(name, getattr(config, name, False)) for name in recorded)
            or any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "past_key_values"))
            # Offloaded layers and layers on several devices have hooks that bring weights and activations together.
            or any(norm.device != hidden_states.device for norm in norms)
        )


def check(config: LowbitConfig) -> None:
    """Raise ValueError unless a model of this configuration can run without padding; says what lacks."""
    problems = {
        "stage='packed' (call lowbit.convert first)": config.stage != "packed",
        "weight_bits of 1 or 2": config.weight_bits is None,
        "activation_bits of 8 or 4": config.activation_bits is None,
        "activation_granularity='per_token'": config.activation_granularity != "per_token",
        "activation_clip=None": config.activation_clip is not None,
    }
    missing = [need for need, lacks in problems.items() if lacks]
    if missing:
        raise ValueError(f"a fused encoder needs {' and '.join(missing)}; run the model without fused=True")


def _product(*linears: Any) -> Product:
    return Product(
        [linear.weight for linear in linears],
        [linear.weight_scale for linear in linears],
        [linear.bias for linear in linears],
    )


def without_padding(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, Sequences, torch.Tensor | None]:
    """The tokens of a padded batch.

    Args:
        hidden_states: [B, S, H].
        attention_mask: bool or integer [B, S], 0 at padding (anywhere in a row), or None.

    Returns:
        tokens [T, H]; where the sequences begin; int64 [T] places of the tokens in [B * S], None without padding.
    """
    B, S, _ = hidden_states.shape
    rows = hidden_states.flatten(0, 1)
    if attention_mask is None or bool(attention_mask.all()):
        cu_seqlens = torch.arange(B + 1, dtype=torch.int32, device=rows.device) * S
        return rows, Sequences(cu_seqlens, S), None
    mask = attention_mask.bool()
    lengths = mask.sum(1, dtype=torch.int32)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    places = mask.flatten().nonzero().squeeze(1)
    return rows[places], Sequences(cu_seqlens, int(lengths.max())), places


def with_padding(tokens: torch.Tensor, places: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """Inverse of `without_padding`: [T, H] -> [B, S, H], zeros at padding."""
    if places is None:
        return tokens.view(shape)
    padded = tokens.new_zeros(shape[0] * shape[1], shape[2])
    return padded.index_copy_(0, places, tokens).view(shape)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What the layers take for a mask [B, S]: float [B, 1, 1, S], the least number at padding."""
    if mask is None or mask.dim() != 2:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask.bool(), torch.finfo(dtype).min)[:, None, None, :]
