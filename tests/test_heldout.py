"""Held-out examples share no text with training: each word-for-word containment, by the definition and on real data."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lowbit.data.containment import occurrences, overlapping, whole, words
from lowbit.data.tasks import get_task, load_task
from lowbit.recipes import RecipeError
from lowbit.recipes.data import held_out

DATA = Path(__file__).parents[2] / "shared/data"
SST2 = get_task("sst2")
PHRASES = [
    "a gorgeous , witty film",  # 0, whole
    "gorgeous , witty",  # 1
    "Witty",  # 2
    "the plot is thin and the film  is dull",  # 3, whole
    "plot is thin",  # 4
    "is thin and  the",  # 5
    "thin the",  # 6, whole: these two words are not neighbours anywhere
    "film is",  # 7
    "a  Gorgeous, witty film",  # 8, whole, the same as 0
]


def places(piece: str, text: str) -> int:
    """By the definition."""
    a, b = words(piece), words(text)
    return sum(b[at : at + len(a)] == a for at in range(len(b) - len(a) + 1)) if a else 0


def shares(a: str, b: str) -> bool:
    return places(a, b) > 0 or places(b, a) > 0


# Few words, so that containment, overlaps and repetition are frequent; texts without a word too.
texts = st.lists(st.lists(st.sampled_from(["a", "b", "A", "c", ","]), max_size=6).map(" ".join), max_size=12)


@given(texts, texts)
def test_occurrences_are_those_of_the_definition(pieces: list[str], others: list[str]) -> None:
    counts, holds = occurrences(pieces, others)
    assert counts.tolist() == [sum(places(piece, other) for other in others) for piece in pieces]
    assert holds.tolist() == [any(places(piece, other) for piece in pieces) for other in others]
    assert overlapping(pieces, others).tolist() == [any(shares(p, other) for other in others) for p in pieces]


@given(st.lists(st.tuples(*[st.sampled_from(["a", "a b", "b", "a b a b", "b c a", "", "a b c"])] * 2), max_size=8))
def test_whole_rows_stand_inside_no_other_row(rows: list[tuple[str, str]]) -> None:
    def inside_another(text: str, row: tuple[str, str]) -> bool:
        longer = {tuple(words(other)) for other in row}
        others = (other for pair in rows for other in pair if tuple(words(other)) not in longer)
        return any(places(text, other) for other in others)

    expected = [all(words(text) and not inside_another(text, row) for text in row) for row in rows]
    assert whole(rows).tolist() == expected


def test_texts_of_hundreds_of_words_are_compared_to_the_end() -> None:
    long = [f"w{i}" for i in range(700)]
    other = [*long[:699], "end"]
    pieces = [" ".join(long), " ".join(long[1:699]), " ".join(long[5:])]
    assert occurrences(pieces, [" ".join(other)])[0].tolist() == [0, 1, 0]
    assert whole([(text,) for text in pieces]).tolist() == [True, False, False]


def phrases(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"sentence": texts, "label": [i % 2 for i in range(len(texts))], "idx": range(len(texts))})


def test_whole_phrases_are_held_out_and_parts_of_them_dropped(caplog: pytest.LogCaptureFixture) -> None:
    data = phrases(PHRASES)
    assert np.flatnonzero(whole([(text,) for text in PHRASES])).tolist() == [0, 3, 6, 8]
    seen = set()
    for seed in range(20):
        with caplog.at_level(logging.INFO, "lowbit"):
            train, held = held_out(data, SST2, 1, seed)
        assert held_out(data, SST2, 1, seed)[1]["idx"][:] == held["idx"][:]
        (row,) = held["idx"]
        left = {0: [3, 4, 5, 6, 7], 8: [3, 4, 5, 6, 7], 3: [0, 1, 2, 6, 8], 6: [0, 1, 2, 3, 4, 5, 7, 8]}[row]
        assert train["idx"][:] == left
        dropped = len(PHRASES) - 1 - len(left)
        assert f"1 examples held out, {dropped} dropped from training" in caplog.messages[-1]
        seen.add(row)
    assert seen == {0, 3, 6, 8}


@given(texts, st.integers(1, 4), st.integers(0, 99))
def test_no_training_text_holds_or_stands_in_a_held_out_one(texts: list[str], count: int, seed: int) -> None:
    data = phrases(texts)
    try:
        train, held = held_out(data, SST2, count, seed)
    except RecipeError:
        return
    assert len(held) == count and len(train)
    assert not any(shares(a, b) for a in train["sentence"] for b in held["sentence"])
    dropped = set(range(len(texts))) - set(train["idx"]) - set(held["idx"])
    assert all(any(shares(texts[row], b) for b in held["sentence"]) for row in dropped)


def test_of_a_pair_one_shared_text_is_enough() -> None:
    rows = [("A dog runs .", "an animal moves"), ("a dog runs.", "it sleeps"), ("the cat", "An  animal moves"),
            ("the cat", "a cat"), ("fish swim", "dog runs")]  # fmt: skip
    first, second = zip(*rows, strict=True)
    data = Dataset.from_dict({"sentence1": first, "sentence2": second, "label": [0] * 5, "idx": range(5)})
    assert whole(rows).tolist() == [True, True, True, True, False]
    for seed in range(30):
        train, held = held_out(data, get_task("mrpc"), 1, seed)
        if held["idx"][0] == 0:
            assert train["idx"][:] == [3]  # 1 has the first text, 2 the second, 4 a part of the first
            return
    raise AssertionError("row 0 was never held out")


def test_more_than_there_are_and_nothing_left_are_clear_errors() -> None:
    with pytest.raises(RecipeError, match="heldout=5: 4 of 9 training examples stand inside no other; accepted: at mo"):
        held_out(phrases(PHRASES), SST2, 5)
    with pytest.raises(RecipeError, match="leaves no training example"):
        held_out(phrases(["a b", "a", "b"]), SST2, 1)


@pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason="needs SST-2")
def test_sst2_keeps_most_phrases() -> None:
    data = load_task("sst2", DATA)["train"]
    begin = time.perf_counter()
    train, held = held_out(data, SST2, 2000)
    assert time.perf_counter() - begin < 60  # seconds on an idle machine
    assert len(held) == 2000 and 44_000 < len(train) < 48_000
    assert not set(map(str.lower, train["sentence"])) & set(map(str.lower, held["sentence"]))
    haystack = " \n ".join(" ".join(words(text)) for text in held["sentence"])  # another way to look
    sample = train.shuffle(seed=0).select(range(3000))["sentence"]
    assert not any(f" {' '.join(words(text))} " in f" {haystack} " for text in sample if words(text))
