"""Coverage-guided fuzzing by atheris (libFuzzer): the checkpoint loader, and one dispatcher for all ops.

    python -m benchmarks.soak_atheris loader --runs 3000        bytes -> edits of header, records, tensors and JSON
    python -m benchmarks.soak_atheris ops --runs 20000          bytes -> the draws of benchmarks.soak_ops

Coverage is that of lowbit's own modules. A failure ends the run, with exit code 77 and the input that did it in
`--artifacts`; passing that file instead of --runs repeats it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import atheris

_MEASURED = ["lowbit"] if "loader" in sys.argv else ["lowbit_kernels"]
with atheris.instrument_imports(include=_MEASURED, exclude=["lowbit._register"], enable_loader_override=False):
    import torch

    import lowbit
    from lowbit import plugin  # noqa: F401 (instrumented)
    from lowbit.files import loading, records, weights  # noqa: F401

    from . import soak_checkpoints, soak_damage, soak_ops

VALUES: tuple[Any, ...] = (*soak_damage.STRANGE, "F32", "I8", [2, 3], [0, 2**63], -5, 2**64, "model.safetensors")


def fuzz_ops(data: bytes) -> None:
    draw = atheris.FuzzedDataProvider(data)
    soak_ops.run(soak_ops.choose(draw.ConsumeIntInRange, list(soak_ops.CASES)), draw.ConsumeIntInRange)


def edit_json(values: Any, draw: atheris.FuzzedDataProvider) -> Any:
    """Walk down a few steps, then remove, replace, rename or copy what is there."""
    at = values
    for _ in range(draw.ConsumeIntInRange(0, 3)):
        inner = [key for key in at if isinstance(at[key], dict) and at[key]] if isinstance(at, dict) else []
        if not inner:
            break
        at = at[draw.PickValueInList(inner)]
    if not at:
        return values
    key = draw.PickValueInList(list(at))
    how = draw.ConsumeIntInRange(0, 4)
    if how == 0:
        del at[key]
    elif how == 1:
        at[key] = draw.PickValueInList(list(VALUES))
    elif how == 2:
        at[draw.ConsumeUnicodeNoSurrogates(12)] = at.pop(key)
    elif how == 3:
        at[key] = at[draw.PickValueInList(list(at))]
    elif isinstance(at[key], int) and not isinstance(at[key], bool):
        at[key] += draw.ConsumeIntInRange(-4, 4)
    elif isinstance(at[key], str):
        at[key] = draw.ConsumeUnicodeNoSurrogates(20)
    return values


def edit(folder: Path, draw: atheris.FuzzedDataProvider) -> None:
    """One change that knows the format: raw bytes anywhere, the JSON header, the records in it, config.json, index."""
    path = draw.PickValueInList(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    if not content:
        return
    if draw.ConsumeBool():
        for _ in range(draw.ConsumeIntInRange(1, 3)):
            at = draw.ConsumeIntInRange(0, len(content) - 1)
            if draw.ConsumeBool():
                content[at] = draw.ConsumeIntInRange(0, 255)
            else:
                content[at : at + draw.ConsumeIntInRange(0, 9)] = draw.ConsumeBytes(9)
            if not content:
                break
        path.write_bytes(content)
        return
    try:
        if path.suffix == ".json":
            path.write_text(json.dumps(edit_json(json.loads(content), draw)))
            return
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        records = header.get("__metadata__", {})
        if records and draw.ConsumeBool():
            key = draw.PickValueInList(sorted(records))
            records[key] = json.dumps(edit_json(json.loads(records[key]), draw)) if key != "format" else "tf"
        else:
            header = edit_json(header, draw)
    except (ValueError, struct.error, TypeError, AttributeError, KeyError):
        return  # damaged before, by raw bytes
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def fuzz_loader(root: Path, expected: dict[str, torch.Tensor], data: bytes) -> None:
    draw = atheris.FuzzedDataProvider(data)
    base = draw.PickValueInList(list(soak_damage.BASES))
    folder = root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "bases" / base, folder)
    for _ in range(draw.ConsumeIntInRange(1, 3)):
        edit(folder, draw)
    own = soak_checkpoints.outcome_of(lowbit.from_pretrained, folder, expected[base])
    verdict = soak_checkpoints.verdict("edited", own)
    # transformers would build any number of layers before lowbit is called (counted among the mutated checkpoints).
    if not verdict.startswith("FAILED") and layers_of(folder) <= 1000:
        plain = soak_checkpoints.outcome_of(soak_checkpoints.plain, folder, expected[base])
        verdict = soak_checkpoints.plain_verdict("edited", plain, verdict)
    if verdict.startswith("FAILED"):
        raise AssertionError(f"{verdict}: base {base}, lowbit.from_pretrained {own}")


def layers_of(folder: Path) -> int:
    """How many layers a damaged config.json asks for."""
    try:
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 1
    return layers if isinstance(layers, int) else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["loader", "ops"])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--artifacts", default=tempfile.gettempdir())
    parser.add_argument("--input", help="a file that an earlier run left")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments = [sys.argv[0], f"-runs={options.runs}", f"-seed={options.seed}", "-max_len=400", "-timeout=1200",
                 "-rss_limit_mb=6000", f"-artifact_prefix={options.artifacts}/", "-len_control=0"]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lowbit-soak-") as corpus:
        rng = random.Random(options.seed)
        for number in range(32):  # long enough for several edits or draws; libFuzzer would begin with empty inputs
            (Path(corpus) / str(number)).write_bytes(rng.randbytes(300))
        _fuzz(options, [sys.argv[0], options.input] if options.input else [*arguments, corpus])


def _fuzz(options: argparse.Namespace, arguments: list[str]) -> None:
    with soak_checkpoints.prepared(0) as (root, expected):
        target = fuzz_ops if options.target == "ops" else lambda data: fuzz_loader(root, expected, data)
        atheris.Setup(arguments, target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
