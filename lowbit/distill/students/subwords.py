"""Optimal subwords and shared projections (Zhao et al. 2019, 1909.11687 v1): tiny models with a small vocabulary.

    L = MLM_s + MLM_t + eps L_p        L_p = sum over tensors ||U W_t V - W_s||^2 (down), or ||U W_s V - W_t||^2 (up)

The student has a vocabulary of its own (`segmentation.learn_wordpiece`) and as many layers as the teacher, each
narrower. The teacher is trained beside it, on words of both vocabularies, mixed at random: one table and
one softmax for each. U and V are shared by all layers, one pair between blocks and one inside of FFNs, and thrown away.

No code was published, and of the paper's text only notes were at hand: p_DT 0.5, eps 1, widths 48, 96, 192, LAMB.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from . import Built, copies
from .segmentation import IGNORED, masked, mixed
from .sides import Sides

_BIAS = "cls.predictions.bias"


class DualVocabulary(nn.Module):
    """Student, teacher, and the projections between them; called with a batch of `BothSegmentations`.

    Attributes:
        words, words_bias: the student's pieces in the teacher: a table [V_s, D] and the biases of their softmax.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, words: torch.Tensor, masks: tuple[int, int],
        share: float, mask_probability: float, weights: dict[str, float], up: bool, reduction: str, detach: str | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes, self.masks = (len(words), teacher.config.vocab_size), masks
        self.share, self.mask_probability = share, mask_probability
        self.student, self.teacher = student, teacher
        self.words, self.words_bias = nn.Parameter(words), nn.Parameter(words.new_zeros(len(words)))
        self.weights, self.up, self.reduction, self.detach = weights, up, reduction, detach
        sides = Sides(student, teacher)
        own = dict(student.named_parameters())
        taken = dict(teacher.named_parameters())
        self._table = next(name for name, each in own.items() if each is student.get_input_embeddings().weight)
        self._kinds = {
            name: sides.of(name, each.shape, (words if name == self._table else taken[name]).shape)
            for name, each in own.items()
            if name != _BIAS
        }
        self.projections = nn.ParameterDict()
        for kind, (small, large) in sides.sizes.items():
            if kind != "heads":  # one and the same inside of attention
                source, target = (small, large) if up else (large, small)
                self.projections[f"{kind}_left"] = nn.Parameter(torch.eye(target, source))
                self.projections[f"{kind}_right"] = nn.Parameter(torch.eye(source, target))

    def forward(
        self, input_ids: torch.Tensor, words: torch.Tensor, teacher_input_ids: torch.Tensor, teacher_words: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`loss`, a float scalar; columns [B, S] of `BothSegmentations`."""
        own, taught = self.sizes
        ids, labels = masked(input_ids, words, self.mask_probability, self.masks[0], own, (own, own))
        batch = {
            "input_ids": input_ids, "words": words,
            "teacher_input_ids": teacher_input_ids, "teacher_words": teacher_words,
        }  # fmt: skip
        chosen = torch.rand(len(words), int(words.max()) + 1, device=words.device) < self.share
        joint, joint_words = mixed(batch, chosen, taught)
        joint, joint_labels = masked(joint, joint_words, self.mask_probability, self.masks[1], taught, (taught, own))
        losses = {
            "student": self._predict_student(ids, words >= 0, labels),
            "teacher": self._predict_teacher(joint, joint_words >= 0, joint_labels),
            "projection": self.projection_loss(),
        }
        return {"loss": sum(self.weights[name] * each for name, each in losses.items())}  # type: ignore[dict-item]

    def _predict_student(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.student(input_ids=ids, attention_mask=mask).logits
        return _mean_over_predicted(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"), labels)

    def _predict_teacher(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each predicted piece within its own vocabulary; ids and labels are joint."""
        teacher: Any = self.teacher
        table = teacher.get_input_embeddings().weight
        embedded = F.embedding(ids, torch.cat((table, self.words)))
        states = teacher.bert(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        chosen = labels != IGNORED
        states, wanted = teacher.cls.predictions.transform(states[chosen]), labels[chosen]
        first, own = len(table), wanted >= len(table)
        losses = [
            F.cross_entropy(F.linear(states[~own], table, teacher.cls.predictions.bias), wanted[~own], reduction="sum"),
            F.cross_entropy(F.linear(states[own], self.words, self.words_bias), wanted[own] - first, reduction="sum"),
        ]
        return (losses[0] + losses[1]) / max(len(wanted), 1)

    def projection_loss(self) -> torch.Tensor:
        """L_p."""
        loss: Any = 0.0
        for source, target, kinds in self._pairs():
            difference = (self._projected(source, kinds) - target).square()
            loss = loss + (difference.sum() if self.reduction == "sum" else difference.mean())
        return loss

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[str | None, ...]]]:
        """(source, target, kinds of axes) of every tensor: biases of the words' softmax are of no width."""
        own, taken = dict(self.student.named_parameters()), dict(self.teacher.named_parameters())
        yield from (self._directed(each, self.words_bias, (None,)) for name, each in own.items() if name == _BIAS)
        for name, kinds in self._kinds.items():
            yield self._directed(own[name], self.words if name == self._table else taken[name], kinds)

    def _directed(self, own: torch.Tensor, taught: torch.Tensor, kinds: tuple[str | None, ...]) -> Any:
        own = own.detach() if self.detach == "student" else own
        taught = taught.detach() if self.detach == "teacher" else taught
        return (own, taught, kinds) if self.up else (taught, own, kinds)

    def _projected(self, source: torch.Tensor, kinds: tuple[str | None, ...]) -> torch.Tensor:
        names = [{"heads": "hidden"}.get(kind or "", kind) for kind in kinds]
        if names[0] is not None:
            source = self.projections[f"{names[0]}_left"] @ source
        return source if len(names) == 1 or names[1] is None else source @ self.projections[f"{names[1]}_right"]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Decoders share weights with tables, which files of tensors cannot say: they get copies, and read them."""
        state, seen = super().state_dict(*args, **kwargs), set()
        for name, tensor in state.items():
            if tensor.data_ptr() in seen:
                state[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        return state


def _mean_over_predicted(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean where there is a label; 0 where a batch has none."""
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


def build(
    teacher: PreTrainedModel,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    hidden: int = 48,
    heads: int = 12,
    intermediate: int | None = None,
    share: float = 0.5,
    mask_probability: float = 0.15,
    direction: str = "down",
    eps: float = 1.0,
    student_weight: float = 1.0,
    teacher_weight: float = 1.0,
    reduction: str = "sum",
    detach: str | None = None,
    seed: int = 0,
) -> Built:
    """Student and teacher in one module with its own loss, for `Trainer`; `finish` gives the student.

    Train it on rows of text with `BothSegmentations` as collator, and `remove_unused_columns=False`.

    Args:
        teacher: float BertForMaskedLM; a copy of it is trained.
        student_tokenizer: of `learn_wordpiece`; saved with the student.
        teacher_tokenizer: the teacher's.
        hidden, heads, intermediate: the student's sizes; None: four times `hidden`. It has the teacher's depth.
        share: p_DT, the probability of a word to be in the student's pieces on the teacher's side.
        mask_probability: of a token to be predicted, on either side.
        direction: "down" projects the teacher's tensors (the better one as published), "up" the student's.
        eps, student_weight, teacher_weight: weights of L_p, MLM_s, MLM_t.
        reduction: of each tensor in L_p: "sum" (published), or "mean", which does not grow with the teacher.
        detach: which side gets no gradient of L_p: None (published: both do), "teacher" or "student".
        seed: of the student's random weights. Pieces that the teacher has begin as the first `hidden` numbers of its
            rows; in the teacher, pieces that it does not have begin as the mean of its own of that string.

    Raises:
        TypeError, ValueError: as `copies.random`; another model; another direction, reduction or detach point; a
            probability outside [0, 1].
    """
    if not isinstance(teacher, BertForMaskedLM):
        raise ValueError(f"the teacher is a {type(teacher).__name__}; a BertForMaskedLM is needed, which both predict")
    for name, value, accepted in (
        ("direction", direction, ("down", "up")),
        ("reduction", reduction, ("sum", "mean")),
        ("detach", detach, (None, "teacher", "student")),
    ):
        if value not in accepted:
            raise ValueError(f"{name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
    for name, probability in (("share", share), ("mask_probability", mask_probability)):
        if not 0 <= probability <= 1:
            raise ValueError(f"{name}={probability}; accepted: 0 to 1")
    student: Any = copies.random(
        teacher,
        teacher.config.num_hidden_layers,
        hidden,
        heads,
        4 * hidden if intermediate is None else intermediate,
        seed,
        vocab_size=len(student_tokenizer),
        pad_token_id=student_tokenizer.pad_token_id,
    ).model
    table = teacher.get_input_embeddings().weight.detach()
    words, shared = _words_in(table, student_tokenizer, teacher_tokenizer)
    with torch.no_grad():
        student.get_input_embeddings().weight[shared] = words[shared, :hidden]
    weights = {"student": student_weight, "teacher": teacher_weight, "projection": eps}
    model = DualVocabulary(
        student, copy.deepcopy(teacher), words, (student_tokenizer.mask_token_id, teacher_tokenizer.mask_token_id),
        share, mask_probability, weights, direction == "up", reduction, detach,
    )  # fmt: skip
    return Built(model.eval(), finish=_finish)


def _words_in(
    table: torch.Tensor, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, list[int]]:
    """The student's pieces as rows of the teacher's width, and which of them the teacher has."""
    known, words, shared = teacher.get_vocab(), table.new_zeros(len(student), table.shape[1]), []
    for piece, row in student.get_vocab().items():
        if piece in known:
            shared.append(row)
        ids = (
            [known[piece]]
            if piece in known
            else teacher(piece.removeprefix("##"), add_special_tokens=False)["input_ids"]
        )
        if ids:
            words[row] = table[ids].mean(0)
    return words, sorted(shared)


def _finish(model: DualVocabulary) -> Any:
    return model.student.eval()
