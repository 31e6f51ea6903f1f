"""What is quantized, to how many bits, and how: one dataclass that travels from `prepare` to `config.json`.

Bits are written W-E-A as in the papers: `weight_bits`, `embedding_bits`, `activation_bits` (2-2-8, 1-1-8).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 3  # of packed weights in files: 1 as in memory, 2 ternary ones at 1.6 bits, 3 no rows with padding

# (field, accepted values); None means "left in float".
_CHOICES: dict[str, tuple[Any, ...]] = {
    "weight_bits": (None, 2, 1),
    "embedding_bits": (None, 8, 2, 1),
    "position_embedding_bits": (None, 8),
    "output_embedding_bits": (None, 8),
    "activation_bits": (None, 8, 4),
    "granularity": ("per_row", "per_tensor"),
    "embedding_granularity": ("per_row", "per_tensor"),
    "activation_granularity": ("per_token", "per_tensor"),
    "stage": ("float", "prepared", "packed"),
    "format_version": tuple(range(1, FORMAT_VERSION + 1)),
    "quant_method": ("lowbit",),
}
_SITES = ("linear", "ffn_output", "query", "key", "attention_probs", "value")


def names(entry: str, module_name: str) -> bool:
    """Whether an entry of `modules_to_not_convert` names the module, or one that it is in."""
    parts = module_name.split(".")
    ancestors = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(name == entry or name.endswith("." + entry) for name in ancestors)


def _are_counts(values: Any) -> bool:
    """Whether it is a list of whole numbers from 1."""
    numbers = values if isinstance(values, list) else []
    return bool(numbers) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)


@dataclass
class LowbitConfig:
    """How a model's linears, embeddings, activations and attention are quantized.

    Attributes:
        weight_bits: 2 (ternary), 1 (binary) or None (float linears).
        weight_quantizer: name in `lowbit.quantizers.WEIGHT_QUANTIZERS`: "twn" (ternary) or "bwn" (binary).
        embedding_bits: word embedding table: 2, 1, 8 or None (float).
        position_embedding_bits: position embedding table: 8 or None (float, as released).
        output_embedding_bits: the decoder of a head that scores words (masked language models), which is as large as
            the word embedding: 8 or None (float). Models without one do not have it afterwards.
        activation_bits: inputs of quantized linears, and Q, K, V and attention probabilities: 8, 4 or None (float).
        granularity: scales of the linears, "per_row" or "per_tensor" (the published mode).
        embedding_granularity: scales of the embeddings, "per_row" (published) or "per_tensor".
        activation_granularity: "per_token" (a sentence does not depend on the others in its batch; that there is
            padding widens the range of its attention probabilities to 0, which `lowbit.fuse` avoids) or "per_tensor"
            (published).
        activation_clip: clip activations to [-clip, clip] first (published: 2.5), with zero gradient outside;
            None (default) does not clip.
        asymmetric: sites quantized with a zero point, out of "linear", "ffn_output" (the input of the FFN's output
            linear, after GELU), "query", "key", "attention_probs", "value". The default is released BinaryBERT's.
        quantize_attention: quantize Q, K, V and the attention probabilities.
        quantize_pooler: quantize the pooler's linear (released models do).
        modules_to_not_convert: modules left in float, with all inside them: full names, or endings of names that
            start at a dot ("pooler", "layer.0", "output.dense").
        split: each quantized weight is a pair of binary planes (ternary weight splitting). Set by `lowbit.split`.
        num_attention_heads: attention heads kept, None for all: a number for every layer, or a list of one a layer. Set
            by `lowbit.slim`, `prune_heads` and `extract`, as are the next two.
        kept_heads: which ones, a list of ascending numbers for each layer; None where that is not known. Distillation
            compares them with these heads of the teacher, which should be the model that was slimmed, or a copy.
        intermediate_sizes: neurons of each layer's FFN, a list, where layers differ; None where they do not.
        stage: "float" (only slimmed), "prepared" (fake-quantized) or "packed". Set by `prepare` and `convert`.
        format_version: version of the packed checkpoint format: 3. 2 writes rows of binary weights padded to 256 values
            (pairs: 128), 1 ternary weights with 2 bits instead of 1.6 as well. What is read as 1 or 2 is saved as 3.
    """

    weight_bits: int | None = 2
    weight_quantizer: str = "twn"
    embedding_bits: int | None = 2
    position_embedding_bits: int | None = None
    output_embedding_bits: int | None = None
    activation_bits: int | None = 8
    granularity: str = "per_row"
    embedding_granularity: str = "per_row"
    activation_granularity: str = "per_token"
    activation_clip: float | None = None
    asymmetric: list[str] = field(default_factory=lambda: ["attention_probs", "ffn_output"])
    quantize_attention: bool = True
    quantize_pooler: bool = True
    modules_to_not_convert: list[str] = field(default_factory=list)
    split: bool = False
    num_attention_heads: int | list[int] | None = None
    kept_heads: list[list[int]] | None = None
    intermediate_sizes: list[int] | None = None
    stage: str = "float"
    format_version: int = FORMAT_VERSION
    quant_method: str = "lowbit"

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            value = getattr(self, name)
            if value not in accepted or isinstance(value, bool):
                raise ValueError(f"{type(self).__name__}: {name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
        for name in ("quantize_attention", "quantize_pooler", "split"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r}; accepted: True, False")
        if self.modules_to_not_convert is None:  # as other libraries write "none"
            self.modules_to_not_convert = []
        for name in ("asymmetric", "modules_to_not_convert"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
                raise ValueError(f"{type(self).__name__}: {name}={value!r}; accepted: a list of names")
        unknown = sorted(set(self.asymmetric) - set(_SITES))
        if unknown:
            raise ValueError(f"{type(self).__name__}: asymmetric={unknown}; accepted: {', '.join(_SITES)}")
        self._check_widths()
        clip = self.activation_clip
        if clip is not None and not (isinstance(clip, int | float) and clip > 0):
            raise ValueError(f"{type(self).__name__}: activation_clip={clip!r}; accepted: None or > 0")
        if self.split and (self.weight_bits != 1 or self.embedding_bits == 2):
            raise ValueError(
                f"{type(self).__name__}: split=True needs weight_bits=1 and embedding_bits of 1, 8 or None, got "
                f"{self.weight_bits} and {self.embedding_bits}"
            )

    def _check_widths(self) -> None:
        heads, sizes = self.num_attention_heads, self.intermediate_sizes
        if not (heads is None or _are_counts([heads]) or _are_counts(heads)):
            raise ValueError(
                f"{type(self).__name__}: num_attention_heads={heads!r}; accepted: None, a whole number from 1, or a "
                "list of one a layer"
            )
        if not (sizes is None or (_are_counts(sizes) and heads is not None)):
            raise ValueError(
                f"{type(self).__name__}: intermediate_sizes={sizes!r}; accepted: None, or beside num_attention_heads a "
                "list of whole numbers from 1, one a layer"
            )
        lengths = {len(each) for each in (heads, sizes, self.kept_heads) if isinstance(each, list)}
        if self.kept_heads is not None and not self._are_kept_heads(self.kept_heads):
            raise ValueError(
                f"{type(self).__name__}: kept_heads={self.kept_heads!r}; accepted: None, or for each layer a list of "
                f"num_attention_heads={heads} ascending numbers from 0"
            )
        if len(lengths) > 1:
            raise ValueError(
                f"{type(self).__name__}: num_attention_heads, kept_heads and intermediate_sizes are of "
                f"{' and '.join(map(str, sorted(lengths)))} layers; one number expected"
            )

    def _are_kept_heads(self, layers: Any) -> bool:
        if not isinstance(layers, list) or not layers:
            return False
        counts = self.num_attention_heads
        counts = counts if isinstance(counts, list) else [counts] * len(layers)  # type: ignore[list-item]
        return len(counts) == len(layers) and all(
            isinstance(heads, list)
            and len(heads) == count
            and all(isinstance(head, int) and not isinstance(head, bool) and head >= 0 for head in heads)
            and heads == sorted(set(heads))
            for count, heads in zip(counts, layers, strict=True)
        )

    def widths(self) -> dict[str, Any]:
        """The fields that say which heads and neurons the layers have: of the float model, whatever becomes of it."""
        return {name: getattr(self, name) for name in ("num_attention_heads", "kept_heads", "intermediate_sizes")}

    def skips(self, module_name: str) -> bool:
        """Whether `modules_to_not_convert` names this module or one that it is in."""
        return any(names(entry, module_name) for entry in self.modules_to_not_convert)

    def get(self, name: str, default: Any = None) -> Any:
        """A field by name, as transformers reads quantization configs."""
        return getattr(self, name, default)

    def replace(self, **changes: Any) -> LowbitConfig:
        """A copy with some fields changed; always a plain `LowbitConfig`."""
        return LowbitConfig(**{**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, as written under `quantization_config` in config.json."""
        return dataclasses.asdict(self)

    to_diff_dict = to_dict  # the name transformers calls when it writes config.json

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LowbitConfig:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a field this version does not know, or a value outside its range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"quantization_config has fields this lowbit does not know: {', '.join(unknown)}; "
                "the checkpoint was written by a newer version, upgrade lowbit"
            )
        return cls(**values)


@dataclass
class TernaryConfig(LowbitConfig):
    """TernaryBERT, 2-2-8 by default (Zhang et al. 2020)."""


@dataclass
class BinaryConfig(LowbitConfig):
    """BinaryBERT without splitting, 1-1-8 by default (BWN); `lowbit.split` makes the split pair (Bai et al. 2021)."""

    weight_bits: int | None = 1
    weight_quantizer: str = "bwn"
    embedding_bits: int | None = 1


@dataclass(frozen=True)
class LengthConfig:
    """How many tokens of each sequence every layer keeps; set by `lowbit.set_length`, kept in config.json.

    A layer drops tokens after its attention and before its FFN: those that receive the least attention. The first token
    of a sequence ([CLS]) is always kept, and the order of the others never changes.

    Attributes:
        keep: one number a layer, by `unit`:
            "ratio": of the sequence's own length when it entered the model, in (0, 1], not increasing; rounded up;
            "tokens": a number of tokens, at least 1, not increasing (Length-Adaptive Transformer);
            "threshold": tokens that receive less attention than so many even shares are dropped, from 0 (learned token
            pruning). An even share is what each would get if all tokens that the layer still has of the sequence got
            the same: 0.5 means the same for short and for long ones. Published thresholds are of attention divided by
            the padded length: times that length, they are these.
        unit: "ratio", "tokens" or "threshold".
        min_tokens: fewer are never kept of a sequence that has as many.
        score: attention received from "all" queries, or from the first one ("cls": cheaper).
        protect: tokens kept as long as there is room: "first_segment" (token type 0: the question, in question
            answering). The first token needs no mention.
        restore: give dropped tokens the hidden state that they had when they were dropped; heads that read all tokens
            need it. Without it they end as zeros.
    """

    keep: tuple[float, ...]
    unit: str = "ratio"
    min_tokens: int = 1
    score: str = "all"
    protect: tuple[str, ...] = ()
    restore: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.keep, str | int | float) or isinstance(self.protect, str):
            raise ValueError(f"LengthConfig: keep={self.keep!r}, protect={self.protect!r}; accepted: tuples")
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "protect", tuple(self.protect))
        for name, accepted in (("unit", ("ratio", "tokens", "threshold")), ("score", ("all", "cls"))):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"LengthConfig: {name}={getattr(self, name)!r}; accepted: {', '.join(map(repr, accepted))}"
                )
        if unknown := sorted(set(self.protect) - {"first_segment"}):
            raise ValueError(f"LengthConfig: protect={unknown}; accepted: 'first_segment' (token type 0)")
        if not isinstance(self.min_tokens, int) or self.min_tokens < 1:
            raise ValueError(f"LengthConfig: min_tokens={self.min_tokens!r}; accepted: a whole number from 1")
        accepted_keep, fits = {
            "ratio": ("ratios in (0, 1]", lambda k: 0 < k <= 1),
            "tokens": ("whole numbers from 1", lambda k: k >= 1 and k == int(k)),
            "threshold": ("thresholds from 0", lambda k: k >= 0),
        }[self.unit]
        if not self.keep or not all(isinstance(k, int | float) and math.isfinite(k) and fits(k) for k in self.keep):
            raise ValueError(f"LengthConfig: keep={self.keep} with unit={self.unit!r}; accepted: {accepted_keep}")
        if self.unit != "threshold" and any(a < b for a, b in itertools.pairwise(self.keep)):
            raise ValueError(f"LengthConfig: keep={self.keep} increases; a layer cannot keep more than the one before")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, as written under `length_config` in config.json."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LengthConfig:
        """Inverse of `to_dict`; ValueError for a field this version does not know, or a value outside its range."""
        if unknown := sorted(set(values) - {f.name for f in dataclasses.fields(cls)}):
            raise ValueError(f"length_config has fields this lowbit does not know: {', '.join(unknown)}")
        return cls(**values)
