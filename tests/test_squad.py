"""SQuAD: windows hold the answers they are labelled with, logits become answers, scores are the official ones."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import BertTokenizerFast

from helpers import minilm_folder
from lowbit.data.squad import (
    Answer,
    ask_elsewhere,
    best_answers,
    exact_match,
    f1_score,
    featurize,
    load_squad,
    normalize_answer,
    score_answers,
)

DATA = Path(__file__).parents[2] / "shared/data/squad"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60)), "un", "##der", "##stand", "?"]
LOWER = ["the", "zurich", "mayor", "東", "京", "cafe", "is", "in", ",", ".", "who", "what", "e", "##s"]


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={word: i for i, word in enumerate([*WORDS, *LOWER])})


def row(context: str, *answers: str, question: str = "w0 w1 ?") -> dict:
    starts = [context.index(answer) for answer in answers]
    return {"context": context, "question": question, "answers": {"text": list(answers), "answer_start": starts}}


def dataset(*rows: dict) -> Dataset:
    return Dataset.from_list(list(rows))


def sentence(first: int, end: int) -> str:
    return " ".join(f"w{i}" for i in range(first, end))


def labelled(data: Dataset, feature: dict) -> str:
    """The text between the labels of a feature."""
    context = data[feature["example"]]["context"]
    start, end = (feature["offsets"][feature[name]] for name in ("start_positions", "end_positions"))
    return context[start[0] : end[1]]


# -- loading


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("nested", [True, False])
def test_local_files_load(suffix: str, nested: bool, tmp_path: Path) -> None:
    rows = [row("Zürich is in 東京", "東京", "Zürich"), row("w1 w2", "w2")]
    folder = tmp_path / "squad" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        text = "\n".join(map(json.dumps, rows)).encode()
        if suffix == ".parquet":
            dataset(*rows).to_parquet(str(folder / f"{split}{suffix}"))
        else:
            (folder / f"{split}{suffix}").write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    data = load_squad(tmp_path)
    assert set(data) == {"train", "validation"}
    assert data["validation"][:] == {key: [r[key] for r in rows] for key in rows[0]}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"context": "a b", "question": "w0"}, "has columns context, question; needed: context, question, answers"),
        ({"context": None, "question": "w0", "answers": {"text": [], "answer_start": []}}, "1 rows without context"),
        (row("a b", "b") | {"answers": "b"}, "row 0: answers are 'b'; needed: "),
        (row("a b", "b") | {"answers": {"text": ["b"]}}, "row 0: answers are .*; needed: "),
        (row("a b", "b") | {"answers": {"text": ["b"], "answer_start": []}}, "row 0: answers are .*; needed: "),
        (row("a b", "b") | {"answers": {"text": ["b"], "answer_start": [1]}}, "'b' is not at character 1"),
        (row("a b", "b") | {"answers": {"text": ["b"], "answer_start": [-1]}}, "'b' is not at character -1"),
        (row("a b", "b") | {"answers": {"text": ["b"], "answer_start": [3]}}, "'b' is not at character 3"),
    ],
)
def test_a_broken_file_is_a_clear_error(broken: dict, message: str, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=message):
        load_squad(tmp_path)


def test_missing_files_and_hub_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.csv").write_text("context,question,answers\n")  # answers are nested: no csv
    with pytest.raises(FileNotFoundError, match=r"no train file; accepted: train with suffix .jsonl.gz, .*.parquet$"):
        load_squad(tmp_path)

    def offline(*args: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ConnectionError, match="data_dir=DIR"):
        load_squad()


# -- questions without answers


def numbered(paragraphs: int, each: int) -> Dataset:
    return dataset(*(row(f"p{i}", f"p{i}", question=f"q{i}-{j}") for i in range(paragraphs) for j in range(each)))


@pytest.mark.parametrize(("share", "near"), [(1.0, 1), (1.0, 4), (0.5, 2), (0.0, 3)])
def test_questions_go_to_paragraphs_nearby_and_lose_their_answers(share: float, near: int) -> None:
    data = numbered(paragraphs=12, each=3)
    asked = ask_elsewhere(data, 36 * 50 + 7, share, near=near)
    assert len(asked) == 36 * 50 + 7 and asked.column_names == ["context", "question", "answers"]
    assert all(given == {"text": [], "answer_start": []} for given in asked["answers"])
    times = Counter(asked["question"])
    assert set(times) == set(data["question"]) and set(times.values()) == {50, 51}
    by_home: dict[int, Counter] = {home: Counter() for home in range(12)}
    for context, question in zip(asked["context"], asked["question"], strict=True):
        by_home[int(question[1:].split("-")[0])][int(context[1:])] += 1
    for home, went in by_home.items():
        others = {p for p in range(12) if p != home and abs(p - home) <= near}
        assert set(went) == (others if share else set()) | ({home} if share < 1 else set())
        away = sum(went[p] for p in others)
        assert away / went.total() == pytest.approx(share, abs=0.2)
        for other in others:  # all alike, at the ends of the data too; 5 standard deviations
            expected = share * went.total() / len(others)
            assert abs(went[other] - expected) <= 5 * expected**0.5


def test_questions_asked_elsewhere_follow_the_seed() -> None:
    data = numbered(5, 2)
    assert ask_elsewhere(data, 20, seed=1)[:] == ask_elsewhere(data, 20, seed=1)[:] != ask_elsewhere(data, 20)[:]
    none = ask_elsewhere(data, 0)
    assert len(none) == 0 and none.column_names == ["context", "question", "answers"]


@pytest.mark.parametrize(
    ("paragraphs", "wrong", "message"),
    [
        (3, {"share": 1.5}, "share=1.5"),
        (3, {"share": float("nan")}, "share=nan"),
        (3, {"count": -1}, "count=-1"),
        (3, {"near": 0}, "near=0"),
        (1, {}, "2 questions on 1 paragraphs"),
        (0, {}, "0 questions on 0 paragraphs"),
    ],
)
def test_questions_that_cannot_be_asked_elsewhere_are_clear_errors(paragraphs: int, wrong: dict, message: str) -> None:
    data = numbered(3, 2).select(range(2 * paragraphs))
    with pytest.raises(ValueError, match=message):
        ask_elsewhere(data, **{"count": 4, **wrong})


# -- features


def test_a_short_context_is_one_window_with_token_labels(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row("w5 understand w7", "understand"))
    (feature,) = featurize(data, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["[CLS]", "w0", "w1", "?", "[SEP]", "w5", "un", "##der", "##stand", "w7", "[SEP]"]
    assert (feature["start_positions"], feature["end_positions"]) == (6, 8)
    assert feature["token_type_ids"] == [0] * 5 + [1] * 6
    assert feature["offsets"] == [[0, 0]] * 5 + [[0, 2], [3, 5], [5, 8], [8, 13], [14, 16], [0, 0]]
    assert feature["example"] == 0


def test_an_answer_inside_of_a_token_takes_the_whole_token(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row("w5 understand w27", "nderst"), row("w5 w27 w8", "7"), row("w5 w27 w8", "7 w"))
    texts = [labelled(data, feature) for feature in featurize(data, tokenizer)]
    assert texts == ["understand", "w27", "w27 w8"]


def test_windows_overlap_by_the_stride_and_cover_the_context(tokenizer: BertTokenizerFast) -> None:
    # Room for 14 - 3 - 3 = 8 tokens of context, 3 of them shared: windows begin at 0, 5, 10, ...
    data = dataset(row(sentence(10, 30), "w16 w17"), row(sentence(10, 12), "w10"))
    features = featurize(data, tokenizer, max_length=14, stride=3, max_question_length=5)
    windows = [
        [data[f["example"]]["context"][a:b] for a, b in f["offsets"] if b > a] for f in features if f["example"] == 0
    ]
    assert windows == [sentence(a, min(a + 8, 30)).split() for a in (10, 15, 20, 25)]
    assert features["example"] == [0, 0, 0, 0, 1]
    # Whole in the first two windows; the third and fourth begin after it.
    assert [labelled(data, f) for f in features] == ["w16 w17", "w16 w17", "", "", "w10"]
    assert [(f["start_positions"], f["end_positions"]) for f in features][2:4] == [(0, 0)] * 2


def test_an_answer_cut_by_every_window_is_nowhere(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row(sentence(10, 30), sentence(14, 20)))  # the windows are 10-18, 15-23, ...
    features = featurize(data, tokenizer, max_length=14, stride=3, max_question_length=5)
    assert len(features) == 4
    assert all(f["start_positions"] == f["end_positions"] == 0 for f in features)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_answers_no_longer_than_the_stride_are_in_some_window(length: int, tokenizer: BertTokenizerFast) -> None:
    starts = range(10, 60 - length)
    data = dataset(*(row(sentence(10, 60), sentence(a, a + length)) for a in starts))
    features = featurize(data, tokenizer, max_length=19, stride=4, max_question_length=5)
    found = {f["example"]: labelled(data, f) for f in features if f["start_positions"]}
    assert found == {i: sentence(a, a + length) for i, a in enumerate(starts)}


def test_a_question_without_answer_is_labelled_cls(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row("w5 w6"), row("w5 w6", "w6"))
    first, second = featurize(data, tokenizer)
    assert (first["start_positions"], first["end_positions"]) == (0, 0)
    assert labelled(data, second) == "w6"


def test_the_first_answer_is_trained_on(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row("w5 w6 w7", "w6 w7", "w5"))
    assert labelled(data, featurize(data, tokenizer)[0]) == "w6 w7"


def test_empty_contexts_are_one_window_without_answer(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row(""), row("w5"))
    features = featurize(data, tokenizer)
    assert features["input_ids"][0][-2:] == [tokenizer.sep_token_id] * 2
    assert features["start_positions"] == [0, 0]
    logits = [np.zeros(len(ids)) for ids in features["input_ids"]]
    assert best_answers(data, features, logits, logits) == [[], [Answer("w5", 0.0, 0, 2)]]


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("Zürich, the CAFÉ", "Zürich"),  # lower-cased and without accents in the vocabulary
        ("Zu\u0308rich is in", "Zu\u0308rich"),  # the accent is a character of its own
        ("the mayor is in 東京.", "東京"),  # each sign is a token, without spaces between
        ("🙂🙂 is in Zürich", "🙂🙂"),  # unknown to the vocabulary, beyond 16 bits
        ("İ is in Zürich", "Zürich"),  # lower case has more characters than the original
        ("\u200bthe\u00a0CAFÉ is", "CAFÉ"),  # characters that the tokenizer drops or takes for spaces
    ],
)
def test_offsets_are_of_the_original_text(context: str, answer: str, tokenizer: BertTokenizerFast) -> None:
    data = dataset(row(context, answer))
    (feature,) = featurize(data, tokenizer)
    assert labelled(data, feature) == answer
    logits = np.zeros((2, len(feature["offsets"])))
    logits[[0, 1], [feature["start_positions"], feature["end_positions"]]] = 5.0
    ((best, *_),) = best_answers(data, featurize(data, tokenizer), logits[:1], logits[1:])
    assert best == Answer(answer, 10.0, context.index(answer), context.index(answer) + len(answer))


def test_long_questions_are_cut(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row(sentence(10, 20), "w12", question=sentence(0, 60)))
    features = featurize(data, tokenizer, max_length=20, stride=2, max_question_length=9)
    assert all(f["input_ids"][1:11] == [*range(5, 14), tokenizer.sep_token_id] for f in features)
    assert {labelled(data, f) for f in features} - {""} == {"w12"}


@pytest.mark.parametrize("stride", [-1, 8, 100])
def test_a_stride_without_room_is_a_clear_error(stride: int, tokenizer: BertTokenizerFast) -> None:
    with pytest.raises(ValueError, match=rf"stride={stride}, .*: 8 tokens are left for the context"):
        featurize(dataset(row("w1")), tokenizer, max_length=20, stride=stride, max_question_length=9)


def test_a_slow_tokenizer_is_a_clear_error() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no offsets"):
        featurize(dataset(row("w1")), Slow())


# -- answers


def brute_force(data: Dataset, features: Dataset, logits: list[np.ndarray], longest: int) -> list[dict]:
    """Every span of context tokens in every window -> its best score; by three loops."""
    found: list[dict] = [{} for _ in range(len(data))]
    for feature, (starts, ends) in zip(features, logits, strict=True):
        offsets = feature["offsets"]
        for i in range(len(offsets)):
            for j in range(i, min(i + longest, len(offsets))):
                if offsets[i][1] > 0 and offsets[j][1] > 0:
                    span, score = (offsets[i][0], offsets[j][1]), float(starts[i]) + float(ends[j])
                    spans = found[feature["example"]]
                    spans[span] = max(score, spans.get(span, -np.inf))
    return found


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_best_answers_are_those_of_a_search_through_all(
    dtype: type, tokenizer: BertTokenizerFast, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    lengths = [random.randint(1, 50) for _ in range(5)]
    data = dataset(*(row(sentence(10, 10 + n), question="w0 " * random.randint(1, 6)) for n in lengths))
    features = featurize(data, tokenizer, max_length=20, stride=5, max_question_length=6)
    padding = 3  # what follows a feature's tokens must not be read
    logits = [generator.normal(size=(2, len(f["offsets"]) + padding)).astype(dtype) for f in features]
    for both in logits:
        both[:, -padding:] = 100
    answers = best_answers(data, features, [x[0] for x in logits], [x[1] for x in logits], 7, max_answer_length=4)
    for example, spans in enumerate(brute_force(data, features, logits, 4)):
        expected = sorted(spans.values(), reverse=True)[:7]
        assert [answer.score for answer in answers[example]] == expected
        for answer in answers[example]:
            assert spans[answer.start, answer.end] == answer.score
            assert answer.text == data[example]["context"][answer.start : answer.end]
        assert len({answer[2:] for answer in answers[example]}) == len(answers[example])


def test_question_and_special_tokens_are_no_answer(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row("w5 w6 w7"))
    features = featurize(data, tokenizer)  # [CLS] w0 w1 ? [SEP] w5 w6 w7 [SEP]
    starts, ends = np.zeros(9), np.zeros(9)
    starts[[0, 1, 4, 8]], ends[[0, 2, 4, 8]] = 100, 100  # all outside of the context
    starts[6], ends[5], ends[7] = 3, 9, 2  # an end before its start does not count
    ((best, *others),) = best_answers(data, features, [starts], [ends])
    assert best == Answer("w5", 9.0, 0, 2)
    assert others[0] == Answer("w6 w7", 5.0, 3, 8)
    assert {other.text for other in others} == {"w6", "w7", "w5 w6", "w5 w6 w7", "w6 w7"}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_logits_that_are_no_numbers_give_no_answer(value: float, tokenizer: BertTokenizerFast) -> None:
    data = dataset(row("w5 w6 w7"))
    features = featurize(data, tokenizer)
    assert best_answers(data, features, [np.full(9, value)], [np.zeros(9)]) == [[]]
    starts = np.zeros(9)
    starts[5] = value
    (answers,) = best_answers(data, features, [starts], [np.zeros(9)])
    assert sorted(answer.text for answer in answers) == ["w6", "w6 w7", "w7"]
    starts[6] = np.inf
    assert best_answers(data, features, [starts], [np.zeros(9)])[0][0].text == "w6"


def test_logits_that_do_not_fit_are_clear_errors(tokenizer: BertTokenizerFast) -> None:
    data = dataset(row("w5 w6 w7"))
    features = featurize(data, tokenizer)
    with pytest.raises(ValueError, match="1 features, 2 rows of start logits, 1 of end logits"):
        best_answers(data, features, [np.zeros(9)] * 2, [np.zeros(9)])
    with pytest.raises(ValueError, match="9 start and 8 end logits for a feature of 9 tokens"):
        best_answers(data, features, [np.zeros(9)], [np.zeros(8)])


# -- scores


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat.", "cat"),
        ("a an the", ""),
        ("theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        ("the-cat", "thecat"),  # punctuation goes first, without leaving a space
        ("an\tapple\n pie", "apple pie"),
        ("Zürich\u2019s «café»", "zürich\u2019s «café»"),  # only ASCII punctuation
        ("$1,000.50", "100050"),
        ("…the…", "… …"),  # a word boundary is enough for an article
    ],
)
def test_normalization_by_hand(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("The Broncos", "broncos!", 1, 1),
        ("Denver Broncos", "the Broncos", 0, 2 / 3),  # precision 1/2, recall 1
        ("to be or not to be", "to be", 0, 1 / 2),  # each word counts as often as the other has it: 2/6, 2/2
        ("x x x", "x x y y", 0, 4 / 7),
        ("Paris", "London", 0, 0),
        ("", "London", 0, 0),
        ("the", "", 1, 0),  # the official script counts no words as no overlap
        ("b a", "a b", 1, 1),  # the article goes
        ("c b", "b c", 0, 1),
    ],
)
def test_exact_match_and_f1_by_hand(prediction: str, answer: str, exact: float, f1: float) -> None:
    assert exact_match(prediction, answer) == exact
    assert f1_score(prediction, answer) == pytest.approx(f1)
    assert f1_score(answer, prediction) == pytest.approx(f1)


def test_a_prediction_is_scored_by_the_answer_that_suits_it_best() -> None:
    answers = [["Paris", "in Paris France"], ["1973", "October 1973"], []]
    scores = score_answers(["Paris, France", "October, 1973", ""], answers)
    # F1: "in paris france" 4/5, an exact match, a question without answer: no overlap
    assert scores == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx((0.8 + 1 + 0) / 3)}


@pytest.mark.parametrize(("predictions", "answers"), [([], []), (["a"], []), (["a"], [["a"], ["b"]])])
def test_scores_need_one_prediction_a_question(predictions: list, answers: list) -> None:
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions, {len(answers)} questions"):
        score_answers(predictions, answers)


# -- real data


@pytest.mark.skipif(not DATA.is_dir() or minilm_folder() is None, reason="needs SQuAD and the MiniLM tokenizer")
def test_offsets_agree_with_the_text_of_real_data() -> None:
    data = load_squad(DATA)["validation"]
    data = data.select(random.sample(range(len(data)), 300))
    tokenizer = BertTokenizerFast.from_pretrained(minilm_folder())
    features = featurize(data, tokenizer, max_length=160, stride=64)
    starts, ends = ([np.zeros(len(offsets)) for offsets in features["offsets"]] for _ in range(2))
    for feature, start, end in zip(features, starts, ends, strict=True):
        context, answers = (data[feature["example"]][name] for name in ("context", "answers"))
        for token, (a, b) in zip(feature["input_ids"], feature["offsets"], strict=True):
            if b > a and token != tokenizer.unk_token_id:  # each token is the text at its offsets, alone
                piece = tokenizer.convert_ids_to_tokens(token).removeprefix("##")
                assert "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(context[a:b]).split()) == piece
        if feature["start_positions"]:
            assert answers["text"][0] in labelled(data, feature)
            start[feature["start_positions"]] = end[feature["end_positions"]] = 1
    # Logits that say what the labels say are right but for answers that stop inside of a word.
    texts = [best[0].text for best in best_answers(data, features, starts, ends, max_answer_length=60)]
    assert score_answers(texts, [given["text"] for given in data["answers"]])["exact_match"] > 0.95
