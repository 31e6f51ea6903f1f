"""10,000 damaged checkpoints: each loads as what was saved, or raises one `lowbit.CheckpointError`.

Case n is made of seed and n alone: the kind of damage is KINDS[n % len(KINDS)], everything else comes from a generator
seeded with both, so `python -m benchmarks.soak checkpoints --case n` shows one again. A case copies a small checkpoint,
damages the copy (`soak_damage`), loads it by `lowbit.from_pretrained`, then by plain `from_pretrained` of transformers,
and compares the logits of a padded batch, bit for bit, with those of the undamaged checkpoint. Cases run in processes
of their own, so that a crash or a hang ends a case and not the run.

What counts as a failure:
    lowbit.from_pretrained    any exception but CheckpointError; a crash or a hang; a load that is wrong; code that runs
    plain from_pretrained     a load that is wrong; code that runs; a crash, a hang or an exception but CheckpointError
                              for what lowbit.from_pretrained loads
    rewritten                 damage whose checksums were written anew, so that nothing can notice it: a load with
                              another result is counted, and is a failure only where logits are NaN or infinite
What transformers itself raises for files that it reads before lowbit is called is counted by type.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging as transformers_logging

import lowbit

from .soak_damage import BASES, KINDS, SHARDED, canary_of, rewrite_header

CASES = 10_000
SECONDS = 60.0  # for one case on a busy machine, after which it counts as hanging

Outcome = dict[str, str]  # "kind", "base", "verdict" of lowbit.from_pretrained, "plain": that of transformers' own
Load = Callable[[Path], Any]

# ------------------------------------------------------------------------------------------------------- checkpoints


def small() -> BertForSequenceClassification:
    """One layer, hidden 32, sizes that fill no packing block; weights spread out, so that every tensor matters."""
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=70,
        max_position_embeddings=24, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write_bases(folder: Path, seed: int) -> None:
    """Saved models to damage, one a subfolder, and another of the same shapes as "other"."""
    torch.manual_seed(seed)
    ternary = lowbit.TernaryConfig
    models = {
        "ternary": lowbit.quantize(small(), ternary()),
        "sharded": lowbit.quantize(small(), ternary()),
        "other": lowbit.quantize(small(), ternary()),
        "binary": lowbit.quantize(small(), lowbit.BinaryConfig(embedding_bits=8)),
        "split pair": lowbit.convert(lowbit.split(lowbit.prepare(small(), ternary()))),
        "lengths": lowbit.set_length(lowbit.quantize(small(), ternary()), lowbit.LengthConfig(keep=(0.5,))),
        "bfloat16": lowbit.quantize(small(), ternary(granularity="per_tensor")).bfloat16(),
        "prepared": lowbit.prepare(small(), ternary()),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name, **({"max_shard_size": "6KB"} if name == "sharded" else {}))
    lowbit.quantize(small(), ternary()).save_pretrained(folder / "other sharded", max_shard_size="6KB")
    for path in folder.rglob("README.md"):
        path.unlink()  # the model card, which no loader reads: damage to it would count for nothing
    # safetensors writes the records in an order that changes from process to process; a case is to be the same in all.
    for path in sorted(folder.rglob("*.safetensors")):
        rewrite_header(path, lambda header: json.dumps({**header, "__metadata__": dict(_sorted(header))}))


def _sorted(header: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted(header["__metadata__"].items())


def plain(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def logits(folder: Path, load: Load = plain) -> torch.Tensor:
    """What a loaded checkpoint computes for a fixed padded batch."""
    model = load(folder)
    if getattr(model, "hf_quantizer", None) is None:
        raise WithoutLowbit
    ids = (torch.arange(2 * 9).view(2, 9) * 7) % 49 + 1
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, token_type_ids=ids % 2).logits


class WithoutLowbit(Exception):
    """config.json lost its quantization_config: transformers loads latent weights as an ordinary float model."""


# ------------------------------------------------------------------------------------------------------------- cases


def damage(folder: Path, case: int, seed: int) -> tuple[str, str]:
    """Put a damaged copy into `folder`, beside which "bases" is; returns (kind, base)."""
    kind = list(KINDS)[case % len(KINDS)]
    rng = random.Random(f"{seed} {case}")
    base = "sharded" if KINDS[kind] in SHARDED else rng.choice(BASES)
    shutil.copytree(folder.parent / "bases" / base, folder)
    KINDS[kind](folder, rng)
    return kind, base


def outcome_of(load: Load, folder: Path, expected: torch.Tensor) -> str:
    """What a loader makes of a checkpoint, in words."""
    try:
        got = logits(folder, load)
    except lowbit.CheckpointError:
        return "CheckpointError"
    except Exception as error:  # whatever there is, counted by type
        return type(error).__name__
    if canary_of(folder).exists():
        return "code ran"
    if got.dtype == expected.dtype and torch.equal(got, expected):
        return "equal"
    return "different" if got.isfinite().all() else "not finite"


WRONG = ("code ran", "different", "not finite")  # worse than any exception


def verdict(kind: str, outcome: str) -> str:
    """Which line of the report `lowbit.from_pretrained` gives a case; "FAILED" must not be."""
    if outcome == "different" and kind.startswith("rewritten"):
        return "loaded the rewritten values"
    return {"equal": "loaded correctly", "CheckpointError": "CheckpointError"}.get(outcome, f"FAILED: {outcome}")


def plain_verdict(kind: str, outcome: str, own: str) -> str:
    """The same of plain `from_pretrained`, which may raise anything for what `own`, the verdict before, refuses."""
    found = verdict(kind, outcome)
    may = own == "CheckpointError" and outcome not in WRONG
    return f"transformers: {outcome}" if found.startswith("FAILED") and may else found


def run(root: Path, case: int, seed: int, expected: dict[str, torch.Tensor], tell: Callable[[Any], None]) -> Outcome:
    """One case; `tell` is given what is known before the plain load, which may not come back."""
    folder = root / f"case {case}"
    try:
        kind, base = damage(folder, case, seed)
        own = verdict(kind, outcome_of(lowbit.from_pretrained, folder, expected[base]))
        known = {"kind": kind, "base": base, "verdict": own}
        tell(known)
        return {**known, "plain": plain_verdict(kind, outcome_of(plain, folder, expected[base]), own)}
    finally:
        for path in root.glob(f"{folder.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def quiet() -> None:
    """Ten thousand warnings about damaged files help nobody."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)


def _work(connection: Any, root: Path, seed: int, expected: dict[str, torch.Tensor]) -> None:
    """A worker: takes cases until there are none."""
    quiet()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nobody answers questions
    while (case := connection.recv()) is not None:
        outcome = run(root, case, seed, expected, lambda known: connection.send(("known", known)))
        connection.send(("done", outcome))


@contextlib.contextmanager
def prepared(seed: int) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """A folder with the undamaged checkpoints, and their logits."""
    quiet()
    with tempfile.TemporaryDirectory(prefix="lowbit-soak-") as name:
        root = Path(name)
        write_bases(root / "bases", seed)
        yield root, {base: logits(root / "bases" / base) for base in BASES}


def outcomes(cases: Iterator[int], seed: int, workers: int) -> Iterator[tuple[int, Outcome]]:
    """Run cases in worker processes; a worker that dies or hangs is replaced, and its case counted as that."""
    context = multiprocessing.get_context("fork")
    with prepared(seed) as (root, expected):
        pool: list[_Worker] = []
        try:
            while True:
                while len(pool) < workers and (case := next(cases, None)) is not None:
                    pool.append(_Worker(context, root, seed, expected, case))
                if not pool:
                    return
                before = time.monotonic()
                ready = multiprocessing.connection.wait([worker.connection for worker in pool], timeout=1.0)
                # Of a pause in which all processes were stopped, a second at most counts as a case's time.
                waited = min(time.monotonic() - before, 1.0)
                for worker in list(pool):
                    outcome = worker.outcome(worker.connection in ready, waited)
                    if outcome is None:
                        continue
                    yield worker.case, outcome
                    if not worker.process.is_alive():
                        pool.remove(worker)
                    elif (case := next(cases, None)) is not None:
                        worker.start(case)
                    else:
                        worker.stop()
                        pool.remove(worker)
        finally:
            for worker in pool:
                worker.kill()


class _Worker:
    def __init__(self, context: Any, root: Path, seed: int, expected: dict[str, torch.Tensor], case: int) -> None:
        self.connection, far = context.Pipe()
        self.process = context.Process(target=_work, args=(far, root, seed, expected), daemon=True)
        self.process.start()
        far.close()
        self.start(case)

    def start(self, case: int) -> None:
        self.case, self.known = case, {"kind": list(KINDS)[case % len(KINDS)], "base": "?"}
        self.left = SECONDS
        self.connection.send(case)

    def outcome(self, ready: bool, waited: float) -> Outcome | None:
        """The result of the case, None while there is none."""
        self.left -= waited
        if not ready:
            if self.left > 0:
                return None
            self.kill()
            return self._lost("hangs")
        try:
            state, values = self.connection.recv()
        except EOFError:
            self.process.join()
            return self._lost(f"crashes ({self.process.exitcode})")
        if state == "done":
            return values
        self.known = values
        return None

    def _lost(self, how: str) -> Outcome:
        if "verdict" in self.known:
            return {**self.known, "plain": plain_verdict(self.known["kind"], how, self.known["verdict"])}
        return {**self.known, "verdict": f"FAILED: {how}", "plain": "not reached"}

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
