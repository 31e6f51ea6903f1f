"""Start-up: importing lowbit, loading a packed BERT-base, making one out of a float model.

Each figure is the median of several fresh processes (forked after the imports) with warm file caches: the first call,
in which transformers sets up tables of its own, and a second one ("again"). "cpu" is the processor time of the same
call, all threads together, which other programs on the machine disturb less. Memory is of one more process each: the
high-water mark during the call less what was resident just before it, in all (mapped pages of the file included, which
the system can take back) and anonymous. Writes startup.json and prints its table.

    python -m benchmarks.startup --results benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .results import Row

MEMORY = Path("/proc/self/status")


def prepare_folders(folder: Path) -> None:
    """Write `folder/float` and `folder/packed`: BERT-base with random weights."""
    import torch
    from transformers import BertConfig, BertModel

    import lowbit

    torch.manual_seed(0)
    model = BertModel(BertConfig())
    model.save_pretrained(folder / "float")
    lowbit.quantize(model, lowbit.TernaryConfig()).save_pretrained(folder / "packed")


def load_float(folder: Path) -> Callable[[], Any]:
    from transformers import BertModel

    return lambda: BertModel.from_pretrained(folder / "float")


def load_packed(folder: Path) -> Callable[[], Any]:
    from transformers import BertModel

    import lowbit  # noqa: F401

    return lambda: BertModel.from_pretrained(folder / "packed")


def convert(folder: Path) -> Callable[[], Any]:
    from transformers import BertModel

    import lowbit

    model = BertModel.from_pretrained(folder / "float")
    models = [copy.deepcopy(model), model]
    return lambda: lowbit.convert(lowbit.prepare(models.pop(), lowbit.TernaryConfig()))


IMPORTS = {
    "import lowbit, after torch": "lowbit",
    "import transformers' BERT, after torch": "transformers.models.bert.modeling_bert",
}
CALLS = {"load float32": load_float, "load packed": load_packed, "prepare and convert": convert}


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the first call in a process, and of a second one."""
    seconds = {}
    for place in ("", "again "):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        seconds |= {f"{place}s": time.perf_counter() - wall, f"{place}cpu s": time.process_time() - cpu}
    return seconds


def resident(field: str) -> float:
    """A field of /proc/self/status, in MB."""
    return int(re.search(rf"^{field}:\s+(\d+) kB", MEMORY.read_text(), re.MULTILINE)[1]) / 1e3  # type: ignore[index]


def peaks(call: Callable[[], Any]) -> dict[str, float]:
    """MB beyond what is resident before the call, and the size of the model it returns."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before, anonymous, done = resident("VmRSS"), resident("RssAnon"), threading.Event()
    highest = [anonymous]

    def watch() -> None:  # anonymous memory has no mark of its own
        while not done.wait(0.001):
            highest.append(resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = call()
    done.set()
    watcher.join()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e6
    return {
        "model MB": size,
        "peak MB": resident("VmHWM") - before,
        "peak anonymous MB": max(highest) - anonymous,
    }


def imported(module: str) -> dict[str, float]:
    """Seconds of an import in a new interpreter that has torch already."""
    code = (
        "import json, time, torch; wall, cpu = time.perf_counter(), time.process_time(); "
        f"import {module}; "
        "print(json.dumps({'s': time.perf_counter() - wall, 'cpu s': time.process_time() - cpu}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process that has this one's imports and nothing else of its history."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(function(*arguments)))
    process.start()
    send.close()
    try:
        return receive.recv()  # EOFError where it failed; its traceback is on stderr
    finally:
        process.join()


def medians(runs: list[dict[str, float]]) -> Row:
    return {column: round(statistics.median(run[column] for run in runs), 4) for column in runs[0]}


def measured(build: Callable[[Path], Callable[[], Any]], folder: Path, runs: int) -> Row:
    """Times and memory of one of `CALLS`."""
    row = medians([forked(lambda: timed(build(folder))) for _ in range(runs)])
    if not MEMORY.exists():
        return {**row, "note": "memory not measured: needs Linux"}
    memory = forked(lambda: peaks(build(folder)))
    row |= {column: round(value, 1) for column, value in memory.items()}
    return {**row, "anonymous over model": round(memory["peak anonymous MB"] / memory["model MB"], 2)}


def suite(runs: int) -> dict[str, Any]:
    """The report of all cases."""
    from tqdm.auto import tqdm

    from .cpu import machine

    rows = {name: medians([imported(module) for _ in range(runs)]) for name, module in tqdm(IMPORTS.items(), "imports")}
    for module in (*IMPORTS.values(), "lowbit.stages.prepare", "lowbit.nn"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        forked(prepare_folders, folder)
        for name, build in tqdm(CALLS.items(), "calls"):
            rows[name] = measured(build, folder, runs)
    return {
        "suite": "startup",
        "model": "imports, loading and converting BERT-base (12 layers, random weights), ternary 2-2-8",
        "machine": {**machine(), "load average": round(os.getloadavg()[0], 1)},
        "method": f"medians of {runs} fresh processes, files in the cache; the machine was shared with other work (see "
        "the load average; programs that wait for a core make seconds longer): `cpu s` is what the call itself used",
        "results": {"BERT-base": rows},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder for startup.json")
    parser.add_argument("--runs", type=int, default=5, help="processes for each figure")
    options = parser.parse_args()
    from .cpu import show

    show(suite(options.runs), options.results)


if __name__ == "__main__":
    main()
