"""Substitution of words: candidates by plain loops, copies as the algorithm says, a cache that goes on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertForMaskedLM, BertForSequenceClassification, BertTokenizerFast

from helpers import tiny_config
from lowbit.data import sentiment
from lowbit.distill.augment import COPIES, MaskedLM, Substitution, augment, load_substitution, read_vectors, vectors_of
from lowbit.distill.augment.words import STOP_WORDS, replace, replaceable

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = [row["sentence"] for row in sentiment.generate(40, False, 0)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    """Words of the synthetic task, but for "masterful" (two pieces); "7" and "," are no words of letters."""
    words = {word for text in SENTENCES for word in text.split()} | {"masterful", "plot", "dull"}
    vocabulary = [*SPECIAL, *sorted(words - {"masterful"}), "master", "##ful", "7", ","]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(vocabulary)))
    return BertTokenizerFast.from_pretrained(path.parent)


@pytest.fixture(scope="module")
def model(tokenizer: BertTokenizerFast) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=128)
    return BertForMaskedLM(config).eval()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the Plot is thin.", ["Plot", "thin"]),
        ('a ("gorgeous") film, 3d and h4 !', ["gorgeous", "film"]),
        ("it 's n't don't well-made film's", []),
        ("not no never", []),
        ("naïve Übel", ["naïve", "Übel"]),
        ("  \n", []),
    ],
)
def test_words_of_letters_that_are_no_stop_words_may_be_replaced(text: str, words: list[str]) -> None:
    spans = replaceable(text, STOP_WORDS)
    assert [text[slice(*span)] for span in spans] == words
    assert replace(text, {}) == text


def test_replacing_keeps_all_else_and_capitals() -> None:
    text = "The Plot,  is THIN."
    assert replace(text, {(4, 8): "story", (14, 18): "weak"}) == "The Story,  is weak."


def slow_candidates(model: BertForMaskedLM, tokenizer: BertTokenizerFast, text: str, word: str, pair: bool) -> list:
    """One word at a time, one text at a time, by strings: TinyBERT's algorithm 1 without batches or offsets."""
    pieces = tokenizer.tokenize(text)
    place = pieces.index(word)
    masked = [*pieces[:place], "[MASK]", *pieces[place + 1 :]]
    tokens = ["[CLS]", *masked, "[SEP]", *([*pieces, "[SEP]"] if pair else [])]
    types = [0] * (len(masked) + 2) + ([1] * (len(pieces) + 1) if pair else [])
    with torch.no_grad():
        logits = model(
            torch.tensor([tokenizer.convert_tokens_to_ids(tokens)]), token_type_ids=torch.tensor([types])
        ).logits[0, place + 1]
    best = tokenizer.convert_ids_to_tokens(logits.argsort(descending=True)[:15].tolist())
    return [token for token in best if token.isalpha() and token not in SPECIAL]


@pytest.mark.parametrize("pair", [True, False])
def test_masked_lm_candidates_are_those_of_single_forwards(model, tokenizer, pair: bool) -> None:
    lm = MaskedLM(model, tokenizer, sees_original=pair, batch_size=7)
    texts = [*SENTENCES[:6], "plot", "the plot , 7 masterful unknownword dull ."]
    spans = [replaceable(text, ()) for text in texts]
    compared = 0
    for text, words, lists in zip(texts, spans, lm(texts, spans), strict=True):
        for span, found in zip(words, lists, strict=True):
            word = text[slice(*span)]
            if word in ("masterful", "unknownword"):  # two pieces, no token
                assert found == []
            elif tokenizer.tokenize(text).count(word) == 1:
                assert found == slow_candidates(model, tokenizer, text, word, pair)
                compared += 1
    assert compared > 20
    assert MaskedLM(model, tokenizer, sees_original=not pair).key != lm.key


def test_a_word_cut_off_by_the_longest_input_has_no_candidates(model, tokenizer) -> None:
    text = "the plot " * 80 + "dull"
    spans = replaceable(text, ("the",))
    (found,) = MaskedLM(model, tokenizer)([text], [spans])
    assert found[0] and not found[-1] and len(found) == 81


def test_a_trained_lm_offers_words_of_the_class(tokenizer) -> None:
    """A few steps on the task's text: adjectives then come from adjectives."""
    torch.manual_seed(0)
    model = BertForMaskedLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=128))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    texts = [f"the {a} was {w}" for a in sentiment.ASPECTS for w in sentiment.ADJECTIVES]
    texts = [text for text in texts if tokenizer.unk_token not in tokenizer.tokenize(text)]
    rng = random.Random(0)
    for _ in range(60):
        batch = tokenizer(rng.sample(texts, 32), return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        masked = (torch.rand(labels.shape) < 0.4) & (labels > 4)
        batch["input_ids"][masked] = tokenizer.mask_token_id
        model(**batch, labels=labels.masked_fill(~masked, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lm = MaskedLM(model, tokenizer, count=5, sees_original=False)
    (found,) = lm(["the plot was dull"], [[(4, 8), (13, 17)]])
    assert set(found[0]) <= {*sentiment.ASPECTS} and set(found[1]) <= {*sentiment.ADJECTIVES} and found[1]


def test_nearest_words_are_those_of_plain_loops(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(300)]
    table = rng.normal(size=(300, 7))
    table[5] = 0
    lines = [f"{word} {' '.join(f'{x:.6f}' for x in row)}" for word, row in zip(words, table, strict=True)]
    path = tmp_path / "vectors.txt"
    path.write_text("300 7\n" + "\n".join([*lines[:200], "a b 1 2 3 4 5 6 7", "3d 1 2 3 4 5 6 7", *lines[200:]]))
    vectors = read_vectors(path, count=4)
    asked = ["waa", "Wbc", "absent", "waa", words[-1]]
    expected = {}
    for word in {"waa", "wbc", words[-1]}:
        own = table[words.index(word)]
        cosines = [own @ v / np.linalg.norm(own) / max(np.linalg.norm(v), 1e-12) for v in table]
        cosine = dict(zip(words, cosines, strict=True))
        expected[word] = sorted((w for w in words if w != word), key=lambda w, cosine=cosine: -cosine[w])[:4]
    assert vectors(asked) == [expected.get(word.lower(), []) for word in asked]
    assert len(read_vectors(path, limit=150)(["waa"])[0]) == 15
    assert words[-1] not in read_vectors(path, limit=150).words


@pytest.mark.parametrize("text", ["", "a 1 2\nb 1\n", "a 1 2\nb 1 x\n", "word\n"])
def test_files_of_another_form_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match="accepted is a"):
        read_vectors(path)


def test_a_models_table_gives_vectors_to_words_of_pieces(model, tokenizer) -> None:
    vectors = vectors_of(model, tokenizer, count=3)
    table = model.get_input_embeddings().weight.detach()
    mean = table[tokenizer.convert_tokens_to_ids(["master", "##ful"])].mean(0)
    cosine = torch.nn.functional.cosine_similarity(mean, table)
    names = tokenizer.convert_ids_to_tokens(cosine.argsort(descending=True).tolist())
    assert vectors(["masterful", "unknownword"]) == [
        [name for name in names if name.isalpha() and name not in SPECIAL][:3],
        [],
    ]


class Fixed:
    """Candidates as a table; counts calls."""

    def __init__(self, table: dict[str, list[str]], key: str) -> None:
        self.table, self.key, self.calls = table, key, 0

    def __call__(self, texts, spans=None):
        self.calls += 1
        if spans is None:
            return [self.table.get(word, []) for word in texts]
        return [[self.table.get(t[slice(*span)], []) for span in s] for t, s in zip(texts, spans, strict=True)]


def test_copies_replace_at_the_rate_and_only_by_candidates() -> None:
    text = "a film of rare wit and grace"
    lm, vectors = Fixed({"film": ["movie", "film"]}, "lm"), Fixed({"film": ["no"], "wit": ["humor", "charm"]}, "v")
    made = Substitution(lm, vectors, p=0.4, copies=4000)([(text,)], 0, None)[0]
    words = [copy.split() for (copy,) in made]
    assert {w[1] for w in words} == {"film", "movie"} and {w[4] for w in words} == {"wit", "humor", "charm"}
    assert all(w[:1] + w[2:4] + w[5:] == ["a", "of", "rare", "and", "grace"] for w in words)
    assert len(made) == len(set(made)) == 5 and (text,) not in made  # 2 x 3, but for the original
    single = [Substitution(lm, vectors, copies=1)([(text,)], seed, None)[0] for seed in range(3000)]
    rate = np.mean([bool(copies) and "wit" not in copies[0][0] for copies in single])
    assert abs(rate - 0.4) < 0.04  # 4.5 standard errors
    rate = np.mean([bool(copies) and "movie" in copies[0][0] for copies in single])
    assert abs(rate - 0.2) < 0.04


def test_pairs_keep_their_partner() -> None:
    method = Substitution(None, Fixed({"cat": ["dog", "cow"], "runs": ["walks"]}, "v"), p=0.9, copies=10)
    rows = [("the cat", "she runs"), ("cat runs", "cat"), ("no", "words")]
    first, second, third = method(rows, 0, None)
    assert set(first) == {("the dog", "she runs"), ("the cow", "she runs"), ("the cat", "she walks")}
    assert all((a == "cat runs") != (b == "cat") for a, b in second) and third == []


def data(rows: int = 30) -> Dataset:
    return Dataset.from_dict({"idx": range(rows), "sentence": SENTENCES[:rows], "label": [i % 2 for i in range(rows)]})


def test_augmented_data_has_the_originals_first_and_labels_of_their_origin(model, tokenizer) -> None:
    given = data()
    method = Substitution(MaskedLM(model, tokenizer), vectors_of(model, tokenizer), copies=COPIES["sst2"])
    whole = augment(given, ["sentence"], method)
    assert whole.column_names == ["idx", "sentence", "label", "augmented"]
    assert whole.select(range(30)).remove_columns("augmented")[:] == given[:]
    added = whole.filter(lambda row: row["augmented"])
    assert 300 < len(added) == len(whole) - 30 <= 600
    for row in added:
        origin = given[row["idx"]]
        assert row["label"] == origin["label"] and len(row["sentence"].split()) == len(origin["sentence"].split())
        assert row["sentence"] != origin["sentence"]
    assert augment(given, ["sentence"], method)[:] == whole[:]
    assert augment(given, ["sentence"], method, seed=1)["sentence"][:] != whole["sentence"][:]
    assert "label" not in augment(given, ["sentence"], method, labels="drop").column_names


def test_interrupted_work_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"film {i // 10}{'x' * (i % 10)} wit" for i in range(600)]
    given = Dataset.from_dict({"sentence": texts})

    class Interrupted(Fixed):
        def __call__(self, texts, spans=None):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(texts, spans)

    table = {"film": ["movie"], "wit": ["humor", "charm"]}
    plain = augment(given, ["sentence"], Substitution(Fixed(table, "lm")))
    with pytest.raises(KeyboardInterrupt):
        augment(given, ["sentence"], Substitution(Interrupted(table, "lm")), cache=tmp_path)
    rest = Fixed(table, "lm")
    assert augment(given, ["sentence"], Substitution(rest), cache=tmp_path)[:] == plain[:]
    assert rest.calls == 1  # 600 texts are 3 chunks, two were done
    again = Fixed(table, "lm")
    assert augment(given, ["sentence"], Substitution(again), cache=tmp_path)[:] == plain[:] and again.calls == 0
    for changed in ({"never": ["film"]}, {"lm": Fixed({"wit": ["charm"]}, "another model")}):
        method = Substitution(**{"lm": Fixed(table, "lm"), **changed})
        augment(given, ["sentence"], method, cache=tmp_path)
        assert method.lm.calls == 3, changed
    fresh = Fixed(table, "lm")  # p and copies need no new candidates, but make other rows
    other = augment(given, ["sentence"], Substitution(fresh, p=0.9, copies=2), cache=tmp_path)
    assert fresh.calls == 0 and other[:] == augment(given, ["sentence"], Substitution(fresh, p=0.9, copies=2))[:]


def test_other_weights_are_another_key(model, tokenizer) -> None:
    before = MaskedLM(model, tokenizer).key
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[3, 5] += 1
        changed = MaskedLM(model, tokenizer).key
        weight[3, 5] -= 1
    assert changed != before and json.dumps(before)


def test_a_substitution_is_loaded_from_folders_and_files(model, tokenizer, tmp_path: Path) -> None:
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "lm")
    given, folder = data(6), str(tmp_path / "lm")
    loaded = load_substitution(folder, folder, count=5, sees_original=False, p=0.3, copies=4)
    lm = MaskedLM(model, tokenizer, count=5, sees_original=False)
    made = Substitution(lm, vectors_of(model, tokenizer, count=5), p=0.3, copies=4)
    assert augment(given, ["sentence"], loaded)[:] == augment(given, ["sentence"], made)[:]
    (tmp_path / "vectors.txt").write_text("plot 1 0\nstory 1 0.1\n")
    near = load_substitution(vectors=str(tmp_path / "vectors.txt"))
    assert near.lm is None and near.vectors(["plot"]) == [["story"]]
    BertForSequenceClassification(model.config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="is no masked language model: cls"):
        load_substitution(str(tmp_path / "classifier"))


def test_wrong_use_is_refused_before_any_work(model, tokenizer) -> None:
    with pytest.raises(ValueError, match="neither lm nor vectors"):
        Substitution()
    with pytest.raises(ValueError, match="0 < p <= 1"):
        Substitution(vectors=vectors_of(model, tokenizer), p=0)
    classifier = BertForSequenceClassification(tiny_config(vocab_size=len(tokenizer)))
    with pytest.raises(ValueError, match="AutoModelForMaskedLM"):
        MaskedLM(classifier, tokenizer)
    method = Substitution(Fixed({}, "lm"))
    with pytest.raises(ValueError, match="columns idx, sentence, label, and no text"):
        augment(data(), ["text"], method)
    with pytest.raises(ValueError, match="holds no text in row 0"):
        augment(data(), ["idx"], method)
    with pytest.raises(ValueError, match="a list of names"):
        augment(data(), "sentence", method)
    with pytest.raises(ValueError, match="augmented already"):
        augment(augment(data(), ["sentence"], method), ["sentence"], method)
    with pytest.raises(ValueError, match="accepted: keep, drop"):
        augment(data(), ["sentence"], method, labels="none")  # type: ignore[arg-type]
