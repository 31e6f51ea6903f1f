"""DeFormer (Cao et al. 2020, 2005.00697): BERT whose lower layers read question and passage apart.

    lower layers 1..s     each text for itself, the same weights; the passage's positions begin at `passage_offset`
    upper layers s+1..N   both together, as in BERT

So a passage can be read before the question is known:

    passages = model.encode_passages(**columns_of_passages)
    model(**columns_of_questions, passages=passages[[3, 3, 7]])

Published code pads each text to its maximum and joins them, padding between. Here tokens keep the places that a BERT
has them at, so that hidden states of each layer can be compared with a teacher's token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert.modeling_bert import BertForQuestionAnswering, BertForSequenceClassification, BertModel
from transformers.utils.generic import can_return_tuple

from .configurations import DeformerConfig
from .segments import put, take


@dataclass
class Passages:
    """Passages that the lower layers have read.

    Attributes:
        hidden_states: [P, S, H].
        attention_mask: bool [P, S].
    """

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor

    def __getitem__(self, index: Any) -> Passages:
        """Those at an index (a slice, a list, a tensor), to be asked one question each; one may come several times."""
        return Passages(self.hidden_states[index], self.attention_mask[index])


class DeformerModel(BertModel):
    """BERT's modules, run in two parts; same parameters, same names."""

    config_class = DeformerConfig
    config: Any

    def __init__(self, config: DeformerConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        if not 0 <= config.separate_layers <= config.num_hidden_layers:
            raise ValueError(
                f"separate_layers={config.separate_layers} of {config.num_hidden_layers}; accepted: 0 to "
                f"{config.num_hidden_layers}"
            )
        if not 0 <= config.passage_offset < config.max_position_embeddings:
            raise ValueError(
                f"passage_offset={config.passage_offset}; accepted: 0 to {config.max_position_embeddings - 1}, the "
                "positions that the model has"
            )

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        passages: Passages | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """A batch of pairs, or of questions about passages that are read already.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding.
            token_type_ids: [B, S], 1 in the passage; not needed with `passages`.
            passages: of `encode_passages`, one for each question, or one for all.
            output_hidden_states: the embeddings' output and that of each layer, every token at its place in the batch;
                with `passages`, where there are none, what the upper layers read and write.

        Raises:
            ValueError: something of BERT's that has no meaning here (positions, embeddings, attention maps); no token
                types; passages of another number; longer texts than there are positions.
        """
        if input_ids is None or position_ids is not None or inputs_embeds is not None:
            raise ValueError("a DeFormer takes input_ids, and gives them positions itself")
        if output_attentions:
            raise ValueError("a DeFormer's lower layers have no map of all tokens: compare hidden states and logits")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        hidden: tuple[torch.Tensor, ...]
        if passages is not None:
            states, real = self._join(self.read(input_ids, real, passage=False), real, passages)
            hidden = (states,)
        elif token_type_ids is not None:
            hidden = self._read_pairs(input_ids, real, token_type_ids.bool(), bool(output_hidden_states))
        else:
            raise ValueError("a DeFormer needs token_type_ids: 0 in the question, 1 in the passage")
        hidden = (*hidden, *self._layers(hidden[-1], real, lower=False))
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden[-1],
            pooler_output=self.pooler(hidden[-1]) if self.pooler is not None else None,
            hidden_states=hidden if output_hidden_states else None,
        )

    def read(self, input_ids: torch.Tensor, real: torch.Tensor, passage: bool) -> torch.Tensor:
        """Texts of one kind [B, S] through embeddings and lower layers -> [B, S, H]."""
        kinds = torch.full_like(real, passage)
        embedded = self._embed(input_ids, real, kinds)
        return [embedded, *self._layers(embedded, real, lower=True)][-1]

    def _read_pairs(
        self, input_ids: torch.Tensor, real: torch.Tensor, passage: torch.Tensor, every: bool
    ) -> tuple[torch.Tensor, ...]:
        """Pairs [B, S] through embeddings and lower layers, apart: the last state [B, S, H], or `every` one."""
        embedded = self._embed(input_ids, real, passage)
        parts = [take(embedded, real & kind) for kind in (~passage, passage)]
        outputs = zip(*(self._layers(part.states, part.mask, lower=True) for part in parts), strict=True)
        found = [embedded]
        for index, states in enumerate(outputs, 1):
            if every or index == self.config.separate_layers:
                joint = torch.zeros_like(embedded)
                for part, new in zip(parts, states, strict=True):
                    joint = put(joint, part._replace(states=new))
                found.append(joint)
        return tuple(found) if every else (found[-1],)

    def _join(
        self, questions: torch.Tensor, real: torch.Tensor, passages: Passages
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Questions [B, Q, H] and their passages: each row's question, then its passage -> [B, S, H], bool [B, S]."""
        count, given = len(questions), len(passages.hidden_states)
        if given not in (1, count):
            raise ValueError(f"{given} passages for {count} questions; accepted: as many, or one for all")
        asked = take(questions, real)
        read = take(passages.hidden_states.expand(count, -1, -1), passages.attention_mask.expand(count, -1))
        lengths = real.sum(1)
        read = read._replace(columns=lengths[read.rows] + read.ranks)
        asked = asked._replace(columns=asked.ranks)
        ends = lengths + passages.attention_mask.sum(1)
        joint = questions.new_zeros(count, int(ends.max()), questions.shape[-1])
        for part in (asked, read):
            joint = put(joint, part)
        return joint, torch.arange(joint.shape[1], device=joint.device) < ends[:, None]

    def _embed(self, input_ids: torch.Tensor, real: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, S, H], positions counted in each text for itself."""
        places = [(real & kind).cumsum(1) - 1 for kind in (~passage, passage)]
        positions = torch.where(passage, places[1] + self.config.passage_offset, places[0]).clamp(min=0)
        if int(positions.max()) >= self.config.max_position_embeddings:
            raise ValueError(
                f"a text ends at position {int(positions.max())} (passages begin at {self.config.passage_offset}), "
                f"and the model has {self.config.max_position_embeddings}: shorten it"
            )
        return self.embeddings(input_ids=input_ids, token_type_ids=passage.long(), position_ids=positions)

    def _layers(self, states: torch.Tensor, real: torch.Tensor, lower: bool) -> Iterator[torch.Tensor]:
        """States [B, S, H] after each of the lower or of the upper layers."""
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=real)
        all_layers: Any = self.encoder.layer
        end = self.config.separate_layers
        for layer in all_layers[:end] if lower else all_layers[end:]:
            states = layer(states, mask)
            yield states


class _Reads:
    """What the heads share."""

    bert: Any

    @torch.no_grad()
    def encode_passages(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, token_type_ids: Any = None
    ) -> Passages:
        """Passages through the lower layers, once for all questions.

        Args:
            input_ids: [P, S], each a passage and its [SEP], without [CLS], as it stands behind a question.
            attention_mask: [P, S], 0 at padding.
            token_type_ids: whatever they are, a passage's are 1.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return Passages(self.bert.read(input_ids, real, passage=True), real)


class DeformerForQuestionAnswering(_Reads, BertForQuestionAnswering):
    """BERT's head; start and end are places in the joint batch, with `passages` in question and passage one by one."""

    config_class = DeformerConfig

    def __init__(self, config: DeformerConfig) -> None:
        super().__init__(config)
        self.bert = DeformerModel(config, add_pooling_layer=False)
        self.post_init()


class DeformerForSequenceClassification(_Reads, BertForSequenceClassification):
    """BERT's head on the pooler of a pair's first token."""

    config_class = DeformerConfig

    def __init__(self, config: DeformerConfig) -> None:
        super().__init__(config)
        self.bert = DeformerModel(config)
        self.post_init()


for _auto, _model in {
    AutoModel: DeformerModel,
    AutoModelForQuestionAnswering: DeformerForQuestionAnswering,
    AutoModelForSequenceClassification: DeformerForSequenceClassification,
}.items():
    _auto.register(DeformerConfig, _model, exist_ok=True)
