"""BERT-base on the CPU: ternary and binary against float32, torch and onnxruntime dynamic int8; attention by itself.

Random weights, sequence length 128, batch 1 and 8, and a batch of 8 whose sentences fill 40 % on average; "fused" is
how a packed model runs, without padding, "module by module" with transformers' own encoder around the packed modules,
"compiled" is `lowbit.compile` for each shape. With "half the MACs", layer l (from 1) keeps 0.88^l of the tokens.

All models sit in one process on the same threads and inputs, and take turns (A B C A B C ...), so that a machine whose
speed drifts slows all of them; ratios are medians of the ratios within a turn. Each output is checked before it is
timed. Attention, with and without importance, is measured in the same way on BERT-base's heads. Writes two JSON and
prints their tables.

    python -m benchmarks.cpu --results benchmarks/results
    python -m benchmarks.cpu --name cpu-vnni         another kind of machine, beside the first
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel

import lowbit
import lowbit_kernels
from lowbit.stages.unpadding import restore_padding

from . import gpu_attention
from .gpu_model import keep_per_layer
from .report import render
from .results import Row, write

LENGTH = 128
KEPT_PER_LAYER = 0.88
HALF = "lowbit ternary 2-2-8, fused, half the MACs"
ATTENTION_CASES = [gpu_attention.Case("BERT-base", 8, LENGTH, ragged, torch.float32) for ragged in (False, True)]
ATTENTION = (gpu_attention.PADDED, "HF eager", "HF eager, importance")  # beside lowbit's
torch._dynamo.config.recompile_limit = 64  # several models share the code of a layer; beyond 8 it would run eagerly
Runner = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids and attention mask [B, S] -> [B, S, 768]


def models(names: list[str]) -> dict[str, Runner | None]:
    """The runners by name; None for a peer that is not installed."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(), add_pooling_layer=False).eval()

    def torch_runner(model: torch.nn.Module) -> Runner:
        return lambda ids, mask: model(ids, attention_mask=mask)[0]

    half_width = lowbit.prepare(lowbit.slim(copy.deepcopy(base), 0.5), lowbit.TernaryConfig())

    def ternary(fused: bool = False) -> BertModel:
        return lowbit.quantize(copy.deepcopy(base), lowbit.TernaryConfig(), fused=fused).eval()

    def binary(fused: bool = False) -> BertModel:
        return lowbit.quantize(copy.deepcopy(base), lowbit.BinaryConfig(), fused=fused).eval()

    def split(fused: bool = False) -> BertModel:
        return lowbit.convert(lowbit.split(copy.deepcopy(half_width)), fused).eval()

    def by_module(model: BertModel) -> BertModel:
        restore_padding(model)
        return model

    def compiled(model: BertModel) -> Runner:
        return torch_runner(lowbit.compile(model, dynamic=False))

    def half_the_macs() -> BertModel:
        return lowbit.set_length(ternary(fused=True), keep_per_layer(KEPT_PER_LAYER, base.config.num_hidden_layers))

    built: dict[str, Callable[[], Runner | None]] = {
        "float32 eager": lambda: torch_runner(_eager(base)),
        "float32 SDPA": lambda: torch_runner(base),
        "torch dynamic int8": lambda: torch_runner(_dynamic_int8(base)),
        "onnxruntime dynamic int8": lambda: _onnxruntime(base),
        "float32 SDPA, compiled": lambda: compiled(copy.deepcopy(base)),
        "lowbit ternary 2-2-8, module by module": lambda: torch_runner(by_module(ternary())),
        "lowbit ternary 2-2-8, module by module, compiled": lambda: compiled(by_module(ternary())),
        "lowbit ternary 2-2-8, fused": lambda: torch_runner(ternary(fused=True)),
        "lowbit ternary 2-2-8, fused, compiled": lambda: compiled(ternary(fused=True)),
        HALF: lambda: torch_runner(half_the_macs()),
        "lowbit binary 1-1-8, module by module": lambda: torch_runner(by_module(binary())),
        "lowbit binary 1-1-8, fused": lambda: torch_runner(binary(fused=True)),
        "lowbit split 1-1-8, half width, module by module": lambda: torch_runner(by_module(split())),
        "lowbit split 1-1-8, half width, fused": lambda: torch_runner(split(fused=True)),
    }
    return {name: built[name]() for name in built if not names or name in names}


def _eager(base: BertModel) -> BertModel:
    model = copy.deepcopy(base)
    model.set_attn_implementation("eager")
    return model


def _dynamic_int8(base: BertModel) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(base), {torch.nn.Linear}, dtype=torch.qint8)


class _Exported(torch.nn.Module):
    """What is exported: two inputs, one output."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(ids, attention_mask=mask)[0]


def _onnxruntime(base: BertModel) -> Runner | None:
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        return None
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, int8_path = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask")}
        ids = torch.ones(2, LENGTH, dtype=torch.long)
        torch.onnx.export(
            _Exported(copy.deepcopy(base)).eval(),
            (ids, ids),
            path,
            dynamo=False,
            input_names=["ids", "mask"],
            dynamic_axes=axes,
            opset_version=17,
        )
        quantize_dynamic(path, int8_path, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(int8_path, options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])


def check(name: str, output: torch.Tensor, expected: torch.Tensor) -> None:
    """int8 peers must compute the float model; lowbit models have other weights and must only be finite."""
    if output.shape != expected.shape or not torch.isfinite(output).all():
        raise RuntimeError(f"{name}: wrong shape or not finite")
    similarity = torch.nn.functional.cosine_similarity(output.flatten(), expected.flatten(), dim=0)
    if not name.startswith("lowbit") and similarity < 0.98:
        raise RuntimeError(f"{name}: cosine similarity to float32 is {similarity:.3f}")


def mask_of(lengths: list[int]) -> torch.Tensor:
    """Padding mask [B, LENGTH] of sentences of these lengths."""
    return (torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()


CASES = {
    "batch 1": [LENGTH],
    "batch 8": [LENGTH] * 8,
    "batch 8, 40 % filled": [128, 78, 61, 47, 36, 27, 20, 13],  # 410 of 1,024 tokens
}


def measure(runners: dict[str, Runner | None], case: str, turns: int) -> dict[str, Row]:
    """Milliseconds and ratios to float32 eager of each runner."""
    mask = mask_of(CASES[case])
    ids = torch.randint(1000, 20000, mask.shape)
    present = {name: run for name, run in runners.items() if run is not None}
    expected = next(iter(present.values()))(ids, mask)
    for name, run in present.items():
        check(name, run(ids, mask)[mask.bool()], expected[mask.bool()])
    times = take_turns({name: functools.partial(run, ids, mask) for name, run in present.items()}, turns, case)
    rows = rows_of(times, ("float32 eager", "torch dynamic int8", "onnxruntime dynamic int8"))
    if HALF in rows:
        rows[HALF]["part of the MACs"] = round(part_of_macs(CASES[case]), 3)
    return {name: rows.get(name, {"note": "not measured: not installed"}) for name in runners}


def part_of_macs(lengths: list[int]) -> float:
    """Multiply-accumulates of `HALF` over those of all tokens."""
    from lowbit.length import macs

    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
    keep = keep_per_layer(KEPT_PER_LAYER, model.config.num_hidden_layers)
    return macs(model, keep, lengths) / macs(model, None, lengths)


def attention(case: gpu_attention.Case, turns: int) -> dict[str, Row]:
    """Attention alone, float32: milliseconds, and ratios to padded SDPA."""
    batch = gpu_attention.Batch(case, "cpu")
    calls: dict[str, Callable[[], Any]] = {}
    for name, runner in gpu_attention.RUNNERS.items():
        if name in ATTENTION or name.startswith("lowbit"):
            calls[name] = gpu_attention.forward(runner, batch)
            gpu_attention.check_forward(name, runner, batch, calls[name]())
    return rows_of(take_turns(calls, turns, str(case)), (gpu_attention.PADDED, "HF eager, importance"))


def take_turns(calls: dict[str, Callable[[], Any]], turns: int, label: str) -> dict[str, list[float]]:
    """Milliseconds of each call in each turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in calls.values():
        run()
    for _ in tqdm(range(turns), desc=label):
        for name, run in calls.items():
            run()  # untimed: lets the threads of the model before stop spinning, and warms the caches
            begin = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - begin))
    return times


def rows_of(times: dict[str, list[float]], peers: tuple[str, ...]) -> dict[str, Row]:
    """Of each runner, with the ratios to those peers that were measured."""
    rows: dict[str, Row] = {}
    for name in times:
        rows[name] = {
            "median_ms": round(statistics.median(times[name]), 2),
            "min_ms": round(min(times[name]), 2),
            "max_ms": round(max(times[name]), 2),
        }
        for peer in peers:
            if peer in times:
                ratios = [a / b for a, b in zip(times[name], times[peer], strict=True)]
                rows[name][f"over {peer}"] = round(statistics.median(ratios), 3)
    return rows


def machine() -> dict[str, str | int]:
    """What the figures hold for."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **versions,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder for NAME-*.json")
    parser.add_argument("--name", default="cpu", help="of the reports, NAME-attention and NAME-encoder")
    parser.add_argument("--turns", type=int, default=15, help="timed rounds of each model")
    parser.add_argument("--only", nargs="*", default=[], help="names of models, as in the table; no attention then")
    options = parser.parse_args()
    method = f"medians of {options.turns} turns"
    if not options.only:
        report = {
            "suite": f"{options.name}-attention",
            "model": "attention of BERT-base (12 heads, 64 numbers each), float32",
            "machine": machine(),
            "method": method,
            "results": {str(case): attention(case, options.turns) for case in ATTENTION_CASES},
        }
        show(report, options.results)
    runners = models(options.only)
    with torch.inference_mode():
        results = {case: measure(runners, case, options.turns) for case in CASES}
    report = {
        "suite": f"{options.name}-encoder",
        "model": f"BERT-base, random weights, sequence length {LENGTH}; half the MACs: layer l (from 1) keeps "
        f"{KEPT_PER_LAYER}^l of each sequence",
        "machine": {
            **machine(),
            "kernels": lowbit.backend(),
            "int8 expansions MB": round(lowbit_kernels.expanded_bytes() / 1e6),
        },
        "method": method,
        "results": results,
    }
    show(report, options.results)


def show(report: dict[str, Any], folder: Path) -> None:
    """Write and print a report."""
    path = write(report, folder)
    print(render(report))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
