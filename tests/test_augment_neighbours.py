"""Neighbours by plain loops; of the candidates the hardest is chosen, for the student as it is."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, BertModel, BertTokenizerFast

import lowbit
from helpers import tiny_config, training_arguments
from lowbit import DistillationTrainer, LogitsLoss
from lowbit.data import sentiment
from lowbit.distill.augment import (
    CandidateCollator,
    HardestNeighbour,
    add_neighbours,
    embed,
    with_candidates,
)
from lowbit.distill.augment.hardest import divergence
from lowbit.distill.views import On

ROWS = sentiment.generate(150, False, 0)
SENTENCES = [row["sentence"] for row in ROWS]
CORPUS = [row["sentence"] for row in sentiment.generate(200, False, 1)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    words = sorted({word for text in [*SENTENCES, *CORPUS] for word in text.split()})
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizerFast.from_pretrained(path.parent)


@pytest.fixture(scope="module")
def encoder(tokenizer: BertTokenizerFast) -> BertModel:
    torch.manual_seed(0)
    return BertModel(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=64)).eval()


def classifier(tokenizer: BertTokenizerFast, seed: int, **changes: object) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=3, **changes)
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    return model


def test_embeddings_are_means_over_tokens_without_padding(encoder, tokenizer, tmp_path: Path) -> None:
    texts = [*SENTENCES[:9], "plot", ""]
    found = embed(texts, encoder, tokenizer, batch_size=4)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        torch.testing.assert_close(torch.tensor(row), mean / mean.norm(), atol=1e-5, rtol=1e-4)
    head = BertForSequenceClassification(encoder.config)
    head.bert.load_state_dict(encoder.state_dict())
    for _ in range(2):
        assert np.allclose(embed(texts, head, tokenizer, cache=tmp_path), found, atol=1e-5)
    assert len(list(tmp_path.glob("*/*.npy"))) == 1
    assert embed([], encoder, tokenizer).shape == (0, 64)


def slow_neighbours(own: str, corpus: list[str], vectors: dict[str, np.ndarray], count: int, limit: float) -> list:
    found, seen = [], set()
    for text in corpus:
        key = " ".join(text.lower().split())
        a, b = key.split(), own.lower().split()
        short, long = sorted((a, b), key=len)
        part = any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1))
        u, v = vectors[own].astype(np.float64), vectors[text].astype(np.float64)
        angle = math.acos(min(1.0, u @ v / np.linalg.norm(u) / np.linalg.norm(v))) / math.pi
        if key and key not in seen and not part and angle <= limit:
            found.append((angle, text))
        seen.add(key)
    return sorted(found)[:count]


@pytest.mark.parametrize(("count", "limit"), [(3, 0.5), (8, 0.1), (1, 0.22), (250, 1.0)])
def test_neighbours_are_those_of_plain_loops(encoder, tokenizer, count: int, limit: float) -> None:
    queries = SENTENCES[:12]
    parts = [text.split(" was ")[0] for text in queries]
    corpus = [*CORPUS[:80], *queries, *parts, *map(str.upper, queries), CORPUS[0] + "  ", ""]
    data = Dataset.from_dict({"sentence": queries, "label": [0] * len(queries)})
    found = add_neighbours(data, "sentence", corpus, encoder, tokenizer, count=count, max_angle=limit)
    vectors = {text: embed([text], encoder, tokenizer)[0] for text in {*corpus, *queries}}
    lengths = set()
    for row in found:
        expected = slow_neighbours(row["sentence"], corpus, vectors, count, limit)
        np.testing.assert_allclose(row["angles"], [angle for angle, _ in expected], atol=2e-4)
        by_text = {text: angle for angle, text in expected}
        for text, angle in zip(row["candidates"], row["angles"], strict=True):  # ties may come in another order
            assert abs(by_text.get(text, expected[-1][0]) - angle) < 2e-4
        lengths.add(len(expected))
    assert max(lengths) > 0


def test_rows_of_many_parts_are_searched_on(encoder, tokenizer) -> None:
    """The 30 nearest are parts of the sentence: the search has to ask for more."""
    words = CORPUS[0].split() * 3
    own = " ".join(words)
    parts = [" ".join(words[:n]) for n in range(2, len(words))]
    data = Dataset.from_dict({"sentence": [own]})
    found = add_neighbours(data, "sentence", [*parts, *SENTENCES[:60]], encoder, tokenizer, max_angle=1.0)
    assert len(parts) > 16 and len(found[0]["candidates"]) == 8 and not set(parts) & set(found[0]["candidates"])


def test_excluded_texts_and_their_parts_are_no_candidates(encoder, tokenizer) -> None:
    data = Dataset.from_dict({"sentence": SENTENCES[:5]})
    options = {"count": 100, "max_angle": 1.0}
    found = add_neighbours(data, "sentence", CORPUS[:40], encoder, tokenizer, exclude=CORPUS[:35], **options)
    candidates = {text for row in found["candidates"] for text in row}
    assert candidates and candidates <= set(CORPUS[35:40])


@pytest.mark.parametrize("corpus", [[], ["", "  "], [SENTENCES[1]]])
def test_an_empty_index_is_a_clear_error(encoder, tokenizer, corpus: list[str]) -> None:
    data = Dataset.from_dict({"sentence": SENTENCES[:2]})
    with pytest.raises(ValueError, match=f"the index of neighbours is empty: of {len(corpus)} texts"):
        add_neighbours(data, "sentence", corpus, encoder, tokenizer, exclude=SENTENCES[:2])


@pytest.fixture(scope="module")
def batch(encoder, tokenizer) -> dict[str, torch.Tensor]:
    data = Dataset.from_list(ROWS[:16])
    data = add_neighbours(data, "sentence", CORPUS, encoder, tokenizer, count=5, max_angle=0.5)
    candidates = [texts[: i % 6] for i, texts in enumerate(data["candidates"])]  # 0 to 5 of them
    encoded = data.map(lambda row: tokenizer(row["sentence"]), remove_columns=data.column_names)
    encoded = with_candidates(encoded.add_column("labels", data["label"][:]), candidates, tokenizer)
    return CandidateCollator(tokenizer)([encoded[i] for i in range(16)])


def test_candidates_are_padded_and_repeated(batch, tokenizer) -> None:
    ids, mask = batch["candidate_input_ids"], batch["candidate_attention_mask"]
    assert ids.shape == mask.shape and ids.shape[:2] == (16, 5) and batch["labels"].shape == (16,)
    assert ((ids != tokenizer.pad_token_id) == mask.bool()).all()
    own = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert all(torch.equal(ids[0, j][mask[0, j].bool()], own) for j in range(5))  # row 0 has no candidate
    assert len({tuple(row.tolist()) for row in ids[1]}) == 1 and len({tuple(row.tolist()) for row in ids[5]}) == 5
    assert "candidate_input_ids" not in CandidateCollator(tokenizer)([{"input_ids": [2, 3]}])
    with pytest.raises(ValueError, match="2 rows of candidates for 1 rows"):
        with_candidates(Dataset.from_dict({"input_ids": [[1]]}), [[], []], tokenizer)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_divergence_is_that_of_the_definition(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 4, 3), torch.cat([200 * torch.randn(1, 4, 3), torch.randn(1, 4, 3)])
    found = divergence(student, teacher, temperature)
    for i in range(2):
        for j in range(4):
            p, q = ([x / temperature for x in z[i, j].double().tolist()] for z in (teacher, student))
            p, q = ([x - max(z) - math.log(sum(math.exp(y - max(z)) for y in z)) for x in z] for z in (p, q))
            kl = sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))
            assert abs(float(found[i, j]) - kl) < 1e-4 * max(1, kl)
    assert divergence(student[..., :1], teacher[..., :1])[1, 2] == (student[1, 2, 0] - teacher[1, 2, 0]) ** 2
    assert divergence(teacher, teacher).abs().max() < 1e-6


def slow_choice(student, teacher, batch, temperature: float) -> tuple[list[list[int]], np.ndarray]:
    """Candidate by candidate without padding: the ids of the hardest, and all divergences [B, k]."""
    chosen, values = [], np.zeros(batch["candidate_input_ids"].shape[:2])
    for i, rows in enumerate(batch["candidate_input_ids"]):
        for j, ids in enumerate(rows):
            ids = ids[batch["candidate_attention_mask"][i, j].bool()][None]
            with torch.no_grad():
                p, q = (
                    torch.log_softmax(model.eval()(input_ids=ids).logits[0].double() / temperature, -1)
                    for model in (teacher, student)
                )
            values[i, j] = (p.exp() * (p - q)).sum()
        best = int(values[i].argmax())
        chosen.append(rows[best][batch["candidate_attention_mask"][i, best].bool()].tolist())
    return chosen, values


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_hardest_is_chosen_for_the_student_as_it_is(batch, tokenizer, temperature: float) -> None:
    teacher, student = classifier(tokenizer, 1).eval(), classifier(tokenizer, 2, hidden_dropout_prob=0.5).train()
    student.bert.pooler.eval()
    view = HardestNeighbour(temperature)
    choices = []
    for _ in range(2):
        columns, of_teacher = view(student, teacher, batch)
        assert columns.keys() == of_teacher.keys() == {"input_ids", "attention_mask"}
        assert student.training and not student.bert.pooler.training and not teacher.training
        assert all(parameter.grad is None for parameter in [*student.parameters(), *teacher.parameters()])
        expected, values = slow_choice(copy.deepcopy(student), teacher, batch, temperature)
        ids, mask = columns["input_ids"], columns["attention_mask"]
        assert [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] == expected
        assert mask.any(0).all()  # no column of padding only
        real = values[2:6]  # rows of two candidates or more
        assert (real.max(1) > real.mean(1)).all()
        choices.append(expected)
        with torch.no_grad():
            for parameter in student.parameters():  # a step later it is another student
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    assert choices[0] != choices[1]


def test_chosen_divergences_exceed_random_ones(batch, tokenizer) -> None:
    teacher, student = classifier(tokenizer, 1).eval(), classifier(tokenizer, 2).eval()
    columns, _ = HardestNeighbour()(student, teacher, batch)
    _, values = slow_choice(student, teacher, batch, 1.0)
    with torch.no_grad():
        hardest = divergence(student(**columns).logits, teacher(**columns).logits)
    generator = torch.Generator().manual_seed(0)
    at_random = [values[range(16), torch.randint(5, (16,), generator=generator)].mean() for _ in range(200)]
    assert float(hardest.mean()) > max(at_random)


def test_before_its_start_examples_stand_for_themselves(batch, tokenizer) -> None:
    teacher, student = classifier(tokenizer, 1).eval(), classifier(tokenizer, 2).eval()
    view = HardestNeighbour(start=0.5)
    for progress, own in ((0.0, True), (0.49, True), (0.5, False), (0.99, False), (0.2, True)):
        view.advance(progress)
        columns, _ = view(student, teacher, batch)
        assert (columns["input_ids"] is batch["input_ids"]) == own


def test_wrong_use_is_a_clear_error(tokenizer) -> None:
    model = classifier(tokenizer, 1)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        HardestNeighbour()(model, model, {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    for fields in ({"start": 1.0}, {"start": -0.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="accepted"):
            HardestNeighbour(**fields)


def minimax_trainer(tokenizer, data: Dataset, folder: Path, steps: int, **changes: object) -> DistillationTrainer:
    """The published sum: labels, the teacher's logits, and those on the hardest neighbour."""
    teacher, student = classifier(tokenizer, 1), classifier(tokenizer, 2)
    objectives = [
        LogitsLoss(weight=0.5),
        On(HardestNeighbour(start=0.25), LogitsLoss(weight=0.5, distance="kl", name="neighbour")),
    ]
    changes |= {"max_steps": steps, "learning_rate": 1e-3, "remove_unused_columns": False}
    arguments = training_arguments(folder, per_device_train_batch_size=8, **changes)
    collator = CandidateCollator(tokenizer)
    return DistillationTrainer(student, arguments, collator, data, data, teacher=teacher, objectives=objectives)


@pytest.fixture(scope="module")
def prepared(encoder, tokenizer) -> Dataset:
    data = Dataset.from_list(ROWS[:32])
    found = add_neighbours(data, "sentence", CORPUS, encoder, tokenizer, count=3, max_angle=0.5)["candidates"]
    encoded = data.map(
        lambda row: {**tokenizer(row["sentence"]), "labels": row["label"]}, remove_columns=data.column_names
    )
    return with_candidates(encoded, found, tokenizer)


def test_the_trainer_learns_on_the_hardest_neighbours(tokenizer, prepared: Dataset, tmp_path: Path) -> None:
    trainer = minimax_trainer(tokenizer, prepared, tmp_path, 60)
    trainer.train()
    values = [entry["loss_neighbour"] for entry in trainer.state.log_history if "loss_neighbour" in entry]
    assert len(values) == 60 and np.mean(values[-8:]) < 0.5 * np.mean(values[16:24])
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_interrupted_training_on_neighbours_goes_on_to_the_same_bits(tokenizer, prepared, tmp_path: Path) -> None:
    whole = minimax_trainer(tokenizer, prepared, tmp_path / "whole", 10, save_strategy="steps", save_steps=4)
    whole.train()
    resumed = minimax_trainer(tokenizer, prepared, tmp_path / "resumed", 10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_low_bit_student_is_asked_with_its_low_bit_weights(tokenizer, batch) -> None:
    teacher = classifier(tokenizer, 1).eval()
    student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig()).train()
    columns, _ = HardestNeighbour()(student, teacher, batch)
    expected, values = slow_choice(student, teacher, batch, 1.0)
    kept = zip(columns["input_ids"], columns["attention_mask"], strict=True)
    assert [ids[mask.bool()].tolist() for ids, mask in kept] == expected
    assert values.max() > 1e-4  # a float student would be the teacher itself
