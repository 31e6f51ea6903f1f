"""MATE-KD: a generator rewrites tokens so that student and teacher differ, and the student learns there too.

Rashid et al. 2021 (arXiv 2105.05912), section 3. Of a text each token is masked with probability p; the generator, a
masked language model, fills in samples of its distribution, by Gumbel-softmax where it is trained:

    max over generator:  D(teacher(x'), student(x'))     min over student:  D(x') + D(x) + CE(x)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from .. import models
from .objectives import Batch, sizes_of


class MaskedGenerator(nn.Module):
    """A view (`lowbit.distill.views`): the batch with some tokens rewritten by a masked language model.

    Args:
        model: with a masked-LM head, of the vocabulary of student and teacher; trained where `On` says so.
        tokenizer: of all three; its special tokens are never rewritten.
        share: p, of tokens that are rewritten.
        temperature: of the Gumbel-softmax; samples are hard, gradients those of the soft ones (straight-through).

    Raises:
        ValueError: a share outside of (0, 1], a temperature that is not positive, a tokenizer without a mask token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, share: float = 0.3, temperature: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 < share <= 1 or not temperature > 0:
            raise ValueError(f"share={share}, temperature={temperature}; accepted: above 0, a share up to 1")
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer has no mask token, which a generator fills in; take another tokenizer")
        self.model, self.share, self.temperature = model, share, temperature
        self.mask_token_id = tokenizer.mask_token_id
        self.special: torch.Tensor
        self.register_buffer("special", torch.tensor(sorted(tokenizer.all_special_ids)), persistent=False)

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for another vocabulary than the models', or no teacher."""
        for model in (student, teacher):
            if model is None:
                raise ValueError("a generator looks for what student and teacher see differently; pass teacher=...")
            sizes = sizes_of("vocab_size", self.model, model)  # type: ignore[arg-type]
            if sizes is None or sizes[0] != sizes[1]:
                raise ValueError(
                    f"the generator has {self.model.config.vocab_size} tokens, {type(model).__name__} "
                    f"{getattr(model.config, 'vocab_size', 'none')}; all three have to share one tokenizer"
                )

    def forward(self, student: Any, teacher: Any, batch: Batch) -> tuple[Batch, Batch]:
        """Columns for student and teacher: without gradients token ids, else embeddings that carry them on."""
        ids = batch["input_ids"]
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        chosen = real & ~torch.isin(ids, self.special) & (torch.rand(ids.shape, device=ids.device) < self.share)
        others = {name: value for name, value in batch.items() if name in ("attention_mask", "token_type_ids")}
        logits = self.model(input_ids=ids.masked_fill(chosen, self.mask_token_id), **others).logits[chosen]
        words = F.gumbel_softmax(logits.float(), self.temperature, hard=True)
        rewritten = ids.masked_scatter(chosen, words.argmax(-1))
        if not torch.is_grad_enabled():
            return ({"input_ids": rewritten, **others},) * 2
        return tuple(  # type: ignore[return-value]
            {"inputs_embeds": _embedded(model.get_input_embeddings(), rewritten, chosen, words), **others}
            for model in (student, teacher)
        )


def _embedded(embedding: Any, ids: torch.Tensor, chosen: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Word embeddings [B, S, d] of ids, of the chosen ones by their distribution [n, V], which is one-hot."""
    table = embedding(torch.arange(words.shape[-1], device=ids.device))  # as it is quantized, if it is
    states = embedding(ids)
    return states.masked_scatter(chosen.unsqueeze(-1), (words.to(table.dtype) @ table).to(states.dtype))


def masked_lm_of(model: PreTrainedModel, layers: int | None = None) -> PreTrainedModel:
    """A masked language model of a model's embeddings and first layers, with a fresh head; it has to be trained.

    Args:
        model: float, of an architecture that `lowbit.models` describes; nothing of it is shared.
        layers: how many; None: all.

    Raises:
        TypeError, ValueError: another model, or more layers than it has.
    """
    own = [layer for _, layer in models.layers(model)]
    layers = len(own) if layers is None else layers
    if not 1 <= layers <= len(own):
        raise ValueError(f"layers={layers}; the model has {len(own)}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.tie_word_embeddings = layers, True
    made = AutoModelForMaskedLM.from_config(config)
    state = {name: value for name, value in model.base_model.state_dict().items() if not name.startswith("pooler.")}
    kept = made.base_model.state_dict().keys()
    made.base_model.load_state_dict({name: value for name, value in state.items() if name in kept})
    return made.eval()
