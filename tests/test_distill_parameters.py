"""What objectives train besides the student, and the other batches that they look at."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertForMaskedLM, BertTokenizerFast, TrainingArguments

import lowbit
from helpers import batch, tiny, tiny_config
from lowbit import AttentionScoreLoss, DistillationTrainer, HiddenStateLoss, LogitsLoss, TaskLoss
from lowbit.distill.generator import MaskedGenerator, masked_lm_of
from lowbit.distill.parameters import FILE
from lowbit.distill.views import On
from lowbit.nn.unpadded.snapshot import is_hooked

NARROW = {"hidden_size": 48, "num_attention_heads": 4}


def rows(count: int = 32) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    return [
        {"input_ids": torch.randint(5, 101, (9,)), "attention_mask": torch.ones(9, dtype=torch.long), "labels": row % 3}
        for row in range(count)
    ]


def trainer(folder: Path, student: nn.Module, teacher: nn.Module, objectives: Any, **changes: Any) -> Any:
    given = {
        "max_steps": 4, "per_device_train_batch_size": 8, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1, **changes,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **given)
    return DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=rows(), objectives=objectives)


def changed(before: dict[str, torch.Tensor], module: nn.Module) -> bool:
    return any(not torch.equal(before[name], value) for name, value in module.state_dict().items())


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_projections_are_trained_saved_beside_the_student_and_restored(tmp_path: Path) -> None:
    hidden = HiddenStateLoss(project="per_layer", learning_rate=0.5)
    made = trainer(tmp_path, tiny(**NARROW), tiny(), [hidden, LogitsLoss()], save_strategy="steps", save_steps=2)
    before = state(hidden)
    assert before
    made.train()
    assert changed(before, hidden)
    rates = {group["initial_lr"] for group in made.optimizer.param_groups}
    assert rates == {1e-2, 0.5}
    held = load_file(tmp_path / "checkpoint-4" / FILE)
    assert {name.removeprefix("0.") for name in held} == set(hidden.state_dict())
    own = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert not any("projection" in name for name in own)
    made.save_model(tmp_path / "final")
    assert not (tmp_path / "final" / FILE).exists()

    again = HiddenStateLoss(project="per_layer", learning_rate=0.5)
    torch.manual_seed(99)  # other first projections
    resumed = trainer(tmp_path, tiny(**NARROW), made.teacher, [again, LogitsLoss()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in hidden.state_dict().items())
    for (name, one), (_, two) in zip(made.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("damage", ["missing", "other objectives", "none needed"])
def test_a_checkpoint_of_other_objectives_is_refused_before_training(damage: str, tmp_path: Path) -> None:
    teacher = tiny()
    first = [HiddenStateLoss(project="per_layer"), LogitsLoss()]
    trainer(tmp_path, tiny(**NARROW), teacher, first, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    if damage == "missing":
        (checkpoint / FILE).unlink()
    then = {
        "missing": [HiddenStateLoss(project="per_layer"), LogitsLoss()],
        "other objectives": [HiddenStateLoss(project="shared", bias=True), LogitsLoss()],
        "none needed": [LogitsLoss()],
    }[damage]
    student = tiny(**NARROW)
    made = trainer(tmp_path, student, teacher, then)
    with pytest.raises(ValueError, match=r"was saved with other objectives: .*Pass the objectives"):
        made.train(resume_from_checkpoint=str(checkpoint))
    assert made.state.global_step == 0


def test_an_optimizer_of_the_users_gets_the_parameters_too(tmp_path: Path) -> None:
    student, hidden = tiny(**NARROW), HiddenStateLoss(project="per_layer")
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
                             save_strategy="no")  # fmt: skip
    own = torch.optim.SGD(student.parameters(), lr=0.1)
    made = DistillationTrainer(
        model=student, teacher=tiny(), args=args, train_dataset=rows(), objectives=[hidden], optimizers=(own, None)
    )
    before = state(hidden)
    made.train()
    assert changed(before, hidden)


def test_a_model_init_gets_new_projections_for_each_student(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
                             save_strategy="no", learning_rate=1e-2)  # fmt: skip
    hidden = HiddenStateLoss(project="per_layer")
    made = DistillationTrainer(
        model_init=lambda: tiny(**NARROW), teacher=tiny(), args=args, train_dataset=rows(), objectives=[hidden]
    )
    made.train()
    first = state(hidden)
    made.train()
    assert not changed(first, hidden)  # begun anew from the same seed, not trained on


class Noted:
    """An objective that keeps what it is called with."""

    name, needs = "noted", ("qkv", "hidden_states")

    def __call__(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        self.student, self.teacher, self.batch = student, teacher, batch
        return student.logits.square().mean()


@pytest.mark.parametrize("prepared", [False, True])
def test_queries_keys_and_values_are_those_of_the_projections(prepared: bool, tmp_path: Path) -> None:
    student, teacher, noted = tiny(), tiny(), Noted()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    student = lowbit.prepare(student, lowbit.TernaryConfig()) if prepared else student
    weights = copy.deepcopy(student)
    trainer(tmp_path, student, teacher, [noted], max_steps=1).train()
    for model, seen in ((weights, noted.student), (teacher, noted.teacher)):
        layers = model.bert.encoder.layer
        assert len(seen.qkv) == len(layers)
        for layer, states, found in zip(layers, seen.hidden_states, seen.qkv, strict=False):
            own = layer.attention.self
            expected = [linear(states) for linear in (own.query, own.key, own.value)]
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert all(each.requires_grad for layer in noted.student.qkv for each in layer)
    assert not any(each.requires_grad for layer in noted.teacher.qkv for each in layer)
    assert not any(map(is_hooked, student.modules()))


class Reversed:
    """A view: each row the other way round."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, student: Any, teacher: Any, batch: Any) -> tuple[Any, Any]:
        self.calls += 1
        turned = {name: value.flip(-1) for name, value in batch.items() if name in ("input_ids", "attention_mask")}
        return turned, turned


def test_a_view_is_run_once_a_step_and_the_objective_sees_it(tmp_path: Path) -> None:
    view, noted, calls = Reversed(), Noted(), []
    student, teacher = tiny(), tiny()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    objectives = [TaskLoss(), On(view, noted), On(view, LogitsLoss(name="turned"))]
    made = trainer(tmp_path, student, teacher, objectives, max_steps=3)
    made.train()
    assert view.calls == 3 and len(calls) == 6  # the loader's batch, and the view's
    with torch.no_grad():
        again = teacher(**{name: noted.batch[name] for name in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(noted.teacher.logits, again)
    assert {"loss_task", "loss_noted", "loss_turned"} <= made.state.log_history[-2].keys()


def words(folder: Path) -> BertTokenizerFast:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(96))]
    (folder / "vocab.txt").write_text("\n".join(names))
    return BertTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("prepared", [False, True])
def test_adversary_and_student_take_turns(prepared: bool, tmp_path: Path) -> None:
    """In its steps the generator alone changes, and student and teacher come to differ more; then the student's."""
    torch.manual_seed(0)
    student, teacher = tiny(), tiny().requires_grad_(True)
    student = lowbit.prepare(student, lowbit.TernaryConfig()) if prepared else student
    generator = BertForMaskedLM(tiny_config())
    view = MaskedGenerator(generator, words(tmp_path), share=0.5)
    objective = On(view, LogitsLoss(distance="kl", name="generated"), alternate=(2, 3), learning_rate=0.05)
    seen: list[tuple[bool, bool]] = []
    made = trainer(tmp_path, student, teacher, [LogitsLoss(), objective], max_steps=10, lr_scheduler_type="constant")
    step = made.training_step

    def watched(model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        before[:] = [state(student), state(generator)]
        return step(model, inputs, *args)

    before: list[Any] = []
    made.training_step = watched

    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append((changed(before[0], student), changed(before[1], generator)))

    made.add_callback(Look())
    first = state(teacher)
    made.train()
    turns = [(False, True)] * 2 + [(True, False)] * 3
    assert seen == turns * 2
    assert not changed(first, teacher) and all(each.grad is None for each in teacher.parameters())
    assert all(each.requires_grad for each in teacher.parameters())
    logged = [set(entry) for entry in made.state.log_history if "loss" in entry]
    assert all(("loss_generated_ascent" in names) == (number % 5 < 2) for number, names in enumerate(logged))


def test_a_projection_of_the_objective_is_not_trained_to_maximise(tmp_path: Path) -> None:
    view = MaskedGenerator(BertForMaskedLM(tiny_config()), words(tmp_path), share=0.5)
    hidden = HiddenStateLoss(project="per_layer")
    made = trainer(tmp_path, tiny(**NARROW), tiny(), [On(view, hidden, alternate=(3, 1))], max_steps=3)
    first, generator = state(hidden), state(view)
    made.train()
    assert not changed(first, hidden) and changed(generator, view)
    assert all(each.requires_grad for each in hidden.parameters())


def test_the_generator_finds_where_they_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student, teacher = tiny(), tiny()
    view = MaskedGenerator(BertForMaskedLM(tiny_config()), words(tmp_path), share=0.9)
    objective = On(view, LogitsLoss(distance="kl"), alternate=(60, 1), learning_rate=5e-3)
    made = trainer(tmp_path, student.eval(), teacher, [objective], max_steps=60, lr_scheduler_type="constant")
    made.train()
    curve = [entry["loss_logits_ascent"] for entry in made.state.log_history if "loss" in entry]
    assert sum(curve[-10:]) > 1.1 * sum(curve[:10])


def test_rewritten_ids_and_embeddings_say_the_same(tmp_path: Path) -> None:
    """With gradients a generator gives embeddings, without them ids: of the same draws, the same words."""
    student, teacher = tiny(), tiny()
    view = MaskedGenerator(BertForMaskedLM(tiny_config()).eval(), words(tmp_path), share=0.5)
    given = batch()
    given["input_ids"][given["attention_mask"] == 0] = 0
    torch.manual_seed(5)
    with torch.no_grad():
        ids, same = view(student, teacher, given)
    torch.manual_seed(5)
    own, taught = view(student, teacher, given)
    assert torch.equal(ids["input_ids"], same["input_ids"])
    kept = (given["attention_mask"] == 0) | (given["input_ids"] < 5)
    assert torch.equal(ids["input_ids"][kept], given["input_ids"][kept])
    assert (ids["input_ids"] != given["input_ids"]).any()
    for model, columns in ((student, own), (teacher, taught)):
        expected = model.get_input_embeddings()(ids["input_ids"])
        torch.testing.assert_close(columns["inputs_embeds"], expected)
        with torch.no_grad():
            torch.testing.assert_close(model(**columns).logits, model(**ids).logits)


def test_a_masked_language_model_of_a_teachers_layers() -> None:
    teacher = tiny()
    made = masked_lm_of(teacher, 1)
    assert made.config.num_hidden_layers == 1
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    taught = teacher.bert.state_dict()
    own = made.bert.state_dict()
    assert own and all(torch.equal(value, taught[name]) for name, value in own.items())
    assert not {id(each) for each in made.parameters()} & {id(each) for each in teacher.parameters()}
    with pytest.raises(ValueError, match="layers=3; the model has 2"):
        masked_lm_of(teacher, 3)


def test_views_that_cannot_work_are_refused(tmp_path: Path) -> None:
    tokenizer, model = words(tmp_path), BertForMaskedLM(tiny_config())
    with pytest.raises(ValueError, match="accepted: above 0"):
        MaskedGenerator(model, tokenizer, share=0.0)
    with pytest.raises(ValueError, match="two numbers of steps"):
        On(Reversed(), LogitsLoss(), alternate=(1, 1))
    other = On(MaskedGenerator(BertForMaskedLM(tiny_config(vocab_size=90)), tokenizer), LogitsLoss())
    with pytest.raises(ValueError, match="the generator has 90 tokens"):
        trainer(tmp_path, tiny(), tiny(), [other])
    trained = On(MaskedGenerator(model, tokenizer), LogitsLoss(), alternate=(1, 1))
    with pytest.raises(ValueError, match="set gradient_checkpointing=False"):
        trainer(tmp_path, tiny(), tiny(), [trained], gradient_checkpointing=True)


def test_a_teacher_may_keep_its_dropout(tmp_path: Path) -> None:
    for dropout in (False, True):
        teacher = tiny()
        args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
        DistillationTrainer(
            model=tiny(), teacher=teacher, args=args, train_dataset=rows(), objectives=[AttentionScoreLoss()],
            teacher_dropout=dropout,
        )  # fmt: skip
        assert teacher.training is dropout
