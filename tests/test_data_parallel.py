"""Replicas of torch.nn.DataParallel, which transformers' Trainer makes where a process sees several GPUs."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lowbit
from fake_cuda import Simulated, move, moved, simulated_cuda
from helpers import batch, outputs, outputs_by_module, tiny

replicate = importlib.import_module("torch.nn.parallel.replicate")  # torch.nn.parallel.replicate is a function, too

STAGES = {
    "prepared": lambda: lowbit.prepare(tiny(), lowbit.TernaryConfig()),
    "packed": lambda: lowbit.quantize(tiny(), lowbit.TernaryConfig()),
    "fused": lambda: lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=True),
    "float, shorter": lambda: lowbit.set_length(tiny(), lowbit.LengthConfig((0.7, 0.4))),
    "fused, shorter": lambda: lowbit.set_length(STAGES["fused"](), lowbit.LengthConfig((0.7, 0.4))),
}


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies tensors to several GPUs copies them to simulated ones, or leaves them on the CPU."""

    def copies(tensors: Sequence[torch.Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Any]]:
        assert devices == [0, 1]
        return [[on(number, each) if each.is_cuda else each.clone() for each in tensors] for number in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)


def on(number: int, tensor: Any) -> Simulated:
    return Simulated(tensor.inner.clone(), f"cuda:{number}")


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_replicas_compute_what_the_modules_do(stage: str, called_before: bool) -> None:
    """Each on its own device, and with its own tensors: simulated ones of two devices meet in no operation."""
    model, inputs = STAGES[stage](), batch()
    shorter = "shorter" in stage  # which modules alone cannot be
    expected = outputs(model, inputs)[0] if shorter else outputs_by_module(model, inputs)[0]
    model = copy.deepcopy(model)
    with simulated_cuda(), torch.no_grad():
        move(model, Simulated)
        if called_before:
            model(**moved(inputs, Simulated))
        replicas = replicate.replicate(model, [0, 1])
        for parameter in model.parameters():
            parameter.zero_()
        for number, each in enumerate(replicas):
            got = each(**moved(inputs, lambda tensor, number=number: Simulated(tensor, f"cuda:{number}"))).logits
            assert got.device == torch.device("cuda", number)
            error = (got.inner - expected).norm() / expected.norm()
            assert error < 0.05 if shorter else error == 0


class OnTwoDevices(torch.nn.Module):
    """torch.nn.DataParallel, one replica after the other."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> Any:
        parts = [
            dict(zip(inputs, rows, strict=True)) for rows in zip(*(x.chunk(2) for x in inputs.values()), strict=True)
        ]
        results = [each(**part) for each, part in zip(replicate.replicate(self.module, [0, 1]), parts, strict=True)]
        return {
            "loss": torch.stack([result.loss for result in results]),
            "logits": torch.cat([result.logits for result in results]),
        }


def test_the_trainer_evaluates_a_fused_model_on_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = STAGES["fused"]()
    inputs = batch(rows=8)
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": 1} for ids, mask in zip(*inputs.values(), strict=True)]
    expected = outputs_by_module(model, inputs)[0]
    monkeypatch.setattr(torch.nn, "DataParallel", OnTwoDevices)
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    arguments._n_gpu = 2
    found = Trainer(model, arguments).predict(rows)
    assert torch.equal(torch.from_numpy(found.predictions), expected)
