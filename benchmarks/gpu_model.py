"""BERT-base and BERT-large on the GPU, end to end: latency, throughput, memory and energy beside the usual ways.

Random weights, fp16, one process. Uniform batches are full; ragged ones have lognormal lengths with a mean of about
40 % of the maximum, the same for every runner, which is what padding costs. Each output is checked against the float
model's (lowbit's, which has other weights, against its own unfused model).

Where tokens are dropped, layer l (from 1) keeps 0.8^l of each sequence; of BERT-base that leaves a third of the
multiply-accumulates.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertModel

import lowbit
from lowbit.stages.unpadding import restore_padding

from .results import Row, reason

SHAPES = [(1, 128), (8, 128), (32, 128), (32, 384), (1, 32), (128, 128), (256, 384)]  # (batch, length)
SIZES = {
    "BERT-base": {},
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
DROPPING_SHAPE = (32, 384)
DROPPING = ", dropping tokens"  # ends the names of those runners
KEPT_PER_LAYER = 0.8
CO2_GRAMS_PER_KWH = 445  # world average of 2024 (IEA, Electricity 2025)

Batch = dict[str, torch.Tensor]
Runner = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Built:
    """A runner, the one whose output it has to reproduce, if any, and its part of the multiply-accumulates."""

    run: Runner
    reference: Runner | None = None
    macs: Callable[[list[int]], float] | None = None  # of a batch of these lengths; None: all


def batch(size: int, length: int, ragged: bool, device: str = "cuda") -> Batch:
    """Random ids [size, length]; ragged ones end early, the longest does not."""
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
    return BertModel(BertConfig(**{**SIZES[size], **changes}), add_pooling_layer=False).half().eval().to(device)


def _ternary(base: BertModel, fused: bool) -> BertModel:
    """Packed: fused, or to be run module by module."""
    model = lowbit.quantize(copy.deepcopy(base), lowbit.TernaryConfig(), fused=fused)
    if not fused:
        restore_padding(model)
    return model


def _run(model: torch.nn.Module) -> Runner:
    return lambda inputs: model(**inputs).last_hidden_state


def models(size: str, slow: bool = False, device: str = "cuda", **changes: Any) -> dict[str, Callable[[], Built]]:
    """Name -> what builds the runner: those that compile for minutes, or all others.

    `changes` to the configuration make it small, for tests.
    """
    base = _base(size, device, **changes)

    def with_attention(name: str) -> BertModel:
        model = copy.deepcopy(base)
        model.set_attn_implementation(name)
        return model

    def graphs() -> BertModel:
        return lowbit.compile_for(_ternary(base, True), [b for b, _ in SHAPES], [s for _, s in SHAPES])

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
        return torch.compile(model, mode="max-autotune")

    exact = _run(base)
    if slow:
        compiled = torch.compile(copy.deepcopy(base), mode="max-autotune")
        return {
            "HF SDPA, max-autotune": lambda: Built(_run(compiled), exact),
            "torchao int8 dynamic, max-autotune": lambda: Built(_run(torchao()), exact),
        }
    packed = _run(_ternary(base, False))
    return {
        "HF eager": lambda: Built(_run(with_attention("eager")), exact),
        "HF SDPA": lambda: Built(exact),
        "bitsandbytes LLM.int8": lambda: Built(_run(llm_int8()), exact),
        "lowbit ternary": lambda: Built(packed),
        "lowbit ternary, fused": lambda: Built(_run(_ternary(base, True)), packed),
        "lowbit ternary, fused, graphs": lambda: Built(_run(graphs()), packed),
    }


def dropping(size: str, device: str = "cuda", **changes: Any) -> dict[str, Callable[[], Built]]:
    """Like `models`: the fused model with and without dropped tokens, for batches of `DROPPING_SHAPE`."""
    from lowbit.length import macs

    base = _base(size, device, **changes)
    lengths = keep_per_layer(KEPT_PER_LAYER, base.config.num_hidden_layers)
    count, length = DROPPING_SHAPE

    def graphs(model: BertModel) -> BertModel:
        return lowbit.compile_for(model, [count], [length])

    def fused(drops: bool) -> BertModel:
        return lowbit.set_length(_ternary(base, True), lengths if drops else None)

    def part(lengths_of_batch: list[int]) -> float:
        return macs(base, lengths, lengths_of_batch) / macs(base, None, lengths_of_batch)

    packed = _run(_ternary(base, False))
    by_module = _run(lowbit.set_length(_ternary(base, False), lengths))
    return {
        "lowbit ternary, fused": lambda: Built(_run(fused(False)), packed),
        f"lowbit ternary, fused{DROPPING}": lambda: Built(_run(fused(True)), by_module, part),
        "lowbit ternary, fused, graphs": lambda: Built(_run(graphs(fused(False))), packed),
        f"lowbit ternary, fused, graphs{DROPPING}": lambda: Built(_run(graphs(fused(True))), by_module, part),
    }


def keep_per_layer(kept: float, layers: int) -> lowbit.LengthConfig:
    """Every layer keeps the same part of what the one before has left of a sequence."""
    return lowbit.LengthConfig(keep=tuple(round(kept ** (layer + 1), 3) for layer in range(layers)))


def check(name: str, inputs: Batch, output: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise RuntimeError unless the hidden states of real tokens agree (mean cosine similarity)."""
    tokens = inputs["attention_mask"].bool()
    similarity = torch.nn.functional.cosine_similarity(output[tokens].float(), expected[tokens].float(), dim=-1)
    # Of two tokens that receive nearly the same attention, rounding may drop the other.
    if not bool((similarity.mean() > (0.95 if name.endswith(DROPPING) else 0.98)).item()):
        raise RuntimeError(f"{name} is wrong: mean cosine similarity {float(similarity.mean()):.4f}")


def measure(built: dict[str, Built], inputs: Batch, median: Callable[[Callable[[], Any]], float]) -> dict[str, Row]:
    """All runners on one batch."""
    rows: dict[str, Row] = {}
    for name, item in built.items():
        call = functools.partial(item.run, inputs)
        try:
            output = call().clone()
        except Exception as error:  # whatever keeps a peer from running here
            rows[name] = {"note": reason(error)}
            continue
        if item.reference is not None:
            check(name, inputs, output, item.reference(inputs))
        milliseconds = median(call)
        size = inputs["input_ids"].shape[0]
        rows[name] = {"ms": round(milliseconds, 3), "sequences/s": round(1000 * size / milliseconds)}
        rows[name] |= memory_and_energy(call, milliseconds, size)
        if item.macs is not None:
            rows[name]["part of the MACs"] = round(item.macs(inputs["attention_mask"].sum(1).tolist()), 3)
    return rows


def compared(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows with their speed-up over SDPA, the usual way to run the model, and over the same without dropping."""
    for name, row in rows.items():
        peers = {"SDPA": "HF SDPA"} | (
            {"with all tokens": name.removesuffix(DROPPING)} if name.endswith(DROPPING) else {}
        )
        for label, peer in peers.items():
            base = rows.get(peer, {}).get("ms")
            if "ms" in row and isinstance(base, float):
                row[f"times as fast as {label}"] = round(base / float(row["ms"]), 2)
    return rows


def memory_and_energy(run: Callable[[], Any], milliseconds: float, size: int) -> Row:
    """Peak memory of a call beyond what all models hold, joules a batch, and what a million sequences take."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    row: Row = {"peak MB": round((torch.cuda.max_memory_allocated() - held) / 1e6, 1)}
    watts = mean_watts(run)
    if watts is not None:
        kwh = watts * milliseconds / 1000 / size * 1e6 / 3.6e6
        row |= {"J/batch": round(watts * milliseconds / 1000, 4), "kWh per million": round(kwh, 4)}
        row["g CO2 per million"] = round(kwh * CO2_GRAMS_PER_KWH, 2)
    return row


def mean_watts(run: Callable[[], Any], seconds: float = 1.0) -> float | None:
    """Mean board power while `run` repeats, sampled by nvidia-smi; None where it tells none."""
    gpu = str(torch.cuda.get_device_properties(0).uuid)
    query = ["nvidia-smi", "-i", gpu if gpu.startswith("GPU-") else f"GPU-{gpu}"]
    query += ["--query-gpu=power.draw.instant", "--format=csv,noheader,nounits"]  # power.draw is a mean over a second
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
            if answer and answer[0].replace(".", "", 1).isdigit():
                samples.append(float(answer[0]))
            done.wait(0.05)

    thread = threading.Thread(target=sample)
    thread.start()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        run()
        torch.cuda.synchronize()
    done.set()
    thread.join()
    settled = samples[len(samples) // 2 :]  # power follows the load with a delay
    return sum(settled) / len(settled) if settled else None


def suite(machine: dict[str, Any], results: dict[str, dict[str, Row]]) -> dict[str, Any]:
    """The report around results."""
    return {
        "suite": "gpu-model",
        "model": "BERT-base and BERT-large, random weights, fp16, inputs padded to the length of the case; "
        f"dropping tokens: layer l (from 1) keeps {KEPT_PER_LAYER}^l of each sequence",
        "machine": {**machine, "CO2 g/kWh": CO2_GRAMS_PER_KWH},
        "method": "median of triton.testing.do_bench; power by nvidia-smi (power.draw.instant) over 1 s",
        "results": results,
    }
