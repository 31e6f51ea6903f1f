"""A WordPiece vocabulary learned on a task's texts, and batches that mix it with the teacher's, word by word.

(Zhao et al. 2019, 1909.11687: each word of the teacher's text is segmented with the student's vocabulary with
probability p_DT; the student always sees its own segmentation.)
"""

from __future__ import annotations

import tempfile
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
    """BERT's tokenizer with a vocabulary of at most `size` pieces, learned on some texts.

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
    learner.train_from_iterator(
        texts, vocab_size=size, min_frequency=min_frequency, special_tokens=[*SPECIAL], show_progress=False
    )
    vocabulary = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    if len(vocabulary) <= len(SPECIAL):
        raise ValueError("the texts have no letters to learn pieces from; give the training texts")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary[:size]), encoding="utf-8")
        return BertTokenizerFast.from_pretrained(folder, do_lower_case=lowercase)


@dataclass
class DualMasking:
    """Collator: rows with a text become masked batches of both vocabularies.

    Ids on the teacher's side are joint ones: its own, then the student's, which begin at the teacher's vocabulary size.
    What is predicted is of the vocabulary that the label is of. Random numbers are torch's own.

    Args:
        student, teacher: BERT's tokenizers, both with or without lower case.
        teacher_size: rows of the teacher's table of words.
        share: p_DT, the probability of a word on the teacher's side to be segmented with the student's vocabulary.
        mask_probability: of a token to be predicted; 80 % of these become [MASK], 10 % another piece.
        max_length: tokens of either side, with [CLS] and [SEP].
        column: where the text is.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    teacher_size: int
    share: float = 0.5
    mask_probability: float = 0.15
    max_length: int = 128
    column: str = "text"
    _pieces: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("share", "mask_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; accepted: 0 to 1")
        if self.max_length < 3:
            raise ValueError(f"max_length={self.max_length}; accepted: at least 3, since [CLS] and [SEP] are two")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Columns input_ids, attention_mask, labels [B, S], and teacher_input_ids, ... [B, S'] of joint ids."""
        own, mixed = zip(*(self.segment(row[self.column]) for row in rows), strict=True)
        size = len(self.student)
        student = self._masked(own, self.student.mask_token_id, lambda ids: torch.randint_like(ids, size))

        def another(ids: torch.Tensor) -> torch.Tensor:  # of the same vocabulary
            theirs = torch.randint_like(ids, len(self.teacher))
            return torch.where(ids < self.teacher_size, theirs, self.teacher_size + torch.randint_like(ids, size))

        teacher = self._masked(mixed, self.teacher.mask_token_id, another)
        return {**student, **{f"teacher_{name}": each for name, each in teacher.items()}}

    def segment(self, text: str) -> tuple[list[int], list[int]]:
        """The student's ids of a text, and the joint ids of the mixture that the teacher reads."""
        own, mixed = [self.student.cls_token_id], [self.teacher.cls_token_id]
        words = self._words(text)
        chosen = torch.rand(len(words)) < self.share
        for word, of_student in zip(words, chosen.tolist(), strict=True):
            if word not in self._pieces:
                both = self.student, self.teacher
                pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for tokenizer in both]
                self._pieces[word] = pieces[0], pieces[1]
            pieces_of_student, pieces_of_teacher = self._pieces[word]
            own += pieces_of_student
            mixed += [self.teacher_size + i for i in pieces_of_student] if of_student else pieces_of_teacher
        end = self.max_length - 1
        return [*own[:end], self.student.sep_token_id], [*mixed[:end], self.teacher.sep_token_id]

    def _words(self, text: str) -> list[str]:
        """Words as both tokenizers see them: normalized, then parted at spaces and punctuation."""
        backend: Any = self.teacher.backend_tokenizer  # type: ignore[attr-defined]
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]

    def _masked(self, sequences: Sequence[list[int]], mask: int, another: Any) -> dict[str, torch.Tensor]:
        longest = max(map(len, sequences))
        ids, real = torch.zeros(len(sequences), longest, dtype=torch.long), torch.zeros(len(sequences), longest)
        inner = real.bool()  # all but [CLS] and [SEP]
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            real[row, : len(sequence)] = 1
            inner[row, 1 : len(sequence) - 1] = True
        predicted = inner & (torch.rand(ids.shape) < self.mask_probability)
        how = torch.rand(ids.shape)
        labels = ids.masked_fill(~predicted, IGNORED)
        changed = torch.where(predicted & (how < 0.8), mask, ids)
        changed = torch.where(predicted & (how >= 0.9), another(ids), changed)
        return {"input_ids": changed, "attention_mask": real.long(), "labels": labels}
