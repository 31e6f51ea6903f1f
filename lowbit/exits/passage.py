"""One forward pass by the exits of a model: who has left, where, and with which answer.

Made by a hook before the model runs, handed to its encoder as a keyword, read by a hook afterwards. So nothing of a
call is kept in the model, and threads may share it.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import torch

from ..nn.unpadded.leaving import staying
from ..nn.unpadded.pruning import Kept
from ..nn.unpadded.sequences import Sequences
from .criteria import Criterion, Memory
from .ramps import Answer, Ramps, pooler_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Passage:
    """The exits of one forward pass (`lowbit.nn.unpadded.leaving.Exits`).

    Args:
        model: with ramps.
        criterion: says who leaves; None: nobody, and all answers are kept.
    """

    def __init__(self, model: PreTrainedModel, criterion: Criterion | None) -> None:
        self.ramps: Ramps = model.exits  # type: ignore[assignment]
        self.criterion = criterion
        self.layers = self.ramps.layers
        self.last: int = model.config.num_hidden_layers
        self.pooler = pooler_of(model) if self.ramps.kind == "shared" else None
        self.answers: list[Answer] = []  # of all ramps, where there is no criterion
        self.rows: torch.Tensor | None = None  # int64 [B'] of the batch, still here; None: all
        self.left: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # layer, rows, logits
        self.labels: torch.Tensor | None = None  # of the call; compared with the answers in the end
        self._memory: Memory = None
        self._starts: torch.Tensor | None = None  # of the sequences that are here, int32 [B' + 1] on the host
        self._size = 0

    def following(self, done: int) -> int:
        place = bisect.bisect_right(self.layers, done)
        return self.layers[place] if place < len(self.layers) else self.last

    def after(self, layer: int, tokens: torch.Tensor, sequences: Sequences) -> Kept | None:
        if layer not in self.layers:
            return None
        if self._starts is None:
            self._starts = sequences.cu_seqlens.cpu() if sequences.host is None else sequences.host
            self._size = len(self._starts) - 1
        answer: Answer = self.ramps[str(layer)](tokens, sequences, self.pooler, self.ramps.certainty_head)
        if self.criterion is None:
            self.answers.append(answer)
            return None
        wrong = None if answer.wrong is None else answer.wrong.float().sigmoid()
        leaves, memory = self.criterion(answer.logits.float(), wrong, self._memory)
        if not leaves.any():
            self._memory = memory
            return None
        rows = torch.arange(self._size, device=leaves.device) if self.rows is None else self.rows
        self.left.append((layer, rows[leaves], answer.logits[leaves]))
        here = ~leaves
        self.rows, self._memory = rows[here], None if memory is None else memory[here]
        kept = staying(here.cpu(), self._starts, tokens.device)
        self._starts = kept.sequences.host
        return kept

    def look(self, layer: int, tokens: torch.Tensor, sequences: Sequences) -> None:
        if layer not in self.layers or (self.rows is not None and not len(self.rows)):
            return
        if self.rows is not None:
            stay = torch.zeros(self._size, dtype=torch.bool)
            stay[self.rows.cpu()] = True
            host = sequences.cu_seqlens.cpu() if sequences.host is None else sequences.host
            kept = staying(stay, host, tokens.device)
            tokens, sequences = tokens[kept.rows], kept.sequences
        self.after(layer, tokens, sequences)

    def stayed(self) -> torch.Tensor | None:
        return self.rows

    def exit_logits(self) -> torch.Tensor:
        """[ramps, B, C], where there is no criterion."""
        return torch.stack([answer.logits for answer in self.answers])

    def exit_wrong(self) -> torch.Tensor | None:
        """[ramps, B] logits of the answers being wrong, where there is a certainty head."""
        wrong: list[Any] = [answer.wrong for answer in self.answers]
        return None if wrong[0] is None else torch.stack(wrong)

    def answered(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers that were given, [B, C], and the layer of each row, int64 [B].

        Args:
            logits: of the model's own head: [B', C] of the rows that stayed, or [B, C] where it saw all.
        """
        if self.rows is None:
            return logits, torch.full((len(logits),), self.last, device=logits.device)
        answers = logits.new_empty(self._size, logits.shape[1])
        layers = torch.full((self._size,), self.last, device=logits.device)
        answers[self.rows] = logits if len(logits) == len(self.rows) else logits[self.rows]
        for layer, rows, own in self.left:
            answers[rows] = own.to(logits.dtype)
            layers[rows] = layer
        return answers, layers
