"""BiLSTM and CNN over words, distilled by their logits (Tang et al. 2019, 1903.12136; castorini/d-bert).

    L = MSE(z_s, z_t)        published; d-bert's configurations add the cross-entropy of the labels, 1 each

The models are `lowbit.modeling.words`. They read words, the teacher its own tokens: see `both`. Published sizes:
vectors of 300, hidden 150 (SST-2) or 300, dense 200; batch 50, 30 epochs, Adadelta.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...modeling.configurations import WordClassifierConfig
from ...modeling.words import WordClassifier
from ..augment.vectors import WordVectors, read_vectors
from . import Built
from .copies import check_sizes

PAD, UNKNOWN, MASK = "[PAD]", "[UNK]", "[MASK]"


def word_tokenizer(
    texts: Iterable[str], size: int = 20000, min_frequency: int = 1, lowercase: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer of the most frequent words of some texts; saves and loads like any other.

    No special tokens are added around a text; in a pair the second one has token type 1.

    Args:
        texts: the training texts.
        size: words at most, with padding, unknown and the word that augmentation by rules masks with.
        min_frequency: of a word.
        lowercase: of all words.

    Raises:
        ValueError: no texts, or a size below 4.
    """
    if size < 4:
        raise ValueError(f"size={size}; accepted: at least 4, since padding, unknown and mask are three")
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=size, min_frequency=min_frequency, special_tokens=[PAD, UNKNOWN, MASK], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < 4:
        raise ValueError(f"the texts have no word that occurs {min_frequency} times; give the training texts")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, mask_token=MASK, model_input_names=names
    )


def build(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: str = "bilstm",
    pair: bool = False,
    embedding_size: int = 300,
    hidden_size: int = 150,
    intermediate_size: int = 200,
    num_hidden_layers: int = 1,
    kernel_sizes: tuple[int, ...] = (3, 4, 5),
    dropout: float = 0.1,
    vectors: WordVectors | str | Path | None = None,
    seed: int = 0,
) -> Built:
    """A classifier over words, with the teacher's labels.

    Args:
        teacher: a sequence classifier; nothing but its labels is read.
        tokenizer: of `word_tokenizer`.
        encoder: "bilstm" or "cnn".
        pair: whether texts are pairs.
        embedding_size, hidden_size, intermediate_size, num_hidden_layers, kernel_sizes, dropout: see
            `WordClassifierConfig`.
        vectors: what words begin with, of length 1: a text file of vectors, or what `augment.vectors` reads of one or
            of a model's own table (`vectors_of`). Words without stay random.
        seed: of what is random.

    Raises:
        ValueError: a size below 1, another encoder, vectors of another width.
    """
    check_sizes(
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
    )
    config = WordClassifierConfig(
        encoder=encoder,
        vocab_size=len(tokenizer),
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        kernel_sizes=list(kernel_sizes),
        dropout=dropout,
        pair=pair,
        pad_token_id=tokenizer.pad_token_id,
        id2label=teacher.config.id2label,
        label2id=teacher.config.label2id,
        problem_type=teacher.config.problem_type,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = WordClassifier(config)
    if vectors is not None:
        found = read_vectors(vectors) if isinstance(vectors, str | Path) else vectors
        if found.table.shape[1] != embedding_size:
            raise ValueError(f"embedding_size={embedding_size}, and the vectors have {found.table.shape[1]} numbers")
        table = student.words.embeddings.weight.data
        for word, row in tokenizer.get_vocab().items():
            if (vector := found.vector(word)) is not None and word not in (PAD, UNKNOWN, MASK):
                table[row] = torch.from_numpy(vector)
    return Built(student.eval())
