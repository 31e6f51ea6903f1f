"""Encoders that run on the tokens of a batch without padding, and may drop tokens on the way.

Padding is taken out once at the entrance and put back, as zeros, at the exit. A layer that drops tokens does so after
its attention and before its output projection, which like all that follows takes each token for itself: dropping
before or after it is the same function.

`UnpaddedEncoder` calls the modules of the layers: float, prepared or packed, also in training. `PackedEncoder`
(`packed_encoder`) runs a packed model's layers in a few operations.

The layers stay what and where they were, with their names. They run as they are where an attention map, hidden states
or a mask that is no padding mask are asked for, where a row begins with padding, where hooks would see what they do,
and where they do something else than `proof` can reproduce; with dropped tokens all of this is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any, Protocol

import torch
from torch import nn

from lowbit_kernels import AttentionOutput, attention, attention_eager
from lowbit_kernels.varlen_attention.shared_gpu import HEAD_DIMS

from ...config import LengthConfig
from ...models import Architecture
from .leaving import Exits, noting
from .proof import attention_options, prove
from .pruning import Keep, Kept, Survivors, drop, gathered, importance_loss, plan
from .sequences import Sequences, additive, has_gaps, of_padding, with_first_tokens, with_padding, without_padding
from .snapshot import Snapshot, any_global_hook, is_hooked
from .stand_in import StandIn


class SoftMask(Protocol):
    """A factor for every token in place of dropping it, learned: see `lowbit.length`.

    `place` says what is multiplied: the output of the layer's "attention" (PoWER-BERT) or of its "ffn" (LTP).
    """

    place: str

    def __call__(self, layer: int, importance: torch.Tensor, sequences: Sequences, heads: int) -> torch.Tensor: ...


class UnpaddedEncoder(StandIn):
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
        super().__init__(encoder)
        self.layer: Any
        self.config = model_config
        self.architecture = architecture
        self.lengths = None
        self.skip: frozenset[int] = frozenset()
        self.soft_mask: SoftMask | None = None
        self.importance_target: torch.Tensor | None = None
        self.importance_losses: list[torch.Tensor] = []
        self.noted_lengths: list[torch.Tensor] | None = None
        self.replaced_attention: str | None = None
        self._proof: tuple[Snapshot, str | None] = (Snapshot(), None)
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
            keep = torch.tensor(() if lengths is None else lengths.keep, dtype=torch.float64, device="cpu")
            device = next(self.layer.parameters()).device
            device = torch.device("cpu") if device.type == "meta" else device  # offloaded
            # Their bits, which `.half()` leaves alone.
            self.register_buffer("_keep_bits", keep.view(torch.int64).to(device), persistent=False)

    def _plan(self, sequences: Sequences, num_tokens: int, first_token_only: bool) -> list[Keep | None]:
        bits: Any = self._keep_bits
        keep = bits.to(sequences.cu_seqlens.device).view(torch.float64)
        steps = plan(self.lengths, len(self.layer), sequences, num_tokens, first_token_only, keep)
        if len(steps) != len(self.layer):
            raise ValueError(
                f"the model has {len(self.layer)} layers, and its lengths are for {len(steps)}; give it lengths for "
                "these: lowbit.set_length(model, lowbit.LengthConfig(keep=...))"
            )
        return steps

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
        exits: Exits | None = None,
        **kwargs: Any,
    ) -> Any:
        """A batch through all layers, or through as many as each sequence takes to leave.

        Args:
            hidden_states: [B, S, H].
            attention_mask: [B, S] or None; what the model's own attention adds to scores, where it has one.
            first_token_only: the caller reads hidden_states[:, 0] only, what else is returned may be anything.
            protected_tokens: bool [B, S], tokens to keep as long as there is room, or None.
            exits: what is told the states behind layers, and says which sequences leave there; None: nothing.

        Returns:
            transformers' output with last_hidden_state [B, S, H]; [B', S, H] of the rows that stayed, where some left.

        Raises:
            ValueError: tokens are to be dropped, and something is asked for that needs them all, a row begins with
                padding (with exits too), or the layers are not those of the architecture.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        compiling = torch.compiler.is_compiling()
        drops = self.lengths is not None or self.soft_mask is not None
        prevented, by_modules = self._look(drops)
        mask = of_padding(attention_mask) if self.architecture.own_attention else attention_mask
        obstacle = self._obstacle(hidden_states, mask, kwargs) or prevented
        if drops and obstacle:
            raise ValueError(
                f"{obstacle}, which a model that drops tokens cannot give; lowbit.set_length(model, None) keeps all"
            )
        fast = None if obstacle or by_modules else self._fast(hidden_states, exits)
        # How many tokens are padding is not known while the whole model is traced (torch.compile, torch.export).
        traced = compiling and mask is not None
        if obstacle or (not drops and exits is None and (traced or fast is None)):
            return self._by_layer(hidden_states, attention_mask, exits, **kwargs)
        tokens, sequences, places = without_padding(hidden_states, mask)
        if sequences.begin_with_padding:  # a head that reads the first place of a row reads padding, then
            if drops or exits is not None:
                raise ValueError(
                    "rows of the batch begin with padding, where heads read the first token, which a model that drops "
                    "tokens, or has exits, cannot give; pad on the right (tokenizer.padding_side = 'right')"
                )
            return self._by_layer(hidden_states, attention_mask, **kwargs)
        if self.architecture.position_bias is not None and has_gaps(mask):  # where two tokens are no neighbours
            return self._by_layer(hidden_states, attention_mask, **kwargs)
        protected = None
        if protected_tokens is not None and self.lengths is not None:
            protected = protected_tokens.bool().expand(hidden_states.shape[:2]).flatten()
            protected = protected if places is None else protected[places]
        if len(tokens):
            run = self._run_modules if fast is None else fast  # not `fast or`: Dynamo of torch 2.11 cannot trace that
            more = () if exits is None else (exits,)  # graphs of `compile_for` take four arguments
            tokens = run(tokens, sequences, first_token_only, protected, *more)
        stayed = None if exits is None else exits.stayed()
        if stayed is not None and first_token_only:
            output = tokens.unsqueeze(1).expand(-1, *hidden_states.shape[1:])
        elif first_token_only and len(tokens):
            output = with_first_tokens(tokens, sequences, places, hidden_states.shape)
        else:
            output = with_padding(tokens, places, hidden_states.shape)
            output = output if stayed is None else output[stayed]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=output)

    def _by_layer(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        exits: Exits | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' encoder, as if we were not there; exits look on, and no sequence leaves before the end."""
        mask = attention_mask
        if self.architecture.own_attention:  # else it is ours, which takes a padding mask as it is
            attention_mask = additive(attention_mask, hidden_states.dtype)
        encoder: Any = self.original if exits is None else noting(exits, self.original, hidden_states, mask)
        return encoder.forward(hidden_states, attention_mask, **kwargs)

    def prevented(self) -> str | None:
        """Why the layers cannot be run without padding, None where they can.

        They are looked at, and run both ways on a few tokens (`proof`), when this is asked first, and again after
        modules were replaced or their settings changed.
        """
        return self._look(drops=False)[0]

    def _look(self, drops: bool) -> tuple[str | None, bool]:
        """Why the layers cannot be run without padding, if so; whether they can by calling their modules only.

        With dropped tokens, hooks of the modules that are called do without padding.
        """
        if torch.compiler.is_compiling():  # a whole model is traced by its modules; see `compile_layers`
            return None if drops else "the model is being traced", False
        self._original[0].__dict__["training"] = self.training
        snapshot, reason = self._proof
        compared = snapshot.compare()
        if compared == "changed":
            # Before the proof: another thread may change the model meanwhile.
            snapshot = Snapshot([self._original[0], *(module for module in self.modules() if module is not self)])
            reason = Context().run(prove, self)  # where transformers is noting no hidden states of this call
            self._proof = snapshot, reason
            compared = snapshot.compare()
        if reason is not None:
            return reason, False
        if any_global_hook():
            return "hooks of all modules are registered, which want to see every one of them run", False
        hooked = snapshot.hooked
        if hooked:
            called = self._called() if drops else set()
            for name, module in self.named_modules():
                if name and name not in called and is_hooked(module):
                    return f"{name} has forward hooks, which want to see it run", False
        return None, hooked or compared == "mode"

    def _called(self) -> set[str]:
        """Names of the modules that are called where layers run without padding."""
        paths = self.architecture.called()
        return {f"layer.{number}.{path}" for number in range(len(self.layer)) for path in paths}

    def problem(self) -> str | None:
        """What else keeps the layers from being run without padding, in words: for `proof`."""
        return None

    def one_layer(self, number: int, tokens: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """A layer without padding, dropping nothing: tokens [T, H] -> [T, H]. For `proof`."""
        layer = self.layer[number]
        context, _ = self._run_attention_modules(layer, tokens, sequences, None)
        return self._run_rest_modules(layer, context, tokens, None)

    def _compile_options(self, options: dict[str, Any]) -> dict[str, Any]:
        # Each layer that drops tokens has a shape of its own: compiled for each, they would soon be too many.
        return options if self.lengths is None else {"dynamic": True, **options}

    def _fast(self, hidden_states: torch.Tensor, exits: Exits | None) -> Callable[..., torch.Tensor] | None:
        """What runs all layers faster than their modules, where there is such a thing and it can take this call."""
        return None

    def _obstacle(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> str | None:
        """What of this call only the layers as they are can do."""
        for name in ("output_attentions", "output_hidden_states", "output_scores"):
            if kwargs.get(name, getattr(self.config, name, False)) not in (None, False):  # 0 is a state's number
                return f"{name}=True asks for the states of all tokens in every layer"
        if mask is not None and mask.shape != hidden_states.shape[:2]:
            implementation = getattr(self.config, "_attn_implementation", "lowbit")
            origin = f" (set_attn_implementation({implementation!r}) makes such; call it before set_length)"
            origin = "" if implementation == "lowbit" else origin
            return f"an attention mask of shape {tuple(mask.shape)}{origin} is no padding mask [B, S]"
        if any(kwargs.get(name) is not None for name in ("encoder_hidden_states", "past_key_values", "cache")):
            return "cross-attention and caches are those of decoders"
        return None

    def _run_modules(
        self,
        tokens: torch.Tensor,
        sequences: Sequences,
        first_token_only: bool,
        protected: torch.Tensor | None,
        exits: Exits | None = None,
    ) -> torch.Tensor:
        """All layers by their modules: tokens [T, H] -> [T, H]; `first_token_only`: [B, H], of those that stayed."""
        steps = self._plan(sequences, tokens.shape[0], first_token_only)
        survivors = self._survivors(sequences, first_token_only)
        target = self.importance_target
        for number, layer in enumerate(self.layer):
            kept = None if exits is None else exits.after(number, tokens, sequences)
            if kept is not None:
                before, tokens = tokens, tokens[kept.rows]
                sequences, protected = after(before, kept, sequences, protected, survivors)
                if not len(tokens):
                    break
                steps = self._plan(sequences, len(tokens), first_token_only)
            keep = steps[number]
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
            sequences, protected = after(before, kept, sequences, protected, survivors)
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
        options = attention_options(paths, layer)
        dropout = module.dropout.p if self.training else 0.0
        runs = query.dtype != torch.float64 and (not query.is_cuda or query.shape[-1] in HEAD_DIMS)
        learned = self.soft_mask is not None or (self.importance_target is not None and importance is not None)
        # `attention` gives importance no gradient. On a CPU it rounds otherwise where no gradient is wanted, as in the
        # first pass of reentrant checkpointing.
        if dropout or learned or not runs or (self.training and not query.is_cuda):
            options = {"bits": None, "asymmetric": (), "dropout_p": dropout, "importance": importance, **options}
            result = attention_eager(query, key, value, *sequences[:2], **options)
        else:
            result = run_attention(query, key, value, sequences, importance, options)
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


def run_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    importance: str | None,
    options: dict[str, Any],
) -> AttentionOutput:
    result = attention(query, key, value, *sequences[:2], importance=importance, **options)
    return result if isinstance(result, AttentionOutput) else AttentionOutput(result, None, None)


def after(
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
