"""SQuAD v1.1: loading, windows of long contexts, n-best answers from logits, exact match and F1.

A question and a context of more than `max_length` tokens become several features: windows of the context, each with the
whole question before it, neighbours sharing `stride` tokens. An answer is a span of a window's tokens, scored
start logit + end logit; the best span over all windows of a question is its answer.

With few labelled questions, `ask_elsewhere` makes more pairs of a question and a context, for a teacher to answer.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .tasks import find_split, read_split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".parquet")
_ANSWERS = '{"text": [...], "answer_start": [...]}'


def load_squad(data_dir: str | Path | None = None) -> DatasetDict:
    """Training and validation questions: columns context, question and answers, as on the Hub.

    Args:
        data_dir: a folder holding `squad/train.*` and `squad/validation.*`, or those files themselves; JSON lines
            (gzipped or not) or parquet, answers as {"text": [...], "answer_start": [...]}. None downloads
            `rajpurkar/squad`.

    Raises:
        ValueError: a file without these columns, or with answers that are not where `answer_start` says.
        FileNotFoundError: a split that is not in `data_dir`.
        ConnectionError: no `data_dir`, and the Hub cannot be reached.
    """
    from datasets import DatasetDict, load_dataset

    splits = ("train", "validation")
    if data_dir is None:
        try:
            hub = load_dataset("rajpurkar/squad")
        except Exception as error:  # the hub library raises many kinds for "offline"
            raise ConnectionError(
                f"could not load rajpurkar/squad from the Hub ({type(error).__name__}); put train.jsonl and "
                "validation.jsonl with columns context, question, answers into DIR/squad and pass data_dir=DIR"
            ) from error
        return DatasetDict({split: hub[split] for split in splits})
    folder = Path(data_dir)
    folder = folder / "squad" if (folder / "squad").is_dir() else folder
    return DatasetDict({split: _load_file(find_split(folder, split, _SUFFIXES)) for split in splits})


def _load_file(path: Path) -> Dataset:
    data = read_split(path, ("context", "question"), "answers")
    for index, (context, answers) in enumerate(zip(data["context"], data["answers"], strict=True)):
        try:
            spans = list(zip(answers["answer_start"], answers["text"], strict=True))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path}, row {index}: answers are {answers!r:.200}; needed: {_ANSWERS}") from None
        for start, text in spans:
            if start < 0 or not text or not context.startswith(text, start):
                raise ValueError(f"{path}, row {index}: the answer {text!r} is not at character {start} of its context")
    return data


def ask_elsewhere(data: Dataset, count: int, share: float = 0.75, seed: int = 0, near: int = 15) -> Dataset:
    """Questions without answers, a share of them put to other paragraphs, to learn from what a teacher says of them.

    A teacher knows the answers to its training questions by heart, and a student of these learns little about others.
    There are many more pairs of a question and a paragraph than questions with answers, and of a pair that was never
    trained on a teacher says what it makes of it, as of a question that is new.

    Args:
        data: questions in the order of their articles, so that paragraphs nearby are mostly of the same one; of a few
            questions from many articles they are not.
        count: questions to return; each of `data` is there as often as any other, give or take one.
        share: of the questions go to another paragraph than their own.
        seed: of the order and the choice.
        near: the other paragraph is at most so many distinct ones away.

    Returns:
        Columns context, question and answers, which are empty.

    Raises:
        ValueError: a count below 0, a share outside [0, 1], near below 1, or questions on fewer than 2 paragraphs.
    """
    from datasets import Dataset

    contexts, questions = data["context"][:], data["question"][:]
    paragraphs = list(dict.fromkeys(contexts))
    if not 0 <= share <= 1 or count < 0 or near < 1:
        raise ValueError(f"count={count} (accepted: from 0), share={share} (0 to 1), near={near} (from 1)")
    if len(paragraphs) < 2:
        raise ValueError(f"{len(data)} questions on {len(paragraphs)} paragraphs; questions on two or more are needed")
    place = {context: number for number, context in enumerate(paragraphs)}
    generator = random.Random(seed)
    order: list[int] = []
    while len(order) < count:
        order += generator.sample(range(len(questions)), min(len(questions), count - len(order)))
    asked = []
    for index in order:
        to = place[contexts[index]]
        if generator.random() < share:
            first, last = max(0, to - near), min(len(paragraphs) - 1, to + near)
            other = generator.randrange(first, last)  # one fewer than there are, to leave out its own
            to = other + (other >= to)
        asked.append(paragraphs[to])
    answers: list[dict[str, list[Any]]] = [{"text": [], "answer_start": []}] * count
    return Dataset.from_dict({"context": asked, "question": [questions[index] for index in order], "answers": answers})


def featurize(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 384,
    stride: int = 128,
    max_question_length: int = 64,
) -> Dataset:
    """Windows of every question and its context, for training and for `best_answers`; not padded.

    Columns: those of the tokenizer; `start_positions` and `end_positions`, the first and last token of the question's
    first answer, both those of [CLS] where the window does not hold all of it or there is none; `example`, the row in
    `data`; `offsets`, for each token its [start, end) in the context, [0, 0] for tokens that are not of the context.

    Args:
        max_length: tokens of a window, question and special tokens included.
        stride: tokens of the context that neighbouring windows share.
        max_question_length: questions are cut after so many tokens.

    Raises:
        ValueError: a tokenizer without offsets, or no room for more than `stride` tokens of context.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed")
    room = max_length - max_question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= stride < room:
        raise ValueError(
            f"stride={stride}, max_length={max_length}, max_question_length={max_question_length}: "
            f"{room} tokens are left for the context; the stride must be from 0 and less than that"
        )

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        questions = [_cut(tokenizer, question, max_question_length) for question in rows["question"]]
        encoded = tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        examples, mapping = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        columns: dict[str, list[Any]] = dict(encoded)
        columns |= {"start_positions": [], "end_positions": [], "example": [], "offsets": []}
        for window, example in enumerate(examples):
            of_context = np.array([part == 1 for part in encoded.sequence_ids(window)])
            offsets = np.asarray(mapping[window]) * of_context[:, None]
            none = encoded["input_ids"][window].index(tokenizer.cls_token_id)
            first, last = _answer_tokens(offsets, rows["answers"][example]) or (none, none)
            columns["start_positions"].append(first)
            columns["end_positions"].append(last)
            columns["example"].append(indices[example])
            columns["offsets"].append(offsets.tolist())
        return columns

    return data.map(encode, batched=True, with_indices=True, remove_columns=data.column_names, desc="tokenizing")


def _cut(tokenizer: PreTrainedTokenizerBase, question: str, length: int) -> str:
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return question if len(offsets) <= length else question[: offsets[length - 1][1]]


def _answer_tokens(offsets: np.ndarray, answers: dict[str, list[Any]]) -> tuple[int, int] | None:
    """First and last token of the first answer; None where the window does not hold all of it."""
    if not answers["text"]:
        return None
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    context = offsets[:, 1] > offsets[:, 0]
    if not context.any() or offsets[context, 0].min() > start or offsets[context, 1].max() < end:
        return None
    # A token that the answer begins or ends inside of belongs to it.
    tokens = np.flatnonzero(context & (offsets[:, 1] > start) & (offsets[:, 0] < end))
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else None


class Answer(NamedTuple):
    """Characters [start, end) of the context; the score is the sum of two logits."""

    text: str
    score: float
    start: int
    end: int


def best_answers(
    data: Dataset,
    features: Dataset,
    start_logits: Sequence[Any],
    end_logits: Sequence[Any],
    n_best: int = 20,
    max_answer_length: int = 30,
) -> list[list[Answer]]:
    """The `n_best` answers to each question, best first; a span of several windows counts once, by its best score.

    An answer is of context tokens of one window, ends no earlier than it begins and has at most `max_answer_length`
    tokens. Logits that are NaN or -inf give no answer, so a list may be short or empty. Ties: the earlier window, start
    and end.

    Args:
        data: the questions that `features` was made of.
        start_logits, end_logits: for each feature the logits of its tokens; what follows them (padding) is not read.

    Raises:
        ValueError: not one row of logits for each feature, or fewer logits than tokens.
    """
    if not len(features) == len(start_logits) == len(end_logits):
        raise ValueError(
            f"{len(features)} features, {len(start_logits)} rows of start logits, {len(end_logits)} of end logits; "
            "one row for each feature is needed"
        )
    found: list[dict[tuple[int, int], float]] = [{} for _ in range(len(data))]
    rows = zip(features["example"], features["offsets"], start_logits, end_logits, strict=True)
    for example, offsets, starts, ends in rows:
        spans = found[example]
        for first, last, score in _best_spans(np.asarray(offsets), starts, ends, n_best, max_answer_length):
            span = (offsets[first][0], offsets[last][1])
            spans[span] = max(score, spans.get(span, score))
    answers = []
    for context, spans in zip(data["context"], found, strict=True):
        best = sorted(spans.items(), key=lambda item: -item[1])[:n_best]
        answers.append([Answer(context[start:end], score, start, end) for (start, end), score in best])
    return answers


def _best_spans(
    offsets: np.ndarray, start_logits: Any, end_logits: Any, n_best: int, max_answer_length: int
) -> list[tuple[int, int, float]]:
    """(first token, last token, score) of the best spans of one window, best first."""
    count = len(offsets)
    starts, ends = (np.asarray(logits, dtype=np.float64)[:count] for logits in (start_logits, end_logits))
    if len(starts) < count or len(ends) < count:
        raise ValueError(f"{len(starts)} start and {len(ends)} end logits for a feature of {count} tokens")
    context = offsets[:, 1] > offsets[:, 0]
    starts, ends = (np.where(context, logits, -np.inf) for logits in (starts, ends))
    # Row i: the scores of the spans that begin at token i and have 1, 2, ... tokens.
    padded = np.concatenate([ends, np.full(max_answer_length - 1, -np.inf)])
    with np.errstate(invalid="ignore"):  # inf - inf
        scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, max_answer_length)
    scores = np.where(np.isnan(scores), -np.inf, scores).ravel()
    best = np.argsort(-scores, kind="stable")[:n_best]
    pairs = [(*divmod(int(i), max_answer_length), float(scores[i])) for i in best if scores[i] > -np.inf]
    return [(first, first + more, score) for first, more, score in pairs]


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case without ASCII punctuation, articles and surplus white space, as the official script does it."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are the same once normalized, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1_score(prediction: str, answer: str) -> float:
    """F1 of the bags of normalized words; 0 where they have none in common, as in the official script for v1.1."""
    predicted, words = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = (Counter(predicted) & Counter(words)).total()
    return 0.0 if not common else 2 * common / (len(predicted) + len(words))


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean `exact_match` and `f1` (fractions) of one prediction a question, by the given answer that suits it best.

    A question without answers wants the empty one.

    Raises:
        ValueError: numbers of predictions and questions that differ, or none at all.
    """
    if len(predictions) != len(answers) or not len(answers):
        raise ValueError(f"{len(predictions)} predictions, {len(answers)} questions; as many of both needed, from 1")
    pairs = [(prediction, list(given) or [""]) for prediction, given in zip(predictions, answers, strict=True)]
    return {
        name: float(np.mean([max(metric(prediction, answer) for answer in given) for prediction, given in pairs]))
        for name, metric in (("exact_match", exact_match), ("f1", f1_score))
    }
