"""Augmentation by rules, without a model: for students whose words are not a teacher's tokens (1903.12136, 3.3)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cache import chunked, fingerprint, flat

Row = tuple[str, ...]
Tagged = list[tuple[str, str]]  # words and their classes


@dataclass
class Rules:
    """Words masked or replaced by others of their class, then perhaps only a piece of the text: a method of `augment`.

    Each word, split at spaces, is masked with probability `mask`, else with probability `word` becomes a random word of
    its class, as frequent ones as there are. Then with probability `piece` only 1 to 5 words in a row are kept. Of a
    pair a copy changes the first text, the second, or both, each in a third of the copies.

    Args:
        mask, word: published 0.1 each.
        piece: published 0.25; the code's default is 0.
        lengths: of pieces, each as likely as the others; a shorter text stays whole.
        copies: published 20, of pairs 10 (None). What is equal to any row of the data or to another copy is dropped,
            and what has no word left.
        tag: words of a text -> a class for each, as parts of speech of nltk or spacy: `lambda words: [tag for _, tag
            in nltk.pos_tag(words)]`. None: no word is replaced, since there is no tagger in lowbit.
        mask_word: as the teacher's tokenizer writes it.

    Raises:
        ValueError: probabilities that are none, or fewer than one copy or word.
    """

    mask: float = 0.1
    word: float = 0.1
    piece: float = 0.25
    lengths: Sequence[int] = (1, 2, 3, 4, 5)
    copies: int | None = None
    tag: Callable[[list[str]], list[str]] | None = None
    mask_word: str = "[MASK]"

    def __post_init__(self) -> None:
        if min(self.mask, self.word, self.piece) < 0 or self.mask + self.word > 1 or self.piece > 1:
            raise ValueError(
                f"Rules: mask={self.mask}, word={self.word}, piece={self.piece}; accepted: 0 to 1, also mask + word"
            )
        if self.copies is not None and self.copies < 1:
            raise ValueError(f"Rules: copies={self.copies}; accepted: 1 or more, or None for 20 (pairs: 10)")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"Rules: lengths={self.lengths}; accepted: numbers of words from 1 on")

    def __call__(self, rows: Sequence[Row], seed: int, cache: Path | None) -> list[list[Row]]:
        """Copies of each row of texts."""
        texts = list(dict.fromkeys(text for row in rows for text in row))
        tagged = {text: self._tagged(text) for text in texts}
        classes: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            for text in row:
                for word, name in tagged[text]:
                    classes[name].append(word)

        def copy(some: Sequence[Row], start: int) -> list[list[Row]]:
            return [
                self._copies(row, tagged, classes, random.Random(f"{seed} {start + i}")) for i, row in enumerate(some)
            ]

        fields = [self.mask, self.word, self.piece, [*self.lengths], self.copies, self.mask_word, self.tag is not None]
        key = fingerprint("rules", fields, seed, rows, [tagged[text] for text in texts])
        made = flat(chunked(rows, copy, folder=cache, key=key, size=4096, title="copies"))
        seen = {tuple(" ".join(text.split()) for text in row) for row in rows}
        fresh: list[list[Row]] = []
        for new in made:
            kept = [row for row in dict.fromkeys(map(tuple, new)) if row not in seen]
            seen.update(kept)
            fresh.append(kept)
        return fresh

    def _tagged(self, text: str) -> Tagged:
        words = text.split()
        tags = [""] * len(words) if self.tag is None else list(self.tag(words))
        if len(tags) != len(words):
            raise ValueError(f"Rules: tag gives {len(tags)} classes for {len(words)} words; one a word is needed")
        return list(zip(words, tags, strict=True))

    def _copies(
        self, row: Row, tagged: dict[str, Tagged], classes: dict[str, list[str]], rng: random.Random
    ) -> list[Row]:
        copies = self.copies or (20 if len(row) == 1 else 10)
        choices = [*((column,) for column in range(len(row))), *([tuple(range(len(row)))] if len(row) > 1 else [])]
        made = []
        for _ in range(copies):
            changed = rng.choice(choices)
            words = [
                self._changed(tagged[text], classes, rng) if column in changed else text.split()
                for column, text in enumerate(row)
            ]
            if all(set(some) - {self.mask_word} for some in words):
                made.append(tuple(map(" ".join, words)))
        return made

    def _changed(self, tagged: Tagged, classes: dict[str, list[str]], rng: random.Random) -> list[str]:
        words = []
        for word, name in tagged:
            roll = rng.random()
            if roll < self.mask:
                word = self.mask_word
            elif roll < self.mask + self.word and self.tag is not None:
                word = rng.choice(classes[name])
            words.append(word)
        if rng.random() < self.piece:
            length = min(rng.choice(self.lengths), len(words))
            start = rng.randint(0, len(words) - length)
            words = words[start : start + length]
        return words
