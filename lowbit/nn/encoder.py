"""Encoders that run on the tokens of a batch without padding, and may drop tokens on the way.

Padding is taken out once at the entrance and put back, as zeros, at the exit. A layer that drops tokens does so after
its attention and before its output projection, which like all that follows takes each token for itself: dropping
before or after it is the same function.

`UnpaddedEncoder` calls the modules of the layers: float, prepared or packed, also in training. `PackedEncoder` runs a
packed model's layers as nine operations each, int8 between them: Q, K and V in one product; attention; quantize;
product; residual + LayerNorm + quantize; product with GELU; quantize; product; residual + LayerNorm + quantize.

The layers stay what and where they were, with their names. They run as they are where an attention map, hidden states
or a mask that is no padding mask are asked for; with dropped tokens these are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from lowbit_kernels import (
    AttentionOutput,
    add_layernorm,
    attention,
    attention_eager,
    encoder_cpu,
    joint_linear,
    quantize_per_token,
)
from lowbit_kernels.varlen_attention import HEAD_DIMS

from ..config import LengthConfig, LowbitConfig
from ..models import Architecture
from .pruning import Keep, Kept, Survivors, drop, gathered, importance_loss, plan
from .sequences import Sequences, additive, with_first_tokens, with_padding, without_padding
from .weights import Found, Product, Weights, find

UNPADDED = "lowbit_unpadded"  # attention implementation of a model with an `UnpaddedEncoder`
_SITES = ("query", "key", "value", "attention_probs")


class SoftMask(Protocol):
    """A factor for every token in place of dropping it, learned: see `lowbit.length`.

    `place` says what is multiplied: the output of the layer's "attention" (PoWER-BERT) or of its "ffn" (LTP).
    """

    place: str

    def __call__(self, layer: int, importance: torch.Tensor, sequences: Sequences, heads: int) -> torch.Tensor: ...


class UnpaddedEncoder(nn.Module):
    """Stands in for the encoder of a model; same parameters, same names.

    Args:
        encoder: Hugging Face encoder with its layers in its child `layer`.
        architecture: where a layer keeps what.
        model_config: of the model.

    Attributes:
        lengths: what every layer keeps, None for all.
        skip: layers that are left out (LayerDrop); they have to keep what the layer before them keeps.
        soft_mask: in training, a factor for every token.
        importance_target: in training, float [T], what share of their sequence's importance its tokens are to have.
        importance_losses: how far they are from it, for every layer that has dropped tokens since there is a target.
        noted_lengths: None, or a list: every layer adds what it has left of each sequence, int [B].
        replaced_attention: the model's attention implementation before this encoder came.
    """

    _replaced: tuple[str, ...] = ("run_attention_modules", "run_rest_modules")  # by `lowbit.compile`, `compile_for`

    def __init__(self, encoder: nn.Module, architecture: Architecture, model_config: Any) -> None:
        super().__init__()
        layers: Any = encoder.get_submodule("layer")
        self.layer: Any = layers
        for name, child in encoder.named_children():  # a table of relative positions, say
            self.register_module(name, child)
        self._by_layer = [encoder]  # in a list: its parameters are ours already
        self.config = model_config
        self.architecture = architecture
        self.lengths = None
        self.skip: frozenset[int] = frozenset()
        self.soft_mask: SoftMask | None = None
        self.importance_target: torch.Tensor | None = None
        self.importance_losses: list[torch.Tensor] = []
        self.noted_lengths: list[torch.Tensor] | None = None
        self.replaced_attention: str | None = None
        # What `lowbit.compile` replaces: a layer is two parts, between them tokens are dropped.
        self.run_attention_modules: Callable[..., Any] = self._run_attention_modules
        self.run_rest_modules: Callable[..., torch.Tensor] = self._run_rest_modules

    @property
    def lengths(self) -> LengthConfig | None:
        return self._lengths

    @lengths.setter
    def lengths(self, lengths: LengthConfig | None) -> None:
        self._lengths = lengths
        with torch.inference_mode(False):
            keep = torch.tensor(() if lengths is None else lengths.keep, dtype=torch.float64)
            device = next(self.layer.parameters()).device
            # Their bits, which `.half()` leaves alone.
            self.register_buffer("_keep_bits", keep.view(torch.int64).to(device), persistent=False)

    def _plan(self, sequences: Sequences, num_tokens: int, first_token_only: bool) -> list[Keep | None]:
        bits: Any = self._keep_bits
        keep = bits.to(sequences.cu_seqlens.device).view(torch.float64)
        return plan(self.lengths, len(self.layer), sequences, num_tokens, first_token_only, keep)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are not compiled, and have no graphs: what these hold on to is this encoder."""
        parts = {name: getattr(self, f"_{name}") for name in self._replaced}
        return {**self.__dict__, **parts}

    def compile_layers(self, **options: Any) -> None:
        """`torch.compile` the parts of a layer, the same code for all; options of `torch.compile`."""
        options = self._compile_options(options)
        self.run_attention_modules = torch.compile(self._run_attention_modules, **options)
        self.run_rest_modules = torch.compile(self._run_rest_modules, **options)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        first_token_only: bool = False,
        protected_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """A batch through all layers.

        Args:
            hidden_states: [B, S, H].
            attention_mask: [B, S] or None.
            first_token_only: the caller reads hidden_states[:, 0] only, what else is returned may be anything.
            protected_tokens: bool [B, S], tokens to keep as long as there is room, or None.

        Returns:
            transformers' output with last_hidden_state [B, S, H].

        Raises:
            ValueError: tokens are to be dropped, and something is asked for that needs them all.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        obstacle = self._obstacle(hidden_states, attention_mask, kwargs)
        drops = self.lengths is not None or self.soft_mask is not None
        if drops and obstacle:
            raise ValueError(
                f"{obstacle}, which a model that drops tokens cannot give; lowbit.set_length(model, None) keeps all"
            )
        fast = self._fast(hidden_states)
        # How many tokens are padding is not known while the whole model is traced (torch.compile, torch.export).
        traced = torch.compiler.is_compiling() and attention_mask is not None
        if obstacle or (not drops and (traced or fast is None)):
            return self._by_layer[0](hidden_states, additive(attention_mask, hidden_states.dtype), **kwargs)
        tokens, sequences, places = without_padding(hidden_states, attention_mask)
        protected = None
        if protected_tokens is not None and self.lengths is not None:
            protected = protected_tokens.bool().expand(hidden_states.shape[:2]).flatten()
            protected = protected if places is None else protected[places]
        if len(tokens):
            run = self._run_modules if fast is None else fast  # not `fast or`: Dynamo of torch 2.11 cannot trace that
            tokens = run(tokens, sequences, first_token_only, protected)
        if first_token_only and len(tokens):
            output = with_first_tokens(tokens, sequences, places, hidden_states.shape)
        else:
            output = with_padding(tokens, places, hidden_states.shape)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)

    def _compile_options(self, options: dict[str, Any]) -> dict[str, Any]:
        # Each layer that drops tokens has a shape of its own: compiled for each, they would soon be too many.
        return options if self.lengths is None else {"dynamic": True, **options}

    def _fast(self, hidden_states: torch.Tensor) -> Callable[..., torch.Tensor] | None:
        """What runs all layers faster than their modules, where there is such a thing and it can take this call."""
        return None

    def _obstacle(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """What of this call only the layers as they are can do."""
        for name in ("output_attentions", "output_hidden_states", "output_scores"):
            if kwargs.get(name, getattr(self.config, name, False)):
                return f"{name}=True asks for the states of all tokens in every layer"
        if mask is not None and mask.dim() != 2:
            implementation = getattr(self.config, "_attn_implementation", UNPADDED)
            origin = f" (set_attn_implementation({implementation!r}) makes such; call it before set_length)"
            origin = "" if implementation == UNPADDED else origin
            return f"an attention mask of shape {tuple(mask.shape)}{origin} is no padding mask [B, S]"
        if any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "past_key_values")):
            return "cross-attention and caches are those of decoders"
        return None

    def _run_modules(
        self, tokens: torch.Tensor, sequences: Sequences, first_token_only: bool, protected: torch.Tensor | None
    ) -> torch.Tensor:
        """All layers by their modules: tokens [T, H] -> [T, H]; `first_token_only`: [B, H]."""
        steps = self._plan(sequences, tokens.shape[0], first_token_only)
        survivors = self._survivors(sequences, first_token_only)
        target = self.importance_target
        for number, (layer, keep) in enumerate(zip(self.layer, steps, strict=True)):
            if number in self.skip:
                if keep is not None and keep.first_only:
                    (tokens,) = gathered(drop(None, sequences, keep, tokens.shape[0], 0, None), tokens)
                continue
            before = tokens
            run: Callable[..., Any] = self._run_layer_modules
            if self.training and getattr(layer, "gradient_checkpointing", False):
                tokens, kept, received = layer._gradient_checkpointing_func(
                    run, number, layer, tokens, sequences, keep, protected
                )
            else:
                tokens, kept, received = run(number, layer, tokens, sequences, keep, protected)
            if target is not None and received is not None and kept is not None:
                self.importance_losses.append(importance_loss(received, target, sequences))
                target = target[kept.rows]
            sequences, protected = _after(before, kept, sequences, protected, survivors)
            self._note(sequences)
        return tokens if survivors is None else survivors.all(tokens)

    def _note(self, sequences: Sequences, layers: int = 1) -> None:
        if self.noted_lengths is not None:
            self.noted_lengths += [sequences.cu_seqlens.diff()] * layers

    def _survivors(self, sequences: Sequences, first_token_only: bool) -> Survivors | None:
        if first_token_only:
            return None
        return Survivors(self.lengths is None or self.lengths.restore, sequences.host is not None)

    def _run_layer_modules(
        self,
        number: int,
        layer: nn.Module,
        tokens: torch.Tensor,
        sequences: Sequences,
        keep: Keep | None,
        protected: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Kept | None, torch.Tensor | None]:
        importance = "all" if self.soft_mask is not None else keep and keep.score
        context, received = self.run_attention_modules(layer, tokens, sequences, importance)
        heads = self.architecture.heads(layer)
        kept = factor = None
        if keep is not None:
            kept = drop(received, sequences, keep, tokens.shape[0], heads, protected)
        if self.soft_mask is not None:
            factor = self.soft_mask(number, received, sequences, heads).unsqueeze(-1).to(tokens.dtype)  # type: ignore[arg-type]
            (factor,) = gathered(kept, factor)
        return self.run_rest_modules(layer, *gathered(kept, context, tokens), factor), kept, received

    def _run_attention_modules(
        self, layer: nn.Module, tokens: torch.Tensor, sequences: Sequences, importance: str | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens [T, H] -> context [T, heads * head_dim], importance [T] if any."""
        paths, find = self.architecture, layer.get_submodule
        module: Any = find(paths.attention)
        heads = paths.heads(layer)
        query, key, value = (find(path)(tokens).unflatten(-1, (heads, -1)) for path in paths.projections)
        options = _attention_options(paths, layer)
        dropout = module.dropout.p if self.training else 0.0
        runs = query.dtype != torch.float64 and (not query.is_cuda or query.shape[-1] in HEAD_DIMS)
        learned = self.soft_mask is not None or (self.importance_target is not None and importance is not None)
        # `attention` gives importance no gradient. On a CPU it rounds otherwise where no gradient is wanted, as in the
        # first pass of reentrant checkpointing.
        if dropout or learned or not runs or (self.training and not query.is_cuda):
            options = {"bits": None, "asymmetric": (), "dropout_p": dropout, "importance": importance, **options}
            result = attention_eager(query, key, value, *sequences[:2], **options)
        else:
            result = _attention(query, key, value, sequences, importance, options)
        return result.output.flatten(1), result.importance

    def _run_rest_modules(
        self, layer: nn.Module, context: torch.Tensor, tokens: torch.Tensor, factor: torch.Tensor | None
    ) -> torch.Tensor:
        """What takes each token for itself: context and tokens [T, H], a soft mask [T, 1] or None -> tokens."""
        paths, find = self.architecture, layer.get_submodule
        place = None if self.soft_mask is None else self.soft_mask.place
        output = find(paths.attention_output)(context)
        output = output if paths.attention_dropout is None else find(paths.attention_dropout)(output)
        tokens = find(paths.attention_norm)(output + tokens)
        tokens = tokens * factor if factor is not None and place == "attention" else tokens
        output = find(paths.ffn_output)(find(paths.ffn_activation)(find(paths.ffn_input)(tokens)))
        output = output if paths.ffn_dropout is None else find(paths.ffn_dropout)(output)
        tokens = find(paths.ffn_norm)(output + tokens)
        return tokens * factor if factor is not None and place == "ffn" else tokens


Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # int8 [T, K], scale [T], zero point [T] or None


class PackedEncoder(UnpaddedEncoder):
    """`UnpaddedEncoder` of a packed model, in a few operations; by its modules where gradients are needed.

    Args:
        encoder: Hugging Face encoder with packed linears in its child `layer`.
        architecture: where a layer keeps what.
        model_config: of the model.
        config: of its quantization.

    Raises:
        ValueError: a configuration that does not run without padding (`check`).
    """

    _replaced = (*UnpaddedEncoder._replaced, "run_attention", "run_rest", "run")

    def __init__(self, encoder: nn.Module, architecture: Architecture, model_config: Any, config: LowbitConfig) -> None:
        super().__init__(encoder, architecture, model_config)
        check(config)
        assert config.activation_bits is not None  # check said so
        self.bits = config.activation_bits
        first = self.layer[0]
        self.heads, self.head_dim = architecture.heads(first), architecture.head_dim(first)
        self.layout = first.get_submodule(architecture.ffn_input).layout
        self.gelu = first.get_submodule(architecture.ffn_input).activation
        self.activation = first.get_submodule(architecture.ffn_activation)
        self.eps = first.get_submodule(architecture.attention_norm).eps
        self.symmetric = {site: site not in config.asymmetric for site in ("linear", "ffn_output")}
        self.attention_options = _attention_options(architecture, first)
        self._found: Found | None = None
        # What `lowbit.compile` and `lowbit.compile_for` replace.
        self.run_attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = self._run_attention
        self.run_rest: Callable[..., tuple[torch.Tensor, Codes]] = self._run_rest
        self.run: Callable[..., torch.Tensor] = self._run

    def compile_layers(self, **options: Any) -> None:
        options = self._compile_options(options)
        self.run_attention = torch.compile(self._run_attention, **options)
        self.run_rest = torch.compile(self._run_rest, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Copies find weights of their own."""
        return {**super().__getstate__(), "_found": None}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._found = None  # `.to(device)` is to free the memory that it leaves
        return super()._apply(*args, **kwargs)

    def _fast(self, hidden_states: torch.Tensor) -> Callable[..., torch.Tensor] | None:
        norms = [own.ffn_norm.weight for own in self._weights()]
        needs_modules = (
            self.training
            or self.soft_mask is not None
            or (torch.is_grad_enabled() and any(p.requires_grad for p in (hidden_states, *self.layer.parameters())))
            or hidden_states.dtype == torch.float64
            or (hidden_states.is_cuda and self.head_dim not in HEAD_DIMS)
            # Offloaded layers and layers on several devices have hooks that bring weights and activations together.
            or any(norm.device != hidden_states.device for norm in norms)
        )

        return None if needs_modules else self.run

    def _run(
        self,
        tokens: torch.Tensor,
        sequences: Sequences,
        first_token_only: bool = False,
        protected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """All layers: tokens [T, H] -> [T, H], `first_token_only`: [B, H].

        Tokens after the last sequence belong to none and do not matter.
        """
        steps = self._plan(sequences, tokens.shape[0], first_token_only)
        survivors = self._survivors(sequences, first_token_only)
        sequences = sequences._replace(host=None)  # a layer compiled with it would be compiled again without
        codes: Codes = quantize_per_token(tokens, self.bits, self.symmetric["linear"])
        bias = self._position_bias(tokens, sequences.max_seqlen)
        weights = self._weights()
        native = self._native(tokens.device, tokens.dtype)
        while weights:
            together = self._layers_together(weights, steps) if native else 0
            if together:
                last = steps[together - 1]
                tokens, codes = self._run_layers(weights[:together], tokens, codes, sequences, bias, last is not None)
                self._note(sequences, together - 1)
                sequences = sequences if last is None or last.sequences is None else last.sequences
            else:
                before = tokens
                tokens, codes, kept = self._run_layer(weights[0], tokens, codes, sequences, steps[0], protected, bias)
                sequences, protected = _after(before, kept, sequences, protected, survivors)
            self._note(sequences)
            done = together or 1
            weights, steps = weights[done:], steps[done:]
        return tokens if survivors is None else survivors.all(tokens)

    def _position_bias(self, tokens: torch.Tensor, length: int) -> torch.Tensor | None:
        """float32 [heads, S, S], where the architecture has a bias."""
        if self.architecture.position_bias is None:
            return None
        bias = getattr(self._by_layer[0], self.architecture.position_bias)
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
        products = [product for own in weights for product in own.products]
        packed, scale, biases = (list(itertools.chain.from_iterable(of)) for of in zip(*products, strict=True))
        norms = [tensor for own in weights for norm in own.norms for tensor in norm]
        tokens, q, q_scale, zero_point = encoder_cpu.encoder_layers(
            tokens, *codes, packed, scale, biases, norms, self.layout, self.gelu, self.eps, self.bits,
            self.symmetric["ffn_output"], sequences.cu_seqlens, self.heads, self.attention_options["scaling"],
            self.attention_options["asymmetric"], bias, first_only,
        )  # fmt: skip
        return tokens, (q, q_scale, None if self.symmetric["linear"] else zero_point)

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
            kept = drop(importance, sequences, keep, tokens.shape[0], self.heads, protected)
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
        if self._native(codes[0].device, dtype):
            context, received = encoder_cpu.encoder_attention(
                *codes, *projections, self.layout, *sequences[:2], self.heads, self.attention_options["scaling"],
                self.attention_options["bits"], self.attention_options["asymmetric"], bias, importance,
            )  # fmt: skip
            return context, received if importance else None
        parts = self._multiply(projections, codes, dtype)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        result = _attention(query, key, value, sequences, importance, {**self.attention_options, "bias": bias})
        return result.output.flatten(1), result.importance

    def _run_rest(self, weights: Weights, context: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, Codes]:
        """What takes each token for itself: context and tokens [T, H] -> tokens of the next layer, their codes."""
        symmetric, dtype = self.symmetric, tokens.dtype
        if self._native(tokens.device, dtype):
            first, second, third = weights.attention_output, weights.ffn_input, weights.ffn_output
            packed, scale = first.packed + second.packed + third.packed, first.scale + second.scale + third.scale
            biases = first.bias + second.bias + third.bias
            tokens, q, q_scale, zero_point = encoder_cpu.encoder_rest(
                context, tokens, packed, scale, biases, [*weights.attention_norm, *weights.ffn_norm], self.layout,
                self.gelu, self.eps, self.bits, symmetric["linear"], symmetric["ffn_output"],
            )  # fmt: skip
            return tokens, (q, q_scale, None if symmetric["linear"] else zero_point)
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

    def _native(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether layers, or halves of one, run as one operation of the native CPU kernels."""
        options = self.attention_options
        return device.type == "cpu" and encoder_cpu.takes(
            dtype, options.get("bits"), options.get("asymmetric", ()), self.gelu
        )

    def _multiply(
        self, product: Product, codes: Codes, dtype: torch.dtype, activation: str | None = None
    ) -> list[torch.Tensor]:
        x, scale, zero_point = codes
        y = joint_linear(x, *product, scale, zero_point, self.layout, activation, dtype)
        return list(y.split([tensor.shape[0] for tensor in product.packed], -1))

    def _weights(self) -> list[Weights]:
        """Of all layers."""
        if torch.compiler.is_compiling():
            return find(self.layer, self.architecture).weights
        found = self._found  # read once: another thread may be running the same model
        if found is None or not found.holds(self.layer):
            found = self._found = find(self.layer, self.architecture)
        return found.weights


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


def _attention_options(architecture: Architecture, layer: nn.Module) -> dict[str, Any]:
    """Of `attention`, for a layer: how it scales its scores, and its quantizers (none: float)."""
    module: Any = layer.get_submodule(architecture.attention)
    options: dict[str, Any] = {"scaling": getattr(module, "scaling", architecture.head_dim(layer) ** -0.5)}
    quantizers = getattr(module, "quantizers", None)
    if quantizers:
        options["bits"] = quantizers["query"].bits
        options["asymmetric"] = tuple(site for site in _SITES if not quantizers[site].symmetric)
    return options


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    importance: str | None,
    options: dict[str, Any],
) -> AttentionOutput:
    result = attention(query, key, value, *sequences[:2], importance=importance, **options)
    return result if isinstance(result, AttentionOutput) else AttentionOutput(result, None, None)


def _after(
    before: torch.Tensor,
    kept: Kept | None,
    sequences: Sequences,
    protected: torch.Tensor | None,
    survivors: Survivors | None,
) -> tuple[Sequences, torch.Tensor | None]:
    """Sequences and protected tokens behind a layer."""
    if kept is None:
        return sequences, protected
    if survivors is not None:
        survivors.keep(before, kept)
    return kept.sequences, None if protected is None else protected[kept.rows]
