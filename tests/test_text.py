"""Text in chunks of one length, nothing lost; rare tokens are masked as often as their counts say; an LM learns."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertForMaskedLM, BertTokenizerFast, DataCollatorForLanguageModeling, Trainer

from helpers import tiny_config, training_arguments
from lowbit.data import sentiment
from lowbit.data.masking import RareTokenCollator, SeededByBatch, count_tokens
from lowbit.data.text import chunks, read_texts, task_texts

TEXTS = [row["sentence"] for row in sentiment.generate(80, False, 0)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    words = sorted({word for text in TEXTS for word in text.split()})
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizerFast.from_pretrained(path.parent)


def test_texts_are_read_from_lines_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two words \nnaïve\x0bline\n")
    assert read_texts(tmp_path / "a.txt") == ["one", "two words", "naïve\x0bline"]
    rows = "\n".join(json.dumps({"body": text, "n": 1}) for text in ("x", " ", "y"))
    (tmp_path / "b.jsonl").write_text(rows)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert read_texts(tmp_path / "b.jsonl", "body") == read_texts(tmp_path / "c.jsonl.gz", "body") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", "x", "accepted are files that end in .txt"),
        ("a.txt", " \n\n", "has no text"),
        ("a.jsonl", '{"body": "x"}', "has columns body, and no text"),
        ("a.jsonl", '{"text": 1}', "1 rows whose text is no text"),
        ("a.jsonl", "{", "could not be read as JSON lines"),
    ],
)
def test_other_files_are_clear_errors(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "none.txt")


def test_texts_of_a_task_are_both_of_its_pairs(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": 0}, {"sentence1": "c", "sentence2": "a", "label": 1}]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert task_texts("mrpc", tmp_path) == ["a", "c", "b"]


@pytest.mark.parametrize("length", [3, 7, 64])
@pytest.mark.parametrize("count", [1, 80])
def test_chunks_hold_all_tokens_in_order(tokenizer, length: int, count: int) -> None:
    texts = [*TEXTS[:count], "plot [SEP] unknownword"]
    stream = []
    for text in texts:  # by the definition
        stream += [*tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)), tokenizer.sep_token_id]
    stream.pop()
    if len(stream) < length - 2:
        with pytest.raises(ValueError, match=f"have {len(stream)} tokens, fewer than the {length - 2} of one row"):
            chunks(texts, tokenizer, length)
        return
    data = chunks(texts, tokenizer, length)
    found = []
    for row in data:
        ids = row["input_ids"]
        assert len(ids) == len(row["attention_mask"]) == length and set(row["attention_mask"]) == {1}
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        special = [int(i in (tokenizer.cls_token_id, tokenizer.sep_token_id)) for i in ids]
        assert row["special_tokens_mask"] == special  # an unknown word is a word
        found += ids[1:-1]
    assert found == stream[: len(found)] and len(stream) - len(found) < length - 2


def test_wrong_lengths_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="3 or more"):
        chunks(TEXTS, tokenizer, 2)
    with pytest.raises(ValueError, match="have 0 tokens"):
        chunks([], tokenizer)


def test_tokens_are_counted() -> None:
    assert count_tokens([[1, 1, 3], [], [3, 1]], 5).tolist() == [0, 3, 0, 2, 0]


def test_rare_tokens_are_chosen_at_their_odds(tokenizer) -> None:
    counts = torch.zeros(len(tokenizer), dtype=torch.long)
    ids = [10, 11, 12, 13]
    counts[ids] = torch.tensor([1000, 100, 0, 10])  # 0 counts as 1
    row = {"input_ids": [2, *ids * 5, 3], "special_tokens_mask": [1, *[0] * 20, 1]}
    short = {"input_ids": [2, 10, 3], "special_tokens_mask": [1, 0, 1]}
    collator = RareTokenCollator(tokenizer, mlm_probability=0.02, counts=counts, seed=0)
    chosen = torch.zeros(len(tokenizer))
    for _ in range(4000):
        batch = collator([row, short])
        labels = batch["labels"]
        assert (labels != -100).sum() == 1  # ceil(0.02 x 21)
        assert (labels[:, 0] == -100).all() and (labels[1, 2:] == -100).all()
        chosen[labels[labels != -100]] += 1
    odds = torch.tensor([6 * 1000**-0.7, 5 * 100**-0.7, 5.0, 5 * 10**-0.7])
    expected = 4000 * odds / odds.sum()
    assert chosen.sum() == chosen[ids].sum() == 4000
    assert ((chosen[ids] - expected).abs() < 3 * expected.sqrt() + 1).all()  # of a fixed seed


def test_chosen_tokens_are_masked_as_transformers_masks_them(tokenizer) -> None:
    data = chunks(TEXTS * 20, tokenizer, 64)
    counts = count_tokens(data["input_ids"], len(tokenizer))
    rows = [data[i] for i in range(200)]
    plain = [{"input_ids": row["input_ids"]} for row in rows]  # special tokens are then looked up
    for some in (rows, plain):
        collator = RareTokenCollator(tokenizer, counts=counts, seed=1)
        batch = collator(some)
        ids, labels = batch["input_ids"], batch["labels"]
        given = torch.tensor([row["input_ids"] for row in rows])
        chosen = labels != -100
        assert chosen.sum() == math.ceil(0.15 * int((given > 4).sum()))
        assert torch.equal(torch.where(chosen, labels, given), given) and torch.equal(ids[~chosen], given[~chosen])
        assert (given[chosen] > 4).all()
        masked = (ids[chosen] == tokenizer.mask_token_id).double().mean()
        same = (ids[chosen] == labels[chosen]).double().mean()
        assert abs(masked - 0.8) < 0.05 and abs(same - 0.1) < 0.04
        assert collator.mlm_probability == 0.15
    with pytest.raises(ValueError, match="give counts"):
        RareTokenCollator(tokenizer)


@pytest.mark.parametrize("rare", [True, False])
def test_a_language_model_learns_from_chunks(tokenizer, rare: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(tiny_config(vocab_size=len(tokenizer)))
    data = chunks(TEXTS[:4] * 200, tokenizer, 32)
    counts = count_tokens(data["input_ids"], len(tokenizer))
    collator = RareTokenCollator(tokenizer, counts=counts) if rare else DataCollatorForLanguageModeling(tokenizer)
    arguments = training_arguments(tmp_path, max_steps=60, learning_rate=3e-3, per_device_train_batch_size=16)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-10:]) / 10 < 0.9 * losses[0]


def test_a_dataset_column_will_do_for_texts(tokenizer) -> None:
    data = Dataset.from_dict({"text": TEXTS})
    assert chunks(data["text"], tokenizer, 32)[:] == chunks(TEXTS, tokenizer, 32)[:]


def test_masks_are_a_function_of_the_batch_and_draw_nothing(tokenizer: Any) -> None:
    """So that batches which are made ahead of their step are the same after resuming."""
    rows = [{"input_ids": [*range(5, 25)]}, {"input_ids": [*range(6, 26)]}]
    collate = SeededByBatch(DataCollatorForLanguageModeling(tokenizer))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again = collate(rows), collate(rows)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (first["labels"] != -100).any()
    turned = collate(rows[::-1])  # in another batch a row has other masks
    assert not torch.equal(turned["labels"].flip(0), first["labels"])
    other = SeededByBatch(DataCollatorForLanguageModeling(tokenizer), seed=1)(rows)
    assert not torch.equal(other["labels"], first["labels"])
