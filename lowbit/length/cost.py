"""What a model costs that keeps fewer tokens: multiply-accumulates, or time by a table measured once.

A layer of width w (heads x head size) with n_in tokens, of which it keeps n_out, takes

    3 n_in d w  +  2 n_in^2 w  +  n_out w d  +  2 n_out d f

multiply-accumulates: Q, K and V; scores and context; attention output; FFN. Tokens are dropped before the attention
output, where the published count (4 n_in d^2 + 2 n_in^2 d + 8 n_out d^2, Length-Adaptive Transformer) drops them after.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import models
from ..config import LengthConfig
from ..files.atomic import write_text
from ..nn import UnpaddedEncoder
from ..nn.unpadded.heads import reads_first_token_only
from ..stages.unpadding import encoder_of, set_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept_lengths(lengths: Sequence[int], length_config: LengthConfig) -> list[list[int]]:
    """For each layer, how many tokens it keeps of sequences that enter the model with these lengths.

    The same numbers as `lowbit_kernels.kept_cu_seqlens`.

    Raises:
        ValueError: unit "threshold", which depends on the text (`observed_lengths`).
    """
    if length_config.unit == "threshold":
        raise ValueError(
            "unit='threshold' keeps what the text says; accepted: 'ratio', 'tokens'; lowbit.length.observed_lengths "
            "counts what a model keeps of a text"
        )
    least = length_config.min_tokens
    if length_config.unit == "ratio":
        return [[min(n, max(math.ceil(keep * n), least)) for n in lengths] for keep in length_config.keep]
    return [[min(n, max(int(keep), least)) for n in lengths] for keep in length_config.keep]


@torch.inference_mode()
def observed_lengths(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """What `kept_lengths` says, counted while the model runs: also where thresholds decide.

    Of a model whose head reads first tokens alone, the last layer has one token a sequence left.

    Args:
        model: with lengths (`lowbit.set_length`); it is in evaluation mode afterwards.
        batches: what the model reads, with attention_mask; labels are left out.

    Returns:
        For each layer, tokens of each sequence of all batches, in their order.

    Raises:
        ValueError: a model without lengths, a batch without tokens, or a model of `lowbit.compile_for`.
    """
    encoder = encoder_of(model)
    if not isinstance(encoder, UnpaddedEncoder) or encoder.lengths is None:
        raise ValueError("the model drops no tokens; set lengths first: lowbit.set_length(model, LengthConfig(...))")
    model.eval()
    kept: list[list[int]] = [[] for _ in encoder.layer]
    try:
        for batch in batches:
            noted: list[torch.Tensor] = []
            encoder.noted_lengths = noted
            model(**{name: value for name, value in batch.items() if name != "labels"})
            if len(noted) != len(kept):
                raise ValueError("layers noted nothing: a batch without tokens, or CUDA graphs of lowbit.compile_for")
            for layer, lengths in zip(kept, noted, strict=True):
                layer += lengths.tolist()
    finally:
        encoder.noted_lengths = None
    return kept


def macs(
    model: PreTrainedModel,
    length_config: LengthConfig | Sequence[Sequence[int]] | None = None,
    lengths: Sequence[int] | None = None,
    first_token_only: bool | None = None,
) -> int:
    """Multiply-accumulates of the encoder's linears and attention for sequences of these lengths, without padding.

    Args:
        model: float, prepared, packed or slimmed; its layers' own sizes count.
        length_config: None keeps all tokens; or what each layer keeps of each sequence, as `observed_lengths` counts.
        lengths: tokens of each sequence; None for one as long as the model takes.
        first_token_only: the last layer's attention output and FFN compute the first token only. None: as the model
            runs, that is where its head reads no other, and it runs without padding or a length_config is given.

    Raises:
        ValueError: unit "threshold", or a configuration for another number of layers, or of sequences.
    """
    lengths = [model.config.max_position_embeddings] if lengths is None else [int(n) for n in lengths]
    sizes = _sizes(model)
    kept: list[Sequence[int]] = [lengths] * len(sizes)
    if length_config is not None:
        kept = [*(kept_lengths(lengths, length_config) if isinstance(length_config, LengthConfig) else length_config)]
        _check_layers(kept, len(sizes))
        if any(len(layer) != len(lengths) for layer in kept):
            raise ValueError(f"layers keep tokens of {[*map(len, kept)]} sequences; lengths has {len(lengths)}")
    if first_token_only is None:
        unpadded = length_config is not None or any(isinstance(m, UnpaddedEncoder) for m in model.modules())
        first_token_only = unpadded and reads_first_token_only(model)
    if first_token_only:
        kept = [*kept[:-1], [min(n, 1) for n in lengths]]
    total = 0
    for size, before, after in zip(sizes, [lengths, *kept], kept, strict=False):
        for n_in, n_out in zip(before, after, strict=True):
            total += n_in * size.projections + 2 * n_in**2 * size.width + n_out * size.rest
    return total


def batch_macs(
    model: PreTrainedModel,
    configs: Mapping[str, LengthConfig | Sequence[Sequence[int]] | None],
    batches: Sequence[Sequence[int]],
) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of batches of these lengths, with padding and with each configuration.

    Args:
        model: without lengths (`lowbit.set_length(model, None)`).
        configs: by name, as in `macs`; None is the model as it is: with padding, unless it is fused.
        batches: tokens of each sequence of each batch.

    Returns:
        (what transformers' padded batches take, what each configuration takes).
    """
    padded = sum(macs(model, None, [max(batch)] * len(batch), first_token_only=False) for batch in batches)
    lengths = [length for batch in batches for length in batch]
    runs_padded = not any(isinstance(module, UnpaddedEncoder) for module in model.modules())
    costs = {
        name: padded if config is None and runs_padded else macs(model, config, lengths)
        for name, config in configs.items()
    }
    return padded, costs


class _Sizes(NamedTuple):
    """Weights of one layer, as multiply-accumulates a token."""

    projections: int  # query, key, value
    rest: int  # attention output and FFN: what dropped tokens skip
    width: int


def _sizes(model: PreTrainedModel) -> list[_Sizes]:
    architecture = models.describe(model)

    def weights(layer: Any, path: str) -> int:
        linear = layer.get_submodule(path)
        return linear.in_features * linear.out_features

    result = []
    for _, layer in models.layers(model):
        projections = sum(weights(layer, path) for path in architecture.projections)
        rest = (architecture.attention_output, architecture.ffn_input, architecture.ffn_output)
        width: Any = layer.get_submodule(architecture.projections[0]).out_features
        result.append(_Sizes(projections, sum(weights(layer, path) for path in rest), width))
    return result


def _check_layers(keep: Sequence[Any], layers: int) -> None:
    if len(keep) != layers:
        raise ValueError(f"lengths are for {len(keep)} layers, the model has {layers}")


# ----------------------------------------------------------------------------------------------------- measured time


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a model by its `LengthConfig`, for batches of one shape: no candidate is timed.

    What a layer keeps decides the rows of its own second half (attention output, FFN) and of the next layer's first
    half (Q, K, V and attention): together one layer's work, `saved_ms` of it at each number of tokens. Only the last
    layer has no next one.

    Attributes:
        batch_size, seq_len, layers: what was measured.
        full_ms: all tokens kept.
        drop_ms: choosing and gathering the tokens, on average, in each layer that drops any; part of `saved_ms`
            where only one layer can.
        tokens, saved_ms: kept tokens a sequence, ascending, and the time a layer's work saves by that. Between two,
            and between the last and `seq_len`, which saves 0, linear; fewer than the first save as much as the first.
        last_share: of that, what the last layer saves; 0 where it computes the first token only and drops none.
    """

    batch_size: int
    seq_len: int
    layers: int
    full_ms: float
    drop_ms: float
    tokens: tuple[int, ...]
    saved_ms: tuple[float, ...]
    last_share: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "saved_ms", tuple(self.saved_ms))
        ascending = [0, *self.tokens, self.seq_len]
        if len(self.tokens) != len(self.saved_ms) or ascending != sorted(set(ascending)):
            raise ValueError(
                f"LatencyTable: tokens={self.tokens} with {len(self.saved_ms)} times; accepted: ascending whole "
                f"numbers from 1, less than seq_len={self.seq_len}, and as many times"
            )

    def latency(self, length_config: LengthConfig) -> float:
        """Milliseconds for a batch of `batch_size` sequences of `seq_len` tokens.

        Raises:
            ValueError: unit "threshold", or a configuration for another number of layers.
        """
        _check_layers(length_config.keep, self.layers)
        kept = [n for (n,) in kept_lengths([self.seq_len], length_config)]
        saved = [self._saved(n) for n in kept]
        dropping = kept if self.last_share else kept[:-1]
        drops = sum(after < before for before, after in zip([self.seq_len, *kept], dropping, strict=False))
        return self.full_ms + drops * self.drop_ms - sum(saved[:-1]) - self.last_share * saved[-1]

    def _saved(self, n: int) -> float:
        tokens, saved = (*self.tokens, self.seq_len), (*self.saved_ms, 0.0)
        right = bisect.bisect_left(tokens, n)
        if right == 0 or tokens[right] == n:
            return saved[right]
        part = (n - tokens[right - 1]) / (tokens[right] - tokens[right - 1])
        return saved[right - 1] + part * (saved[right] - saved[right - 1])

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LatencyTable:
        """Read what `save` wrote; ValueError for any other file."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a table written by LatencyTable.save ({error})") from error


def measure_latency(
    model: PreTrainedModel,
    batch_size: int,
    seq_len: int,
    points: Sequence[int] | None = None,
    repeats: int = 7,
    **fields: Any,
) -> LatencyTable:
    """Time the model on random tokens, with few configurations, for `LatencyTable`.

    Measured are: all tokens kept; for each point, so many kept by all layers; and every layer keeping fewer than the
    one before, in even steps, which shows what dropping itself costs. Each is the median of `repeats` runs, which take
    turns, so that a machine that grows slower does so for all. The model gets its own length configuration and mode
    back, but not the CUDA graphs of `lowbit.compile_for`.

    Args:
        model: what `lowbit.set_length` takes, on its device.
        batch_size, seq_len: shape of the batches to come.
        points: kept tokens of a sequence to measure, from 1 to seq_len - 1; None for nine of them.
        repeats: runs of each configuration.
        **fields: of the configurations to come: `score`, `restore` and other fields of `LengthConfig`.

    Raises:
        ValueError: no points, points outside of that, no batch, no room to drop, or no repeats.
    """
    layers = len(_sizes(model))
    if batch_size < 1 or seq_len < 2 or repeats < 1:
        raise ValueError(
            f"batch_size={batch_size}, seq_len={seq_len}, repeats={repeats}; accepted: at least 1, 2 and 1"
        )
    if points is None:
        points = [1, *(math.ceil(seq_len * part / 16) for part in (1, 2, 3, 4, 6, 8, 10, 13))]
        points = [n for n in points if n < seq_len]
    tokens = sorted(set(points))
    if not tokens or not all(1 <= n < seq_len for n in tokens):
        raise ValueError(f"points={list(points)}; accepted: at least one, each from 1 to seq_len - 1 = {seq_len - 1}")
    keeps = [(seq_len,) * layers, _stairs(seq_len, layers), *((n,) * layers for n in tokens)]
    configs = [LengthConfig(keep, unit="tokens", **fields) for keep in keeps]
    before, training = getattr(encoder_of(model), "lengths", None), model.training
    times: list[list[float]] = [[] for _ in configs]
    random = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (batch_size, seq_len), generator=random).to(model.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs["token_type_ids"] = torch.zeros_like(input_ids)
    model.eval()
    try:
        for _ in range(repeats):
            for config, measured in zip(configs, times, strict=True):
                set_length(model, config)
                _milliseconds(model, inputs)  # the first run after a change may prepare buffers or kernels
                measured.append(_milliseconds(model, inputs))
    finally:
        set_length(model, before)
        model.train(training)
    shape = {"batch_size": batch_size, "seq_len": seq_len, "layers": layers}
    return _table(shape, _last_share(model), tokens, [statistics.median(measured) for measured in times])


def _table(shape: dict[str, int], last_share: float, tokens: Sequence[int], times: list[float]) -> LatencyTable:
    """The table that gives back the measured times: of all tokens, of stairs, then of so many tokens in every layer."""
    full, staircase, *constant = times
    layers = shape["layers"]
    works = layers - 1 + last_share  # how many layers' work is less where every layer keeps as many

    def table(drop: float) -> LatencyTable:
        saved = tuple((full + drop - ms) / works if works else 0.0 for ms in constant)
        return LatencyTable(**shape, full_ms=full, drop_ms=drop, tokens=tuple(tokens), saved_ms=saved,
                            last_share=last_share)  # fmt: skip

    # All times contain drops, and stairs save work as well; what the table says of stairs is linear in `drop`.
    stairs = LengthConfig(_stairs(shape["seq_len"], layers), unit="tokens")
    free, one = table(0.0).latency(stairs), table(1.0).latency(stairs)
    return table(max(0.0, (staircase - free) / (one - free))) if one - free > 1e-6 else table(0.0)


def _stairs(seq_len: int, layers: int) -> tuple[int, ...]:
    """Over the whole range: what a drop costs depends on how many tokens there are to choose from."""
    return tuple(math.ceil(seq_len * (layers - index) / (layers + 1)) for index in range(layers))


def _last_share(model: PreTrainedModel) -> float:
    """Of the work that one token fewer saves, the part that is left where no layer follows (attention itself aside)."""
    if reads_first_token_only(model):
        return 0.0
    last = _sizes(model)[-1]
    return last.rest / (last.projections + last.rest)


@torch.inference_mode()
def _milliseconds(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    on_gpu = inputs["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)
