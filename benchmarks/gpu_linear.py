"""Linears on the GPU beside their peers: x [M, K] bfloat16 times a weight [N, K], in one process, checked first.

Every runner gets the same x and, where it can, the same ternary weight with one scale a tensor (all that gemlite
takes); int8 peers quantize x in the timed region unless their name says otherwise, as lowbit's plain row does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lowbit_kernels import (
    binarize,
    binary_linear,
    pack_binary,
    pack_split,
    pack_ternary,
    quantize_per_token,
    split_linear,
    ternarize,
    ternary_linear,
)

from .gpu_timing import check_alive
from .results import Row, WrongResult, failure, reason

# (N, K): query, key and value together, attention output, FFN in and out.
BERT_BASE = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
BERT_LARGE = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]
TOKENS = (32768, 8192, 2048, 512, 128, 16, 1)  # where a product takes longest, first

Run = Callable[[], torch.Tensor]
Bind = Callable[[torch.Tensor], Run]  # takes x, outside of the timed region
Median = Callable[[Run], float]  # milliseconds


class Weight:
    """A ternary weight [N, K] with one scale, and a binary one; random."""

    def __init__(self, N: int, K: int, device: str = "cuda") -> None:
        self.N, self.K, self.device = N, K, device
        self.codes, self.scale = ternarize(torch.randn(N, K, device=device), granularity="per_tensor")
        self.signs, self.sign_scale = binarize(torch.randn(N, K, device=device), granularity="per_tensor")
        self.dense = (self.codes * self.scale).bfloat16()


def _bf16(weight: Weight) -> Bind:
    return lambda x: lambda: torch.nn.functional.linear(x, weight.dense)


def _int_mm(weight: Weight) -> Bind:
    columns = weight.codes.t()

    def run(x: torch.Tensor) -> torch.Tensor:
        q, q_scale, _ = quantize_per_token(x)
        return (torch._int_mm(q, columns) * (q_scale.unsqueeze(1) * weight.scale)).bfloat16()

    return lambda x: lambda: run(x)


def _fp8(weight: Weight) -> Bind:
    columns = weight.codes.to(torch.float8_e4m3fn).t()
    column_scale = weight.scale.expand(1, weight.N).contiguous()

    def run(x: torch.Tensor) -> torch.Tensor:
        row_scale = x.abs().amax(1, keepdim=True).float() / 448
        q = (x / row_scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(q, columns, row_scale, column_scale, out_dtype=torch.bfloat16)

    return lambda x: lambda: run(x)


def _ternary(weight: Weight) -> Bind:
    packed = pack_ternary(weight.codes)
    return lambda x: lambda: ternary_linear(x, packed, weight.scale)


def _given(linear: Callable[..., torch.Tensor], packed: torch.Tensor, scale: torch.Tensor) -> Bind:
    """x is quantized outside of the timed region, as where LayerNorm does it."""

    def bind(x: torch.Tensor) -> Run:
        q, q_scale, _ = quantize_per_token(x)
        return lambda: linear(q, packed, scale, x_scale=q_scale, out_dtype=torch.bfloat16)

    return bind


def _ternary_given(weight: Weight) -> Bind:
    return _given(ternary_linear, pack_ternary(weight.codes), weight.scale)


def _binary_given(weight: Weight) -> Bind:
    return _given(binary_linear, pack_binary(weight.signs), weight.sign_scale)


def _split_given(weight: Weight) -> Bind:
    packed = pack_split(weight.signs, weight.signs.flip(0))
    return _given(split_linear, packed, torch.stack([weight.sign_scale, weight.sign_scale / 2]))


def expected_weight(name: str, weight: Weight) -> torch.Tensor:
    """The float64 weight [N, K] that a runner multiplies with."""
    signs = weight.signs * weight.sign_scale.double()
    if "binary" in name:
        return signs
    return signs + signs.flip(0) / 2 if "split" in name else weight.dense.double()


def _llm_int8(weight: Weight) -> Bind:
    import bitsandbytes

    linear = bitsandbytes.nn.Linear8bitLt(weight.K, weight.N, bias=False, has_fp16_weights=False, threshold=6.0)
    linear.weight = bitsandbytes.nn.Int8Params(weight.dense.half().cpu(), has_fp16_weights=False, requires_grad=False)
    linear = linear.to(weight.device)

    def bind(x: torch.Tensor) -> Run:
        halves = x.half()
        return lambda: linear(halves)

    return bind


def _nf4(weight: Weight) -> Bind:
    import bitsandbytes

    linear = bitsandbytes.nn.Linear4bit(weight.K, weight.N, False, torch.bfloat16, quant_type="nf4")
    linear.weight = bitsandbytes.nn.Params4bit(weight.dense.cpu(), requires_grad=False, quant_type="nf4")
    linear = linear.to(weight.device)
    return lambda x: lambda: linear(x)


def _torchao(config_name: str, **options: Any) -> Callable[[Weight], Bind]:
    def build(weight: Weight) -> Bind:
        from torchao import quantization

        linear = torch.nn.Linear(weight.K, weight.N, bias=False, device=weight.device, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight.dense)
        # Its Inductor settings hold for the whole process: they would tune everyone else for minutes.
        config = getattr(quantization, config_name)(set_inductor_config=False, **options)
        quantization.quantize_(linear, config)
        compiled = torch.compile(linear)  # as torchao's documentation says to run it
        return lambda x: lambda: compiled(x)

    return build


def _gemlite(helper_name: str) -> Callable[[Weight], Bind]:
    def build(weight: Weight) -> Bind:
        from gemlite import helper

        make = getattr(helper, helper_name)(device=weight.device, dtype=torch.bfloat16)
        linear = make.from_weights(weight.codes.bfloat16(), weight.scale)
        return lambda x: lambda: linear(x)

    return build


RUNNERS: dict[str, Callable[[Weight], Bind]] = {
    "torch bf16": _bf16,
    "torch._int_mm, quantizing x": _int_mm,
    "torch._scaled_mm fp8, quantizing x": _fp8,
    "bitsandbytes LLM.int8": _llm_int8,
    "bitsandbytes NF4": _nf4,
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4 weights": _torchao("Int4WeightOnlyConfig", int4_packing_format="tile_packed_to_4d"),
    "gemlite A16W2 ternary": _gemlite("A16W158_INT"),
    "gemlite A8W2 ternary": _gemlite("A8W158_INT_dynamic"),
    "lowbit ternary, quantizing x": _ternary,
    "lowbit ternary, x int8": _ternary_given,
    "lowbit binary, x int8": _binary_given,
    "lowbit split pair, x int8": _split_given,
}
SLOW = ("torchao", "gemlite")  # compile or tune themselves, which takes most of the time of all
WEIGHT_BITS = {
    "torch bf16": 16,
    "lowbit ternary, x int8": 2,
    "lowbit binary, x int8": 1,
    "lowbit split pair, x int8": 2,
}


def check(name: str, weight: Weight, x: torch.Tensor, output: torch.Tensor) -> None:
    """Raise WrongResult unless `output` is x W^T: 5 % for x in 8 bits, 20 % for peers that quantize W to 4 bits."""
    if output.shape != (x.shape[0], weight.N) or not bool(torch.isfinite(output).all()):
        raise WrongResult(f"shape {tuple(output.shape)} or not finite")
    rows = slice(0, 256)  # float64 products of all would take longer than the benchmark
    expected = x[rows].double() @ expected_weight(name, weight).t()
    error = float((output[rows].double() - expected).norm() / expected.norm())
    if not error < (0.2 if "int4" in name or "NF4" in name else 0.05):
        raise WrongResult(f"relative error {error:.3f}")


def roofline_us(name: str, M: int, N: int, K: int, ceilings: dict[str, float]) -> float | None:
    """Least microseconds by bytes (packed weight, x and output each once) and operations; None where unknown."""
    if name not in WEIGHT_BITS:
        return None
    bits = WEIGHT_BITS[name]
    x_bytes, rate = (2, "bf16_tflop_per_s") if bits == 16 else (1, "int8_top_per_s")
    moved = N * K * bits / 8 + M * K * x_bytes + M * N * 2
    operations = 2 * M * N * K * (2 if "split" in name else 1)
    return max(moved / ceilings["copy_tb_per_s"] / 1e6, operations / ceilings[rate] / 1e6)


def build(N: int, K: int, slow: bool = False, device: str = "cuda") -> tuple[Weight, dict[str, Bind | str]]:
    """A weight, and every runner that is (or is not) `SLOW`, or what kept it from being built."""
    weight = Weight(N, K, device)
    built: dict[str, Bind | str] = {}
    for name, make in RUNNERS.items():
        if name.startswith(SLOW) != slow:
            continue
        try:
            built[name] = make(weight)
        except Exception as error:  # a peer that is not installed, say
            built[name] = reason(error)
    return weight, built


def measure(
    weight: Weight, built: dict[str, Bind | str], M: int, replay: Median, eager: Median, ceilings: dict[str, float]
) -> Iterator[tuple[str, Row]]:
    """Rows of all runners at M tokens: microseconds on the device, and as Python calls them.

    One that cannot run says why; one that computes something else is not timed.
    """
    x = torch.randn(M, weight.K, device=weight.device, dtype=torch.bfloat16)
    for name, bind in built.items():
        yield name, {"note": bind} if isinstance(bind, str) else _row(name, weight, x, bind, replay, eager, ceilings)


def _row(
    name: str, weight: Weight, x: torch.Tensor, bind: Bind, replay: Median, eager: Median, ceilings: dict[str, float]
) -> Row:
    try:
        run = bind(x)
        check(name, weight, x, run())
    except Exception as error:  # a shape that a peer does not take, say
        check_alive()
        return failure(name, error)
    row: Row = {"us, called": round(1000 * eager(run), 2)}
    try:
        microseconds = 1000 * replay(run)
    except Exception as error:  # a peer that waits for the device, say
        check_alive()
        return row | {"note": f"no graph: {reason(error)}"}
    row["us"] = round(microseconds, 2)
    floor = roofline_us(name, x.shape[0], weight.N, weight.K, ceilings)
    return row if floor is None else row | {"of roofline": round(floor / microseconds, 3)}


def compared(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows with their speed-up over bfloat16."""
    base = rows.get("torch bf16", {}).get("us")
    for row in rows.values():
        if "us" in row and isinstance(base, float):
            row["times as fast as bf16"] = round(base / float(row["us"]), 2)
    return rows


def head(machine: dict[str, Any]) -> dict[str, Any]:
    """The report around results."""
    return {
        "suite": "gpu-linear",
        "model": "linears of BERT-base and BERT-large, bfloat16 input and output",
        "machine": machine,
        "method": "us: median in a CUDA graph, x and weights in L2 where they fit (so that 'of roofline', "
        "by what DRAM gives, can pass 1); us, called: median of calls from Python, caches flushed between",
    }
