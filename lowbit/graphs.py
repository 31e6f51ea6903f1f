"""CUDA graphs of a fused encoder, captured for a few shapes and replayed for the nearest that holds a batch.

A forward of BERT-base launches about a hundred kernels; replayed from a graph they follow each other without the CPU. A
graph is of a number of sequences, a longest length and a number of tokens. A smaller batch is run with empty sequences
and spare tokens at its end, which belong to no sequence.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm.auto import tqdm

from lowbit_kernels.linear import made_of

from . import models
from .heads import reads_first_token_only
from .nn import PackedEncoder
from .nn.sequences import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILL = (0.25, 0.5, 0.75, 1.0)  # of batch size x length, one graph each: ragged batches have fewer tokens

Run = Callable[..., torch.Tensor]  # of tokens, sequences, first_token_only, protected
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], None], torch.Tensor]]


class Shape(NamedTuple):
    """What one graph holds."""

    tokens: int
    length: int
    batch: int


class Graph(NamedTuple):
    """A captured run: its inputs, what replays it, its output."""

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    replay: Callable[[], None]
    output: torch.Tensor


def compile_for(
    model: PreTrainedModel, batch_sizes: Sequence[int], seq_lens: Sequence[int], progress: bool = True
) -> PreTrainedModel:
    """Capture CUDA graphs of the encoder of a fused model for these batch sizes and lengths, in place.

    A batch takes the graph with the fewest tokens that holds it; one that no graph holds runs without.

    Graphs hold the weights and lengths as they are and share their buffers: edits of weights are not seen afterwards
    (moving or retyping the model and `lowbit.set_length` give the graphs up), and one thread and stream at a time may
    run it. A head that reads the first token only has graphs that compute no other in the last layer; the base model
    called without its head, and tokens protected by name, run without graphs.

    Args:
        model: fused (`convert(..., fused=True)` or `fuse`), on a CUDA device.
        batch_sizes, seq_lens: each with each; four graphs a pair, of a quarter, half, three quarters and all tokens.
        progress: show a bar.

    Returns:
        The same model.

    Raises:
        ValueError: not fused, not on CUDA, sizes that are not positive, or lengths by threshold or with protected
            tokens.
    """
    models.describe(model)
    encoder = next((module for module in model.modules() if isinstance(module, PackedEncoder)), None)
    if encoder is None:
        raise ValueError("compile_for takes a fused model; call lowbit.fuse(model) first")
    lengths = encoder.lengths
    if lengths is not None and (lengths.unit == "threshold" or lengths.protect):
        raise ValueError(
            "a CUDA graph needs to know how many tokens are kept, and by importance alone: lengths of unit 'ratio' or "
            f"'tokens' without protect, got unit={lengths.unit!r}, protect={lengths.protect}"
        )
    if model.device.type != "cuda":
        raise ValueError(f"compile_for captures CUDA graphs, the model is on {model.device}; use lowbit.compile there")
    available, width = shapes(batch_sizes, seq_lens), model.config.hidden_size
    first_token_only = reads_first_token_only(model)
    weights = (*encoder.parameters(), *encoder.buffers())
    encoder.run = Graphs(
        encoder._run, available, width, model.dtype, model.device, first_token_only, progress=progress, weights=weights
    )
    return model


def shapes(batch_sizes: Iterable[int], seq_lens: Iterable[int]) -> list[Shape]:
    """The graphs of `compile_for`, fewest tokens first.

    Raises:
        ValueError: no size, or one that is not positive.
    """
    pairs = [(batch, length) for batch in batch_sizes for length in seq_lens]
    if not pairs or any(batch < 1 or length < 1 for batch, length in pairs):
        raise ValueError(f"batch_sizes and seq_lens must be positive, got {pairs}")
    return sorted({Shape(math.ceil(fill * batch * length), length, batch) for batch, length in pairs for fill in FILL})


def nearest(available: Iterable[Shape], tokens: int, sequences: Sequences) -> Shape | None:
    """The first shape that holds the batch, None where none does."""
    batch = sequences.cu_seqlens.numel() - 1
    return next(
        (s for s in available if s.tokens >= tokens and s.length >= sequences.max_seqlen and s.batch >= batch), None
    )


def _capturing(device: torch.device) -> Capture:
    """Captures into one memory pool: replays follow each other, and outputs are copied out at once."""
    with torch.cuda.device(device):
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels and fills caches, which a capture must not do
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # By default calls of other threads would break a capture, and it theirs.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    output = run()
            except BaseException:
                _forget_failed_capture(stream)
                raise
        return graph.replay, output

    return capture


def _forget_failed_capture(stream: torch.cuda.Stream) -> None:
    """Capture something else: until a capture succeeds, the device's random generator raises when it is used."""
    graph = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device=stream.device)


class Graphs:
    """Stands in for the `run` of a `PackedEncoder`.

    Args:
        run: what is captured, and what runs batches that no graph holds.
        available: shapes, fewest tokens first.
        hidden_size, dtype, device: of the tokens.
        first_token_only: whether the last layer computes no other; batches that ask for something else are not held.
        capture: makes a replay and its output of a call; default: CUDA graphs.
        progress: show a bar.
        weights: that `run` reads. They stay, with what was made of them, as long as graphs hold their addresses.
    """

    def __init__(
        self,
        run: Run,
        available: Sequence[Shape],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        first_token_only: bool = False,
        capture: Capture | None = None,
        progress: bool = False,
        weights: Iterable[torch.Tensor] = (),
    ) -> None:
        self.uncaptured, self.first_token_only = run, first_token_only
        self.graphs: dict[Shape, Graph] = {}
        capture = capture or _capturing(device)
        with torch.inference_mode(False), torch.no_grad():
            for shape in tqdm(available, desc="CUDA graphs", disable=not progress):
                tokens = torch.zeros(shape.tokens, hidden_size, dtype=dtype, device=device)
                # Lengths as even as they come, none above the graph's.
                steps = torch.arange(shape.batch + 1, device=device) * shape.tokens // shape.batch
                sequences = Sequences(steps.to(torch.int32), shape.length)
                replay, output = capture(functools.partial(run, tokens, sequences, first_token_only))
                self.graphs[shape] = Graph(tokens, sequences.cu_seqlens, replay, output)
        weights = list(weights)
        self.held = [*weights, *made_of(weights)]

    def __call__(
        self,
        tokens: torch.Tensor,
        sequences: Sequences,
        first_token_only: bool = False,
        protected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens [T, H] -> [T, H], of first tokens only [B, H]; a tensor of its own."""
        shape = nearest(self.graphs, tokens.shape[0], sequences)
        if shape is None or protected is not None or first_token_only != self.first_token_only:
            return self.uncaptured(tokens, sequences, first_token_only, protected)
        graph, T = self.graphs[shape], tokens.shape[0]
        ends = sequences.cu_seqlens.numel()
        graph.tokens[:T].copy_(tokens)
        graph.tokens[T:].zero_()
        graph.cu_seqlens[:ends].copy_(sequences.cu_seqlens)
        graph.cu_seqlens[ends:].fill_(T)
        graph.replay()
        return graph.output[: ends - 1 if first_token_only else T].clone()
