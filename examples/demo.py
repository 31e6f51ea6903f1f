"""Compress a real BERT to 2 and 1 bits in about ten minutes on two CPU cores, without a network.

all-MiniLM-L6-v2 is fine-tuned on a synthetic sentiment task, distilled to TernaryBERT (2-2-8), and, at half width,
ternarized, split into pairs of binary weights and distilled to BinaryBERT (1-1-8). Each model is packed, saved, loaded
in a new process and measured there. Ends with a table, results.json and a plot of accuracy against size.

example:
  python examples/demo.py --output_dir demo-output
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import lowbit
from _common import default_model, run_example
from lowbit.data import sentiment
from lowbit.data.tasks import Task, tokenize
from lowbit.recipes.measure import measure, table
from lowbit.recipes.stages import Run, distill, fine_tune, load_teacher, start, training_batches

TASK = Task(("sentence",), ("negative", "positive"), ("accuracy",), max_length=40)
MODELS = {"float": "teacher", "ternary 2-2-8": "ternary-packed", "binary 1-1-8": "binary-packed"}
COLUMNS = {
    "accuracy": "accuracy % (synthetic)",
    "disk_mb": "MB on disk",
    "memory_mb": "MB of weights",
    "expanded_mb": "+ MB int8 cache",
    "ms_b1": "ms, batch 1 (compiled)",
    "ms_b8": "ms, batch 8 (compiled)",
    "speedup_b1": "speed-up, batch 1",
    "speedup_b8": "speed-up, batch 8",
}


@dataclass
class DemoOptions:
    """Options of the demo; the defaults take about ten minutes on two cores."""

    model: str = field(default_factory=default_model, metadata={"help": "float BERT: folder or Hub id"})
    output_dir: str = field(default="demo-output", metadata={"help": "made anew in each run"})
    train_samples: int = field(default=8000, metadata={"help": "sentences to train on"})
    validation_samples: int = field(default=1000, metadata={"help": "held-out sentences"})
    teacher_steps: int = field(default=280, metadata={"help": "of plain fine-tuning"})
    slim_steps: int = field(default=80, metadata={"help": "of distilling the slimmed float model"})
    steps: int = field(default=160, metadata={"help": "of each distillation stage"})
    batch_size: int = field(default=32, metadata={"help": "of training"})
    bf16: bool = field(default=False, metadata={"help": "train in bfloat16 (autocast)"})
    seed: int = field(default=0, metadata={"help": "of data and training"})
    measure_only: str = field(default="", metadata={"help": "internal: measure one saved model and exit"})


def open_run(options: DemoOptions) -> Run:
    data = sentiment.load(options.train_samples, options.validation_samples, options.seed)
    _, tokenizer = load_teacher(options, TASK)
    return start(options, TASK, tokenize(data, tokenizer, TASK), tokenizer)


def clear(folder: Path) -> None:
    """Delete the folder of an earlier demo; refuse one that holds anything else."""
    if not folder.exists():
        return
    try:
        mine = "measure_only" in json.loads((folder / "options.json").read_text())
    except (OSError, ValueError):
        mine = folder.is_dir() and not any(folder.iterdir())
    if not mine:
        raise SystemExit(f"{folder} holds other files than a demo's; choose another --output_dir or delete it")
    shutil.rmtree(folder)


def build(run: Run) -> None:
    """Train and save every model."""
    options = run.options
    model, _ = load_teacher(options, TASK)
    teacher = run.stage("teacher", lambda: fine_tune(run, "teacher", model, options.teacher_steps, 1e-4))
    student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())
    run.stage("ternary-packed", lambda: lowbit.convert(distill(run, "ternary", student, teacher, options.steps, 3e-4)))
    half = copy.deepcopy(teacher)
    lowbit.slim(half, 0.5, dataloader=training_batches(run, half, 8))
    half = distill(run, "half-width", half, teacher, options.slim_steps, 1e-4)
    half = lowbit.prepare(half, lowbit.TernaryConfig())
    half = distill(run, "half-width-ternary", half, teacher, options.steps, 3e-4)
    binary = lowbit.split(half)
    run.stage("binary-packed", lambda: lowbit.convert(distill(run, "binary", binary, teacher, options.steps, 3e-4)))


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Accuracy against size on disk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, row in rows.items():
        axes.scatter(row["disk_mb"], row["accuracy"], s=60)
        axes.annotate(name, (row["disk_mb"], row["accuracy"]), textcoords="offset points", xytext=(8, -4))
    axes.set(xscale="log", xlabel="size on disk, MB (log)", ylabel="accuracy, % (synthetic task)")
    axes.set_xlim(right=4 * max(row["disk_mb"] for row in rows.values()))
    axes.set_title("all-MiniLM-L6-v2, compressed by lowbit")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(options: DemoOptions) -> None:
    folder = Path(options.output_dir)
    if options.measure_only:
        options, name = DemoOptions(**json.loads((folder / "options.json").read_text())), options.measure_only
        options.output_dir = str(folder)
        measure(open_run(options), name, compiled=bool(shutil.which("g++")))
        return
    began = time.perf_counter()
    clear(folder)
    print(f"lowbit {lowbit.__version__}, {lowbit.backend()}")
    build(open_run(options))
    for stage in MODELS.values():
        command = [sys.executable, __file__, "--output_dir", str(folder), "--measure_only", stage]
        measured = subprocess.run(command, capture_output=True, text=True)
        if measured.returncode:
            raise SystemExit(f"error: measuring {stage} failed:\n{measured.stderr}")
    results = json.loads((folder / "results.json").read_text())
    rows = {name: results[stage] for name, stage in MODELS.items()}
    for row in rows.values():
        for batch in ("b1", "b8"):
            eager, compiled = f"latency_{batch}_ms", f"compiled_{batch}_ms"
            best = compiled if compiled in row else eager  # speed-ups compare like with like
            row[f"ms_{batch}"] = f"{row[eager]:.1f} ({row[compiled]:.1f})" if compiled in row else f"{row[eager]:.1f}"
            row[f"speedup_{batch}"] = f"{rows['float'][best] / row[best]:.2f}x"
    plot(rows, folder / "accuracy-size.png")
    text = table(rows, COLUMNS)
    (folder / "table.md").write_text(text + "\n")
    print(f"\nSynthetic task; CPU latency at sequence length 128, packed models fused.\n\n{text}\n")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; models, results.json and accuracy-size.png in {folder}/")


if __name__ == "__main__":
    run_example(main, DemoOptions, __doc__)
