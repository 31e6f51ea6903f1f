"""The synthetic task is deterministic, balanced, held out, and not solvable by counting words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit import sentiment


def test_deterministic_distinct_and_balanced() -> None:
    rows = sentiment.generate(1000, False, seed=3)
    assert rows == sentiment.generate(1000, False, seed=3)
    assert rows != sentiment.generate(1000, False, seed=4)
    assert len({row["sentence"] for row in rows}) == 1000
    assert sum(row["label"] for row in rows) == 500


def test_no_validation_pair_occurs_in_training() -> None:
    def pairs(validation: bool) -> set[tuple[str, str]]:
        found = set()
        for row in sentiment.generate(1500, validation, seed=0):
            words = row["sentence"].split()
            found |= {(a, adj) for a in sentiment.ASPECTS if a in words for adj in sentiment.ADJECTIVES if adj in words
                      and len([w for w in words if w in sentiment.ASPECTS]) == 1}  # fmt: skip
        return found

    train, validation = pairs(False), pairs(True)
    assert len(train) > 100 and len(validation) > 50
    assert not train & validation


def test_known_sentences_have_the_label_a_reader_gives() -> None:
    labels = {row["sentence"]: row["label"] for row in sentiment.generate(6000, False, seed=0)}
    plain = {s: y for s, y in labels.items() if len(s.split()) == 4}
    assert len(plain) > 20
    for sentence, label in plain.items():
        assert label == (sentence.split()[-1] in sentiment.POSITIVE)
    for sentence, label in labels.items():
        words = sentence.split()
        if len(words) == 5 and words[3] in ("not", "never"):
            assert label == (words[-1] in sentiment.NEGATIVE)


def test_bag_of_words_does_not_solve_it() -> None:
    train, validation = sentiment.generate(3000, False, seed=0), sentiment.generate(500, True, seed=0)
    vocabulary = {w: i for i, w in enumerate(sorted({w for r in train for w in r["sentence"].split()}))}

    def features(rows: list[dict]) -> torch.Tensor:
        x = torch.zeros(len(rows), len(vocabulary))
        for i, row in enumerate(rows):
            for word in row["sentence"].split():
                if word in vocabulary:
                    x[i, vocabulary[word]] += 1
        return x

    x, y = features(train), torch.tensor([float(r["label"]) for r in train])
    model = torch.nn.Linear(len(vocabulary), 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (model(features(validation)).squeeze(1) > 0).numpy()
    assert np.mean(predicted == np.array([r["label"] for r in validation])) < 0.8


def test_too_many_sentences_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentiment, "CONSTRUCTIONS", (sentiment._clause,))
    with pytest.raises(ValueError, match="fewer"):
        sentiment.generate(5000, True, seed=0)
