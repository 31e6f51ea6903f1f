"""BERT-base and BERT-large on the GPU, end to end: latency, throughput, memory and energy beside the usual ways.

Random weights, fp16, one process. Uniform batches are full; ragged ones have lognormal lengths with a mean of about
40 % of the maximum, the same for every runner, which is what padding costs. Each output is checked against the float
model's (lowbit's, which has other weights, against its own unfused model).

"HF SDPA, compiled, graph" is torch.compile at its best for one shape: every layer compiled for that very shape (they
share the code, so it takes seconds), the whole model in one CUDA graph, inputs in place and the mask made before.

Where tokens are dropped, layer l (from 1) keeps 0.8^l of each sequence; of BERT-base that leaves a third of the
multiply-accumulates.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import BertConfig, BertModel

import lowbit
from lowbit.stages.unpadding import restore_padding

from .gpu_timing import check_alive, mean_watts
from .results import Row, Rows, WrongResult, failure

SIZES = {
    "BERT-base": {},
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
CHECKED = 8  # sequences of a batch; module by module, long batches take seconds
# Seconds that have to be left to begin a case of a tier: its compiler cannot be stopped.
TIER_SECONDS = {"compiled": 20.0, "slow": 150.0}
DROPPING_SHAPE = (32, 384)
DROPPING = ", dropping tokens"  # ends the names of those runners
KEPT_PER_LAYER = 0.8
CO2_GRAMS_PER_KWH = 445  # world average of 2024 (IEA, Electricity 2025)


class Case(NamedTuple):
    """A batch of a model."""

    size: str
    count: int
    length: int
    ragged: bool = False

    def __str__(self) -> str:
        return f"{self.size}, batch {self.count}, length {self.length}{', ragged' if self.ragged else ''}"


# What the targets are stated for; then everything else.
FIRST = [Case(size, *shape) for size in SIZES for shape in ((1, 128), (32, 128), (32, 128, True))]
REST = [Case(size, *shape) for size in SIZES for shape in ((32, 384), (8, 128))]
REST += [Case("BERT-base", 32, 384, ragged=True), Case("BERT-base", 256, 384, ragged=True)]
POWER = [(1, 128), (32, 128)]  # uniform batches whose energy is measured: half a second a row

Batch = dict[str, torch.Tensor]
Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Built:
    """A runner: `bind` makes, for a batch, what is timed.

    `reference` computes what the output has to agree with, if anything; `macs` the part of the multiply-accumulates
    that a batch of these lengths takes (None: all).
    """

    bind: Callable[[Batch], Call]
    reference: Callable[[Batch], torch.Tensor] | None = None
    macs: Callable[[list[int]], float] | None = None


Builders = dict[str, Callable[[], Built]]


def plan() -> list[tuple[str, Case]]:
    """(tier of runners, case) in the order of measuring; a runner that a case has already is not measured again."""
    base = [case for case in FIRST if case.size == "BERT-base"]
    dropping = [Case("BERT-base", *DROPPING_SHAPE, ragged) for ragged in (False, True)]
    tiers = [("first", FIRST), ("compiled", FIRST), ("dropping", dropping), ("first", REST)]
    return [(tier, case) for tier, cases in (*tiers, ("more", base), ("slow", base)) for case in cases]


def batch(size: int, length: int, ragged: bool, device: str = "cuda") -> Batch:
    """Random ids [size, length]; ragged ones end early, the longest does not. The same whenever asked for."""
    torch.manual_seed(1000 * size + length)
    ids = torch.randint(1000, 20000, (size, length), device=device)
    lengths = torch.full((size,), length)
    if ragged:
        drawn = torch.empty(size).log_normal_(-0.9 - 0.5 * 0.5**2, 0.5) * length  # mean exp(-0.9) = 0.41 of length
        lengths = drawn.round().long().clamp(4, length)
        lengths[0] = length
    mask = (torch.arange(length).unsqueeze(0) < lengths.unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": mask.to(device)}


def _base(size: str, device: str, **changes: Any) -> BertModel:
    torch.manual_seed(0)
    with torch.device(device):
        return BertModel(BertConfig(**{**SIZES[size], **changes}), add_pooling_layer=False).half().eval()


def _ternary(base: BertModel, fused: bool) -> BertModel:
    """Packed: fused, or to be run module by module."""
    model = lowbit.quantize(copy.deepcopy(base), lowbit.TernaryConfig(), fused=fused)
    if not fused:
        restore_padding(model)
    return model


def _run(model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
    return model(**inputs).last_hidden_state


def _bind(model: torch.nn.Module) -> Callable[[Batch], Call]:
    return lambda inputs: functools.partial(_run, model, inputs)


def _bind_graphs(model: BertModel) -> Callable[[Batch], Call]:
    """lowbit's CUDA graphs, captured for the batch's very shape."""

    def bind(inputs: Batch) -> Call:
        count, length = inputs["input_ids"].shape
        lowbit.compile_for(model, [count], [length], progress=False)
        return functools.partial(_run, model, inputs)

    return bind


def _bind_compiled(model: BertModel) -> Callable[[Batch], Call]:
    """See the top of the file."""
    for layer in model.encoder.layer:
        layer.compile(dynamic=False)

    def bind(inputs: Batch) -> Call:
        mask = inputs["attention_mask"].bool()
        given = {"input_ids": inputs["input_ids"]}
        if not bool(mask.all()):  # 4-dimensional, it is taken as it is
            given["attention_mask"] = mask[:, None, None].expand(-1, 1, mask.shape[1], -1).contiguous()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles; the second call runs what was compiled
            for _ in range(2):
                _run(model, given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = _run(model, given)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    return bind


def models(size: str, device: str = "cuda", **changes: Any) -> dict[str, Builders]:
    """Tier -> name -> what builds the runner. The "slow" ones compile for minutes.

    `changes` to the configuration make it small, for tests.
    """
    base = _base(size, device, **changes)

    @functools.cache
    def by_module() -> BertModel:
        return _ternary(base, False)

    @functools.cache
    def packed() -> Callable[[Batch], torch.Tensor]:
        return functools.partial(_run, by_module())

    def with_attention(name: str) -> BertModel:
        model = copy.deepcopy(base)
        model.set_attn_implementation(name)
        return model

    def llm_int8() -> BertModel:
        import bitsandbytes

        model = copy.deepcopy(base)
        for name, linear in list(model.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                int8 = bitsandbytes.nn.Linear8bitLt(
                    linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0
                )
                int8.weight = bitsandbytes.nn.Int8Params(
                    linear.weight.data.cpu(), has_fp16_weights=False, requires_grad=False
                )
                int8.bias = linear.bias
                model.set_submodule(name, int8.to(device))
        return model

    def torchao() -> torch.nn.Module:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = copy.deepcopy(base)
        quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        return torch.compile(model, mode="max-autotune", dynamic=False)

    def max_autotune() -> torch.nn.Module:
        return torch.compile(copy.deepcopy(base), mode="max-autotune", dynamic=False)

    exact = functools.partial(_run, base)
    return {
        "first": {
            "HF SDPA": lambda: Built(_bind(base)),
            "lowbit ternary, fused": lambda: Built(_bind(_ternary(base, True)), packed()),
            "lowbit ternary, fused, graphs": lambda: Built(_bind_graphs(_ternary(base, True)), packed()),
        },
        "compiled": {  # seconds of compiling a case
            "HF SDPA, compiled, graph": lambda: Built(_bind_compiled(copy.deepcopy(base)), exact),
        },
        "more": {
            "HF eager": lambda: Built(_bind(with_attention("eager")), exact),
            "bitsandbytes LLM.int8": lambda: Built(_bind(llm_int8()), exact),
            "lowbit ternary": lambda: Built(_bind(by_module())),
        },
        "slow": {
            "HF SDPA, max-autotune": lambda: Built(_bind(max_autotune()), exact),
            "torchao int8 dynamic, max-autotune": lambda: Built(_bind(torchao()), exact),
        },
    }


def dropping(size: str, device: str = "cuda", **changes: Any) -> Builders:
    """Like a tier of `models`: the fused model with and without dropped tokens, for batches of `DROPPING_SHAPE`."""
    from lowbit.length import macs

    base = _base(size, device, **changes)
    lengths = keep_per_layer(KEPT_PER_LAYER, base.config.num_hidden_layers)

    def fused(drops: bool) -> BertModel:
        return lowbit.set_length(_ternary(base, True), lengths if drops else None)

    def part(lengths_of_batch: list[int]) -> float:
        return macs(base, lengths, lengths_of_batch) / macs(base, None, lengths_of_batch)

    packed = functools.partial(_run, _ternary(base, False))
    by_module = functools.partial(_run, lowbit.set_length(_ternary(base, False), lengths))
    return {
        "lowbit ternary, fused": lambda: Built(_bind(fused(False)), packed),
        f"lowbit ternary, fused{DROPPING}": lambda: Built(_bind(fused(True)), by_module, part),
        "lowbit ternary, fused, graphs": lambda: Built(_bind_graphs(fused(False)), packed),
        f"lowbit ternary, fused, graphs{DROPPING}": lambda: Built(_bind_graphs(fused(True)), by_module, part),
    }


def build(builders: Builders) -> dict[str, Built]:
    """The runners; one that cannot be built raises, when it is bound, what kept it from being built.

    Not in inference mode: of weights that were made in it, nothing derived is kept.
    """

    def failing(error: Exception) -> Built:
        def bind(inputs: Batch) -> Call:
            raise error

        return Built(bind)

    built = {}
    for name, make in builders.items():
        try:
            built[name] = make()
        except Exception as error:  # a peer that is not installed, say
            check_alive()
            built[name] = failing(error)
    return built


def keep_per_layer(kept: float, layers: int) -> lowbit.LengthConfig:
    """Every layer keeps the same part of what the one before has left of a sequence."""
    return lowbit.LengthConfig(keep=tuple(round(kept ** (layer + 1), 3) for layer in range(layers)))


def check(name: str, inputs: Batch, output: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise WrongResult unless the hidden states of real tokens agree (mean cosine similarity)."""
    tokens = inputs["attention_mask"].bool()
    similarity = torch.nn.functional.cosine_similarity(output[tokens].float(), expected[tokens].float(), dim=-1)
    # Of two tokens that receive nearly the same attention, rounding may drop the other.
    if not bool((similarity.mean() > (0.95 if name.endswith(DROPPING) else 0.98)).item()):
        raise WrongResult(f"mean cosine similarity {float(similarity.mean()):.4f}")


def measure(
    built: dict[str, Built], inputs: Batch, median: Callable[[Call], float], power: bool = False
) -> Iterator[tuple[str, Row]]:
    """Rows of all runners on one batch; one that computes something else is not timed."""
    references: dict[Any, torch.Tensor] = {}
    for name, item in built.items():
        yield name, _row(name, item, inputs, references, median, power)


def _row(
    name: str,
    item: Built,
    inputs: Batch,
    references: dict[Any, torch.Tensor],
    median: Callable[[Call], float],
    power: bool,
) -> Row:
    try:
        call = item.bind(inputs)
        output = call().clone()
        if item.reference is not None:
            few = {key: x[:CHECKED] for key, x in inputs.items()}
            if item.reference not in references:
                references[item.reference] = item.reference(few)
            check(name, few, output[:CHECKED], references[item.reference])
    except Exception as error:  # whatever keeps a peer from running here
        check_alive()
        return failure(name, error)
    milliseconds = median(call)
    size = inputs["input_ids"].shape[0]
    row: Row = {"ms": round(milliseconds, 3), "sequences/s": round(1000 * size / milliseconds)}
    row |= memory(call)
    if power:
        row |= energy(call, milliseconds, size)
    if item.macs is not None:
        row["part of the MACs"] = round(item.macs(inputs["attention_mask"].sum(1).tolist()), 3)
    return row


def compared(rows: Rows) -> Rows:
    """The rows with their speed-up over SDPA, the usual way to run the model, and over the same without dropping."""
    for name, row in rows.items():
        peers = {"SDPA": "HF SDPA", "compiled SDPA": "HF SDPA, compiled, graph"}
        if name.endswith(DROPPING):
            peers["with all tokens"] = name.removesuffix(DROPPING)
        for label, peer in peers.items():
            base = rows.get(peer, {}).get("ms")
            if "ms" in row and isinstance(base, float):
                row[f"times as fast as {label}"] = round(base / float(row["ms"]), 2)
    return rows


def memory(run: Call) -> Row:
    """Peak memory of a call beyond what all models hold; that of a CUDA graph is held."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {"peak MB": round((torch.cuda.max_memory_allocated() - held) / 1e6, 1)}


def energy(run: Call, milliseconds: float, size: int) -> Row:
    """Joules a batch, and what a million sequences take; nothing where nothing tells the power."""
    watts = mean_watts(run)
    if watts is None:
        return {}
    kwh = watts * milliseconds / 1000 / size * 1e6 / 3.6e6
    return {
        "J/batch": round(watts * milliseconds / 1000, 4),
        "kWh per million": round(kwh, 4),
        "g CO2 per million": round(kwh * CO2_GRAMS_PER_KWH, 2),
    }


def head(machine: dict[str, Any]) -> dict[str, Any]:
    """The report around results."""
    return {
        "suite": "gpu-model",
        "model": "BERT-base and BERT-large, random weights, fp16, inputs padded to the length of the case; "
        f"dropping tokens: layer l (from 1) keeps {KEPT_PER_LAYER}^l of each sequence; compiled: torch.compile of "
        "every layer for the very shape, the model in one CUDA graph",
        "machine": {**machine, "CO2 g/kWh": CO2_GRAMS_PER_KWH},
        "method": "median of triton.testing.do_bench (calls from Python, caches flushed between); power by NVML or "
        "nvidia-smi (now, not a mean) over 0.5 s of full batches of 1 and 32 at length 128",
    }
