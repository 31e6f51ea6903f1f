"""A packed model under load: many threads, several processes at one folder, and training that is killed.

requests       20,000 random ragged batches in 4 threads, each answer compared with that of one thread; memory over
               time
concurrency    two processes that save two models to one folder while two others load from it; threads that share a
               model and its int8 expansions
resume         training killed at a random moment, and resumed until done: the weights of a run left alone, bit for
               bit
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import queue
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import lowbit
import lowbit_kernels

from .soak_checkpoints import quiet, small

THREADS = 4
# Of a pool's processes: the handler that `make soak` has for SIGTERM raises, which a callback may swallow, and then the
# pool waits for ever.
END_AT_ONCE = (signal.signal, (signal.SIGTERM, signal.SIG_DFL))
Result = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------- requests


def request(number: int, seed: int) -> dict[str, torch.Tensor]:
    """Batch `number`: one to four sentences of one to 24 tokens, padded to the longest."""
    rng = random.Random(f"{seed} request {number}")
    lengths = [rng.randint(1, 24) for _ in range(rng.randint(1, 4))]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.tensor([rng.randrange(1, 50) for _ in range(length)])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def resident() -> float:
    """Memory of this process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.inference_mode()
def _answers(model: torch.nn.Module, seed: int, numbers: range) -> list[list[list[float]]]:
    return [model(**request(number, seed)).logits.tolist() for number in numbers]


@torch.inference_mode()
def requests(count: int, seed: int, progress: Callable[[int], None]) -> Result:
    """Run `count` requests in threads that share one fused model; memory is read every hundredth part."""
    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = lowbit.quantize(small(), lowbit.TernaryConfig(), fused=True)
    # Answers of one thread, in processes of their own, so that nothing of the threads can reach them.
    parts = [range(first, min(first + 500, count)) for first in range(0, count, 500)]
    expected: list[torch.Tensor] = []
    with multiprocessing.get_context("fork").Pool(THREADS, *END_AT_ONCE) as pool:
        for answers in pool.imap(functools.partial(_answers, model, seed), parts):
            expected += [torch.tensor(answer) for answer in answers]
            progress(len(answers) // 2)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        waiting.put(number)
    wrong: list[int] = []
    errors: list[str] = []
    memory: list[float] = []
    lock, done = threading.Lock(), itertools.count(1)

    def serve() -> None:
        with torch.inference_mode():
            while True:
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answer = model(**request(number, seed)).logits
                    if not torch.equal(answer, expected[number]):
                        wrong.append(number)
                except Exception as error:
                    errors.append(f"{number}: {error!r}")
                with lock:
                    finished = next(done)
                    if finished % max(count // 100, 1) == 0:
                        memory.append(resident())
                        progress(max(count // 100, 1) // 2)

    started = time.monotonic()
    threads = [threading.Thread(target=serve) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quarter = max(len(memory) // 4, 1)
    middle, last = (sum(part) / len(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    growth = last - middle
    failures = [f"request {number} has another answer" for number in wrong] + errors
    # Allocators keep arenas for each thread and give back late: 1 % is noise, a leak of one logit a request is not.
    if growth > max(0.01 * middle, 2.0):
        failures.append(f"memory grew by {growth:.1f} MB from the second to the last quarter")
    return {
        "requests": count, "threads": THREADS, "seconds": round(time.monotonic() - started), "failures": failures,
        "MB after the first quarter": round(memory[quarter - 1], 1), "MB at the end": round(memory[-1], 1),
        "MB grown from the second to the last quarter": round(growth, 2), "memory": [round(m, 1) for m in memory],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- concurrency


def two_models(seed: int) -> list[BertForSequenceClassification]:
    """Of one shape, but one ternary in shards and one binary: files of both together are no checkpoint."""
    torch.manual_seed(seed)
    return [lowbit.quantize(small(), config) for config in (lowbit.TernaryConfig(), lowbit.BinaryConfig())]


def answer(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9).view(1, 8)).logits


def _save_often(folder: Path, which: int, times: int, seed: int, start: Any) -> None:
    quiet()
    torch.set_num_threads(1)
    model = two_models(seed)[which]
    start.wait()
    for turn in range(times):
        model.save_pretrained(folder, **({"max_shard_size": "6KB"} if which == 0 and turn % 2 else {}))


def _load_often(folder: Path, seed: int, stop: Any, results: Any, start: Any) -> None:
    quiet()
    torch.set_num_threads(1)
    expected = [answer(model) for model in two_models(seed)]
    seen: Counter[str] = Counter()
    start.wait()
    while not stop.is_set():
        seen[_loaded(folder, expected)] += 1
    results.put(seen)


def _loaded(folder: Path, expected: list[torch.Tensor]) -> str:
    try:
        got = answer(AutoModelForSequenceClassification.from_pretrained(folder))
    except lowbit.CheckpointError:
        return "CheckpointError"
    except Exception as error:  # a shard that transformers wants to open was just replaced: counted by type
        return f"transformers: {type(error).__name__}"
    return "one of the two models" if any(torch.equal(got, one) for one in expected) else "FAILED: another model"


def concurrency(rounds: int, seed: int, progress: Callable[[int], None]) -> Result:
    """`rounds` times: two processes save 5 times each, two load meanwhile; then the folder must hold one of the two."""
    quiet()
    torch.set_num_threads(1)
    expected = [answer(model) for model in two_models(seed)]
    context = multiprocessing.get_context("fork")
    seen: Counter[str] = Counter()
    left: Counter[str] = Counter()
    failures = []
    for turn in range(rounds):
        with tempfile.TemporaryDirectory(prefix="lowbit-soak-") as name:
            folder = Path(name)
            two_models(seed)[0].save_pretrained(folder)
            stop, start, results = context.Event(), context.Barrier(4), context.Queue()
            savers = [context.Process(target=_save_often, args=(folder, which, 5, seed, start)) for which in (0, 1)]
            loaders = [context.Process(target=_load_often, args=(folder, seed, stop, results, start)) for _ in range(2)]
            for process in (*savers, *loaders):
                process.start()
            for process in savers:
                process.join()
            stop.set()
            for _ in loaders:
                seen += results.get(timeout=120)
            for process in loaders:
                process.join()
            if any(process.exitcode for process in (*savers, *loaders)):
                failures.append(f"round {turn}: exit codes {[process.exitcode for process in (*savers, *loaders)]}")
            ending = _loaded(folder, expected)
            left[ending] += 1
            if ending != "one of the two models":
                failures.append(f"round {turn}: {ending} is left")
            if leftovers := [path.name for path in folder.iterdir() if path.name.startswith(".")]:
                failures.append(f"round {turn}: {leftovers} left behind")
        progress(1)
    failures += [f"{count} loads: {kind}" for kind, count in seen.items() if kind.startswith("FAILED")]
    failures += _shared_model(seed)
    return {
        "rounds": rounds, "saves": 10 * rounds, "loads meanwhile": dict(seen), "left in the end": dict(left),
        "threads on one model, forward passes": 8 * 200, "failures": failures,
    }  # fmt: skip


def _shared_model(seed: int) -> list[str]:
    """Eight threads on one unfused model, whose expansions another thread drops again and again."""
    torch.manual_seed(seed)
    model = lowbit.quantize(small(), lowbit.TernaryConfig())
    expected = answer(model)
    failures: list[str] = []
    stop = threading.Event()

    def run() -> None:
        for _ in range(200):
            try:
                if not torch.equal(answer(model), expected):
                    failures.append("threads on one model: another answer")
            except Exception as error:
                failures.append(f"threads on one model: {error!r}")

    def disturb() -> None:
        while not stop.is_set():
            lowbit_kernels.keep_expanded(False)
            lowbit_kernels.keep_expanded(True)
            time.sleep(0.002)

    threads = [threading.Thread(target=run) for _ in range(8)]
    other = threading.Thread(target=disturb)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    return failures[:5]


# ------------------------------------------------------------------------------------------------------------ resume

STEPS = 40


def training(folder: Path, kind: str, seed: int) -> None:
    """One distillation run that saves every 4 steps, from where it was if it was interrupted; run as a process."""
    from torch.utils.data import Dataset
    from transformers import TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Sentences(Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, Any]:
            ids = torch.randint(1, 50, (12,), generator=torch.Generator().manual_seed(index))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0]) % 3}

    quiet()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    teacher, student = small(), small()
    if kind != "float":
        student = lowbit.prepare(student, lowbit.TernaryConfig())
    if kind == "split":
        student = lowbit.split(student)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), use_cpu=True, report_to=[], disable_tqdm=True, save_steps=4, save_total_limit=2,
        max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1000, seed=seed,
    )  # fmt: skip
    trainer = lowbit.DistillationTrainer(
        model=student, teacher=teacher, args=arguments, train_dataset=Sentences(),
        stages=[(0.5, [lowbit.HiddenStateLoss(), lowbit.AttentionScoreLoss()]), (1.0, [lowbit.LogitsLoss()])],
    )  # fmt: skip
    run = folder / "run"
    last = get_last_checkpoint(str(run)) if run.is_dir() else None
    # A kill while a checkpoint is written leaves one without the file that is written last.
    while last and not (Path(last) / "trainer_state.json").exists():
        Path(last).rename(run / f"unfinished-{Path(last).name}-{time.monotonic_ns()}")
        last = get_last_checkpoint(str(run))
    trainer.train(resume_from_checkpoint=last)
    whole = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    torch.save(whole, folder / "aside.pt")
    os.replace(folder / "aside.pt", folder / "final.pt")


def _trained(folder: Path, kind: str, seed: int, kills: random.Random | None) -> int:
    """Run `training` until it ends; returns how often it was killed."""
    killed = 0
    while not (folder / "final.pt").exists():
        process = multiprocessing.get_context("fork").Process(target=training, args=(folder, kind, seed))
        process.start()
        if kills is not None and killed < 3:
            begun = _newest(folder)
            while process.is_alive() and _newest(folder) == begun:  # until it has saved at least once more
                time.sleep(0.002)
            process.join(kills.random() * 0.5)
            if process.is_alive():
                process.kill()
                killed += 1
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"training of a {kind} student ended with exit code {process.exitcode}")
    return killed


def _newest(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob("run/checkpoint-*")), default=0)


def resume(rounds: int, seed: int, progress: Callable[[int], None]) -> Result:
    """`rounds` times: a run left alone and one killed up to 3 times, for float, ternary and split students in turn."""
    rng = random.Random(f"{seed} resume")
    kills, failures = 0, []
    for turn in range(rounds):
        kind = ("float", "ternary", "split")[turn % 3]
        with tempfile.TemporaryDirectory(prefix="lowbit-soak-") as name:
            folders = [Path(name) / part for part in ("whole", "killed")]
            for folder in folders:
                folder.mkdir()
            _trained(folders[0], kind, seed + turn, None)
            kills += _trained(folders[1], kind, seed + turn, rng)
            one, other = (torch.load(folder / "final.pt") for folder in folders)
            if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
                failures.append(f"round {turn} ({kind}): other weights than the uninterrupted run's")
        progress(1)
    return {"rounds": rounds, "steps each": STEPS, "kills": kills, "failures": failures}
