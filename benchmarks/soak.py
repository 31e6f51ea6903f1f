"""Reliability under damage, strange input, surgery, load, concurrency and interruption; `make soak` runs all of it.

    python -m benchmarks.soak                          every part that has not been run yet, then the report
    python -m benchmarks.soak checkpoints --again      one part, from the start
    python -m benchmarks.soak checkpoints --case 1234  one damaged checkpoint, shown
    python -m benchmarks.soak ops --case 17            one case of every kind of op
    python -m benchmarks.soak surgery --case 17        one program of edits and verbs, shown

Parts write what they have to `soak-output/`, so a run that is cut off goes on where it was. The report is
`benchmarks/results/reliability.json`, and docs/reliability.md rendered from it. Ends with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from tqdm.auto import tqdm

import lowbit

from . import soak_checkpoints, soak_damage, soak_ops, soak_running, soak_surgery
from .report import render
from .results import Row, read, write

STATE = Path("soak-output")
RESULTS = Path("benchmarks/results")
PAGE = Path("docs/reliability.md")
SEED = 1

OPS_CASES = 600  # of each kind, by random numbers
HYPOTHESIS_CASES = 100  # of each kind
ATHERIS_RUNS = {"loader": 1000, "ops": 8000}
REQUESTS = 20_000
PROCESSES = 4  # for ops
WORKERS = 6  # for checkpoints: more than cores, since a hanging one waits
ROUNDS = {"concurrency": 10, "resume": 6}

Part = Callable[[], dict[str, Any]]

# ------------------------------------------------------------------------------------------------------------- parts


def checkpoints() -> dict[str, Any]:
    """Every outcome goes to a line of a file at once."""
    STATE.mkdir(exist_ok=True)
    log = STATE / "checkpoints.jsonl"
    done = {}
    if log.exists():
        for line in log.read_text().splitlines():
            outcome = json.loads(line)
            done[outcome["case"]] = outcome
    left = [case for case in range(soak_checkpoints.CASES) if case not in done]
    started = time.monotonic()
    with log.open("a") as file, _bar(len(left), "checkpoints") as bar:
        for case, outcome in soak_checkpoints.outcomes(iter(left), SEED, WORKERS):
            done[case] = {"case": case, **outcome}
            file.write(json.dumps(done[case]) + "\n")
            file.flush()
            bar.update()
            if failed(outcome):
                bar.write(f"case {case}: {outcome}")
    seconds = round(time.monotonic() - started)
    # Of a run that was interrupted, the time is not known.
    known = {"seconds": seconds} if len(left) == soak_checkpoints.CASES else {}
    return {**known, "outcomes": [done[case] for case in sorted(done)]}


def ops() -> dict[str, Any]:
    """Cases drawn by random numbers, then by hypothesis, which shrinks what fails; kinds side by side."""
    started = time.monotonic()
    rows: dict[str, Counter[str]] = {}
    failures: list[str] = []
    with (
        multiprocessing.get_context("fork").Pool(PROCESSES, *soak_running.END_AT_ONCE) as pool,
        _bar(len(soak_ops.CASES), "ops") as bar,
    ):
        for name, row, failed in pool.imap_unordered(_cases_of, soak_ops.CASES):
            rows[name] = row
            failures += failed
            bar.update()
    return {
        "seconds": round(time.monotonic() - started), "rows": {name: rows[name] for name in soak_ops.CASES},
        "failures": failures,
    }  # fmt: skip


def _cases_of(name: str) -> tuple[str, Counter[str], list[str]]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row, failures = Counter(equal=0, refused=0), []
    for case in range(OPS_CASES):
        try:
            row[soak_ops.run(name, op_case(name, case).randint)] += 1
        except Exception as error:
            row["failed"] += 1
            failures.append(f"{name}, case {case}: {type(error).__name__}: {str(error)[:200]}")
    return name, row, failures + soak_ops.by_hypothesis(name, HYPOTHESIS_CASES)


def op_case(name: str, case: int) -> random.Random:
    return random.Random(f"{SEED} {name} {case}")


def surgery() -> dict[str, Any]:
    with _bar(soak_surgery.PROGRAMS, "surgery") as bar:
        return soak_surgery.programs(soak_surgery.PROGRAMS, SEED, bar.update)


def atheris() -> dict[str, Any]:
    """libFuzzer in processes of its own; none of its runs is among the mutated checkpoints."""
    if importlib.util.find_spec("atheris") is None:
        return {"note": "not measured: atheris is not installed", "failures": []}
    started = time.monotonic()
    rows, failures = {}, []
    with _bar(len(ATHERIS_RUNS), "atheris") as bar:
        for target, runs in ATHERIS_RUNS.items():
            command = [sys.executable, "-m", "benchmarks.soak_atheris", target, "--artifacts", str(STATE)]
            command += ["--runs", str(runs), "--seed", str(SEED)]
            result = subprocess.run(command, capture_output=True, text=True)
            last = re.findall(r"#(\d+)\s+\w+\s+cov: (\d+)", result.stderr)
            rows[target] = {"runs": int(last[-1][0]), "branches covered": int(last[-1][1])} if last else {"runs": 0}
            if result.returncode:
                failures.append(f"{target}: exit code {result.returncode}: {result.stderr[-1500:]}")
            bar.update()
    return {"seconds": round(time.monotonic() - started), "rows": rows, "failures": failures}


def requests() -> dict[str, Any]:
    with _bar(REQUESTS, "requests") as bar:
        return soak_running.requests(REQUESTS, SEED, bar.update)


def concurrency() -> dict[str, Any]:
    with _bar(ROUNDS["concurrency"], "concurrency") as bar:
        return soak_running.concurrency(ROUNDS["concurrency"], SEED, bar.update)


def resume() -> dict[str, Any]:
    with _bar(ROUNDS["resume"], "resume") as bar:
        return soak_running.resume(ROUNDS["resume"], SEED, bar.update)


PARTS: dict[str, Part] = {
    "checkpoints": checkpoints,
    "ops": ops,
    "surgery": surgery,
    "atheris": atheris,
    "requests": requests,
    "concurrency": concurrency,
    "resume": resume,
}


def _bar(total: int, name: str) -> Any:
    return tqdm(total=total, desc=name, dynamic_ncols=True, mininterval=2)


# ------------------------------------------------------------------------------------------------------------ report

LOADER, PLAIN = "lowbit.from_pretrained", "plain from_pretrained"
COLUMNS = ("loaded correctly", "CheckpointError", "the rewritten values", "failed")


def failed(outcome: dict[str, str]) -> bool:
    return "FAILED" in outcome["verdict"] + outcome["plain"]


def tables(parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Row]]:
    """The report's results, from what the parts wrote."""
    makers = {
        "checkpoints": _checkpoint_tables, "ops": _ops_tables, "surgery": _surgery_tables,
        "atheris": _atheris_tables, "requests": _request_tables, "concurrency": _concurrency_tables,
        "resume": _resume_tables,
    }  # fmt: skip
    results: dict[str, dict[str, Row]] = {}
    for name, part in parts.items():
        results |= makers[name](part)
    if missing := [name for name in PARTS if name not in parts]:
        results["not run yet"] = {name: {"note": "not measured"} for name in missing}
    return results


def _checkpoint_tables(part: dict[str, Any]) -> dict[str, dict[str, Row]]:
    outcomes = part["outcomes"]
    own, plain = (Counter(outcome[which] for outcome in outcomes) for which in ("verdict", "plain"))
    verdicts = sorted(own | plain, key=lambda name: (-own[name], -plain[name], name))
    loads: dict[str, Row] = {"all": {LOADER: len(outcomes), PLAIN: len(outcomes)}}
    loads |= {name: {LOADER: own[name], PLAIN: plain[name]} for name in verdicts}
    loads["FAILED"] = {LOADER: _failures(own), PLAIN: _failures(plain)}
    kinds: dict[str, Row] = {}
    for kind in soak_damage.KINDS:
        cases = [outcome for outcome in outcomes if outcome["kind"] == kind]
        counts = Counter(_column(outcome["verdict"]) for outcome in cases)
        kinds[kind] = {
            "cases": len(cases), **{column: counts[column] for column in COLUMNS},
            "plain: transformers' own exception": sum(outcome["plain"].startswith("transf") for outcome in cases),
        }  # fmt: skip
    return {"damaged checkpoints": loads, "kind of damage, lowbit.from_pretrained": kinds}


def _failures(verdicts: Counter[str]) -> int:
    return sum(name.startswith("FAILED") for name in verdicts.elements())


def _column(verdict: str) -> str:
    if verdict.startswith("FAILED"):
        return "failed"
    return {"loaded the rewritten values": "the rewritten values"}.get(verdict, verdict)


def _ops_tables(part: dict[str, Any]) -> dict[str, dict[str, Row]]:
    columns = ("equal", "refused", "on meta", "failed")
    rows: dict[str, Row] = {}
    for name, row in part["rows"].items():
        rows[name] = {"cases": sum(row.values()), **{key: row.get(key, 0) for key in columns}}
    return {"op": rows}


def _surgery_tables(part: dict[str, Any]) -> dict[str, dict[str, Row]]:
    failed = len(part["failures"])
    rows: dict[str, Row] = {
        kind: {"times": sum(row.values()), **{outcome: row.get(outcome, 0) for outcome in soak_surgery.OUTCOMES}}
        for kind, row in part["rows"].items()
    }
    programs: dict[str, Row] = {name: {"programs": count} for name, count in part["families"].items()}
    return {"surgery": {"programs": {"run": part["programs"], "failed": failed}}, "surgery, by model": programs,
            "surgery, by step": rows}  # fmt: skip


def _atheris_tables(part: dict[str, Any]) -> dict[str, dict[str, Row]]:
    rows = part.get("rows") or {"loader, ops": {"note": part["note"]}}
    return {"coverage-guided fuzzing (atheris)": rows}


def _request_tables(part: dict[str, Any]) -> dict[str, dict[str, Row]]:
    memory = part["memory"]
    run = {key: value for key, value in part.items() if key != "memory"}
    return {
        "requests": {"fused ternary model": {**run, "failures": len(part["failures"])}},
        "memory over the requests, MB": {
            f"after {percent} %": {"resident": memory[max(len(memory) * percent // 100 - 1, 0)]}
            for percent in (1, 10, 25, 50, 75, 100)
        },
    }


def _concurrency_tables(part: dict[str, Any]) -> dict[str, dict[str, Row]]:
    rows: dict[str, Row] = {"saves by two processes": {"times": part["saves"]}}
    rows |= {f"loaded meanwhile: {key}": {"times": count} for key, count in sorted(part["loads meanwhile"].items())}
    rows |= {f"left in the end: {key}": {"times": count} for key, count in part["left in the end"].items()}
    rows["forward passes of eight threads on one model"] = {"times": part["threads on one model, forward passes"]}
    return {"concurrency": rows}


def _resume_tables(part: dict[str, Any]) -> dict[str, dict[str, Row]]:
    row = {**part, "failures": len(part["failures"])}
    return {"training killed and resumed": {"float, ternary and split students in turn": row}}


def failures(parts: dict[str, dict[str, Any]]) -> list[str]:
    """What must not have happened, in words."""
    found = [f"{name}: {failure}" for name, part in parts.items() for failure in part.get("failures", [])]
    for outcome in parts.get("checkpoints", {}).get("outcomes", []):
        if failed(outcome):
            found.append(f"checkpoints: {outcome}")
    return found


INTRO = """# Reliability

Written by `make soak` (`python -m benchmarks.soak`) from `benchmarks/results/reliability.json`; every number on this
page was counted there; parts may have been run one by one. The model card, which no loader reads, is never damaged.

## What is promised

**`lowbit.from_pretrained(folder)` loads what was saved, or raises one `lowbit.CheckpointError`.** Every safetensors
file carries, in its header, a CRC-32 of type, shape and bytes of each tensor of the checkpoint, and the fields of
config.json that decide what the model computes. Both are compared before a model is built (`lowbit.verify`), then again
by transformers' loader as it reads. "Loaded correctly" below means: logits of a padded batch equal the undamaged
checkpoint's bit for bit.

**Plain `from_pretrained`** of a transformers class makes the same checks before a weight is used, but reads
config.json, builds the model and finds the weight files before lowbit is called. What it raises by itself there
(`OSError` for a file that is missing or no JSON, `ValueError`, `TypeError` and others for values that it does not
accept, `RecursionError` for deeply nested JSON), or the time it takes to build a million layers, lowbit cannot change;
it is counted by type, as "transformers: ..." ("hangs": longer than SECONDS seconds). It loads files without records
too (of earlier versions, of other programs), which `lowbit.from_pretrained` refuses.

**What can be noticed.** The records guard against accidents: they are no signature. Whoever rewrites tensors and
checksums together makes another checkpoint (the kinds named "rewritten"); it is asked there that nothing crashes and
logits are finite or the file refused. Names of labels, dropout and other fields that do not change what a loaded
model computes may be edited. "WithoutLowbit" are checkpoints of the stage "prepared", which hold ordinary float
weights, whose quantization_config was removed: transformers then loads them as a float model without calling lowbit;
`lowbit.from_pretrained` refuses them.

**No code of a checkpoint is run.** Planted pickles and Python files would each write a file when opened or imported;
none appeared. `trust_remote_code=True` is the caller's own decision and was not given.

**Ops** are compared with `lowbit_kernels.reference` in float64 and int64, or another independent computation: "equal"
is within the rounding of float32, integers bit for bit; "refused" is a TypeError, ValueError (or IndexError of an id
outside of its table) with a message; inputs are never changed. Each kind was also drawn by hypothesis, HYPOTHESIS
examples. Other devices than the CPU and meta: not measured.

**Surgery**: random programs of what users do to models (heads, activations, norms, tables and layers replaced, hooks,
pruning, shared parts, ...), of lowbit's verbs, of saving, loading and copying, and of calls with masks of every kind.
The same program is done to a twin that takes no fast path and is neither saved nor copied; where nothing is quantized
it stays transformers' float model. After each step both compute the same, up to rounding, and hooks have seen the same
("equal"); or both refuse the call, or the verb was refused by one clear error that left the model as it was, to the
last bit ("refused"). "random": dropout was on; "dropped": lengths drop tokens, and sentences are compared with
themselves alone; "unfit": the model has no such part; "end": the file cannot say what was done, as with transformers'
own models.

**Under load** every answer of the threads equals the single thread's for the same request, bit for bit; memory may
grow by 1 % (at least 2 MB) from the second to the last quarter of the run. **Two processes that save to one folder**
leave one of the two checkpoints, whole; who loads meanwhile gets either model or an error. **Training that is
killed** (SIGKILL) and resumed ends in the weights of a run left alone, bit for bit, on the CPU.

Case n of the checkpoints, of each kind of op and of surgery is made of the seed and n alone: `python -m benchmarks.soak
checkpoints --case n` shows it again.

"""


def page(report: dict[str, Any]) -> str:
    numbers = {"HYPOTHESIS": HYPOTHESIS_CASES, "SECONDS": round(soak_checkpoints.SECONDS)}
    intro = INTRO
    for name, number in numbers.items():
        intro = intro.replace(name, str(number))
    return intro + render(report)


def write_report(parts: dict[str, dict[str, Any]]) -> list[str]:
    found = failures(parts)
    seconds = {name: part["seconds"] for name, part in parts.items() if "seconds" in part}
    report = {
        "suite": "reliability",
        "model": "tiny models of one layer, every format",
        "machine": {
            "CPU": _processor(), "cores": os.cpu_count() or 0, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "safetensors": safetensors.__version__, "lowbit": lowbit.__version__,
        },
        "method": f"seed {SEED}; {len(found)} failures; seconds of wall time by part, on shared cores: "
        + ", ".join(f"{name} {value}" for name, value in seconds.items()),
        "results": tables(parts),
    }  # fmt: skip
    path = write(report, RESULTS)
    PAGE.write_text(page(read(path)))
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.machine()


# -------------------------------------------------------------------------------------------------------------- main


def show_checkpoint(case: int) -> None:
    """Damage checkpoint `case` again, and print what is made of it."""
    with soak_checkpoints.prepared(SEED) as (root, expected):
        outcome = soak_checkpoints.run(root, case, SEED, expected, lambda known: print(known, flush=True))
        print(outcome)
        folder = root / "shown"
        soak_checkpoints.damage(folder, case, SEED)
        for load in (lowbit.from_pretrained, soak_checkpoints.plain):
            try:
                print(load.__name__, soak_checkpoints.logits(folder, load))
            except Exception:
                traceback.print_exc(limit=-3)


def finished(name: str) -> dict[str, Any] | None:
    """What an earlier run of a part found, None where there is none."""
    path = STATE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_part(name: str, again: bool) -> dict[str, Any]:
    """What a part finds; from an earlier run where there is one."""
    path = STATE / f"{name}.json"
    if again:
        for old in (path, STATE / f"{name}.jsonl"):
            old.unlink(missing_ok=True)
    if (before := finished(name)) is not None:
        return before
    started = time.monotonic()
    result = PARTS[name]()
    if name != "checkpoints":
        result.setdefault("seconds", round(time.monotonic() - started))
    STATE.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=STATE, delete=False) as file:
        json.dump(result, file)
    os.replace(file.name, path)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=list(PARTS), help="default: all, and the report")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--report", action="store_true", help="write the report of what has been run, and run nothing")
    parser.add_argument("--case", type=int, help="show one case of checkpoints, ops or surgery")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that workers and temporary folders go too
    if options.case is not None:
        if options.part == "checkpoints":
            show_checkpoint(options.case)
        elif options.part == "surgery":
            print(soak_surgery.surgery().draw(SEED, options.case))
            print(soak_surgery.run(options.case, SEED))
        else:
            for name in soak_ops.CASES:
                print(name, soak_ops.run(name, op_case(name, options.case).randint))
        return
    if options.report:
        parts = {name: part for name in PARTS if (part := finished(name))}
    else:
        wanted = [options.part] if options.part else list(PARTS)
        parts = {name: run_part(name, options.again) for name in wanted}
    found = failures(parts) if options.part else write_report(parts)
    for failure in found:
        print(failure)
    print(f"{len(found)} failures" + ("" if options.part else f"; see {PAGE}"))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
