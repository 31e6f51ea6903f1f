"""Student and teacher share a batch; each is called with the columns that its own forward names, in every trainer."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    TrainingArguments,
)

import lowbit
from helpers import tiny_config, training_arguments
from lowbit import HiddenStateLoss, LogitsLoss
from lowbit.distill.columns import arguments as taken
from lowbit.distill.columns import parameters

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPTIONS = {"return_dict", "output_hidden_states", "output_attentions", "output_scores"}
TRAINERS = {
    "plain": (lowbit.DistillationTrainer, {}),
    "any length": (lowbit.LengthDropTrainer, {"length_drop": lowbit.LengthDrop(sub_models=2)}),
    "learned length": (lowbit.SoftLengthTrainer, {"soft_lengths": lowbit.LearnedThresholds(2)}),
}


def bert(kind: type = BertForSequenceClassification) -> Any:
    """With token types that decide its logits."""
    model = kind(tiny_config(num_labels=3, **NO_DROPOUT) if kind is not BertForQuestionAnswering else tiny_config())
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight[1].normal_(std=2.0)
        (model.qa_outputs if kind is BertForQuestionAnswering else model.classifier).weight.normal_()
    return model.eval()


def distilbert(kind: type = DistilBertForSequenceClassification) -> Any:
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 150, "max_position_embeddings": 40}
    labels = {} if kind is DistilBertForQuestionAnswering else {"num_labels": 3}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return kind(DistilBertConfig(vocab_size=101, **sizes, **labels, **dropout)).eval()


PAIRS = {"distilbert of bert": (distilbert, bert), "bert of distilbert": (bert, distilbert), "berts": (bert, bert)}
# What transformers' documentation says that these take of what is in `rows`.
TAKEN = {"bert": {"input_ids", "attention_mask", "token_type_ids"}, "distilbert": {"input_ids", "attention_mask"}}


def rows(count: int = 8, length: int = 9, **more: Any) -> list[dict[str, Any]]:
    """Every second one is padded; each has its columns in an order of its own."""
    examples = []
    for row in range(count):
        mask = torch.ones(length, dtype=torch.long)
        mask[length - 4 * (row % 2) :] = 0
        example = {
            "input_ids": torch.randint(1, 101, (length,)),
            "attention_mask": mask,
            "token_type_ids": torch.randint(0, 2, (length,)),
            "labels": torch.tensor(row % 3),
            "unrelated": torch.tensor(row),
            **more,
        }
        examples.append(dict(random.Random(row).sample([*example.items()], len(example))))
    return examples


def stacked(data: list[dict[str, Any]], names: set[str]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in names}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
    }
    return training_arguments(folder, **{**values, **changes})


class Record:
    """Names of the columns that a model was called with, and the logits that it gave."""

    def __init__(self, model: Any) -> None:
        self.names: list[set[str]] = []
        self.logits: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda _module, _args, kwargs: self._called(_args, kwargs), with_kwargs=True)
        model.register_forward_hook(lambda _module, _args, output: self.logits.append(output["logits"].detach()))

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        self.names.append(kwargs.keys() - OPTIONS)


@pytest.mark.parametrize("source", ["list", "datasets", "iterable"])
@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_each_model_is_called_with_the_columns_that_it_names(
    tmp_path: Path, pair: str, trainer: str, removed: bool, source: str
) -> None:
    student, teacher = (make() for make in PAIRS[pair])
    before, data = [copy.deepcopy(model) for model in (student, teacher)], rows()
    given = {
        "list": lambda: data,
        "datasets": lambda: datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in data]),
        "iterable": lambda: datasets.Dataset.from_list(
            [{k: v.tolist() for k, v in row.items()} for row in data]
        ).to_iterable_dataset(),
    }[source]()
    kind, more = TRAINERS[trainer]
    records = Record(student), Record(teacher)
    run = kind(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, remove_unused_columns=removed, max_grad_norm=0.0),
        train_dataset=given,
        eval_dataset=given,
        objectives=[LogitsLoss()],
        **more,
    )
    run.train()
    own, taught = (TAKEN[model.config.model_type] for model in (student, teacher))
    assert all(names == taught for names in records[1].names) and len(records[1].names) == 2
    assert records[0].names and all(own <= names <= own | {"labels"} for names in records[0].names)
    with torch.no_grad():
        expected = before[1](**stacked(data, taught)).logits
        blind = before[1](**stacked(data, TAKEN["distilbert"])).logits
    assert torch.allclose(torch.cat(records[1].logits), expected, atol=1e-5)
    assert torch.allclose(blind, expected, atol=1e-3) == (teacher.config.model_type == "distilbert")
    if trainer != "plain":  # their students run without padding, and one is scaled
        return
    seen = len(records[0].names)
    with torch.no_grad():
        own_logits = before[0](**stacked(data, own)).logits
    loss = torch.nn.functional.cross_entropy(own_logits, torch.arange(8) % 3).item()
    assert run.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)
    assert torch.allclose(torch.from_numpy(run.predict(given).predictions), own_logits, atol=1e-5)
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in data]
    assert torch.allclose(torch.from_numpy(run.predict(unlabelled).predictions), own_logits, atol=1e-5)
    assert all(own <= names <= own | {"labels"} for names in records[0].names[seen:])
    assert len(records[1].names) == 2  # never asked there


@pytest.mark.parametrize("trainer", TRAINERS)
def test_evaluation_of_a_student_that_drops_tokens_leaves_the_teachers_columns_out(
    tmp_path: Path, trainer: str
) -> None:
    student = distilbert()
    record, data, (kind, more) = Record(student), rows(), TRAINERS[trainer]
    run = kind(model=student, teacher=bert(), args=arguments(tmp_path, remove_unused_columns=False), **more)
    assert run.evaluate(data)["eval_loss"] > 0
    run.predict([{name: value for name, value in row.items() if name != "labels"} for row in data])
    assert record.names == [{*TAKEN["distilbert"], "labels"}] * 2 + [TAKEN["distilbert"]] * 2


def test_batches_padded_by_the_students_tokenizer_hold_the_teachers_columns(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    berts = BertTokenizerFast.from_pretrained(tmp_path)
    students = BertTokenizerFast.from_pretrained(tmp_path, model_input_names=["input_ids", "attention_mask"])
    texts = [("a b", "c d e"), ("f", "g"), ("h a b", "c"), ("d", "e f g h a")]
    data = [{**berts(*text), "labels": row % 3} for row, text in enumerate(texts)]
    teacher = bert()
    before, record = copy.deepcopy(teacher), Record(teacher)
    lowbit.DistillationTrainer(
        model=distilbert(),
        teacher=teacher,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=data,
        objectives=[LogitsLoss()],
        processing_class=students,
    ).train()
    for text, logits in zip(texts, record.logits[0], strict=True):
        with torch.no_grad():  # one at a time: no padding
            assert torch.allclose(before(**berts(*text, return_tensors="pt")).logits[0], logits, atol=1e-5)


def test_the_teacher_gets_no_labels_whatever_they_are_called(tmp_path: Path) -> None:
    names: list[set[str]] = []
    teacher = bert(BertForQuestionAnswering)
    teacher.register_forward_pre_hook(lambda _m, _a, kwargs: names.append(kwargs.keys() - OPTIONS), with_kwargs=True)
    answer = {"start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}
    run = lowbit.DistillationTrainer(
        model=distilbert(DistilBertForQuestionAnswering),
        teacher=teacher,
        args=arguments(tmp_path),
        train_dataset=rows(**answer),
        objectives=[LogitsLoss(), lowbit.TaskLoss()],
    )
    run.train()
    assert names == [TAKEN["bert"]] * 2
    assert run.evaluate(rows(**answer))["eval_loss"] > 0


def test_a_student_made_anew_by_model_init_has_its_own_columns(tmp_path: Path) -> None:
    students, records = [distilbert(), bert(), distilbert()], []
    for student in students:
        records.append(Record(student))
    teacher = bert()
    taught, left = Record(teacher), iter(students)
    run = lowbit.DistillationTrainer(
        model_init=lambda: next(left),
        teacher=teacher,
        args=arguments(tmp_path),
        train_dataset=rows(),
        objectives=[LogitsLoss()],
    )
    assert run.get_train_dataloader() and run._signature_columns
    run.train()
    run.train()
    assert [{*names} for names in map(lambda record: map(frozenset, record.names), records)] == [
        set(),
        {frozenset(TAKEN["bert"] | {"labels"})},
        {frozenset(TAKEN["distilbert"] | {"labels"})},
    ]
    assert taught.names == [TAKEN["bert"]] * 4


# --- forwards of the user's own ---------------------------------------------------------------------------------------


class Exact(DistilBertForSequenceClassification):
    """Names all that it takes, and no option."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, weights=None):  # type: ignore[no-untyped-def]
        self.seen = weights
        return super().forward(input_ids, attention_mask, labels=labels)


class Strict(DistilBertForSequenceClassification):
    """Chokes on **kwargs that are no options of transformers."""

    def forward(self, weights=None, input_ids=None, attention_mask=None, labels=None, **kwargs):  # type: ignore[no-untyped-def]
        assert kwargs.keys() - {"inputs_embeds"} <= OPTIONS, kwargs.keys()  # which PEFT always hands on, as None
        self.seen = weights
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


class Partial(DistilBertForSequenceClassification):
    """Names what it adds, hands the rest on."""

    def forward(self, weights=None, **kwargs):  # type: ignore[no-untyped-def]
        self.seen = weights
        assert "token_type_ids" not in kwargs and "attention_mask" in kwargs
        return super().forward(**kwargs)


class Through(Strict):
    """Names nothing."""

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("kind", [Exact, Strict, Partial, Through])
def test_extra_columns_reach_the_forward_that_names_them(tmp_path: Path, kind: type, removed: bool) -> None:
    student, teacher, data = distilbert(kind), bert(), rows(4, weights=torch.rand(9))
    record, taught = Record(student), Record(teacher)
    run = lowbit.DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, remove_unused_columns=removed, max_steps=1, label_names=["labels"]),
        train_dataset=data,
        eval_dataset=data,
        objectives=[LogitsLoss()],
    )
    run.train()
    assert torch.equal(student.seen, stacked(data, {"weights"})["weights"])
    student.seen = None
    assert run.evaluate()["eval_loss"] > 0
    assert torch.equal(student.seen, stacked(data, {"weights"})["weights"])
    assert record.names == [{*TAKEN["distilbert"], "weights", "labels"}] * 2
    assert taught.names == [TAKEN["bert"]]
    ordinary = distilbert()
    ordinary.load_state_dict(student.state_dict())
    with torch.no_grad():
        assert torch.allclose(record.logits[0], ordinary(**stacked(data, TAKEN["distilbert"])).logits, atol=1e-6)


def test_a_teachers_extra_columns_are_kept_for_it_alone(tmp_path: Path) -> None:
    student, teacher = distilbert(), distilbert(Exact)
    record = Record(student)
    lowbit.DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=rows(4, weights=torch.arange(9)),
        objectives=[LogitsLoss()],
    ).train()
    assert torch.equal(teacher.seen, torch.arange(9).expand(4, 9))
    assert record.names == [{*TAKEN["distilbert"], "labels"}]


def test_objectives_see_every_column_that_is_kept(tmp_path: Path) -> None:
    class Names:
        name, needs = "names", ()

        def __call__(self, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
            seen.append({*batch})
            return student.logits.square().mean()

    seen: list[set[str]] = []
    for removed in (True, False):
        lowbit.DistillationTrainer(
            model=distilbert(),
            teacher=bert(),
            args=arguments(tmp_path, max_steps=1, remove_unused_columns=removed),
            train_dataset=rows(4),
            objectives=[Names()],
        ).train()
    assert seen == [TAKEN["bert"] | {"labels"}, TAKEN["bert"] | {"labels", "unrelated"}]


def test_a_forward_without_the_options_that_objectives_need_is_refused_before_training(tmp_path: Path) -> None:
    for student, teacher in ((distilbert(Exact), bert()), (bert(), distilbert(Exact))):
        with pytest.raises(ValueError, match=r"Exact.forward does not take output_hidden_states.*\*\*kwargs"):
            lowbit.DistillationTrainer(
                model=student, teacher=teacher, args=arguments(tmp_path), objectives=[HiddenStateLoss(), LogitsLoss()]
            )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrapped_models_take_what_the_model_takes(tmp_path: Path, precision: str) -> None:
    student, teacher = distilbert(Strict), bert()
    run = lowbit.DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, bf16=precision == "bf16", max_steps=1),
        train_dataset=rows(4, weights=torch.rand(9)),
        objectives=[LogitsLoss()],
    )
    run.train()  # accelerate has wrapped forward itself for mixed precision
    batch = stacked(rows(4, weights=torch.rand(9)), {*TAKEN["bert"], "labels", "weights", "unrelated"})
    expected = {"weights", "input_ids", "attention_mask", "labels"}
    wrappers = [student, torch.nn.DataParallel(student), torch.compile(student, backend="eager")]
    wrappers.append(torch.compile(torch.nn.DataParallel(student), backend="eager"))
    for wrapped in wrappers:
        assert taken(wrapped, batch).keys() == expected
        assert taken(wrapped, {}, {"return_dict": True}) == {"return_dict": True}
        assert parameters(wrapped) == parameters(student)
    for mode in (True, False):
        wrapped = torch.nn.DataParallel(student).train(mode)
        assert torch.isfinite(run.compute_loss(wrapped, dict(batch)))


@pytest.mark.parametrize("removed", [True, False])
def test_a_student_inside_peft_takes_its_own_columns(tmp_path: Path, removed: bool) -> None:
    inner, teacher, data = distilbert(Strict), bert(), rows(4, weights=torch.rand(9))
    student = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS"))
    taught = Record(teacher)
    run = lowbit.DistillationTrainer(
        model=student,
        teacher=teacher,
        args=arguments(tmp_path, max_steps=1, remove_unused_columns=removed, label_names=["labels"]),
        train_dataset=data,
        objectives=[LogitsLoss()],
    )
    run.train()
    assert torch.equal(inner.seen, stacked(data, {"weights"})["weights"])
    assert taught.names == [TAKEN["bert"]]
    assert run.evaluate(data)["eval_loss"] > 0


def test_a_forward_that_names_nothing_at_all_gets_everything() -> None:
    class Wrapper(torch.nn.Module):
        def forward(self, **batch: Any) -> Any:
            return batch

    assert taken(Wrapper(), {"a": 1, "labels": 2}, without={"labels"}) == {"a": 1}
