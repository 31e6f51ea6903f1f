"""Augmentation by rules: rates, classes, pieces, pairs, duplicates, cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from lowbit.distill.augment import Rules, augment

TEXT = " ".join(f"w{i}" for i in range(12))


def made(method: Rules, *rows: tuple[str, ...], seed: int = 0) -> list[list[tuple[str, ...]]]:
    return method(rows, seed, None)


def test_words_are_masked_at_the_rate_and_stay_in_place() -> None:
    (copies,) = made(Rules(piece=0, copies=2000), (TEXT,))
    words = np.array([copy.split() for (copy,) in copies])
    masked = words == "[MASK]"
    assert (masked | (words == TEXT.split())).all() and len(set(copies)) == len(copies)
    first = [made(Rules(piece=0, copies=1), (TEXT,), seed=seed)[0] for seed in range(2000)]
    share = np.mean([copies[0][0].count("[MASK]") if copies else 0 for copies in first]) / 12
    assert abs(share - 0.1) < 0.008  # 4 standard errors


def test_other_words_are_of_the_same_class_and_as_frequent() -> None:
    def tag(words: list[str]) -> list[str]:
        return [word[0] for word in words]

    rows = [("a1 b1",), ("a2 b2 a2 a2",), ("c1",)]
    method = Rules(mask=0, word=1, piece=0, copies=200, tag=tag)
    copies = [copy for new in made(method, *rows) for (copy,) in new]
    assert copies and all([word[0] for word in copy.split()] in (["a", "b"], list("abaa")) for copy in copies)
    starts = [made(Rules(0, 1, 0, copies=1, tag=tag), ("a1 b1",), rows[1], seed=s)[0] for s in range(600)]
    share = np.mean([copies[0][0].startswith("a2") if copies else False for copies in starts])
    assert abs(share - 0.75) < 0.08  # three of four words of class a; 4.5 standard errors
    assert made(Rules(mask=0, word=1, piece=0), *rows) == [[], [], []]  # no tagger


def test_pieces_are_windows_of_every_place_and_length() -> None:
    (copies,) = made(Rules(mask=0, piece=1, copies=3000), (TEXT,))
    words = TEXT.split()
    windows = {" ".join(words[i : i + n]) for n in range(1, 6) for i in range(12 - n + 1)}
    assert {copy for (copy,) in copies} == windows
    assert made(Rules(mask=0, piece=1, copies=50, lengths=[5]), ("one two",)) == [[]]  # is the text itself


def test_of_pairs_either_text_changes_or_both() -> None:
    rows = [(f"a{i} b{i} c{i} d{i}", f"e{i} f{i} g{i} h{i}") for i in range(900)]
    kinds = {(True, False): 0, (False, True): 0, (True, True): 0}
    for row, new in zip(rows, made(Rules(mask=0.9, piece=0, copies=1), *rows), strict=True):
        for copy in new:
            kinds[copy[0] != row[0], copy[1] != row[1]] += 1
    # Texts with all words masked are dropped: (1 - 0.9^4) of each changed text stays.
    left = 1 - 0.9**4
    expected = np.array([300 * left, 300 * left, 300 * left**2])
    assert (abs(np.array(list(kinds.values())) - expected) < 5 * np.sqrt(expected)).all()
    assert len(made(Rules(mask=0.5), (TEXT, TEXT))[0]) <= 10 < len(made(Rules(mask=0.5), (TEXT,))[0])


def test_no_copy_is_a_row_or_another_copy_or_without_words() -> None:
    rows = [("the film is good",), ("film  is",), ("good",), ("",), ("the film is good",)]
    copies = [copy for new in made(Rules(mask=0.3, piece=0.5, copies=200), *rows) for copy in new]
    assert len(copies) == len(set(copies)) and not {("film is",), ("good",), ("the film is good",)} & set(copies)
    assert all(set(copy.split()) - {"[MASK]"} for (copy,) in copies)


def test_augmented_data_is_the_same_with_and_without_files(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": [f"{TEXT} {i}" for i in range(20)], "label": [0.5] * 20})
    whole = augment(data, ["text"], Rules(), seed=3)
    for _ in range(2):
        assert augment(data, ["text"], Rules(), seed=3, cache=tmp_path)[:] == whole[:]
    assert augment(data, ["text"], Rules(mask_word="<unk>"), seed=3, cache=tmp_path)[:] != whole[:]
    assert len(list(tmp_path.glob("*/*.json"))) == 2 and 200 < len(whole) <= 420


@pytest.mark.parametrize(
    "fields", [{"mask": -0.1}, {"mask": 0.6, "word": 0.6}, {"piece": 2}, {"copies": 0}, {"lengths": [0]}]
)
def test_wrong_fields_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match="accepted"):
        Rules(**fields)


def test_a_tagger_that_loses_words_is_refused() -> None:
    with pytest.raises(ValueError, match="2 classes for 12 words"):
        made(Rules(tag=lambda _: ["a", "b"]), (TEXT,))
