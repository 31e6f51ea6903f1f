"""Words that a masked language model puts in the place of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache import fingerprint, model_fingerprint
from .words import Span

_WORD_STARTS = ("Ġ", "▁")  # of byte-level BPE and of SentencePiece; WordPiece marks what goes on: ##


@dataclass
class MaskedLM:
    """The `count` most likely tokens at a masked word, of which those that are words of letters are candidates.

    Args:
        model: any masked language model of transformers; put in eval mode, run where it is.
        tokenizer: its own, a fast one.
        count: K, published 15. Pieces ("##ing"), punctuation and special tokens among them are dropped, so there may be
            fewer; the word itself may be one of them, as published.
        sees_original: the text with the mask is followed by the original as a second sentence, as TinyBERT's code has
            it: candidates are closer to the word. False: the mask alone, as the paper can be read.
        batch_size: masked texts a forward.

    Raises:
        ValueError: no head over words, a tokenizer that is slow or has no mask token.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    count: int = 15
    sees_original: bool = True
    batch_size: int = 64
    _words: list[str | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.model.get_output_embeddings() is None:
            raise ValueError(
                f"a masked language model is needed, and {type(self.model).__name__} predicts no words; "
                "load one by AutoModelForMaskedLM"
            )
        if self.tokenizer.mask_token_id is None or not self.tokenizer.is_fast:
            raise ValueError(f"{type(self.tokenizer).__name__} has no mask token, or is no fast tokenizer")
        self.model.eval()
        self._words = whole_words(self.tokenizer)

    @property
    def key(self) -> str:
        """What candidates depend on."""
        return fingerprint(
            model_fingerprint(self.model), self.tokenizer.get_vocab(), self.count, self.sees_original, "masked-lm"
        )

    def __call__(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[list[list[str]]]:
        """Candidates for each word of each text, most likely first; none for a word that is not one known token.

        Args:
            texts: any number of them.
            spans: of each text, where the words are.
        """
        encodings = self._encode(texts)
        queries = [  # text, word, its token
            (number, word, token)
            for number, encoding in enumerate(encodings)
            for word, span in enumerate(spans[number])
            if (token := _token_of(encoding, span)) is not None
            and encoding["input_ids"][token] != self.tokenizer.unk_token_id
        ]
        queries.sort(key=lambda query: len(encodings[query[0]]["input_ids"]))  # little padding
        found: list[list[list[str]]] = [[[] for _ in words] for words in spans]
        for start in range(0, len(queries), self.batch_size):
            batch = queries[start : start + self.batch_size]
            best = self._best([encodings[number] for number, _, _ in batch], [token for _, _, token in batch])
            for (number, word, _), ids in zip(batch, best.tolist(), strict=True):
                words = (self._words[i] for i in ids if i < len(self._words))
                found[number][word] = list(dict.fromkeys(candidate for candidate in words if candidate))
        return found

    def _encode(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Of each text what the model takes, and `offsets`: where its tokens are in it, None for those that are not."""
        longest = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512))
        pair = (list(texts),) if self.sees_original else ()
        batch = self.tokenizer(list(texts), *pair, truncation=True, max_length=longest, return_offsets_mapping=True)
        offsets = batch.pop("offset_mapping")
        encodings = []
        for number in range(len(texts)):
            row = {name: values[number] for name, values in batch.items()}
            own = [sequence == 0 for sequence in batch.sequence_ids(number)]
            row["offsets"] = [tuple(at) if here else None for at, here in zip(offsets[number], own, strict=True)]
            encodings.append(row)
        return encodings

    @torch.no_grad()
    def _best(self, encodings: Sequence[dict[str, Any]], tokens: Sequence[int]) -> torch.Tensor:
        """Ids of the most likely tokens at the place of one token of each, int64 [B, count]."""
        rows = []
        for encoding, token in zip(encodings, tokens, strict=True):
            row = {name: values for name, values in encoding.items() if name != "offsets"}
            ids = row["input_ids"]
            rows.append({**row, "input_ids": [*ids[:token], self.tokenizer.mask_token_id, *ids[token + 1 :]]})
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
        places = torch.arange(len(rows)), torch.tensor(tokens)

        def only_masked(module: Any, arguments: Any, output: Any) -> Any:
            output["last_hidden_state"] = output["last_hidden_state"][places].unsqueeze(1)
            return output

        # The head over words costs more than a small encoder: it reads one token of each text, [B, 1, H].
        hook = self.model.base_model.register_forward_hook(only_masked)
        try:
            logits = self.model(**batch, return_dict=True).logits[:, 0]
        finally:
            hook.remove()
        return logits.float().topk(min(self.count, logits.shape[-1])).indices


def _token_of(encoding: dict[str, Any], span: Span) -> int | None:
    """The token that is just this word."""
    return encoding["offsets"].index(span) if span in encoding["offsets"] else None


def whole_words(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """For each token id the word of letters that it is, None where it is a piece or something else."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    marked = any(token.startswith(_WORD_STARTS) for token in tokens)
    special = set(tokenizer.all_special_tokens)
    words: list[str | None] = []
    for token in tokens:
        starts_word = token.startswith(_WORD_STARTS) if marked else not token.startswith("##")
        word = tokenizer.convert_tokens_to_string([token]).strip() if starts_word else ""
        words.append(word if word.isalpha() and token not in special else None)
    return words
