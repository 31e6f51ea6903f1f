"""Two processes train a prepared model like one with twice the batch: DistributedDataParallel, and FSDP2.

Run by torchrun, this file is the worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    TrainingArguments,
)

import lowbit
from helpers import batch, end_of_process, outputs, tiny
from lowbit import AttentionScoreLoss, HiddenStateLoss, LogitsLoss, card
from lowbit.distill.students import theseus
from lowbit.exits import ExitLogitsLoss, ExitTaskLoss

SCHEDULES = {
    "joint": [(1.0, [HiddenStateLoss(), AttentionScoreLoss(), LogitsLoss()])],
    # The first stage gives the classifier no gradient, which DistributedDataParallel has to bear.
    "two stages": [(0.5, [HiddenStateLoss(), AttentionScoreLoss()]), (1.0, [LogitsLoss()])],
    "slimmed": [(1.0, [HiddenStateLoss(), AttentionScoreLoss(), LogitsLoss()])],
    # Parameters that DistributedDataParallel does not know of.
    "projected": [(1.0, [HiddenStateLoss(project="per_layer"), LogitsLoss()])],
    # Ramps, which the model's own hooks let answer, inside DistributedDataParallel's forward.
    "exits": [(0.5, [ExitTaskLoss()]), (1.0, [ExitLogitsLoss()])],
    # Parts of the model that a step may not use: ranks draw the same, as all have one seed.
    "theseus": [(1.0, [LogitsLoss()])],
    # A DistilBERT: the teacher alone reads token types.
    # Slices of the weights in the place of parameters, several forward passes a step; one that leaves parts unused.
    "elastic": [(1.0, [HiddenStateLoss(), LogitsLoss()])],
    "elastic, one a step": [(1.0, [HiddenStateLoss(), LogitsLoss()])],
    "other columns": [(1.0, [HiddenStateLoss(), AttentionScoreLoss(), LogitsLoss()])],
}
ELASTIC = {
    "elastic": lowbit.Elastic(widths=(0.5, 1.0), depths=(0.5, 1.0)),
    "elastic, one a step": lowbit.Elastic(widths=(0.5, 1.0), depths=(0.5, 1.0), sampler="random"),
}
State = dict[str, torch.Tensor]


def prepared(pair: bool, slimmed: bool = False) -> BertForSequenceClassification:
    model = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if slimmed:  # rank 1 keeps other heads than rank 0, as it may where each ranks by batches of its own
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                layer.attention.self.query.weight.view(2, 32, 64)[int(os.environ.get("RANK", 0))] *= 3
        model = lowbit.slim(model, 0.5)
    model = lowbit.prepare(model, lowbit.TernaryConfig())
    return (lowbit.split(model) if pair else model).train()


def distilbert() -> DistilBertForSequenceClassification:
    config = DistilBertConfig(
        vocab_size=101, dim=64, n_layers=2, n_heads=4, hidden_dim=150, max_position_embeddings=40, num_labels=3,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return lowbit.prepare(DistilBertForSequenceClassification(config), lowbit.TernaryConfig()).train()


def train(folder: Path, processes: int) -> tuple[dict[str, list[dict[str, float]]], dict[str, State], dict[str, State]]:
    """Loss curves, first and last weights by schedule. Batches of 8 in all, rank r of two takes 4r to 4r + 3."""
    torch.set_num_threads(1)
    curves, first, last = {}, {}, {}
    for name, stages in SCHEDULES.items():
        torch.manual_seed(7)
        student = prepared(pair=name == "two stages", slimmed=name == "slimmed")
        student = distilbert() if name == "other columns" else student
        student = lowbit.add_exits(student) if name == "exits" else student
        teacher = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        callbacks: Any = ()
        if name == "theseus":
            built = theseus.build(teacher, successor=student, start=0.5, slope=0.0, until=3, train="all")
            student, callbacks = built.model.train(), built.callbacks
        seen: list[torch.Tensor | None] = []
        teacher.register_forward_pre_hook(
            lambda _module, _args, kwargs, seen=seen: seen.append(kwargs.get("token_type_ids")), with_kwargs=True
        )
        first[name] = {key: value.clone() for key, value in student.state_dict().items()}
        data = []
        for row in range(32):  # the same number of real tokens on both ranks
            mask = torch.ones(9, dtype=torch.long)
            mask[9 - 4 * (row % 2) :] = 0
            ids, types = torch.randint(1, 101, (9,)), torch.randint(0, 2, (9,))
            data.append(
                {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": torch.tensor(row % 3)}
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
            model=student, teacher=teacher, args=args, train_dataset=data, stages=stages, callbacks=[*callbacks],
            elastic=ELASTIC.get(name),
        )  # fmt: skip
        assert args.world_size == processes
        for key, value in trainer.parametrised.state_dict().items():
            first[name][f"objectives.{key}"] = value.clone()
        trainer.train()
        first_rank, rows = int(os.environ.get("RANK", 0)), 8 // processes
        runs = 4 if name == "elastic" else 1  # of the teacher in a step
        for number, types in enumerate(seen):
            start = 8 * (number // runs) + first_rank * rows
            expected = torch.stack([row["token_type_ids"] for row in data[start : start + rows]])
            assert types is not None and torch.equal(types, expected)
        assert len(seen) == 4 * runs
        curves[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        objectives = {f"objectives.{key}": value for key, value in trainer.parametrised.state_dict().items()}
        last[name] = {**trainer.accelerator.unwrap_model(trainer.model).state_dict(), **objectives}
    return curves, first, last


def shard(folder: Path, rank: int) -> dict[str, State]:
    """FSDP2, three steps: the last weights of the sharded model; the packed model of each is saved in `folder`."""
    last = {}
    for name in ("ternary", "pair"):
        model, given = prepared_with_data(name)
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        steps(model, {key: value[4 * rank : 4 * rank + 4] for key, value in given.items()})
        with pytest.raises(ValueError, match="sharded"):
            lowbit.convert(model)
        last[name] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            whole, _ = prepared_with_data(name)
            whole.load_state_dict(last[name])
            assert card.sizes(model) == card.sizes(whole)
            assert "FSDP" not in card.model_card(model).text
            lowbit.convert(whole).save_pretrained(folder / name)
    return last


def prepared_with_data(name: str) -> tuple[BertForSequenceClassification, dict[str, torch.Tensor]]:
    torch.manual_seed(8)
    model = prepared(pair=name == "pair")
    return model, {**batch(rows=8), "labels": torch.arange(8) % 3}


def steps(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What two processes gave: a folder, and what `train` and `shard` returned on the first."""
    folder = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, torch.load(folder / "result.pt")


def assert_trained_alike(two: State, one: State, start: State) -> None:
    """Equal but for sums in another order, which seldom push a value over a tie between two codes."""
    assert two.keys() == one.keys()
    a, b, c = (torch.cat([state[key].flatten().double() for key in one]) for state in (two, one, start))
    assert (a - b).norm() < 0.005 * (b - c).norm()


def test_two_processes_distil_a_prepared_model_like_one_with_twice_the_batch(
    together: tuple[Path, Any], tmp_path: Path
) -> None:
    (curves, _, last), (alone, first, alone_last) = together[1]["train"], train(tmp_path, processes=1)
    for name, curve in alone.items():
        assert len(curve) == len(curves[name]) == 4
        for step, (one, two) in enumerate(zip(curve, curves[name], strict=True)):
            assert {key for key in one if key.startswith("loss")} == {key for key in two if key.startswith("loss")}
            for key in one:
                if key.startswith("loss"):  # before the first step the weights are the same bits
                    assert two[key] == pytest.approx(one[key], rel=1e-5 if step == 0 else 1e-4, abs=2e-6), (name, key)
        assert curve[1]["loss"] != pytest.approx(curve[0]["loss"], rel=1e-3)
        assert_trained_alike(last[name], alone_last[name], first[name])
        trained = {key for key in first[name] if key.startswith("objectives.")}
        assert bool(trained) == (name == "projected")
        if trained:
            assert_trained_alike(*({key: each[name][key] for key in trained} for each in (last, alone_last, first)))


@pytest.mark.parametrize("name", ["ternary", "pair"])
def test_fsdp2_trains_a_prepared_model_and_saves_it_packed(together: tuple[Path, Any], name: str) -> None:
    folder, result = together
    alone, given = prepared_with_data(name)
    start = {key: value.clone() for key, value in alone.state_dict().items()}
    steps(alone, given)
    assert_trained_alike(result["shard"][name], alone.state_dict(), start)
    loaded = BertForSequenceClassification.from_pretrained(folder / name)
    alone.load_state_dict(result["shard"][name])
    lowbit.convert(alone).eval()
    inputs = batch()
    assert all(map(torch.equal, outputs(loaded, inputs), outputs(alone, inputs)))


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    result = {"train": train(folder, processes=int(os.environ["WORLD_SIZE"])), "shard": shard(folder, rank)}
    if rank == 0:
        torch.save(result, folder / "result.pt")
    end_of_process()
