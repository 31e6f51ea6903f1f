"""Vocabularies are mixed word by word for the teacher, each predicts its own, projections are their formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

import lowbit
from helpers import identical, outputs, tiny, training_arguments
from lowbit.data import sentiment
from lowbit.distill.students import segmentation, subwords

TEXTS = [row["sentence"] for row in sentiment.generate(200, False, 0)]
SIZES = {"hidden": 24, "heads": 2, "intermediate": 50}


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    """Of the student, with few pieces, and of the teacher."""
    return segmentation.learn_wordpiece(TEXTS, 90), segmentation.learn_wordpiece(TEXTS, 200)


def teacher_of(tokenizers: tuple[Any, Any], **changes: Any) -> Any:
    return tiny("BertForMaskedLM", vocab_size=len(tokenizers[1]), **{"max_position_embeddings": 128, **changes})


def composite(tokenizers: tuple[Any, Any], **fields: Any) -> Any:
    teacher = teacher_of(tokenizers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = subwords.build(teacher, *tokenizers, **{**SIZES, **fields}).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def collate(tokenizers: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    return segmentation.BothSegmentations(*tokenizers)(rows())


def rows(count: int = 8) -> list[dict[str, str]]:
    return [{"text": text} for text in TEXTS[:count]]


def test_the_same_texts_give_the_same_vocabulary() -> None:
    """A run that goes on learns it again; pairs of pieces that are as frequent must be joined in one order."""
    texts = [" ".join(a + b + c for c in "aeiou") for a in "bcdfgh" for b in "lmnrst" for _ in range(3)]
    found = [segmentation.learn_wordpiece(texts, 60).get_vocab() for _ in range(5)]
    assert all(each == found[0] for each in found) and len(found[0]) == 60


def test_a_learned_vocabulary_is_berts_tokenizer(tokenizers: tuple[Any, Any], tmp_path: Path) -> None:
    own, taught = tokenizers
    assert len(own) <= 90 < len(taught) and own.mask_token_id != own.unk_token_id
    assert own.decode(own(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0].lower()
    assert len(own(TEXTS[0])["input_ids"]) > len(taught(TEXTS[0])["input_ids"])
    own.save_pretrained(tmp_path)
    assert "/tmp" not in "".join(path.read_text() for path in tmp_path.iterdir())
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[3])["input_ids"] == own(TEXTS[3])["input_ids"]
    with pytest.raises(ValueError, match="size=5"):
        segmentation.learn_wordpiece(TEXTS, 5)
    with pytest.raises(ValueError, match="no letters"):
        segmentation.learn_wordpiece([])


def test_both_sides_have_the_tokens_of_their_tokenizers(tokenizers: tuple[Any, Any]) -> None:
    texts = [TEXTS[5], "", "Émile's  well-made film!"]
    batch = segmentation.BothSegmentations(*tokenizers)([{"text": text} for text in texts])
    for tokenizer, prefix in zip(tokenizers, ("", "teacher_"), strict=True):
        wanted = tokenizer(texts, padding=True, return_tensors="pt")
        assert torch.equal(batch[f"{prefix}input_ids"], wanted["input_ids"])
        assert torch.equal((batch[f"{prefix}words"] >= 0).long(), wanted["attention_mask"])
    assert batch["words"][1].tolist()[:3] == [0, 1, -1] and batch["words"][2].max() == 9  # émile ' s well - made film !


def test_long_texts_end_with_the_same_word_on_both_sides(tokenizers: tuple[Any, Any]) -> None:
    batch = segmentation.BothSegmentations(*tokenizers, max_length=12)(rows())
    assert (batch["words"].amax(1) == batch["teacher_words"].amax(1)).all()
    for chosen in (0, 1, torch.rand(8, 20).round()):
        ids, words = segmentation.mixed(batch, torch.ones(8, 20).mul(chosen).bool(), 1000)
        assert ids.shape[1] <= 12 and (words.amax(1) == batch["words"].amax(1)).all()


def test_chosen_words_are_in_the_students_pieces(tokenizers: tuple[Any, Any]) -> None:
    batch = segmentation.BothSegmentations(*tokenizers)([*rows(6), {"text": ""}])
    chosen = torch.rand(7, 60) < 0.5
    ids, words = segmentation.mixed(batch, chosen, 1000)
    for row in range(7):
        expected = []
        last = int(batch["words"][row].max())
        for word in range(last + 1):
            student = 0 < word < last and bool(chosen[row, word])
            side = "" if student else "teacher_"
            pieces = batch[f"{side}input_ids"][row][batch[f"{side}words"][row] == word]
            expected += [(int(i) + 1000 * student, word) for i in pieces]
        padding = [(0, -1)] * (ids.shape[1] - len(expected))
        assert list(zip(ids[row].tolist(), words[row].tolist(), strict=True)) == expected + padding


def test_masks_are_80_10_10_of_their_share(tokenizers: tuple[Any, Any]) -> None:
    own, taught = map(len, tokenizers)
    ids, words = torch.randint(0, taught + own, (400, 50)), torch.arange(50).repeat(400, 1)
    words[::2, 30:] = -1
    changed, labels = segmentation.masked(ids, words, 0.3, 4, taught, (taught, own))
    inner = (words > 0) & (words < words.amax(1, keepdim=True))
    predicted = labels != segmentation.IGNORED
    assert not (predicted & ~inner).any() and torch.equal(labels[predicted], ids[predicted])
    assert torch.equal(changed[~predicted], ids[~predicted])
    masks, kept = changed[predicted] == 4, changed[predicted] == ids[predicted]
    assert abs(predicted.sum() / inner.sum() - 0.3) < 0.015
    assert abs(masks.float().mean() - 0.8) < 0.03 and abs(kept.float().mean() - 0.1) < 0.03
    assert torch.equal(changed[predicted][~masks] >= taught, ids[predicted][~masks] >= taught)
    assert changed.max() < taught + own


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_projection_loss_is_its_formula(tokenizers: tuple[Any, Any], up: bool, reduction: str) -> None:
    model = composite(tokenizers, direction="up" if up else "down", reduction=reduction)
    array = {name: each.detach().double().numpy() for name, each in model.state_dict().items()}
    left, right = array["projections.hidden_left"], array["projections.hidden_right"]
    inner_left, inner_right = array["projections.inner_left"], array["projections.inner_right"]
    total = tensors = 0
    for name, _ in model.student.named_parameters():
        own, taught = array[f"student.{name}"], array.get(f"teacher.{name}")
        if name == "bert.embeddings.word_embeddings.weight":
            taught = array["words"]
        if name == "cls.predictions.bias":
            taught = array["words_bias"]
        source, target = (own, taught) if up else (taught, own)
        if "embeddings.weight" in name:
            source = source @ right
        elif name.endswith("intermediate.dense.weight"):
            source = inner_left @ source @ right
        elif name.endswith("intermediate.dense.bias"):
            source = inner_left @ source
        elif ".output.dense.weight" in name and "attention" not in name:
            source = left @ source @ inner_right
        elif name.endswith("weight") and source.ndim == 2:
            source = left @ source @ right
        elif name != "cls.predictions.bias":
            source = left @ source
        squares = (source - target) ** 2
        total += squares.sum() if reduction == "sum" else squares.mean()
        tensors += 1
    assert tensors == 2 * 16 + 5 + 5
    assert model.projection_loss().item() == pytest.approx(total, rel=1e-4)


def test_each_piece_is_predicted_in_its_own_vocabulary(tokenizers: tuple[Any, Any]) -> None:
    model, size = composite(tokenizers, eps=0.0, student_weight=0.0, mask_probability=0.4), len(tokenizers[1])
    batch = collate(tokenizers)
    seen: dict[str, Any] = {}
    predict = model._predict_teacher
    model._predict_teacher = lambda *given: predict(*seen.setdefault("given", given))
    loss = model(**batch)["loss"].item()
    ids, real, labels = seen["given"]
    teacher = model.teacher.double()
    tables = [teacher.get_input_embeddings().weight, model.words.double()]
    biases = [teacher.cls.predictions.bias, model.words_bias.double()]
    with torch.no_grad():
        embedded = torch.stack(
            [torch.stack([tables[i >= size][i - size * (i >= size)] for i in row]) for row in ids.tolist()]
        )
        states = teacher.bert(inputs_embeds=embedded, attention_mask=real)[0]
        states, losses = teacher.cls.predictions.transform(states), []
        for row, column in (labels != segmentation.IGNORED).nonzero().tolist():
            own = int(labels[row, column] >= size)
            logits = tables[own] @ states[row, column] + biases[own]
            losses.append(-F.log_softmax(logits, -1)[labels[row, column] - own * size])
    assert {int(label >= size) for label in labels[labels != segmentation.IGNORED]} == {0, 1}
    assert loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_with_its_own_words_alone_each_has_transformers_loss(tokenizers: tuple[Any, Any], part: str) -> None:
    weights = {f"{name}_weight": float(name == part) for name in ("student", "teacher")}
    model = composite(tokenizers, eps=0.0, share=0.0, **weights)
    seen: dict[str, Any] = {}
    predict = getattr(model, f"_predict_{part}")
    setattr(model, f"_predict_{part}", lambda *given: predict(*seen.setdefault("given", given)))
    loss = model(**collate(tokenizers))["loss"].item()
    ids, real, labels = seen["given"]
    expected = getattr(model, part)(input_ids=ids, attention_mask=real, labels=labels).loss
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_texts_without_anything_to_predict_have_a_loss(tokenizers: tuple[Any, Any]) -> None:
    model = composite(tokenizers, eps=0.0)
    loss = model(**segmentation.BothSegmentations(*tokenizers)([{"text": ""}, {"text": ""}]))["loss"]
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("detach", [None, "teacher", "student"])
def test_detach_points(tokenizers: tuple[Any, Any], detach: str | None) -> None:
    model = composite(tokenizers, detach=detach)
    model.projection_loss().backward()
    for part in ("teacher", "student"):
        grads = [parameter.grad for parameter in getattr(model, part).parameters()]
        assert all(grad is None for grad in grads) if part == detach else any(grad is not None for grad in grads)
    assert (model.words.grad is None) == (detach == "teacher")
    assert all(each.grad is not None for each in model.projections.values())


def test_pieces_begin_as_the_teachers_rows(tokenizers: tuple[Any, Any]) -> None:
    own, taught = tokenizers
    teacher = teacher_of(tokenizers)
    model = subwords.build(teacher, own, taught, **SIZES).model
    table, known = teacher.get_input_embeddings().weight, taught.get_vocab()
    shared = [piece for piece in own.get_vocab() if piece in known]
    assert len(shared) > 50
    for piece in shared:
        row = table[known[piece]]
        assert torch.equal(model.words[own.get_vocab()[piece]], row)
        assert torch.equal(model.student.get_input_embeddings().weight[own.get_vocab()[piece]], row[:24])
    other = segmentation.learn_wordpiece(["zzyzx " * 9], 60)  # pieces that the teacher has to spell
    model = subwords.build(teacher, other, taught, **SIZES).model
    piece = next(piece for piece in other.get_vocab() if piece not in known and len(piece) > 3)
    ids = taught(piece.removeprefix("##"), add_special_tokens=False)["input_ids"]
    assert torch.allclose(model.words[other.get_vocab()[piece]], table[ids].mean(0))


def test_training_resumes_to_the_same_bits_learns_and_ends_as_a_plain_model(
    tokenizers: tuple[Any, Any], tmp_path: Path
) -> None:
    teacher = teacher_of(tokenizers)

    def run(name: str, **changes: Any) -> tuple[Any, list[float]]:
        built = subwords.build(teacher, *tokenizers, **SIZES, reduction="mean")
        args = training_arguments(
            tmp_path / name, max_steps=60, per_device_train_batch_size=16, learning_rate=1e-2,
            remove_unused_columns=False, save_strategy="steps", save_steps=30,
        )  # fmt: skip
        collator = segmentation.BothSegmentations(*tokenizers)
        trainer = Trainer(built.model, args, train_dataset=rows(200), data_collator=collator)
        trainer.train(**changes)
        return built, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    built, losses = run("whole")
    assert sum(losses[-4:]) < 0.88 * sum(losses[:4])  # from uniform to how frequent pieces are
    again, _ = run("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-30"))
    pairs = zip(built.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    student = built.finish(built.model)
    student.save_pretrained(tmp_path / "student")
    tokenizers[0].save_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    inputs = dict(tokenizer(TEXTS[:3], padding=True, return_tensors="pt"))
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "student")
    assert identical(outputs(loaded, inputs), outputs(student, inputs))
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    packed = lowbit.convert(lowbit.prepare(classifier, lowbit.TernaryConfig()))
    assert outputs(packed, inputs)[0].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"heads": 5}, "hidden=24 is no multiple of heads=5"),
        ({"direction": "across"}, "direction='across'; accepted: 'down', 'up'"),
        ({"detach": "both"}, "detach='both'; accepted: None, 'teacher', 'student'"),
        ({"reduction": "none"}, "reduction='none'"),
        ({"share": 1.5}, r"share=1\.5; accepted: 0 to 1"),
    ],
)
def test_what_does_not_fit(tokenizers: tuple[Any, Any], fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        subwords.build(teacher_of(tokenizers), *tokenizers, **{**SIZES, **fields})


def test_a_teacher_that_predicts_no_words(tokenizers: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="a BertForMaskedLM is needed"):
        subwords.build(tiny(), *tokenizers, **SIZES)
    with pytest.raises(ValueError, match="max_length=2"):
        segmentation.BothSegmentations(*tokenizers, max_length=2)
