"""A synthetic sentiment task, generated offline: compositional, so that counting words does not solve it.

A clause says something about an aspect ("the plot was very dull") and has a value, the adjective's polarity times its
strength. Constructions compose values: negation flips and weakens, contrast lets the main clause win, "not only ... but
also" does not flip, denied reports flip the whole clause. The label is the sign of the total. Every (aspect, adjective)
pair of the validation set is absent from training. Numbers on this task are synthetic: compare them with each other
only.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

ASPECTS = [
    "plot",
    "acting",
    "script",
    "dialogue",
    "soundtrack",
    "camera",
    "editing",
    "pacing",
    "ending",
    "humor",
    "cast",
    "direction",
    "lighting",
    "wardrobe",
    "story",
    "hero",
    "villain",
    "scenery",
    "opening",
    "finale",
    "romance",
    "action",
    "music",
    "drama",
]
POSITIVE = {
    "good": 1, "pleasant": 1, "solid": 1, "nice": 1, "charming": 2, "clever": 2, "engaging": 2, "moving": 2,
    "fresh": 2, "lovely": 2, "brilliant": 3, "superb": 3, "stunning": 3, "wonderful": 3, "masterful": 3,
}  # fmt: skip
NEGATIVE = {
    "bad": 1, "weak": 1, "flat": 1, "thin": 1, "dull": 2, "clumsy": 2, "tedious": 2, "messy": 2,
    "stale": 2, "boring": 2, "awful": 3, "dreadful": 3, "terrible": 3, "horrible": 3, "unbearable": 3,
}  # fmt: skip
ADJECTIVES = {**POSITIVE, **{word: -strength for word, strength in NEGATIVE.items()}}
DEGREES = {"": 1.0, "very ": 1.5, "really ": 1.5, "extremely ": 2.0, "somewhat ": 0.6, "slightly ": 0.4}
NEGATORS = ("not", "never", "hardly", "anything but", "far from")
DENIALS = ("nobody could say that", "it is simply untrue that", "i doubt that", "no one would claim that")


@dataclass(frozen=True)
class Phrase:
    """A piece of text, its value, and the (aspect, adjective) pairs in it."""

    text: str
    value: float
    pairs: tuple[tuple[str, str], ...]


def _clause(rng: random.Random, pairs: list[tuple[str, str]]) -> Phrase:
    aspect, adjective = rng.choice(pairs)
    degree, factor = rng.choice(list(DEGREES.items()))
    return Phrase(f"the {aspect} was {degree}{adjective}", ADJECTIVES[adjective] * factor, ((aspect, adjective),))


def _negated(rng: random.Random, pairs: list[tuple[str, str]]) -> Phrase:
    clause, negator = _clause(rng, pairs), rng.choice(NEGATORS)
    return Phrase(clause.text.replace(" was ", f" was {negator} ", 1), -0.7 * clause.value, clause.pairs)


def _denied(rng: random.Random, pairs: list[tuple[str, str]]) -> Phrase:
    clause = rng.choice((_clause, _negated))(rng, pairs)
    return Phrase(f"{rng.choice(DENIALS)} {clause.text}", -0.8 * clause.value, clause.pairs)


def _not_only(rng: random.Random, pairs: list[tuple[str, str]]) -> Phrase:
    first = _clause(rng, pairs)
    same = [p for p in pairs if (ADJECTIVES[p[1]] > 0) == (first.value > 0)]
    second = _clause(rng, same)
    text = f"not only {first.text.replace('the ', 'was the ', 1).replace(' was ', ' ', 1)} , but {second.text} too"
    return Phrase(text, first.value + second.value, first.pairs + second.pairs)


SIMPLE = (_clause, _negated, _denied, _not_only)


def _contrast(rng: random.Random, pairs: list[tuple[str, str]]) -> Phrase:
    """Two clauses; the main one weighs four times the conceded one."""
    main, conceded = rng.choice(SIMPLE)(rng, pairs), rng.choice(SIMPLE)(rng, pairs)
    text = rng.choice(
        (
            f"{conceded.text} , but {main.text}",
            f"although {conceded.text} , {main.text}",
            f"{main.text} , even though {conceded.text}",
            f"{main.text} , despite claims that {conceded.text}",
        )
    )
    return Phrase(text, main.value + 0.25 * conceded.value, main.pairs + conceded.pairs)


CONSTRUCTIONS = (_clause, _negated, _denied, _not_only, _contrast, _contrast, _contrast)
MARGIN = 0.3  # totals nearer to 0 have no clear label


def held_out(pair: tuple[str, str]) -> bool:
    """Whether an (aspect, adjective) pair belongs to validation: one in five, by a hash that never changes."""
    return hashlib.sha256(" ".join(pair).encode()).digest()[0] % 5 == 0


def generate(count: int, validation: bool, seed: int) -> list[dict[str, str | int]]:
    """`count` distinct sentences with label 0 (negative) or 1 (positive), balanced, deterministic by seed.

    Raises:
        ValueError: more sentences than the grammar yields.
    """
    rng = random.Random(f"{seed} {validation}")
    pairs = [pair for a in ASPECTS for adj in ADJECTIVES if held_out(pair := (a, adj)) == validation]
    wanted = {0: count // 2, 1: count - count // 2}
    seen: dict[str, int] = {}
    for _ in range(100 * count):
        phrase = rng.choice(CONSTRUCTIONS)(rng, pairs)
        label = int(phrase.value > 0)
        if abs(phrase.value) >= MARGIN and phrase.text not in seen and wanted[label]:
            seen[phrase.text] = label
            wanted[label] -= 1
            if not any(wanted.values()):
                break
    if any(wanted.values()):
        raise ValueError(f"the grammar yields fewer than {count} distinct sentences; ask for fewer")
    return [{"sentence": text, "label": label} for text, label in seen.items()]


def load(train: int = 8000, validation: int = 1000, seed: int = 0) -> DatasetDict:
    """The task as a `DatasetDict` with columns `sentence` and `label` (0 negative, 1 positive)."""
    from datasets import Dataset, DatasetDict

    return DatasetDict(
        {
            "train": Dataset.from_list(generate(train, False, seed)),
            "validation": Dataset.from_list(generate(validation, True, seed)),
        }
    )
