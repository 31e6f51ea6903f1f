"""Two processes distil like one with twice the batch. Run by torchrun, this file is the worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import lowbit
from helpers import tiny
from lowbit import AttentionScoreLoss, HiddenStateLoss, LogitsLoss

SCHEDULES = {
    "joint": [(1.0, [HiddenStateLoss(), AttentionScoreLoss(), LogitsLoss()])],
    # The first stage gives the classifier no gradient, which DistributedDataParallel has to bear.
    "two stages": [(0.5, [HiddenStateLoss(), AttentionScoreLoss()]), (1.0, [LogitsLoss()])],
}


def train(folder: Path, processes: int) -> dict[str, list[dict[str, float]]]:
    """Loss curves by schedule. Batches of 8 in all; rank r of two takes samples 4r to 4r + 3 of each."""
    torch.set_num_threads(1)
    curves = {}
    for name, stages in SCHEDULES.items():
        torch.manual_seed(7)
        student, teacher = (tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) for _ in range(2))
        data = []
        for row in range(32):  # the same number of real tokens on both ranks
            mask = torch.ones(9, dtype=torch.long)
            mask[9 - 4 * (row % 2) :] = 0
            data.append(
                {"input_ids": torch.randint(1, 101, (9,)), "attention_mask": mask, "labels": torch.tensor(row % 3)}
            )
        args = TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            train_sampling_strategy="sequential",
            optim="sgd",
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            max_steps=4,
            per_device_train_batch_size=8 // processes,
        )
        trainer = lowbit.DistillationTrainer(
            model=student, teacher=teacher, args=args, train_dataset=data, stages=stages
        )
        assert args.world_size == processes
        trainer.train()
        curves[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    return curves


def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    together, alone = json.loads((tmp_path / "curves.json").read_text()), train(tmp_path, processes=1)
    for name, curve in alone.items():
        assert len(curve) == len(together[name]) == 4
        for one, two in zip(curve, together[name], strict=True):
            assert {key for key in one if key.startswith("loss")} == {key for key in two if key.startswith("loss")}
            for key in one:
                if key.startswith("loss"):
                    assert two[key] == pytest.approx(one[key], rel=1e-5, abs=2e-6), (name, key)
        assert curve[1]["loss"] != pytest.approx(curve[0]["loss"], rel=1e-3)


if __name__ == "__main__":
    curves = train(Path(sys.argv[1]), processes=int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "curves.json").write_text(json.dumps(curves))
    torch.distributed.destroy_process_group()
