"""Students over words: padding changes nothing, pairs are their formula, tokens are their own, logits are learned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

import lowbit
from helpers import tiny, training_arguments
from lowbit.data import sentiment
from lowbit.distill.augment import Rules
from lowbit.distill.augment.vectors import vectors_of
from lowbit.distill.students import both, rnn
from lowbit.distill.views import On

TEXTS = ["The film is a joy .", "a dull , dull film", "joy", "It is what it is , and no more than that !"]
SMALL = {"embedding_size": 12, "hidden_size": 7, "intermediate_size": 9}


def student_of(encoder: str, **fields: Any) -> tuple[Any, Any]:
    tokenizer = rnn.word_tokenizer(TEXTS)
    return rnn.build(tiny(), tokenizer, encoder, **{**SMALL, **fields}).model, tokenizer


def lstm(weights: dict[str, np.ndarray], vectors: np.ndarray, suffix: str) -> np.ndarray:
    """Last state of an LSTM over vectors [S, E], by its equations."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    state = cell = np.zeros(7)
    for vector in vectors[::-1] if suffix else vectors:
        gates = weights[f"weight_ih_l0{suffix}"] @ vector + weights[f"bias_ih_l0{suffix}"]
        gates = gates + weights[f"weight_hh_l0{suffix}"] @ state + weights[f"bias_hh_l0{suffix}"]
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        state = sigmoid(o) * np.tanh(cell)
    return state


def cnn(weights: dict[str, np.ndarray], vectors: np.ndarray) -> np.ndarray:
    """Maxima over windows, one window at a time."""
    maxima = []
    for index, size in enumerate((3, 4, 5)):
        kernel, bias = weights[f"{index}.weight"], weights[f"{index}.bias"]
        filled = np.concatenate([vectors, np.zeros((max(size - len(vectors), 0), 12))])
        windows = [filled[i : i + size] for i in range(len(filled) - size + 1)]
        maps = [np.maximum((kernel * window.T).sum((1, 2)) + bias, 0) for window in windows]
        maxima.append(np.max(maps, axis=0))
    return np.concatenate(maxima)


def expected(model: Any, ids: list[list[int]]) -> np.ndarray:
    """Logits of the texts of one row, in float64."""
    state = {name: each.detach().double().numpy() for name, each in model.state_dict().items()}

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}

    def encode(text: list[int]) -> np.ndarray:
        vectors = state["words.embeddings.weight"][text] if text else np.zeros((1, 12))
        if model.config.encoder == "cnn":
            return cnn(part("words.encoder.kernels."), vectors)
        weights = part("words.encoder.lstm.")
        return np.concatenate([lstm(weights, vectors, suffix) for suffix in ("", "_reverse")])

    encoded = [encode(text) for text in ids]
    if len(encoded) == 2:
        a, b = encoded
        encoded = [np.concatenate([a, b, abs(a - b), a * b])]
    dense = np.maximum(state["words.dense.weight"] @ encoded[0] + state["words.dense.bias"], 0)
    return state["classifier.weight"] @ dense + state["classifier.bias"]


@pytest.mark.parametrize("encoder", ["bilstm", "cnn"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_the_equations_whatever_the_padding(encoder: str, side: str) -> None:
    model, tokenizer = student_of(encoder)
    batch = tokenizer(TEXTS, padding="max_length", max_length=17, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        got = model(**batch).logits.double().numpy()
    wanted = [expected(model, [tokenizer(text)["input_ids"]]) for text in TEXTS]
    assert np.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("encoder", ["bilstm", "cnn"])
def test_pairs_are_both_texts_their_difference_and_their_product(encoder: str) -> None:
    model, tokenizer = student_of(encoder, pair=True)
    first, second = TEXTS, [TEXTS[2], TEXTS[0], "", TEXTS[1]]
    batch = tokenizer(first, second, padding=True, return_tensors="pt")
    with torch.no_grad():
        got = model(**batch).logits.double().numpy()
    pairs = zip(first, second, strict=True)
    wanted = [expected(model, [tokenizer(a)["input_ids"], tokenizer(b)["input_ids"]]) for a, b in pairs]
    assert np.allclose(got, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="needs token_type_ids"):
        model(batch["input_ids"])


def test_words_are_the_tokens(tmp_path: Path) -> None:
    tokenizer = rnn.word_tokenizer(TEXTS, size=8)
    assert len(tokenizer) == 8 and tokenizer.pad_token_id == 0
    assert tokenizer.tokenize("IS zebra ,") == ["is", "[UNK]", ","]
    assert tokenizer.tokenize("is [MASK],") == ["is", Rules().mask_word, ","]  # one word, as augmentation writes it
    pair = tokenizer("a film", "joy")
    assert pair["token_type_ids"] == [0, 0, 1] and len(pair["input_ids"]) == 3
    tokenizer.save_pretrained(tmp_path)
    model = rnn.build(tiny(), tokenizer, **SMALL).model
    model.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("A film", "joy", return_tensors="pt")["input_ids"].tolist() == [pair["input_ids"]]
    with pytest.raises(ValueError, match="size=3"):
        rnn.word_tokenizer(TEXTS, size=3)
    with pytest.raises(ValueError, match="no word"):
        rnn.word_tokenizer([])


def test_it_loads_in_a_new_process(tmp_path: Path) -> None:
    model, tokenizer = student_of("bilstm")
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    program = f"""
import torch, lowbit
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder = {str(tmp_path)!r}
model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
print(model(**tokenizer({TEXTS!r}, padding=True, return_tensors="pt")).logits.flatten().tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wanted = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.flatten().tolist()
    assert json.loads(result.stdout) == pytest.approx(wanted, abs=1e-6)


def test_vectors_are_where_words_begin(tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text("film 3 4 0\njoy 0 0 2\nzebra 1 1 1\n")
    tokenizer = rnn.word_tokenizer(TEXTS)
    fields = {**SMALL, "embedding_size": 3}
    plain = rnn.build(tiny(), tokenizer, **fields).model.words.embeddings.weight
    table = rnn.build(tiny(), tokenizer, vectors=tmp_path / "vectors.txt", **fields).model.words.embeddings.weight
    words = tokenizer.get_vocab()
    assert torch.allclose(table[words["film"]], torch.tensor([0.6, 0.8, 0.0]))
    assert torch.allclose(table[words["joy"]], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(table[words["dull"]], plain[words["dull"]]) and not table[0].any()
    with pytest.raises(ValueError, match="embedding_size=12, and the vectors have 3"):
        rnn.build(tiny(), tokenizer, vectors=str(tmp_path / "vectors.txt"), **SMALL)


def teacher_tokenizer(folder: Path) -> Any:
    words = sorted({word for text in TEXTS for word in text.lower().split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizerFast.from_pretrained(folder)


def test_the_teachers_own_table_may_be_the_vectors(tmp_path: Path) -> None:
    teacher, tokens = tiny(), teacher_tokenizer(tmp_path)
    tokenizer = rnn.word_tokenizer(TEXTS)
    found = vectors_of(teacher, tokens)
    model = rnn.build(teacher, tokenizer, vectors=found, **{**SMALL, "embedding_size": 64}).model
    row = teacher.get_input_embeddings().weight[tokens.get_vocab()["dull"]]
    got = model.words.embeddings.weight[tokenizer.get_vocab()["dull"]]
    assert torch.allclose(got, row / row.norm(), atol=1e-6)


def test_both_encodings_are_padded_and_each_model_gets_its_own(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    own, taught = rnn.word_tokenizer(TEXTS), teacher_tokenizer(tmp_path)
    data = datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS[::-1], "y": [0, 1, 2, 0], "id": [7, 8, 9, 10]})
    encoded = both.tokenize_for_both(data, own, taught, ["a", "b"], "y")
    assert "id" not in encoded.column_names
    batch = both.PadBoth(own, taught)([encoded[1], encoded[3]])
    student, teacher = both.OwnColumns()(None, None, batch)
    assert set(student) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert set(teacher) == {"input_ids", "token_type_ids", "attention_mask"}
    rows = [(TEXTS[1], TEXTS[2]), (TEXTS[3], TEXTS[0])]
    for got, tokenizer in ((student, own), (teacher, taught)):
        wanted = tokenizer(*map(list, zip(*rows, strict=True)), padding=True, return_tensors="pt")
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert student["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="tokenize_for_both"):
        both.OwnColumns()(None, None, student)
    with pytest.raises(ValueError, match="one or two columns of text"):
        both.tokenize_for_both(data, own, taught, ["text"])


@pytest.mark.parametrize("encoder", ["bilstm", "cnn"])
def test_it_learns_a_teachers_logits_and_resumes(encoder: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = sentiment.generate(64, False, 0)
    texts = [row["sentence"] for row in rows]
    words = sorted({word for text in texts for word in text.split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    taught = BertTokenizerFast.from_pretrained(tmp_path)
    teacher = tiny(vocab_size=len(taught), num_labels=2, max_position_embeddings=128)
    with torch.no_grad():
        teacher.classifier.weight.mul_(5)
    own = rnn.word_tokenizer(texts)
    data = both.tokenize_for_both(datasets.Dataset.from_list(rows), own, taught, ["sentence"])

    def run(name: str, **changes: Any) -> Any:
        student = rnn.build(teacher, own, encoder, **{**SMALL, "dropout": 0.2}).model
        args = training_arguments(
            tmp_path / name, max_steps=40, per_device_train_batch_size=16, learning_rate=1e-2,
            remove_unused_columns=False, save_strategy="steps", save_steps=20,
        )  # fmt: skip
        objective = On(both.OwnColumns(), lowbit.LogitsLoss(problem_type="regression"))
        trainer = lowbit.DistillationTrainer(
            student, args, train_dataset=data, data_collator=both.PadBoth(own, taught), teacher=teacher,
            objectives=[objective],
        )  # fmt: skip
        trainer.train(**changes)
        return trainer

    whole = run("whole")
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-20"))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("encoder", ["bilstm", "cnn"])
def test_table_and_dense_layer_can_be_packed(encoder: str, tmp_path: Path) -> None:
    model, tokenizer = student_of(encoder)
    packed = lowbit.convert(lowbit.prepare(model, lowbit.TernaryConfig()))
    assert set(lowbit.left_in_float(packed)) & {"words.embeddings", "words.dense"} == set()
    assert "classifier" in lowbit.left_in_float(packed)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, packed(**batch).logits)
    assert torch.equal(lowbit.from_pretrained(tmp_path)(**batch).logits, packed(**batch).logits)


def test_sizes_and_encoders_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="encoder='gru'; accepted: bilstm, cnn"):
        student_of("gru")
    with pytest.raises(ValueError, match="hidden_size=0"):
        student_of("cnn", hidden_size=0)
