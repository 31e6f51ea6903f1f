"""Feature by feature beside other quantization libraries, filled from what was run.

Every cell is the outcome of a small probe in a process of its own, on this CPU: a small BERT is quantized in each
library's usual way and then saved, compiled, trained, given wrong input. What raises is shown with what it raised.
Writes features.json and docs/features.md.

    pip install torchao bitsandbytes optimum-quanto hqq gemlite
    python -m benchmarks.features --results benchmarks/results
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.files.atomic import write_text

from .results import Row, read, write

PAGE = Path("docs/features.md")
QUERY = "bert.encoder.layer.0.attention.self.query"
WORDS = "bert.embeddings.word_embeddings"
LABELS = 64  # fewer than what some kernels take would stop a library that quantizes the classifier at every probe
SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


class Missing(Exception):
    """The library has no such function; the message says what there is."""


@dataclass(frozen=True)
class Library:
    """How one library is used here; every field as its own documentation says."""

    module: str
    distribution: str
    usual: str  # what `in_place` or `at_load` runs, in words
    in_place: Callable[[Any], Any] | None
    at_load: Callable[[], Any] | None  # a `quantization_config`
    low: Callable[[Any, int], Any]  # (model, bits of the weights) -> model
    trainable: Callable[[Any], Any]
    wrong_bits: Callable[[Any], Any]

    by_layer: Callable[[Any], Any] | None = None  # where `in_place` does not know BERT

    def quantized(self, model: Any) -> Any:
        """The model in the library's usual way: in memory, or else by loading it again."""
        in_memory = self.by_layer or self.in_place
        return in_memory(model) if in_memory else loaded(model, self.at_load)


def loaded(model: Any, config: Callable[[], Any] | None) -> Any:
    """The model saved and loaded again with a `quantization_config`."""
    if config is None:
        raise Missing("no configuration class in transformers")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, quantization_config=config(), device_map="cpu")


def _lowbit(name: str = "TernaryConfig") -> Callable[[Any], Any]:
    import lowbit

    return lambda model: lowbit.quantize(model, getattr(lowbit, name)())


def _torchao(config: str, **options: Any) -> Any:
    import torchao.quantization as ao

    return getattr(ao, config)(**options)


def _torchao_in_place(model: Any, config: Any) -> Any:
    import torchao.quantization as ao

    ao.quantize_(model, config)
    return model


def _torchao_at_load() -> Any:
    from transformers import TorchAoConfig

    return TorchAoConfig(_torchao("Int8DynamicActivationInt8WeightConfig"))


def _torchao_trainable(model: Any) -> Any:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    return _torchao_in_place(model, QATConfig(weight_config=weight, step="prepare"))


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options})


def _bitsandbytes_low(model: Any, bits: int) -> Any:
    raise Missing("8 and 4 bits only")


def _quanto(model: Any, weights: str, freeze: bool = True) -> Any:
    from optimum import quanto

    quanto.quantize(model, weights=weights)
    if freeze:
        quanto.freeze(model)
    return model


def _quanto_low(model: Any, bits: int) -> Any:
    if bits == 1:
        raise Missing("8, 4 and 2 bits only")
    return _quanto(model, f"qint{bits}")


def _quanto_at_load() -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def _hqq_model(model: Any) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return model


def _hqq(model: Any, bits: int) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            packed = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, packed)
    return model


def _hqq_at_load() -> Any:
    from transformers import HqqConfig

    return HqqConfig(nbits=4, group_size=64)


def _gemlite(model: Any, *bits: int) -> Any:
    raise Missing("packs single linears (GemLiteLinear), no function for a model")


LIBRARIES: dict[str, Library] = {
    "lowbit": Library(
        "lowbit", "lowbit", "`lowbit.quantize(model, TernaryConfig())`",
        in_place=lambda model: _lowbit()(model),
        at_load=lambda: importlib.import_module("lowbit").TernaryConfig(),
        low=lambda model, bits: _lowbit("TernaryConfig" if bits == 2 else "BinaryConfig")(model),
        trainable=lambda model: importlib.import_module("lowbit").prepare(
            model, importlib.import_module("lowbit").TernaryConfig()
        ),
        wrong_bits=lambda model: importlib.import_module("lowbit").TernaryConfig(weight_bits=5),
    ),
    "torchao": Library(
        "torchao", "torchao", "`quantize_(model, Int8DynamicActivationInt8WeightConfig())`",
        in_place=lambda model: _torchao_in_place(model, _torchao("Int8DynamicActivationInt8WeightConfig")),
        at_load=_torchao_at_load,
        low=lambda model, bits: _torchao_in_place(
            model, _torchao("IntxWeightOnlyConfig", weight_dtype=getattr(torch, f"int{bits}"))
        ),
        trainable=_torchao_trainable,
        wrong_bits=lambda model: _torchao_in_place(model, _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int16)),
    ),
    "bitsandbytes": Library(
        "bitsandbytes", "bitsandbytes", "`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')`",
        in_place=None,
        at_load=_bitsandbytes,
        low=_bitsandbytes_low,
        trainable=lambda model: loaded(model, _bitsandbytes),
        wrong_bits=lambda model: loaded(model, lambda: _bitsandbytes(bnb_4bit_quant_type="nf5")),
    ),
    "optimum-quanto": Library(
        "optimum.quanto", "optimum-quanto", "`quantize(model, weights=qint8); freeze(model)`",
        in_place=lambda model: _quanto(model, "qint8"),
        at_load=_quanto_at_load,
        low=_quanto_low,
        trainable=lambda model: _quanto(model, "qint8", freeze=False),
        wrong_bits=lambda model: _quanto(model, "qint5"),
    ),
    "HQQ": Library(
        "hqq.core.quantize", "hqq", "each linear as `HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=64))`, "
        "in one call `AutoHQQHFModel.quantize_model`",
        in_place=_hqq_model,
        by_layer=lambda model: _hqq(model, 4),
        at_load=_hqq_at_load,
        low=_hqq,
        trainable=lambda model: _hqq(model, 4),
        wrong_bits=lambda model: _hqq(model, 5),
    ),
    "gemlite": Library(
        "gemlite", "gemlite", "`GemLiteLinear`",
        in_place=_gemlite, at_load=None, low=_gemlite, trainable=_gemlite, wrong_bits=_gemlite,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- probes
# Each takes a library and returns what its cell says; an exception is the cell, too.


def small_bert(**changes: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{"num_labels": LABELS, **SHAPE, **changes})).eval()


def batch() -> dict[str, torch.Tensor]:
    """One sentence of 128 tokens."""
    torch.manual_seed(1)
    ids = torch.randint(1000, 20000, (1, 128))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: Any) -> torch.Tensor:
    """Float32 [1, labels].

    Raises:
        AssertionError: wrong shape or not finite.
    """
    with torch.no_grad():
        result = model(**batch()).logits.float()
    assert result.shape[0] == 1 and bool(torch.isfinite(result).all()), "logits are not finite"
    return result


def same(first: torch.Tensor, second: torch.Tensor) -> str:
    """How equal two results are; AssertionError where they are not alike."""
    if torch.equal(first, second):
        return "yes, equal bits"
    difference = float((first - second).abs().max() / second.abs().max())
    assert difference < 0.1, f"the result is another one (relative difference {difference:.1g})"
    return f"yes, to {difference:.0e}"


def megabytes(path: Path) -> float:
    return round(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6, 1)


def in_place(library: Library) -> str:
    if library.in_place is None:
        raise Missing("while loading only")
    model = small_bert()
    before = model.get_submodule(QUERY).weight
    model = library.in_place(model)
    module = model.get_submodule(QUERY)
    changed = type(module) is not nn.Linear or type(module.weight) is not type(before)
    assert changed, "the query projection is still float"
    return "yes"


def at_load(library: Library) -> str:
    logits(loaded(small_bert(), library.at_load))
    return "yes"


def bytes_of(module: nn.Module) -> int:
    """Of parameters and buffers, those inside of tensor subclasses counted as they are kept."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        if hasattr(tensor, "__tensor_flatten__"):
            names = tensor.__tensor_flatten__()[0]
            total += sum(getattr(tensor, name).nbytes for name in names)
        else:
            total += tensor.nbytes
    return total


def embeddings(library: Library) -> str:
    before = bytes_of(small_bert().get_submodule(WORDS))
    after = bytes_of(library.quantized(small_bert()).get_submodule(WORDS))
    return f"yes, {before / after:.0f} times smaller" if after < before / 2 else "no, float"


def classifier(library: Library) -> str:
    head = library.quantized(small_bert()).classifier
    alone = type(head) is nn.Linear and type(head.weight) is nn.Parameter and head.weight.dtype == torch.float32
    kinds = " of ".join(type(part).__name__ for part in (head, getattr(head, "weight", None)) if part is not None)
    return "yes" if alone else f"no, quantized ({kinds})"


def forward(library: Library) -> str:
    logits(library.quantized(small_bert()))
    return "yes"


def three_labels(library: Library) -> str:
    logits(library.quantized(small_bert(num_labels=3)))
    return "yes"


def latency(library: Library) -> str:
    models = [small_bert(), library.quantized(small_bert())]
    times: list[list[float]] = [[], []]
    for turn in range(12):
        for model, taken in zip(models, times, strict=True):
            begin = time.perf_counter()
            logits(model)
            if turn > 1:
                taken.append(time.perf_counter() - begin)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return f"{ratio:.2f}"


def reloaded(model: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # before the first forward pass, which changes the weights of some libraries
        expected = logits(model)
        result = same(logits(type(model).from_pretrained(folder, device_map="cpu")), expected)
        return f"{result}, {megabytes(Path(folder))} MB"


def save_in_place(library: Library) -> str:
    if library.in_place is None:
        raise Missing("while loading only")
    return reloaded(library.quantized(small_bert()))


def save_loaded(library: Library) -> str:
    return reloaded(loaded(small_bert(), library.at_load))


def low_bits(bits: int) -> Callable[[Library], str]:
    def probe(library: Library) -> str:
        model = library.low(small_bert(), bits)
        logits(model)
        with tempfile.TemporaryDirectory() as folder:
            try:
                model.save_pretrained(folder)
            except Exception as error:
                return f"runs, is not saved ({type(error).__name__})"
            return f"yes, {megabytes(Path(folder))} MB"

    return probe


def dequantize(library: Library) -> str:
    # transformers' own method, so on a model that came from transformers where that is possible
    model = loaded(small_bert(), library.at_load) if library.at_load else library.quantized(small_bert())
    expected = logits(copy.deepcopy(model))
    result = model.dequantize()
    model = model if result is None else result
    assert model.get_submodule(QUERY).weight.is_floating_point(), "weights are still integers"
    difference = float((logits(model) - expected).abs().max() / expected.abs().max())
    return f"yes, to {difference:.0e}"


def compiled(library: Library) -> str:
    model = library.quantized(small_bert(num_hidden_layers=2))
    return same(logits(torch.compile(model, fullgraph=True)), logits(model))


def exported(library: Library) -> str:
    model = library.quantized(small_bert(num_hidden_layers=2))
    with torch.no_grad():
        program = torch.export.export(model, (), kwargs=batch(), strict=False)
    return same(logits(program.module()), logits(model))


def deepcopied(library: Library) -> str:
    model = library.quantized(small_bert())
    return same(logits(copy.deepcopy(model)), logits(model))


def cast(dtype: torch.dtype) -> Callable[[Library], str]:
    def probe(library: Library) -> str:
        model = library.quantized(small_bert())
        logits(model.half() if dtype == torch.float16 else model.bfloat16())
        return "yes"

    return probe


def training(library: Library) -> str:
    model = library.trainable(small_bert()).train()
    model(**batch(), labels=torch.tensor([3])).loss.backward()
    grad = getattr(getattr(model.get_submodule(QUERY), "weight", None), "grad", None)
    assert grad is not None and bool((grad != 0).any()), "weights of quantized linears get no gradient"
    return "yes"


def wrong_bits(library: Library) -> str:
    try:
        model = library.wrong_bits(small_bert())
        logits(model)
    except Missing:
        raise
    except Exception as error:
        return f"refused: {line_of(error)}"
    return "accepted"


def nan_weight(library: Library) -> str:
    model = small_bert()
    with torch.no_grad():
        model.get_submodule(QUERY).weight[3, 5] = math.nan
    try:
        model = library.quantized(model)
    except Missing:
        raise
    except Exception as error:
        return f"refused: {line_of(error)}"
    return "accepted"


PROBES: dict[str, Callable[[Library], str]] = {
    "one call on a model in memory": in_place,
    "`from_pretrained(quantization_config=...)`": at_load,
    "embeddings quantized": embeddings,
    "classifier left in float": classifier,
    "runs on the CPU": forward,
    "runs with a classifier of 3 labels": three_labels,
    "batch 1, 128 tokens: time over float32": latency,
    "2-bit weights, size on disk": low_bits(2),
    "1-bit weights, size on disk": low_bits(1),
    "quantized in memory: saved and loaded again": save_in_place,
    "quantized while loading: saved and loaded again": save_loaded,
    "`model.dequantize()`": dequantize,
    "`torch.compile(fullgraph=True)`": compiled,
    "`torch.export`": exported,
    "`copy.deepcopy`": deepcopied,
    "`.half()`": cast(torch.float16),
    "`.bfloat16()`": cast(torch.bfloat16),
    "weights can be trained quantized": training,
    "asked for bits that there are not": wrong_bits,
    "NaN in a weight": nan_weight,
}
IMPORTS = {"import without a GPU": "", "import without triton": "sys.modules['triton'] = None; "}


# ------------------------------------------------------------------------------------------------------------- runs


def line_of(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:160]


def cell(error: BaseException) -> str:
    """What a probe that raised says."""
    if isinstance(error, Missing):
        return f"no: {error}"
    text = line_of(error)
    if "CUDA" in text or "NVIDIA" in text:
        return f"needs CUDA, not measured ({text})"
    return f"no: {text}"


def imported(library: Library, before: str) -> str:
    """Seconds of processor time that the import takes beyond `import torch`, in a process of its own."""
    code = (
        f"import sys, time; {before}import torch; t = time.process_time(); import {library.module}; "
        "print(f'{time.process_time() - t:.1f}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1][:160]
        return f"needs CUDA, not measured ({reason})" if "CUDA" in reason else f"no: {reason}"
    said = len([line for line in done.stderr.splitlines() if line.strip()])
    return f"yes, {done.stdout.split()[-1]} s" + (f", {said} lines of warnings" if said else "")


def _child(probe: Callable[[Library], str], library: Library, answer: Any) -> None:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        try:
            answer.send(probe(library))
        except Exception as error:
            answer.send(cell(error))


def run(probe: Callable[[Library], str], library: Library, limit: float = 600) -> str:
    """A probe's cell, from a forked process: what a library changes or breaks stays there."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(probe, library, send))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(limit) else f"not finished after {limit:.0f} s"
    except EOFError:
        process.join()
        return f"no: the process died ({process.exitcode})"
    finally:
        process.kill()
        process.join()


def column(library: Library, wanted: list[str]) -> dict[str, str]:
    """All cells of one library."""
    try:
        importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError:
        return dict.fromkeys([*IMPORTS, *wanted], "not installed")
    cells = {name: imported(library, before) for name, before in IMPORTS.items()}
    first = cells["import without a GPU"]
    if not first.startswith("yes"):
        return {**cells, **dict.fromkeys(wanted, "needs CUDA, not measured" if "CUDA" in first else "does not import")}
    for module in (library.module, "transformers.models.bert.modeling_bert", "torch._inductor"):
        importlib.import_module(module)  # here, not once for each probe
    for name in wanted:
        cells[name] = run(PROBES[name], library)
        print(f"{library.distribution}: {name}: {cells[name]}", flush=True)
    return cells


def column_apart(name: str, wanted: list[str]) -> dict[str, str]:
    """`column` in a process that imports no other library."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.features",
            "--library",
            name,
            "--out",
            str(path),
            "--only",
            *wanted,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}: ...{done.stdout[-2000:]}")
        return json.loads(path.read_text())


def suite(columns: dict[str, dict[str, str]], before: dict[str, Any]) -> dict[str, Any]:
    """The report of columns, over the cells of an earlier one, whose machine and versions stay those of its cells."""
    from .cpu import machine

    versions = {}
    for name, library in LIBRARIES.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(library.distribution)
    earlier = before["results"]["features"] if before else {}
    own = {**machine(), **versions}
    ran_on = {**own, **before["machine"], **versions} if before else own
    if ran_on["cpu"] != own["cpu"]:
        ran_on["parts run again on"] = own["cpu"]
    rows: dict[str, Row] = {}
    for feature in [*IMPORTS, *PROBES]:
        cells = earlier.get(feature, {}) | {name: cells[feature] for name, cells in columns.items() if feature in cells}
        rows[feature] = {name: cells.get(name, "not measured") for name in LIBRARIES}
    return {
        "suite": "features",
        "model": "BERT with 6 layers (2 to compile and to export), hidden size 384, 30,522 words and a classifier "
        "(91 MB in float32), random weights",
        "machine": ran_on,
        "method": "every cell is the outcome of a probe in its own process; import times are processor seconds beyond "
        "`import torch`",
        "results": {"features": rows},
    }


def render(report: dict[str, Any]) -> str:
    """docs/features.md."""
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [
        "# Features beside other libraries",
        "",
        f"Filled by `python -m benchmarks.features` from what was run, on a CPU: {report['method']}. Model: "
        f"{report['model']}. Machine: {machine}.",
        "",
        "Ratios of times are beside float32 in the same process and turns, on a machine shared with other work. lowbit "
        "loads its parts on first use, which its import time does not show. Each library is used in its usual way:",
        "",
        *(f"- {name}: {library.usual}" for name, library in LIBRARIES.items()),
        "",
        f"| feature | {' | '.join(LIBRARIES)} |",
        f"| --- |{' --- |' * len(LIBRARIES)}",
    ]
    for feature, row in report["results"]["features"].items():
        cells = (str(row.get(name, "")).replace("|", "\\|").replace("<", "&lt;") for name in LIBRARIES)
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder for features.json")
    parser.add_argument("--libraries", nargs="*", choices=LIBRARIES, default=list(LIBRARIES), help="default: all")
    parser.add_argument("--only", nargs="*", choices=PROBES, default=[], help="features to run again; default: all")
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        options.out.write_text(json.dumps(column(LIBRARIES[options.library], options.only or list(PROBES))))
        return
    path = options.results / "features.json"
    for name in options.libraries:
        again = options.only or options.libraries != list(LIBRARIES) or name != options.libraries[0]
        before = read(path) if again and path.exists() else {}
        report = suite({name: column_apart(name, options.only)}, before)
        write(report, options.results)  # after each: what is cut off keeps what it has
        write_text(PAGE, render(report))
        print(f"{name}: {PAGE} written")


if __name__ == "__main__":
    main()
