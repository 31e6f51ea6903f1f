"""`PackedEncoder`: a packed model's layers without padding, in nine operations each, or fewer.

    Q, K and V in one product; attention; quantize; product; residual + LayerNorm + quantize;
    product with GELU; quantize; product; residual + LayerNorm + quantize

with int8 between them. The native CPU kernels make two operations of the nine, and one of layers that drop nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lowbit_kernels import add_layernorm, joint_linear, quantize_per_token
from lowbit_kernels.encoder import cpu as encoder_cpu
from lowbit_kernels.varlen_attention.shared_gpu import HEAD_DIMS

from ...config import LowbitConfig
from ...models import Architecture
from ...quantizers import ActivationQuantizer
from ..linear import PackedLinear
from .encoder import UnpaddedEncoder, after, run_attention
from .leaving import Exits
from .proof import attention_options
from .pruning import Keep, Kept, drop, gathered
from .sequences import Sequences
from .weights import Found, Product, Weights, find

Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # int8 [T, K], scale [T], zero point [T] or None


class Settings(NamedTuple):
    """What the layers of a packed encoder have in common, besides their shapes."""

    heads: int
    head_dim: int
    bits: int  # of activations
    symmetric: dict[str, bool]  # by site: "linear", "ffn_output"
    gelu: str | None  # of `lowbit_kernels`, None: the module of the layer is called
    eps: float  # of both LayerNorms
    attention: dict[str, Any]  # options of `lowbit_kernels.attention`


def settings_of(architecture: Architecture, layer: nn.Module) -> Settings | str:
    """The settings of a layer; in words what of it a `PackedEncoder` cannot run."""
    linears: dict[str, Any] = {path: layer.get_submodule(path) for path in architecture.layer_linears()}
    for path, linear in linears.items():
        if type(linear) is not PackedLinear:
            return f"{path} is a {type(linear).__name__}, expected a packed linear (modules_to_not_convert?)"
        own = linear.input_quantizer
        if type(own) is not ActivationQuantizer or own.granularity != "per_token" or own.clip is not None:
            return f"{path} quantizes its input by {own}, expected per token, without clip"
    norms: list[Any] = [layer.get_submodule(path) for path in (architecture.attention_norm, architecture.ffn_norm)]
    if any(type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None for norm in norms):
        return f"the norms are {norms}, expected LayerNorms with weight and bias"
    quantizers = {path: linear.input_quantizer for path, linear in linears.items()}
    output = quantizers.pop(architecture.ffn_output)
    kinds = {(own.bits, own.symmetric) for own in quantizers.values()}
    if len(kinds) > 1 or output.bits != quantizers[architecture.ffn_input].bits:
        return "the linears have several kinds of activations"
    if norms[0].eps != norms[1].eps:
        return f"the LayerNorms add {norms[0].eps} and {norms[1].eps} (eps), one number expected"
    ((bits, symmetric),) = kinds
    return Settings(
        architecture.heads(layer),
        architecture.head_dim(layer),
        bits,
        {"linear": symmetric, "ffn_output": output.symmetric},
        gelu_of(layer.get_submodule(architecture.ffn_activation)),
        norms[0].eps,
        attention_options(architecture, layer),
    )


def gelu_of(activation: nn.Module) -> str | None:
    """What `lowbit_kernels` call the GELU that a module computes: "gelu", "gelu_tanh"; None: another function."""
    if not type(activation).__module__.startswith(("transformers.", "torch.")) or any(activation.parameters()):
        return None
    x = torch.linspace(-6, 6, 1001, device="cpu")
    with torch.no_grad():
        y = activation.forward(x)  # no hooks: x is not the model's
    names = {"gelu": "none", "gelu_tanh": "tanh"}
    return next((n for n, kind in names.items() if torch.equal(y, nn.functional.gelu(x, approximate=kind))), None)


class PackedEncoder(UnpaddedEncoder):
    """`UnpaddedEncoder` of a packed model, in a few operations; by its modules where gradients are needed.

    Args:
        encoder: Hugging Face encoder with packed linears in its child `layer`.
        architecture: where a layer keeps what.
        model_config: of the model.

    Raises:
        ValueError: the first layer is none that could run so.
    """

    _replaced = (*UnpaddedEncoder._replaced, "run_attention", "run_rest", "run")

    def __init__(self, encoder: nn.Module, architecture: Architecture, model_config: Any) -> None:
        layers: Any = encoder.layer
        settings = settings_of(architecture, layers[0])
        if isinstance(settings, str):  # before the encoder's tables are ours, too
            raise ValueError(f"layer.0: {settings}")
        super().__init__(encoder, architecture, model_config)
        self.settings = settings
        self._found: Found | None = None
        # What `lowbit.compile` and `lowbit.compile_for` replace.
        self.run_attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = self._run_attention
        self.run_rest: Callable[..., tuple[torch.Tensor, Codes]] = self._run_rest
        self.run: Callable[..., torch.Tensor] = self._run

    def problem(self) -> str | None:
        """In words why a few operations cannot do what the layers do; notes their settings."""
        first = None
        for number, layer in enumerate(self.layer):
            settings = settings_of(self.architecture, layer)
            if isinstance(settings, str):
                return f"layer.{number}: {settings}"
            first = first or settings
            if settings != first:
                names = [name for name in Settings._fields if getattr(settings, name) != getattr(first, name)]
                return f"layer.{number} differs from layer.0 in {', '.join(names)}"
            own = [name for name, module in layer.named_modules() if "forward" in module.__dict__]
            if own and not hasattr(layer.get_submodule(own[0]), "_hf_hook"):
                return f"layer.{number}.{own[0]} has a forward of its own"
        assert first is not None
        self.settings = first
        return None

    def one_layer(self, number: int, tokens: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        weights, bias = self._weights()[number], self._position_bias(tokens, sequences.max_seqlen)
        codes: Codes = quantize_per_token(tokens, self.settings.bits, self.settings.symmetric["linear"])
        if self._native(tokens.device, tokens.dtype):
            return self._run_layers([weights], tokens, codes, sequences, bias, False)[0]
        return self._run_layer(weights, tokens, codes, sequences, None, None, bias)[0]

    def compile_layers(self, **options: Any) -> None:
        options = self._compile_options(options)
        self.run_attention = torch.compile(self._run_attention, **options)
        self.run_rest = torch.compile(self._run_rest, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Copies find weights of their own."""
        return {**super().__getstate__(), "_found": None}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._found = None  # `.to(device)` is to free the memory that it leaves
        before = self._kinds()
        result = super()._apply(*args, **kwargs)
        if self._kinds() != before:
            self.run = self._run  # graphs read the weights that were there
        return result

    def _kinds(self) -> set[tuple[torch.device, torch.dtype]]:
        return {(tensor.device, tensor.dtype) for tensor in (*self.parameters(), *self.buffers())}

    def _fast(self, hidden_states: torch.Tensor, exits: Exits | None) -> Callable[..., torch.Tensor] | None:
        if self.is_replica:  # its tensors are no parameters, and `run` is that of the encoder on the first device
            return None
        norms = [own.ffn_norm.weight for own in self._weights()]
        needs_modules = (
            self.training
            or self.soft_mask is not None
            or (torch.is_grad_enabled() and any(p.requires_grad for p in (hidden_states, *self.layer.parameters())))
            or hidden_states.dtype == torch.float64
            or (hidden_states.is_cuda and self.settings.head_dim not in HEAD_DIMS)
            # Offloaded layers and layers on several devices have hooks that bring weights and activations together.
            or any(norm.device != hidden_states.device for norm in norms)
        )
        if needs_modules:
            return None
        return self.run if exits is None else self._run  # graphs of `compile_for` hold all layers

    def _run(
        self,
        tokens: torch.Tensor,
        sequences: Sequences,
        first_token_only: bool = False,
        protected: torch.Tensor | None = None,
        exits: Exits | None = None,
    ) -> torch.Tensor:
        """All layers: tokens [T, H] -> [T, H], `first_token_only`: [B, H], of those that stayed.

        Tokens after the last sequence belong to none and do not matter. Layers between two exits run together.
        """
        steps = self._plan(sequences, tokens.shape[0], first_token_only)
        survivors = self._survivors(sequences, first_token_only)
        sequences = sequences._replace(host=None)  # a layer compiled with it would be compiled again without
        codes: Codes | None = None
        bias = self._position_bias(tokens, sequences.max_seqlen)
        weights = self._weights()
        native = self._native(tokens.device, tokens.dtype)
        number = 0  # layers done
        while weights:
            kept = None if exits is None else exits.after(number, tokens, sequences)
            if kept is not None:
                before, tokens = tokens, tokens[kept.rows]
                codes = None if codes is None else _gathered_codes(kept, codes)
                kept = Kept(kept.rows, kept.sequences._replace(host=None))
                sequences, protected = after(before, kept, sequences, protected, survivors)
                if not len(tokens):
                    break
                steps = self._plan(sequences, len(tokens), first_token_only)[number:]
            if codes is None:
                codes = quantize_per_token(tokens, self.settings.bits, self.settings.symmetric["linear"])
            most = len(weights) if exits is None else exits.following(number) - number
            together = self._layers_together(weights[:most], steps[:most]) if native else 0
            if together:
                last = steps[together - 1]
                tokens, codes = self._run_layers(weights[:together], tokens, codes, sequences, bias, last is not None)
                self._note(sequences, together - 1)
                sequences = sequences if last is None or last.sequences is None else last.sequences
            else:
                before = tokens
                tokens, codes, kept = self._run_layer(weights[0], tokens, codes, sequences, steps[0], protected, bias)
                sequences, protected = after(before, kept, sequences, protected, survivors)
            self._note(sequences)
            done = together or 1
            weights, steps, number = weights[done:], steps[done:], number + done
        return tokens if survivors is None else survivors.all(tokens)

    def _position_bias(self, tokens: torch.Tensor, length: int) -> torch.Tensor | None:
        """float32 [heads, S, S], where the architecture has a bias."""
        if self.architecture.position_bias is None:
            return None
        bias = getattr(self.original, self.architecture.position_bias)
        return bias(tokens.new_empty(1, length, 1))[0].detach().float()

    def _layers_together(self, weights: list[Weights], steps: list[Keep | None]) -> int:
        """How many layers, from the first on, are alike in shape and drop nothing; the last may keep first tokens."""
        first = weights[0].shapes
        alike = (
            (keep is None or keep.first_only) and own.shapes == first for keep, own in zip(steps, weights, strict=True)
        )
        return sum(itertools.takewhile(bool, alike))

    def _run_layers(
        self,
        weights: list[Weights],
        tokens: torch.Tensor,
        codes: Codes,
        sequences: Sequences,
        bias: torch.Tensor | None,
        first_only: bool,
    ) -> tuple[torch.Tensor, Codes]:
        """Layers that drop nothing: tokens [T, H] and their codes -> the same of the next layer; `first_only`: [B, H]
        of the first token of each sequence."""
        own = self.settings
        products = [product for own in weights for product in own.products]
        every = (list(itertools.chain.from_iterable(of)) for of in zip(*products, strict=True))
        packed, scale, biases, layouts = every
        norms = [tensor for own in weights for norm in own.norms for tensor in norm]
        tokens, q, q_scale, zero_point = encoder_cpu.encoder_layers(
            tokens, *codes, packed, scale, biases, norms, layouts, own.gelu, own.eps, own.bits,
            own.symmetric["ffn_output"], sequences.cu_seqlens, own.heads, own.attention["scaling"],
            own.attention["asymmetric"], bias, first_only,
        )  # fmt: skip
        return tokens, (q, q_scale, None if own.symmetric["linear"] else zero_point)

    def _run_layer(
        self,
        weights: Weights,
        tokens: torch.Tensor,
        codes: Codes,
        sequences: Sequences,
        keep: Keep | None,
        protected: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Codes, Kept | None]:
        """tokens [T, H] and their codes -> the same of the next layer, and what it keeps."""
        context, importance = self.run_attention(
            weights.projections, codes, sequences, keep and keep.score, tokens.dtype, bias
        )
        kept = None
        if keep is not None:
            kept = drop(importance, sequences, keep, tokens.shape[0], self.settings.heads, protected)
        return *self.run_rest(weights, *gathered(kept, context, tokens)), kept

    def _run_attention(
        self,
        projections: Product,
        codes: Codes,
        sequences: Sequences,
        importance: str | None,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """codes [T, H] -> context [T, heads * head_dim], importance [T] if any."""
        own = self.settings
        if self._native(codes[0].device, dtype):
            context, received = encoder_cpu.encoder_attention(
                *codes, *projections, *sequences[:2], own.heads, own.attention["scaling"],
                own.attention["bits"], own.attention["asymmetric"], bias, importance,
            )  # fmt: skip
            return context, received if importance else None
        parts = self._multiply(projections, codes, dtype)
        query, key, value = (part.unflatten(-1, (own.heads, -1)) for part in parts)
        result = run_attention(query, key, value, sequences, importance, {**own.attention, "bias": bias})
        return result.output.flatten(1), result.importance

    def _run_rest(self, weights: Weights, context: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, Codes]:
        """What takes each token for itself: context and tokens [T, H] -> tokens of the next layer, their codes."""
        own = self.settings
        symmetric, dtype = own.symmetric, tokens.dtype
        if self._native(tokens.device, dtype):
            first, second, third = weights.attention_output, weights.ffn_input, weights.ffn_output
            packed, scale = first.packed + second.packed + third.packed, first.scale + second.scale + third.scale
            biases, layouts = first.bias + second.bias + third.bias, first.layouts + second.layouts + third.layouts
            tokens, q, q_scale, zero_point = encoder_cpu.encoder_rest(
                context, tokens, packed, scale, biases, [*weights.attention_norm, *weights.ffn_norm], layouts,
                own.gelu, own.eps, own.bits, symmetric["linear"], symmetric["ffn_output"],
            )  # fmt: skip
            return tokens, (q, q_scale, None if symmetric["linear"] else zero_point)
        codes = quantize_per_token(context, own.bits, symmetric["linear"])
        (output,) = self._multiply(weights.attention_output, codes, dtype)
        tokens, *inner = add_layernorm(
            output,
            tokens,
            *weights.attention_norm,
            own.eps,
            bits=own.bits,
            symmetric=symmetric["linear"],
        )
        (inner_output,) = self._multiply(weights.ffn_input, tuple(inner), dtype, own.gelu)  # type: ignore[arg-type]
        codes = quantize_per_token(self._activate(weights, inner_output), own.bits, symmetric["ffn_output"])
        (output,) = self._multiply(weights.ffn_output, codes, dtype)
        tokens, *last = add_layernorm(
            output, tokens, *weights.ffn_norm, own.eps, bits=own.bits, symmetric=symmetric["linear"]
        )
        return tokens, tuple(last)  # type: ignore[return-value]

    def _activate(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        return x if self.settings.gelu else weights.ffn_activation(x)

    def _native(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether layers, or halves of one, run as one operation of the native CPU kernels."""
        options = self.settings.attention
        return device.type == "cpu" and encoder_cpu.takes(
            dtype, options.get("bits"), options.get("asymmetric", ()), self.settings.gelu
        )

    def _multiply(
        self, product: Product, codes: Codes, dtype: torch.dtype, activation: str | None = None
    ) -> list[torch.Tensor]:
        x, scale, zero_point = codes
        layouts = product.layouts
        if any(layout != layouts[0] for layout in layouts):
            each = [Product([p], [s], [b], [kind]) for p, s, b, kind in zip(*product, strict=True)]
            return [y for one in each for y in self._multiply(one, codes, dtype, activation)]
        y = joint_linear(x, *product[:3], scale, zero_point, layouts[0], activation, dtype)
        return list(y.split([tensor.shape[0] for tensor in product.packed], -1))

    def _weights(self) -> list[Weights]:
        """Of all layers."""
        if torch.compiler.is_compiling():
            return find(self.layer, self.architecture).weights
        found = self._found  # read once: another thread may be running the same model
        if found is None or not found.holds(self.layer):
            found = self._found = find(self.layer, self.architecture)
        return found.weights


def _gathered_codes(kept: Kept, codes: Codes) -> Codes:
    q, scale, zero_point = codes
    return q[kept.rows], scale[kept.rows], None if zero_point is None else zero_point[kept.rows]


def check(config: LowbitConfig) -> None:
    """Raise ValueError unless a packed model of this configuration can be fused; says what lacks."""
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
