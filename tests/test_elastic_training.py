"""Sub-networks that train inside of one model compute what the models that are taken out of it compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from helpers import batch, identical, outputs, training_arguments
from lowbit.elastic import layout
from lowbit.elastic.running import running
from lowbit.elastic.training import states_of
from test_elastic import CLASSES, close, four, labelled, of_class

CONFIGS = {"float": None, "ternary": lowbit.TernaryConfig, "binary": lowbit.BinaryConfig}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OBJECTIVES = (lowbit.LogitsLoss, lowbit.HiddenStateLoss)


def at(model: Any, bits: str) -> Any:
    config = CONFIGS[bits]
    return model if config is None else lowbit.prepare(model, config())


def with_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    found = model(**inputs, output_hidden_states=True)
    return [found.logits, *found.hidden_states]


@pytest.mark.parametrize("bits", CONFIGS)
@pytest.mark.parametrize("prefix", CLASSES)
def test_a_sub_network_inside_of_its_model_is_the_one_that_is_taken_out(prefix: str, bits: str) -> None:
    """Outputs and all hidden states in a training forward; gradients of the leading parts, and none of the rest."""
    model, inputs = at(of_class(prefix), bits), batch()
    named = dict(model.named_parameters())
    for width, depth in ((0.33, 1.0), (0.67, 0.5), (1.0, 0.75), (1.0, 1.0)):
        taken = lowbit.extract(model, width, depth)
        with running(model, lowbit.Subnet(width, depth).shape(model)):
            inside = with_gradients(model, inputs)
        outside = with_gradients(taken, inputs)
        assert close(inside, outside, 1e-6), (width, depth)
        model.zero_grad()
        sum(x.square().sum() for x in inside).backward()
        sum(x.square().sum() for x in outside).backward()
        own, theirs = (sum(float(p.grad.double().square().sum()) for p in each.parameters() if p.grad is not None)
                       for each in (model, taken))  # fmt: skip
        assert own == pytest.approx(theirs, rel=1e-4)
    assert all(named[name] is parameter for name, parameter in model.named_parameters())
    assert layout.sizes(model) == [(3, 50)] * 4


def test_an_error_inside_of_a_sub_network_puts_all_back() -> None:
    model, inputs = four(), batch()
    before, modules = outputs(model, inputs), [*model.modules()]
    with pytest.raises(RuntimeError), running(model, lowbit.Subnet(0.25, 0.5).shape(model)):
        raise RuntimeError
    assert identical(outputs(model, inputs), before)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_layers_that_a_first_forward_leaves_out_give_their_states_later() -> None:
    """transformers puts the hooks for hidden states on a model once, at the first call that asks for any."""
    model, inputs = four(), batch()
    with running(model, lowbit.Subnet(depth=0.5).shape(model)):
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5


def test_samplers_draw_by_the_step_alone() -> None:
    pairs = {"widths": (1.0, 0.25, 0.5, 0.75), "depths": (0.5, 0.75, 1.0)}
    every = lowbit.Elastic(**pairs)
    assert len(every.draw(3)) == 12 == len(set(every.draw(3)))
    assert every.draw(0)[0] == lowbit.Subnet(0.25, 0.5) and every.draw(0)[-1] == lowbit.Subnet(1.0, 1.0)
    sandwich = lowbit.Elastic(**pairs, sampler="sandwich")
    drawn = [sandwich.draw(step) for step in range(50)]
    assert all(each[0] == every.draw(0)[0] and each[-1] == every.draw(0)[-1] and len({*each}) == 4 for each in drawn)
    assert drawn == [sandwich.draw(step) for step in range(50)]
    assert {subnet for each in drawn for subnet in each} == {*every.draw(0)}
    random = lowbit.Elastic(**pairs, sampler="random")
    assert {len(random.draw(step)) for step in range(50)} == {1} and len({random.draw(s)[0] for s in range(200)}) == 12
    other = lowbit.Elastic(**pairs, sampler="random", seed=1)
    assert [random.draw(s) for s in range(9)] != [other.draw(s) for s in range(9)]


@pytest.mark.parametrize("teacher_width", ["same", "full"])
@pytest.mark.parametrize("bits", CONFIGS)
def test_the_loss_is_the_sum_of_those_of_models_taken_out(bits: str, teacher_width: str, tmp_path: Path) -> None:
    """DynaBERT's loss by hand: soft cross-entropy, and squares of the inputs of the kept layers and the last output."""
    teacher = four(**NO_DROPOUT)
    student = at(copy.deepcopy(teacher), bits)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    inputs, expected = {**batch(), "labels": torch.randint(0, 3, (3,))}, 0.0
    mask = inputs["attention_mask"].bool()
    for depth, kept in ((0.5, (0, 2)), (1.0, (0, 1, 2, 3))):
        for width in (0.5, 1.0):
            own = lowbit.extract(student, width, depth)(**inputs, output_hidden_states=True)
            model = lowbit.extract(teacher, width) if teacher_width == "same" else teacher
            their = model(**inputs, output_hidden_states=True)
            expected -= float((their.logits.softmax(-1) * own.logits.log_softmax(-1)).sum(-1).mean())
            pairs = zip(own.hidden_states, [their.hidden_states[i] for i in (*kept, 4)], strict=True)
            expected += 0.1 * sum(float((a - b)[mask].square().mean()) for a, b in pairs)
    trainer = lowbit.DistillationTrainer(
        model=student, teacher=teacher, args=training_arguments(tmp_path),
        objectives=[lowbit.LogitsLoss(), lowbit.HiddenStateLoss(weight=0.1)],
        elastic=lowbit.Elastic(widths=(0.5, 1.0), depths=(0.5, 1.0), teacher_width=teacher_width),
    )  # fmt: skip
    student.train()
    loss, out = trainer.compute_loss(student, inputs, return_outputs=True)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert len(out.hidden_states) == 5
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("sampler", ["all", "sandwich", "random"])
def test_sub_networks_learn_together_and_are_taken_out(sampler: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    teacher, rows = four(**NO_DROPOUT), labelled(1, 16)[0]
    data = [{key: value[i] for key, value in rows.items()} for i in range(16)]
    with torch.no_grad():
        teacher.classifier.weight *= 20  # answers that differ
    student = copy.deepcopy(teacher)
    lowbit.rewire(student, lowbit.importance(student, [rows]))

    def distance(model: Any, width: float, depth: float) -> float:
        mine, theirs = outputs(lowbit.extract(model, width, depth), rows), outputs(teacher, rows)
        return float((mine[1].softmax(-1) - theirs[1].softmax(-1)).norm())

    begun = copy.deepcopy(student)
    steps = 200 if sampler == "random" else 40  # of six sub-networks one a step
    trainer = lowbit.DistillationTrainer(
        model=student, teacher=teacher, train_dataset=data,
        args=training_arguments(tmp_path, max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=16),
        objectives=[each() for each in OBJECTIVES],
        elastic=lowbit.Elastic(widths=(0.25, 0.5, 1.0), depths=(0.5, 1.0), sampler=sampler, teacher_width="full"),
    )  # fmt: skip
    trainer.train()
    for width, depth in ((0.25, 1.0), (0.5, 0.5)):
        assert distance(student, width, depth) < 0.7 * distance(begun, width, depth)


def test_teachers_states_are_the_inputs_of_the_kept_layers() -> None:
    assert states_of(("e", 1, 2, 3, 4), (0, 2)) == ("e", 2, 4)
    assert states_of(("e", 1, 2), (0, 1)) == ("e", 1, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widths": ()}, "Elastic: widths=()"),
        ({"widths": (0, 1)}, "Elastic: widths=(0, 1)"),
        ({"depths": (1.5,)}, "Elastic: depths=(1.5,)"),
        ({"sampler": "most"}, "sampler='most'; accepted: 'all', 'sandwich', 'random'"),
        ({"teacher_width": "half"}, "teacher_width='half'"),
    ],
)
def test_what_is_no_choice_of_sub_networks_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        lowbit.Elastic(**given)
    assert message in str(caught.value)


def test_what_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    def trainer(
        student: Any = None, teacher: Any = None, elastic: Any = None, objectives: Any = None, **changes: Any
    ) -> Any:
        return lowbit.DistillationTrainer(
            model=student or four(), teacher=teacher or four(), args=training_arguments(tmp_path, **changes),
            objectives=objectives or [lowbit.LogitsLoss()], elastic=elastic or lowbit.Elastic(),
        )  # fmt: skip

    trainer()
    with pytest.raises(ValueError, match=r"width=0\.3 of 4 heads is 1\.2 heads"):
        trainer(elastic=lowbit.Elastic(widths=(0.3, 1.0)))
    with pytest.raises(ValueError, match="keeps none of 4 layers"):
        trainer(elastic=lowbit.Elastic(depths=(0.1,)))
    with pytest.raises(ValueError, match="teacher_width='full'"):
        trainer(teacher=four(intermediate_size=20))
    with pytest.raises(ValueError, match="accepted with elastic: objectives of logits and hidden states"):
        trainer(objectives=[lowbit.AttentionScoreLoss()])
    with pytest.raises(ValueError, match="compared with the teacher's layers of its own numbers"):
        trainer(objectives=[lowbit.HiddenStateLoss(map=[2, 3, 4, 4])])
    with pytest.raises(ValueError, match="without gradient_checkpointing"):
        trainer(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="already packed"):
        trainer(student=lowbit.quantize(four(), lowbit.TernaryConfig()))
    with pytest.raises(ValueError, match="mpnet"):
        config = transformers.MPNetConfig(num_hidden_layers=1, vocab_size=101)
        trainer(student=transformers.MPNetForSequenceClassification(config), teacher=four(num_labels=2))
