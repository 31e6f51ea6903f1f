"""The synthetic task is deterministic, balanced, held out, and not solvable by counting words."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lowbit.data import sentiment


def test_deterministic_distinct_and_balanced() -> None:
    rows = sentiment.generate(1000, False, seed=3)
    assert rows == sentiment.generate(1000, False, seed=3)
    assert rows != sentiment.generate(1000, False, seed=4)
    assert len({row["sentence"] for row in rows}) == 1000
    assert sum(row["label"] for row in rows) == 500


Reading = tuple[float, set[tuple[str, str]]]
_DEGREE = "|".join(degree for degree in sentiment.DEGREES if degree)
_NEGATOR, _DENIAL = "|".join(sentiment.NEGATORS), "|".join(sentiment.DENIALS)
_BOTH = re.compile(rf"not only was the (\w+) ({_DEGREE}|)(\w+) , but the (\w+) was ({_DEGREE}|)(\w+) too")
_CLAUSE = re.compile(rf"(?:({_DENIAL}) )?the (\w+) was (?:({_NEGATOR}) )?({_DEGREE}|)(\w+)")
_CONTRASTS = [  # text, then which of the two is the main clause
    (re.compile(r"<(\d)> , but <(\d)>"), 1),
    (re.compile(r"although <(\d)> , <(\d)>"), 1),
    (re.compile(r"<(\d)> , even though <(\d)>"), 0),
    (re.compile(r"<(\d)> , despite claims that <(\d)>"), 0),
]


def parse(sentence: str) -> Reading:
    """Value and (aspect, adjective) pairs of a sentence, read from its text alone."""
    clauses: list[Reading] = []

    def value(degree: str, adjective: str) -> float:
        return sentiment.ADJECTIVES[adjective] * sentiment.DEGREES[degree]

    def both(m: re.Match[str]) -> str:
        clauses.append((value(m[2], m[3]) + value(m[5], m[6]), {(m[1], m[3]), (m[4], m[6])}))
        return f"<{len(clauses) - 1}>"

    def clause(m: re.Match[str]) -> str:
        factor = (-0.8 if m[1] else 1) * (-0.7 if m[3] else 1)
        clauses.append((factor * value(m[4], m[5]), {(m[2], m[5])}))
        return f"<{len(clauses) - 1}>"

    skeleton = _CLAUSE.sub(clause, _BOTH.sub(both, sentence))
    if skeleton == "<0>":
        return clauses[0]
    for pattern, main in _CONTRASTS:
        if match := pattern.fullmatch(skeleton):
            first, second = clauses[int(match[1])], clauses[int(match[2])]
            (strong, pairs), (weak, more) = (second, first) if main else (first, second)
            return strong + 0.25 * weak, pairs | more
    raise AssertionError(f"not in the grammar: {sentence} -> {skeleton}")


@pytest.mark.parametrize("validation", [False, True])
def test_the_label_follows_from_the_parse(validation: bool) -> None:
    for row in sentiment.generate(3000, validation, seed=1):
        value, _ = parse(str(row["sentence"]))
        assert abs(value) > 0.29 and row["label"] == (value > 0), row


def test_no_validation_pair_occurs_in_training() -> None:
    def pairs(validation: bool) -> set[tuple[str, str]]:
        rows = sentiment.generate(1500, validation, seed=0)
        return set().union(*(parse(str(row["sentence"]))[1] for row in rows))

    train, validation = pairs(False), pairs(True)
    assert len(train) > 400 and len(validation) > 100
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
