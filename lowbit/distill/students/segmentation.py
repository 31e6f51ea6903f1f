"""A WordPiece vocabulary learned on a task's texts, and texts in which it is mixed with the teacher's, word by word.

(Zhao et al. 2019, 1909.11687: each word of the teacher's text is segmented with the student's vocabulary with
probability p_DT; the student always sees its own segmentation.)

The collator draws nothing: batches are made ahead of their step, and a run that resumes would draw others.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

IGNORED = -100  # labels of what is not predicted
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def learn_wordpiece(
    texts: Iterable[str], size: int = 5000, lowercase: bool = True, min_frequency: int = 2
) -> BertTokenizerFast:
    """BERT's tokenizer with a vocabulary of at most `size` pieces, learned on some texts: of the same ones the same.

    Args:
        texts: the training texts.
        size: published 4928.
        lowercase: as the teacher's tokenizer.
        min_frequency: of a pair of pieces that is joined.

    Raises:
        ValueError: a size that leaves no room beside the special tokens, or texts without a letter.
    """
    if size <= len(SPECIAL):
        raise ValueError(f"size={size}; accepted: more than the {len(SPECIAL)} special tokens")
    learner = BertWordPieceTokenizer(lowercase=lowercase)
    texts = [*texts]
    inside = _inside(texts, learner)
    # Pieces inside of words are numbered as a hash table has the words, anew each time, and pairs that are as frequent
    # are joined by their numbers: unless they have numbers before.
    learner.train_from_iterator(
        iter(texts),
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL, *(f"##{letter}" for letter in inside)],
        show_progress=False,
    )
    vocabulary = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    if len(vocabulary) <= len(SPECIAL):
        raise ValueError("the texts have no letters to learn pieces from; give the training texts")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary[:size]), encoding="utf-8")
        return BertTokenizerFast.from_pretrained(folder, do_lower_case=lowercase)


def _inside(texts: Iterable[str], learner: BertWordPieceTokenizer, limit: int = 1000) -> list[str]:
    """Letters that stand inside of words, sorted; of more than `limit`, the trainer's own limit, the most frequent."""
    found: Counter[str] = Counter()
    for text in texts:
        for word, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(text)):
            found.update(word[1:])
    return sorted(sorted(found, key=lambda letter: (-found[letter], letter))[:limit])


@dataclass
class BothSegmentations:
    """Collator: texts, word by word in the pieces of both vocabularies. Nothing is drawn here.

    A text ends with the last word for which there is room however words are mixed, so both sides hold the same words.

    Args:
        student, teacher: BERT's tokenizers, both with or without lower case.
        max_length: tokens at most, with [CLS] and [SEP].
        column: where the text is.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    max_length: int = 128
    column: str = "text"
    _pieces: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise ValueError(f"max_length={self.max_length}; accepted: at least 3, since [CLS] and [SEP] are two")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, words [B, S] and teacher_input_ids, teacher_words [B, S']: ids, and which word each is of.

        [CLS] is word 0, [SEP] the one after the last, padding -1.
        """
        texts = [self._segment(row[self.column]) for row in rows]
        batch = {}
        for side, (tokenizer, prefix) in enumerate(((self.student, ""), (self.teacher, "teacher_"))):
            sequences = []
            for text in texts:
                pieces = [[tokenizer.cls_token_id], *(word[side] for word in text), [tokenizer.sep_token_id]]
                sequences.append([(i, place) for place, word in enumerate(pieces) for i in word])
            longest = max(map(len, sequences))
            padded = [
                [*sequence, *[(tokenizer.pad_token_id, -1)] * (longest - len(sequence))] for sequence in sequences
            ]
            batch[f"{prefix}input_ids"], batch[f"{prefix}words"] = torch.tensor(padded).unbind(-1)
        return batch

    def _segment(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(pieces of the student, of the teacher) of each word, as the teacher's tokenizer parts words."""
        backend: Any = self.teacher.backend_tokenizer  # type: ignore[attr-defined]
        found, room = [], self.max_length - 2
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
            if word not in self._pieces:
                both = self.student, self.teacher
                own, taught = (tokenizer(word, add_special_tokens=False)["input_ids"] for tokenizer in both)
                self._pieces[word] = own, taught
            room -= max(map(len, self._pieces[word]))
            if room < 0:
                break
            found.append(self._pieces[word])
        return found


def mixed(batch: Mapping[str, torch.Tensor], chosen: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the teacher reads: chosen words in the student's pieces, the others in its own.

    Args:
        batch: of `BothSegmentations`.
        chosen: bool [B, words], by word; [CLS] and [SEP] are the teacher's in any case.
        first: id of the student's first piece on the teacher's side, whose ids are joint.

    Returns:
        ids and words [B, S], as of the batch.
    """
    ids = torch.cat((batch["input_ids"] + first, batch["teacher_input_ids"]), 1)
    words = torch.cat((batch["words"], batch["teacher_words"]), 1)
    own = torch.arange(ids.shape[1], device=ids.device) < batch["input_ids"].shape[1]
    kept = (chosen.gather(1, words.clamp(min=0)) & inner(words)) == own
    kept &= words >= 0
    order = torch.where(kept, words, words.max() + 1).argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
    kept = kept.gather(1, order)
    return ids.gather(1, order).masked_fill(~kept, 0), words.gather(1, order).masked_fill(~kept, -1)


def inner(words: torch.Tensor) -> torch.Tensor:
    """Which tokens [B, S] are neither [CLS], [SEP] nor padding."""
    return (words > 0) & (words < words.amax(1, keepdim=True))


def masked(
    ids: torch.Tensor, words: torch.Tensor, probability: float, mask: int, first: int, sizes: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking: of the tokens to predict 80 % become [MASK], 10 % another piece of their own vocabulary.

    Args:
        ids, words: [B, S]; ids from `first` on are of a second vocabulary.
        probability: of a token to be predicted.
        mask: id of [MASK].
        sizes: of the vocabularies.

    Returns:
        changed ids and labels [B, S], -100 where nothing is predicted. Random numbers are torch's own.
    """
    predicted = inner(words) & (torch.rand(ids.shape, device=ids.device) < probability)
    how = torch.rand(ids.shape, device=ids.device)
    other = torch.where(ids < first, torch.randint_like(ids, sizes[0]), first + torch.randint_like(ids, sizes[1]))
    changed = torch.where(predicted & (how < 0.8), mask, ids)
    return torch.where(predicted & (how >= 0.9), other, changed), ids.masked_fill(~predicted, IGNORED)
