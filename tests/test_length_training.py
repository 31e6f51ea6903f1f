"""LengthDrop's sandwich and the two kinds of learned lengths equal their formulas, train, resume and leave no trace."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import lowbit
from helpers import batch, end_of_process, outputs, tiny, training_arguments
from lowbit import LearnedThresholds, LengthConfig, LengthDrop, LogitsLoss, SoftExtract, TaskLoss
from lowbit.length.soft import ranks
from lowbit.nn import UnpaddedEncoder
from lowbit.nn.unpadded.pruning import importance_loss
from lowbit.nn.unpadded.sequences import Sequences

LAYERS = 3
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OWN = LengthConfig((0.9, 0.5, 0.5), min_tokens=3)


def model_of(head: str = "BertForSequenceClassification", **changes: Any) -> Any:
    """With weights so large that the tokens dropped matter to the logits."""
    model = tiny(head, num_hidden_layers=LAYERS, **{**NO_DROPOUT, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(3)
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        "optim": "sgd",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
    }
    return training_arguments(folder, **{**values, **changes})


def dataset(
    rows: int = 16, length: int = 9, labels: Callable[[int], Any] = lambda row: row % 3
) -> list[dict[str, Any]]:
    """Every second sentence is padded."""
    examples = []
    for row in range(rows):
        mask = torch.ones(length, dtype=torch.long)
        mask[length - 4 * (row % 2) :] = 0
        ids = torch.randint(1, 101, (length,))
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(row % 3)})
    return examples


def stacked(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def drop_trainer(folder: Path, model: Any, data: Any, drop: LengthDrop, **kwargs: Any) -> lowbit.LengthDropTrainer:
    changes = kwargs.pop("arguments", {})
    return lowbit.LengthDropTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=data, length_drop=drop, **kwargs
    )


def soft_trainer(folder: Path, model: Any, data: Any, soft: Any, **kwargs: Any) -> lowbit.SoftLengthTrainer:
    changes = kwargs.pop("arguments", {})
    return lowbit.SoftLengthTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=data, soft_lengths=soft, **kwargs
    )


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def encoder(model: Any) -> Any:
    return model.base_model.encoder


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], **close: float) -> bool:
    equal = (lambda a, b: torch.allclose(a, b, **close)) if close else torch.equal
    return one.keys() == two.keys() and all(equal(tensor, two[name]) for name, tensor in one.items())


# --- LengthDrop: what is drawn ----------------------------------------------------------------------------------------


def test_draws_are_within_the_ratio_and_the_first_is_the_smallest() -> None:
    drop = LengthDrop(ratio=0.3, sub_models=4)
    shares = []
    for step in range(200):
        smallest, *others = drop.draw(LAYERS, step)
        assert smallest[0] == pytest.approx([0.7, 0.49, 0.343]) and not smallest[1]
        assert len(others) == 3
        for keep, skip in others:
            assert not skip
            shares += [after / before for before, after in zip((1.0, *keep), keep, strict=False)]
    assert 0.7 <= min(shares) < 0.71 and 0.99 < max(shares) <= 1.0
    assert np.mean(shares) == pytest.approx(0.85, abs=0.01)  # even: the middle


def test_layers_that_are_left_out_keep_the_previous_length() -> None:
    drop, left_out = LengthDrop(layer_drop=0.25), 0
    for step in range(200):
        for number, (keep, skip) in enumerate(drop.draw(LAYERS, step)):
            left_out += len(skip)
            for layer, (before, after) in enumerate(zip((1.0, *keep), keep, strict=False)):
                assert (after == before) == (layer in skip)
                if number == 0 and layer not in skip:
                    assert after == pytest.approx(0.8 * before)
    assert left_out / (200 * 3 * LAYERS) == pytest.approx(0.25, abs=0.04)


def test_each_layer_may_have_a_ratio_of_its_own() -> None:
    drop = LengthDrop(ratio=(0.0, 0.5, 0.2), sub_models=2)
    second, third = [], []
    for step in range(200):
        (smallest, _), (other, _) = drop.draw(LAYERS, step)
        assert smallest == pytest.approx([1.0, 0.5, 0.4]) and other[0] == 1.0
        second.append(other[1])
        third.append(other[2] / other[1])
    assert 0.5 <= min(second) < 0.51 and 0.99 < max(second) <= 1.0
    assert 0.8 <= min(third) < 0.81 and 0.99 < max(third) <= 1.0
    with pytest.raises(ValueError, match="3 ratios, the model has 4 layers; give one, or one each"):
        drop.draw(4, 0)


def test_draws_depend_on_seed_and_step_only() -> None:
    drop = LengthDrop()
    torch.manual_seed(1)
    first = [drop.draw(LAYERS, step) for step in (3, 4, 3)]
    assert first[0] == first[2] != first[1]
    assert LengthDrop(seed=1).draw(LAYERS, 3) != first[0]


@pytest.mark.parametrize("head", ["BertForTokenClassification", "BertForSequenceClassification"])
def test_a_layer_left_out_is_not_run(head: str) -> None:
    """Against the model without that layer, at the lengths of the others."""
    for skip, rest in ({0}, [1, 2]), ({1}, [0, 2]), ({2}, [0, 1]), ({0, 2}, [1]):
        model, inputs = model_of(head).double(), batch(head)
        keep, left = [], 1.0
        for layer in range(LAYERS):
            left *= 1.0 if layer in skip else 0.7
            keep.append(left)
        short = copy.deepcopy(model)
        short.bert.encoder.layer = torch.nn.ModuleList(short.bert.encoder.layer[layer] for layer in rest)
        short.config.num_hidden_layers = len(rest)
        lowbit.set_length(short, LengthConfig(tuple(keep[layer] for layer in rest)))
        lowbit.set_length(model, LengthConfig(tuple(keep)))
        encoder(model).skip = frozenset(skip)
        torch.testing.assert_close(outputs(model, inputs)[0], outputs(short, inputs)[0])


# --- LengthDrop: one step ---------------------------------------------------------------------------------------------


def by_hand(model: Any, inputs: dict[str, torch.Tensor], drop: LengthDrop, step: int, **own: Any) -> dict[str, Any]:
    """Loss, its parts, and gradients of a step of a classifier: one graph of all, KL by torch.distributions."""
    full_model, kinds = copy.deepcopy(model).train(), torch.distributions
    lowbit.set_length(full_model, None)
    full = full_model(**inputs)
    target = kinds.Categorical(logits=full.logits.detach())
    parts = []
    for keep, _ in drop.draw(LAYERS, step):
        sub_model = lowbit.set_length(full_model, LengthConfig(keep, **{"min_tokens": 2, **own}))
        sub = kinds.Categorical(logits=sub_model(inputs["input_ids"], inputs["attention_mask"]).logits)
        pair = (sub, target) if drop.reverse_kl else (target, sub)
        parts.append(kinds.kl_divergence(*pair).mean())
    loss = (full.loss + sum(parts)) / (1 + len(parts))
    loss.backward()
    gradients = {name: p.grad for name, p in full_model.named_parameters()}
    return {"loss": loss.item(), "task": full.loss.item(), "parts": [p.item() for p in parts], "gradients": gradients}


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_a_step_is_the_sandwich_by_hand(tmp_path: Path, reverse_kl: bool) -> None:
    model, data, drop = model_of(), dataset(4), LengthDrop(ratio=0.4, reverse_kl=reverse_kl)
    expected = by_hand(model, stacked(data), drop, 0)
    start = weights(model)
    trainer = drop_trainer(tmp_path, model, data, drop, arguments={"max_steps": 1})
    trainer.train()
    assert logged(trainer, "loss") == [pytest.approx(expected["loss"], rel=1e-4)]
    assert logged(trainer, "loss_task") == [pytest.approx(expected["task"], rel=1e-4)]
    assert logged(trainer, "loss_sub") == [pytest.approx(np.mean(expected["parts"]), rel=1e-3, abs=2e-6)]
    assert min(expected["parts"]) > 1e-4  # the lengths do change the logits
    for name, parameter in model.named_parameters():
        step = (start[name] - parameter.detach()) / 1e-2  # plain SGD
        torch.testing.assert_close(step, expected["gradients"][name], rtol=1e-3, atol=1e-4)
    other = by_hand(tiny_copy(model, start), stacked(data), LengthDrop(ratio=0.4, reverse_kl=not reverse_kl), 0)
    assert other["parts"] != pytest.approx(expected["parts"], rel=1e-3)  # the directions can be told apart


def tiny_copy(model: Any, state: dict[str, torch.Tensor]) -> Any:
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    return copied


def test_the_forwards_of_a_step(tmp_path: Path) -> None:
    """One full, with labels; the others without, at the drawn lengths; none under the model's own lengths."""
    model, seen = lowbit.set_length(model_of(), OWN), []
    drop = LengthDrop(layer_drop=0.4)

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        seen.append((encoder(model).lengths, encoder(model).skip, kwargs.get("labels") is not None))

    model.register_forward_pre_hook(note, with_kwargs=True)
    drop_trainer(tmp_path, model, dataset(), drop, arguments={"gradient_accumulation_steps": 2}).train()
    expected = []
    for step in (0, 1):
        subs = [(LengthConfig(keep, min_tokens=3), skip, False) for keep, skip in drop.draw(LAYERS, step)]
        whole = dataclasses.replace(OWN, keep=(1.0,) * LAYERS, unit="ratio")  # without padding, as it will be used
        expected += 2 * [(whole, frozenset(), True), *subs]
    assert seen == expected
    assert any(skip for _, skip, _ in seen)


def test_sub_models_choose_tokens_as_the_model_itself_will(tmp_path: Path) -> None:
    config = LengthConfig((8, 4, 3), unit="tokens", score="cls", protect=("first_segment",), min_tokens=1)
    model, seen = lowbit.set_length(model_of(), config), []
    model.register_forward_pre_hook(lambda *_: seen.append(encoder(model).lengths))
    data = [{**row, "token_type_ids": torch.arange(9) // 5} for row in dataset()]
    drop_trainer(tmp_path, model, data, LengthDrop(sub_models=1), arguments={"max_steps": 1}).train()
    assert seen[0].keep == (1.0,) * LAYERS
    assert (seen[1].score, seen[1].protect, seen[1].unit, seen[1].min_tokens) == ("cls", ("first_segment",), "ratio", 2)


def test_without_sub_models_it_is_plain_training(tmp_path: Path) -> None:
    data, plain, lengths = dataset(), model_of(), {}
    other, own = copy.deepcopy(plain), lowbit.set_length(copy.deepcopy(plain), OWN)
    Trainer(model=plain, args=arguments(tmp_path), train_dataset=data).train()
    for model in (other, own):
        trainer = drop_trainer(tmp_path, model, data, LengthDrop(sub_models=0))
        trainer.train()
        lengths[model] = encoder(model)
        assert same(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
        assert not logged(trainer, "loss_sub")
    assert not isinstance(lengths[other], UnpaddedEncoder)
    assert lengths[own].lengths == OWN


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    model, data = model_of(), dataset(16)
    parts = copy.deepcopy(model)
    whole = drop_trainer(tmp_path, model, data, LengthDrop(), arguments={"per_device_train_batch_size": 8})
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = drop_trainer(tmp_path, parts, data, LengthDrop(), arguments=changes)
    for trainer in (whole, accumulated):
        trainer.train()
    for key in ("loss", "loss_task", "loss_sub"):
        assert logged(accumulated, key) == pytest.approx(logged(whole, key), rel=1e-4, abs=2e-6)
    assert same(weights(model), weights(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", [None, OWN])
def test_the_model_is_as_before_also_after_a_failure(tmp_path: Path, own: LengthConfig | None) -> None:
    model, inputs, calls = lowbit.set_length(model_of(), own), batch(), []
    before, kind, attention = outputs(model, inputs)[0], type(encoder(model)), model.config._attn_implementation

    def fail(*_: Any) -> None:
        calls.append(encoder(model).lengths)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        drop_trainer(tmp_path, model, dataset(), LengthDrop()).train()
    hook.remove()
    assert calls[0].keep == (1.0,) * LAYERS and min(calls[2].keep) < 1  # it failed in a sub-model
    assert type(encoder(model)) is kind and model.config._attn_implementation == attention
    assert getattr(encoder(model), "lengths", None) == own
    assert torch.equal(outputs(model.eval(), inputs)[0], before)


def test_evaluation_is_at_the_models_own_lengths(tmp_path: Path) -> None:
    data = dataset()
    for own in (None, OWN):
        model, seen = lowbit.set_length(model_of(), own), []
        changes = {"eval_strategy": "steps", "eval_steps": 2}
        trainer = drop_trainer(tmp_path, model, data, LengthDrop(), eval_dataset=data[:8], arguments=changes)

        def note(module: Any, *_: Any, seen: list[Any] = seen) -> None:
            seen.append(getattr(encoder(module), "lengths", None) if not module.training else "training")

        model.register_forward_pre_hook(note)
        trainer.train()
        assert seen == ["training"] * 8 + [own]
        with torch.no_grad():
            expected = model.eval()(**stacked(data[:8])).loss.item()
        assert logged(trainer, "eval_loss") == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("kind", ["float", "ternary"])
def test_a_resumed_sandwich_ends_in_the_weights_of_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    """With dropout, layer drop, Adam and a decaying rate."""

    def model() -> Any:
        new = tiny(num_hidden_layers=LAYERS)
        return lowbit.prepare(new, lowbit.TernaryConfig()) if kind == "ternary" else new

    data, drop = dataset(), LengthDrop(layer_drop=0.2, sub_models=2)
    changes = {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = drop_trainer(tmp_path, model(), data, drop, arguments=changes)
    whole.train()
    resumed = drop_trainer(tmp_path, model(), data, drop, arguments=changes)
    started = weights(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed.model), weights(whole.model))
    assert not same(weights(resumed.model), started)
    if kind == "ternary":
        packed = lowbit.set_length(lowbit.convert(resumed.model.eval()), OWN)
        assert packed(**batch()).logits.isfinite().all()


def test_with_a_teacher_the_full_model_has_its_objectives(tmp_path: Path) -> None:
    """The full model's losses are DistillationTrainer's own, the sub-models' are none of the teacher's."""
    teacher, data, drop = model_of(), dataset(4), LengthDrop(sub_models=2)
    model = lowbit.prepare(model_of(), lowbit.TernaryConfig())
    expected = by_hand(model, stacked(data), drop, 0)
    plain = lowbit.DistillationTrainer(
        model=copy.deepcopy(model),
        teacher=teacher,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=data,
    )
    plain.train()
    trainer = drop_trainer(tmp_path, model, data, drop, teacher=teacher, arguments={"max_steps": 1})
    trainer.train()
    names = ("loss_hidden", "loss_attention", "loss_logits")
    for name in names:
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-4)
    assert logged(trainer, "loss_sub") == [pytest.approx(np.mean(expected["parts"]), rel=1e-2, abs=1e-5)]
    total = sum(logged(plain, name)[0] for name in names) + sum(expected["parts"])
    assert logged(trainer, "loss") == [pytest.approx(total / 3, rel=1e-4)]


def questions(rows: int = 4) -> list[dict[str, Any]]:
    """The answers are tokens 1 to 3."""
    positions = {"start_positions": torch.tensor(1), "end_positions": torch.tensor(3)}
    return [{**{k: v for k, v in row.items() if k != "labels"}, **positions} for row in dataset(rows)]


def test_question_answering_averages_start_and_end_over_real_tokens(tmp_path: Path) -> None:
    model, drop = model_of("BertForQuestionAnswering"), LengthDrop(sub_models=1, ratio=0.4)
    data = questions()
    inputs = {key: value for key, value in stacked(data).items() if "positions" not in key}
    full = outputs(model, inputs)
    sub = outputs(
        lowbit.set_length(copy.deepcopy(model), LengthConfig(drop.draw(LAYERS, 0)[0][0], min_tokens=2)), inputs
    )
    divergences = []
    for t, s in zip(full, sub, strict=True):
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            pair = [torch.distributions.Categorical(logits=logits[row][mask]) for logits in (t, s)]
            divergences.append(torch.distributions.kl_divergence(*pair).item())
    trainer = drop_trainer(tmp_path, model, data, drop, arguments={"max_steps": 1})
    trainer.train()
    assert logged(trainer, "loss_sub") == [pytest.approx(np.mean(divergences), rel=1e-3, abs=2e-6)]


@pytest.mark.parametrize("score", ["all", "cls"])
def test_importance_is_compared_with_where_the_full_model_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: str
) -> None:
    """By transformers' own attention maps. The third layer has only the tokens that the second has left."""
    model, data = model_of("BertForQuestionAnswering"), questions()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    inputs = {key: value for key, value in stacked(data).items() if "positions" not in key}
    with torch.no_grad():
        full = plain(**inputs, output_attentions=True)
    first, later = [], []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        target = (full.start_logits[row][mask].softmax(0) + full.end_logits[row][mask].softmax(0)) / 2
        maps = full.attentions[1][row][:, mask][:, :, mask]
        received = maps[:, 0].sum(0) if score == "cls" else maps.sum((0, 1))
        first.append(-(target * (received / received.sum()).log()).sum().item())
        order = received[1:].argsort(descending=True) + 1  # the first token is always kept
        left = torch.cat([torch.tensor([0]), order[: math.ceil(0.6 * len(target)) - 1]]).sort().values
        later.append(target[left])
    lowbit.set_length(model, LengthConfig((1.0,) * LAYERS, score=score))
    again = copy.deepcopy(model)
    drop = LengthDrop(ratio=(0.0, 0.4, 0.0), sub_models=1, importance_weight=0.7)
    trainer = drop_trainer(tmp_path, model, data, drop, arguments={"max_steps": 1})
    trainer.train()
    assert logged(trainer, "loss_importance") == [pytest.approx(np.mean(first), rel=1e-3)]
    loss = logged(trainer, "loss_task")[0] + logged(trainer, "loss_sub")[0] + 0.7 * np.mean(first)
    assert logged(trainer, "loss") == [pytest.approx(loss / 2, rel=1e-3)]

    targets: list[torch.Tensor] = []

    def note(importance: torch.Tensor, target: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        targets.append(target)
        return importance_loss(importance, target, sequences)

    monkeypatch.setattr("lowbit.nn.unpadded.encoder.importance_loss", note)
    both = dataclasses.replace(drop, ratio=(0.0, 0.4, 0.3))
    drop_trainer(tmp_path, again, data, both, arguments={"max_steps": 1}).train()
    assert len(targets) == 2
    torch.testing.assert_close(targets[1], torch.cat(later), rtol=1e-3, atol=1e-5)


def test_importance_learns_where_the_answers_are(tmp_path: Path) -> None:
    """Against the same training without that loss."""
    data, start, kept = questions(32), model_of("BertForQuestionAnswering"), {}
    answers = [1, 3]
    inputs = {key: value for key, value in stacked(data).items() if "positions" not in key}
    for weight in (0.0, 1.0):
        model = lowbit.set_length(copy.deepcopy(start), LengthConfig((1.0,) * LAYERS, score="cls"))
        changes = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 32, "logging_steps": 32}
        drop = LengthDrop(ratio=(0.0, 0.4, 0.0), sub_models=1, importance_weight=weight)
        drop_trainer(tmp_path, model, data, drop, arguments=changes).train()
        lowbit.set_length(model, None).eval().set_attn_implementation("eager")
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions[1][:, :, 0]
        kept[weight] = maps.mean(1)[:, answers].sum(1).mean().item()
    assert kept[1.0] > 1.2 * kept[0.0]


@pytest.mark.parametrize(("kind", "labels"), [("regression", 1), ("multi_label_classification", 3), ("tokens", 5)])
def test_the_divergence_of_other_heads(tmp_path: Path, kind: str, labels: int) -> None:
    drop = LengthDrop(sub_models=1, ratio=0.4)
    head = "BertForTokenClassification" if kind == "tokens" else "BertForSequenceClassification"
    model = model_of(head, num_labels=labels)
    data = dataset(4)
    for row in data:
        row["labels"] = {
            "regression": torch.randn(()),
            "multi_label_classification": torch.randint(0, 2, (3,)).float(),
            "tokens": torch.randint(0, 5, (9,)).masked_fill(~row["attention_mask"].bool(), -100),
        }[kind]
    inputs = {key: value for key, value in stacked(data).items() if key != "labels"}
    (full,) = outputs(model, inputs)
    short = lowbit.set_length(copy.deepcopy(model), LengthConfig(drop.draw(LAYERS, 0)[0][0], min_tokens=2))
    (sub,) = outputs(short, inputs)
    if kind == "regression":
        expected = (full - sub).square().mean()
    elif kind == "tokens":
        pair = [torch.distributions.Categorical(logits=x[inputs["attention_mask"].bool()]) for x in (full, sub)]
        expected = torch.distributions.kl_divergence(*pair).mean()
    else:
        pair = [torch.distributions.Bernoulli(logits=x) for x in (full, sub)]
        expected = torch.distributions.kl_divergence(*pair).mean()
    trainer = drop_trainer(tmp_path, model, data, drop, arguments={"max_steps": 1})
    trainer.train()
    assert logged(trainer, "loss_sub") == [pytest.approx(expected.item(), rel=1e-3, abs=2e-6)]


def test_model_init_and_gradient_checkpointing(tmp_path: Path) -> None:
    """Layers run again in the backward pass do so at the lengths of their own forward pass."""
    start, data, runs = model_of(), dataset(), []
    for extra in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        trainer = lowbit.LengthDropTrainer(
            model_init=lambda: copy.deepcopy(start),
            args=arguments(tmp_path, **extra),
            train_dataset=data,
            length_drop=LengthDrop(ratio=0.5),
        )
        trainer.train()
        assert not isinstance(encoder(trainer.model), UnpaddedEncoder)
        runs.append(weights(trainer.model))
    assert same(*runs, rtol=1e-5, atol=1e-6)
    assert not same(runs[0], weights(start))


def test_training_brings_short_models_closer_to_the_full_one(tmp_path: Path) -> None:
    """Against training the full model alone for as long."""
    data = dataset(32)
    start, short, divergence = model_of(), LengthConfig((0.7, 0.5, 0.35)), {}
    for subs in (0, 2):
        model = copy.deepcopy(start)
        changes = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 16, "logging_steps": 16}
        drop_trainer(tmp_path, model, data, LengthDrop(ratio=0.3, sub_models=subs), arguments=changes).train()
        inputs = {key: value for key, value in stacked(data).items() if key != "labels"}
        full = torch.distributions.Categorical(logits=outputs(model.eval(), inputs)[0])
        sub = torch.distributions.Categorical(logits=outputs(lowbit.set_length(model, short), inputs)[0])
        divergence[subs] = torch.distributions.kl_divergence(full, sub).mean().item()
    assert divergence[2] < 0.7 * divergence[0]


# --- learned lengths: the formulas ------------------------------------------------------------------------------------


def packed(*lengths: int) -> Sequences:
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return Sequences(cu, max(lengths), cu)


def test_thresholds_scale_tokens_by_the_formula() -> None:
    heads, lengths = 4, (5, 1, 0, 3)
    soft = LearnedThresholds(LAYERS, final_threshold=1.2, temperature=0.4, weight=0.2)
    with torch.no_grad():
        soft.offset.copy_(torch.tensor([0.01, -0.02, 0.03]))
    theta = [0.01, 1.2 / 3 - 0.02, 2.4 / 3 + 0.03]
    importance, total = torch.rand(LAYERS, 9, dtype=torch.float64) * 5, 0.0
    for part in importance.split([n for n in lengths if n], 1):  # as attention gives it: each query spends 1 a head
        part.mul_(heads / part.mean(1, keepdim=True))
    for layer in range(LAYERS):
        expected = []
        for length in lengths:
            for place in range(length):
                share = importance[layer, len(expected)].item() / heads
                expected.append(1.0 if place == 0 else 1 / (1 + math.exp(-(share - theta[layer]) / 0.4)))
        factor = soft(layer, importance[layer], packed(*lengths), heads)
        assert factor.tolist() == pytest.approx(expected, rel=1e-5)
        total += np.mean(expected)
    assert soft.penalty().item() == pytest.approx(0.2 * total, rel=1e-5)
    config = soft.length_config()
    assert config.unit == "threshold" and config.keep == pytest.approx(theta, rel=1e-5)


def test_thresholds_below_zero_are_zero() -> None:
    soft = LearnedThresholds(2, final_threshold=1.0)
    with torch.no_grad():
        soft.offset.copy_(torch.tensor([-0.5, 1.5]))
    assert soft.length_config().keep == (0.0, 2.0)


def test_ranks_are_counts_of_more_important_tokens() -> None:
    lengths = (7, 1, 0, 12, 3, 0)
    importance = torch.randint(0, 5, (23,)).float()  # many ties
    importance[9] = float("nan")
    got, start = ranks(importance, packed(*lengths).cu_seqlens).tolist(), 0
    for length in lengths:
        values = [float("-inf") if math.isnan(x) else x for x in importance[start : start + length].tolist()]
        for j, own in enumerate(values):
            key = (j != 0, -own, j)
            expected = sum((k != 0, -other, k) < key for k, other in enumerate(values))
            assert got[start + j] == expected
        start += length
    assert ranks(torch.zeros(0), torch.zeros(1, dtype=torch.int32)).shape == (0,)


def test_soft_extract_scales_ranks_and_its_penalty_is_by_depth() -> None:
    soft = SoftExtract(2, 4, weight=0.1)
    with torch.no_grad():
        soft.rank_weight.copy_(torch.tensor([[0.9, 0.5, 0.2], [0.8, -0.3, 1.7]]))
    soft.clip_()
    assert soft.retention().tolist() == [pytest.approx([1, 0.9, 0.5, 0.2]), pytest.approx([1, 0.8, 0.0, 1.0])]
    importance = torch.tensor([0.1, 3.0, 7.0, 5.0, 2.0, 9.0])
    factor = soft(0, importance, packed(4, 2), heads=4)
    assert factor.tolist() == pytest.approx([1, 0.2, 0.9, 0.5, 1, 0.9])
    assert soft.penalty().item() == pytest.approx(0.1 * (1 * 2.6 + 2 * 2.8))
    with pytest.raises(ValueError, match=r"max_length=4\) got a sequence of 5 tokens"):
        soft(0, torch.rand(5), packed(5), heads=4)


def test_what_soft_extract_retains_is_the_truncated_sum_and_never_rises() -> None:
    soft = SoftExtract(5, 6)
    with torch.no_grad():
        for row, value in zip(soft.rank_weight, (0.95, 0.5, 0.79, 0.0, 0.3), strict=True):
            row.fill_(value)  # sums 5.75, 3.5, 4.95, 1.0, 2.5
    assert soft.length_config() == LengthConfig((5, 3, 3, 1, 1), unit="tokens")
    assert SoftExtract(2, 6).length_config().keep == (6, 6)


@pytest.mark.parametrize("kind", [LearnedThresholds, SoftExtract])
def test_gradients_are_those_of_the_scaled_model(kind: Any) -> None:
    """Of lengths and of the model, by differences in float64; the importance in the factors has its share."""
    model = model_of("BertForTokenClassification").double().eval()
    inputs = {**batch("BertForTokenClassification"), "labels": torch.randint(0, 5, (3, 11))}
    soft = LearnedThresholds(LAYERS, final_threshold=1.0, temperature=0.5) if kind is LearnedThresholds else None
    soft = (soft or SoftExtract(LAYERS, 11)).double()
    parameter = next(soft.parameters())
    with torch.no_grad():
        parameter.sub_(torch.rand_like(parameter) * 0.02)
    lowbit.set_length(model, LengthConfig((1.0,) * LAYERS))
    encoder(model).lengths, encoder(model).soft_mask = None, soft

    def loss() -> torch.Tensor:
        return model(**inputs).loss + soft.penalty()

    loss().backward()
    key = encoder(model).layer[1].attention.self.key.weight
    for leaf in (parameter, key):
        direction, values = torch.randn_like(leaf), []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                leaf += step * direction
                values.append(loss())
            leaf += 1e-6 * direction
        torch.testing.assert_close((leaf.grad * direction).sum(), (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-8)
        assert leaf.grad.abs().max() > 1e-6


# --- learned lengths: the trainer -------------------------------------------------------------------------------------

SOFT = {
    "thresholds": lambda: LearnedThresholds(LAYERS, final_threshold=1.0, temperature=0.5, learning_rate=0.1),
    "soft extract": lambda: SoftExtract(LAYERS, 12, weight=0.1, learning_rate=0.5),
}


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("stage", ["float", "prepared"])
def test_lengths_are_learned_beside_the_model(tmp_path: Path, name: str, stage: str) -> None:
    model, data, soft = model_of(), dataset(), SOFT[name]()
    if stage == "prepared":
        lowbit.prepare(model, lowbit.TernaryConfig())
    names, attention = list(model.state_dict()), model.config._attn_implementation
    (parameter,) = soft.parameters()
    start, by_itself = parameter.detach().clone(), weights(model)
    trainer = soft_trainer(tmp_path, model, data, soft, arguments={"max_steps": 1, "weight_decay": 0.5})
    trainer.train()
    total = logged(trainer, "loss_task")[0] + logged(trainer, "loss_length")[0]
    assert logged(trainer, "loss") == [pytest.approx(total, rel=1e-4)]
    assert not torch.equal(parameter, start) and not same(weights(model), by_itself)
    if name == "soft extract":  # 0.5 x 0.1 x layer, and no decay
        assert parameter.min() >= 0 and parameter.max() <= 1
        assert logged(trainer, "loss_length") == [pytest.approx(0.1 * (1 + 2 + 3) * 12, rel=1e-5)]
        unread = parameter[-1]  # a classifier reads the first token of the last layer only
        torch.testing.assert_close(unread, torch.full_like(unread, 1 - 0.5 * 0.1 * 3))
    assert not isinstance(encoder(model), UnpaddedEncoder) and model.config._attn_implementation == attention
    assert list(model.state_dict()) == names
    assert all("soft" not in key for key, _ in model.named_parameters())
    hard = lowbit.set_length(model, soft.length_config())
    hard(**stacked(data)).loss.backward()
    assert soft_file(tmp_path / "none") is None
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(soft_file(tmp_path / "saved"), parameter)
    assert list(type(model).from_pretrained(tmp_path / "saved").state_dict()) == names


def soft_file(folder: Path) -> torch.Tensor | None:
    from safetensors.torch import load_file

    path = folder / "soft_lengths.safetensors"
    return next(iter(load_file(path).values())) if path.exists() else None


def test_the_group_of_the_lengths_has_its_own_rate_and_no_decay(tmp_path: Path) -> None:
    soft = LearnedThresholds(LAYERS, temperature=0.5, learning_rate=0.25)
    changes = {"optim": "adamw_torch", "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    trainer = soft_trainer(tmp_path, model_of(), dataset(), soft, arguments=changes)
    trainer.train()
    *others, own = trainer.optimizer.param_groups
    assert own["params"][0] is soft.offset and own["weight_decay"] == 0 and own["initial_lr"] == 0.25
    assert not any(p is soft.offset for group in others for p in group["params"])
    assert all(group["initial_lr"] == 1e-2 for group in others)
    before = soft.offset.detach().clone()
    trainer.train()  # once more: still one group
    assert len(trainer.optimizer.param_groups) == len(others) + 1
    assert not torch.equal(before, soft.offset)


@pytest.mark.parametrize("name", SOFT)
def test_resumed_lengths_end_as_uninterrupted_ones(tmp_path: Path, name: str) -> None:
    data = dataset()
    changes = {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = soft_trainer(tmp_path, tiny(num_hidden_layers=LAYERS), data, SOFT[name](), arguments=changes)
    whole.train()
    resumed = soft_trainer(tmp_path, tiny(num_hidden_layers=LAYERS), data, SOFT[name](), arguments=changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed.model), weights(whole.model))
    for one, two in zip(resumed.soft_lengths.parameters(), whole.soft_lengths.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not list((tmp_path / "checkpoint-2").glob("*.tmp"))
    other = soft_trainer(tmp_path, tiny(num_hidden_layers=LAYERS), data, SoftExtract(LAYERS, 20), arguments=changes)
    with pytest.raises(ValueError, match="SoftExtract needs"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "soft_lengths.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint of SoftLengthTrainer"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not isinstance(encoder(other.model), UnpaddedEncoder)


def test_the_best_model_comes_with_its_lengths(tmp_path: Path) -> None:
    data, soft = dataset(), SOFT["thresholds"]()
    changes = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # the worst, which is not the last
        "learning_rate": 0.1,
    }
    trainer = soft_trainer(tmp_path, model_of(), data, soft, eval_dataset=data, arguments=changes)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    assert torch.equal(soft_file(best), soft.offset)


def test_a_teacher_and_checkpointing_go_with_learned_lengths(tmp_path: Path) -> None:
    teacher, data, start, runs = model_of(), dataset(), model_of(), []
    for extra in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        soft, model = SOFT["thresholds"](), copy.deepcopy(start)
        trainer = soft_trainer(tmp_path, model, data, soft, teacher=teacher, arguments=extra)
        trainer.train()
        total = np.add(logged(trainer, "loss_logits"), logged(trainer, "loss_length"))
        assert logged(trainer, "loss") == pytest.approx(total.tolist(), rel=1e-4)
        runs.append({**weights(model), "offset": soft.offset.detach()})
    assert same(*runs, rtol=1e-5, atol=1e-6)


# --- two processes ----------------------------------------------------------------------------------------------------


def curves(folder: Path, processes: int) -> dict[str, list[dict[str, float]]]:
    """Loss curves, and in the end a sum that any difference in gradients would change."""
    torch.set_num_threads(1)
    found = {}
    for name in ("sandwich", "thresholds"):
        torch.manual_seed(7)
        # The same number of tokens on both ranks: batches of 4 in all, 2 for each of two.
        model, data = model_of(), dataset(16)
        changes = {"per_device_train_batch_size": 4 // processes, "max_steps": 3}
        if name == "sandwich":
            trainer: Any = drop_trainer(folder, model, data, LengthDrop(layer_drop=0.4), arguments=changes)
        else:
            trainer = soft_trainer(folder, model, data, SOFT[name](), arguments=changes)
        assert trainer.args.world_size == processes
        trainer.train()
        found[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        if name == "thresholds":
            found[name][-1]["loss_offset"] = trainer.soft_lengths.offset.abs().sum().item()
    return found


def test_two_processes_give_the_curves_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    together, alone = json.loads((tmp_path / "curves.json").read_text()), curves(tmp_path, processes=1)
    for name, curve in alone.items():
        for one, two in zip(curve, together[name], strict=True):
            expected = {key: value for key, value in one.items() if key.startswith("loss")}
            assert len(expected) >= 3
            got = {key: value for key, value in two.items() if key.startswith("loss")}
            assert got == pytest.approx(expected, rel=2e-4, abs=2e-6), name
        assert curve[1]["loss"] != pytest.approx(curve[0]["loss"], rel=1e-3)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthDrop(ratio=1.0), "ratio=1.0; accepted: 0 to below 1"),
        (lambda: LengthDrop(ratio=float("nan")), "ratio=nan"),
        (lambda: LengthDrop(ratio=(0.2, 1.0)), r"ratio=\(0.2, 1.0\); accepted: 0 to below 1"),
        (lambda: LengthDrop(layer_drop=-0.1), "layer_drop=-0.1"),
        (lambda: LengthDrop(importance_weight=-1.0), "importance_weight=-1.0; accepted: a number from 0"),
        (lambda: LengthDrop(sub_models=1.5), "sub_models=1.5; accepted: a whole number"),
        (lambda: LearnedThresholds(0), "layers=0"),
        (lambda: LearnedThresholds(2, final_threshold=-1.0), "final_threshold=-1.0"),
        (lambda: LearnedThresholds(2, temperature=0.0), "temperature=0.0; accepted: above 0"),
        (lambda: LearnedThresholds(2, weight=-1.0), "weight=-1.0"),
        (lambda: SoftExtract(2, 0), "max_length=0"),
        (lambda: SoftExtract(2, 8, learning_rate=float("inf")), "learning_rate=inf"),
    ],
)
def test_bad_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    def soft(model: Any = None, **kwargs: Any) -> Any:
        values = {"soft_lengths": LearnedThresholds(LAYERS), "args": arguments(tmp_path), **kwargs}
        return lowbit.SoftLengthTrainer(model=model_of() if model is None else model, **values)

    with pytest.raises(ValueError, match="soft_lengths has 2 layers, the model has 3"):
        soft(soft_lengths=LearnedThresholds(2))
    with pytest.raises(ValueError, match="LearnedThresholds or SoftExtract, got float"):
        soft(soft_lengths=0.5)
    with pytest.raises(ValueError, match=r"drops tokens already; call lowbit.set_length\(model, None\)"):
        soft(lowbit.set_length(model_of(), OWN))
    with pytest.raises(ValueError, match="objectives need hidden_states"):
        soft(teacher=model_of(), objectives=[LogitsLoss(), lowbit.HiddenStateLoss()])
    with pytest.raises(ValueError, match="use_reentrant"):
        kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        soft(args=arguments(tmp_path, **kwargs))
    with pytest.raises(ValueError, match="teacher must be a transformers model, got Linear"):
        lowbit.LengthDropTrainer(model=model_of(), args=arguments(tmp_path), teacher=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 ratios, the model has 3 layers"):
        drop_trainer(tmp_path, model_of(), dataset(), LengthDrop(ratio=(0.1, 0.2)))
    with pytest.raises(ValueError, match="importance_weight needs start and end logits, the model gives logits"):
        drop_trainer(tmp_path, model_of(), dataset(), LengthDrop(importance_weight=1.0)).train()
    with pytest.raises(ValueError, match="got NoneType"):
        lowbit.DistillationTrainer(model=model_of(), args=arguments(tmp_path), teacher=None, objectives=[TaskLoss()])


if __name__ == "__main__":
    found = curves(Path(sys.argv[1]), processes=int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        (Path(sys.argv[1]) / "curves.json").write_text(json.dumps(found))
    end_of_process()
