"""A hybrid runs the modules that it drew, trains the successors alone, resumes to the same bits, and ends as one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerState

import lowbit
from helpers import batch, identical, outputs, tiny, training_arguments
from lowbit.distill.students import copies, theseus
from lowbit.distill.students.theseus import Replaceable

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def teacher_of(layers: int = 4, **changes: Any) -> Any:
    return tiny(num_hidden_layers=layers, **{**NO_DROPOUT, **changes})


def places(hybrid: Any) -> list[Replaceable]:
    return [module for module in hybrid.modules() if isinstance(module, Replaceable)]


def set_rate(hybrid: Any, rate: float) -> Any:
    for place in places(hybrid):
        place.rate = rate
    return hybrid


@pytest.mark.parametrize("which", ["uniform", "first"])
def test_with_rate_0_it_is_the_teacher_with_rate_1_and_in_evaluation_the_successor(which: str) -> None:
    teacher, inputs = teacher_of(), batch()
    hybrid = theseus.build(teacher, 2, which).model
    successor = outputs(copies.layers(teacher, 2, which).model, inputs)
    assert identical(outputs(set_rate(hybrid, 0.0).train(), inputs), outputs(teacher, inputs))
    assert identical(outputs(set_rate(hybrid, 1.0), inputs), successor)
    assert identical(outputs(set_rate(hybrid, 0.0).eval(), inputs), successor)


def test_a_batch_runs_what_was_drawn_for_each_module() -> None:
    teacher, inputs = teacher_of(6), {"input_ids": torch.randint(1, 101, (2, 7))}
    hybrid = set_rate(theseus.build(teacher, 3).model.train(), 0.4)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = [bool(torch.rand(()) < 0.4) for _ in range(3)]
        seen.add(tuple(drawn))
        with torch.no_grad():  # by hand: the teacher's layers 1, 3, 5 are where successors begin
            states, layers = teacher.bert.embeddings(**inputs), teacher.bert.encoder.layer
            for place, replaced in enumerate(drawn):
                for index in [2 * place + 1] if replaced else [2 * place, 2 * place + 1]:
                    states = layers[index](states)
            expected = teacher.classifier(teacher.bert.pooler(states))
            torch.manual_seed(seed)
            assert torch.allclose(hybrid(**inputs).logits, expected, atol=1e-6)
    assert len(seen) > 4


def test_modules_are_replaced_at_their_rate() -> None:
    place = Replaceable(torch.nn.Identity(), [torch.nn.Dropout(0.0)]).train()
    place.rate, calls = 0.3, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    place.successor.register_forward_hook(count)
    for _ in range(4000):
        place(torch.zeros(1))
    assert abs(calls / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_published_schedules() -> None:
    assert [theseus.replacing_rate(step) for step in (0, 500, 1166, 1167)] == pytest.approx([0.3, 0.6, 0.9996, 1.0])
    constant = {"start": 0.5, "slope": 0.0, "until": 2500}
    assert [theseus.replacing_rate(step, **constant) for step in (0, 2499, 2500)] == [0.5, 0.5, 1.0]  # type: ignore[arg-type]


def test_gradients_flow_through_predecessors_to_successors_and_stop_there() -> None:
    hybrid = theseus.build(teacher_of(), 2).model.train()
    first, second = places(hybrid)
    first.rate, second.rate = 1.0, 0.0
    hybrid(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    reached = {name for name, parameter in hybrid.named_parameters() if parameter.grad is not None}
    assert reached == {f"bert.encoder.layer.0.successor.{name}" for name, _ in first.successor.named_parameters()}
    assert all(each.grad.abs().sum() > 0 for n, each in first.successor.named_parameters() if "key.bias" not in n)


def test_a_batch_without_any_successor_changes_nothing() -> None:
    hybrid = set_rate(theseus.build(teacher_of(), 2).model.train(), 0.0)
    hybrid(**batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is None for parameter in hybrid.parameters())


def test_all_trains_what_is_around_the_layers_but_no_predecessor() -> None:
    hybrid = theseus.build(teacher_of(), 2, train="all").model
    frozen = {name for name, parameter in hybrid.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in hybrid.named_parameters() if ".predecessor." in name}


def dataset(rows: int = 32) -> list[dict[str, torch.Tensor]]:
    ids = [torch.randint(1, 101, (9,)) for _ in range(rows)]
    return [{"input_ids": each, "labels": each[0] % 3} for each in ids]


def successor_of(teacher: Any, bits: str) -> Any:
    return None if bits == "float" else lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())


@pytest.mark.parametrize("bits", ["float", "2-2-8"])
def test_a_run_goes_on_to_the_same_bits_and_ends_as_a_plain_successor(bits: str, tmp_path: Path) -> None:
    teacher, data = teacher_of(2, hidden_dropout_prob=0.1), dataset()

    def run(name: str, **changes: Any) -> Any:
        built = theseus.build(teacher, 1, successor=successor_of(teacher, bits), start=0.2, slope=0.1, train="all")
        values = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "per_device_train_batch_size": 4}
        args = training_arguments(tmp_path / name, learning_rate=1e-3, **values)
        trainer = Trainer(built.model, args, train_dataset=data, callbacks=[*built.callbacks])
        trainer.train(**changes)
        return built

    whole = run("whole")
    assert [place.rate for place in places(whole.model)] == pytest.approx([0.7] * len(places(whole.model)))
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    states = [{name: each.clone() for name, each in built.model.state_dict().items()} for built in (whole, again)]
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())
    before = states[0]["bert.encoder.layer.0.predecessor.0.output.dense.weight"]
    assert torch.equal(before, teacher.bert.encoder.layer[0].output.dense.weight)

    inputs = batch()
    expected = outputs(whole.model.eval(), inputs)
    model = whole.finish(whole.model)
    assert type(model) is type(teacher) and not places(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    assert identical(outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"), inputs), expected)
    packed = lowbit.convert(model if bits != "float" else lowbit.prepare(model, lowbit.TernaryConfig()))
    assert outputs(packed, inputs)[0].isfinite().all()


def test_a_float_predecessor_beside_2_bit_successors_is_the_teachers_layer() -> None:
    teacher, inputs = teacher_of(2), batch()
    config = lowbit.TernaryConfig(embedding_bits=None, quantize_pooler=False)
    hybrid = theseus.build(teacher, successor=lowbit.prepare(copy.deepcopy(teacher), config)).model
    float_path, quantized = outputs(set_rate(hybrid, 0.0).train(), inputs), outputs(set_rate(hybrid, 1.0), inputs)
    assert torch.allclose(float_path[0], outputs(teacher, inputs)[0], atol=1e-5)
    assert not torch.allclose(quantized[0], float_path[0], atol=1e-3)


def test_the_teacher_may_teach_beside_it(tmp_path: Path) -> None:
    teacher = teacher_of()
    built = theseus.build(teacher, 2)
    args = training_arguments(tmp_path, max_steps=2, per_device_train_batch_size=4)
    trainer = lowbit.DistillationTrainer(
        built.model, args, train_dataset=dataset(), callbacks=[*built.callbacks],
        teacher=teacher, objectives=[lowbit.LogitsLoss()],
    )  # fmt: skip
    assert trainer.train().training_loss > 0


def test_objectives_that_compare_layers_are_refused(tmp_path: Path) -> None:
    teacher = teacher_of()
    built = theseus.build(teacher, 2)
    args = training_arguments(tmp_path, max_steps=1, per_device_train_batch_size=4)
    trainer = lowbit.DistillationTrainer(
        built.model, args, train_dataset=dataset(), teacher=teacher, objectives=[lowbit.HiddenStateLoss()]
    )
    with pytest.raises(ValueError, match="runs other layers in every batch"):
        trainer.train()
    successor = built.finish(built.model).train()
    assert len(successor(**batch(), output_hidden_states=True).hidden_states) == 3


def test_successors_learn_what_a_teacher_knows(tmp_path: Path) -> None:
    data = dataset(64)
    labels = torch.stack([row["labels"] for row in data])
    ids = torch.stack([row["input_ids"] for row in data])

    def loss(model: Any) -> float:
        with torch.no_grad():
            return model.eval()(input_ids=ids, labels=labels).loss.item()

    teacher = teacher_of()
    args = training_arguments(tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=1e-3)
    Trainer(teacher, args, train_dataset=data).train()
    built = theseus.build(teacher, 2, start=0.3, slope=0.02)
    before = loss(built.model)
    Trainer(built.model, args, train_dataset=data, callbacks=[*built.callbacks]).train()
    assert loss(built.finish(built.model)) < 0.7 * before


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layers": 3}, "3 successors do not divide 4 layers of the teacher; accepted: 1, 2, 4"),
        ({"layers": 5}, "layers=5 of a teacher of 4"),
        ({"start": 1.5}, r"start=1\.5"),
        ({"slope": -0.1}, r"slope=-0\.1"),
        ({"start": 0.5, "slope": 0.0}, "until=STEP"),
        ({"train": "heads"}, "train='heads'; accepted: successors, all"),
        ({"successor": tiny("BertForTokenClassification")}, "a BertForTokenClassification, the teacher a"),
        ({"successor": tiny(hidden_size=32)}, "hidden size is 32, the teacher's 64"),
    ],
)
def test_what_does_not_fit_is_said_before_training(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        theseus.build(teacher_of(), **fields)


def test_without_a_slope_the_rate_reaches_one_at_the_end_of_any_run() -> None:
    built = theseus.build(tiny(num_hidden_layers=4), layers=2, start=0.2, slope=None)
    (callback,) = built.callbacks
    places = [module for module in built.model.modules() if isinstance(module, Replaceable)]
    for steps in (10, 1000):
        for step in (0, steps // 2, steps):
            state = TrainerState(global_step=step, max_steps=steps)
            callback.on_step_begin(None, state, None, model=built.model)
            assert all(place.rate == pytest.approx(0.2 + 0.8 * step / steps) for place in places)
