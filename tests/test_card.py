"""Model cards say what is in the folder, and replace none that a person wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import lowbit
from helpers import tiny
from lowbit import card


def packed(**changes: object) -> object:
    return lowbit.quantize(tiny(), lowbit.TernaryConfig(**changes))


def test_saving_writes_a_card_with_bits_and_size(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.library_name == "transformers" and written.data.pipeline_tag == "text-classification"
    assert {"lowbit", "ternary", "2-2-8"} <= set(written.data.tags)
    assert written.data.base_model is None and written.data.eval_results is None
    assert "Not measured" in written.text and "BertForSequenceClassification.from_pretrained" in written.text


@pytest.mark.parametrize(
    "config",
    [
        lowbit.TernaryConfig(),
        lowbit.BinaryConfig(embedding_bits=8),
        lowbit.BinaryConfig(),
        lowbit.TernaryConfig(format_version=1),
        lowbit.BinaryConfig(format_version=2),
    ],
)
def test_sizes_are_those_of_the_files(config: lowbit.LowbitConfig, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "float")
    lowbit.quantize(model, config).save_pretrained(tmp_path / "packed")
    stored, as_float = card.sizes(model)
    for folder, size in (("packed", stored), ("float", as_float)):
        content = (tmp_path / folder / "model.safetensors").read_bytes()
        assert size == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert f"| {stored / 1e6:.2f} |" in (tmp_path / "packed" / "README.md").read_text()


def test_results_teacher_and_task_are_metadata_and_text() -> None:
    made = card.model_card(
        packed(),
        results={"accuracy": 0.912},
        teacher="textattack/bert-base-uncased-SST-2",
        teacher_results={"accuracy": 0.934},
        task="sst2",
        command="lowbit distill sst2 --seed 1",
        tags=["mine"],
    )
    parsed = ModelCard(made.content)  # as the Hub reads it
    assert parsed.data.base_model == "textattack/bert-base-uncased-SST-2"
    assert parsed.data.base_model_relation == "quantized"
    assert parsed.data.datasets == ["nyu-mll/glue"] and "mine" in parsed.data.tags
    (result,) = parsed.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.912)
    assert (result.dataset_type, result.dataset_config, result.task_type) == (
        "nyu-mll/glue",
        "sst2",
        "text-classification",
    )
    assert "| accuracy | 0.912 | 0.934 |" in parsed.text and "lowbit distill sst2 --seed 1" in parsed.text


def test_what_the_teacher_was_not_measured_on_is_said() -> None:
    made = card.model_card(packed(), results={"f1": 0.5}, task="my task", teacher=tiny())
    assert "| f1 | 0.5 | not measured |" in made.text
    with pytest.raises(ValueError, match="without a task"):
        card.model_card(packed(), results={"f1": 0.5})
    with pytest.raises(ValueError, match="is a float model"):
        card.model_card(tiny())


def test_no_path_of_this_machine_is_in_a_card(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "bert-sst2"
    tiny().save_pretrained(folder)
    model = type(tiny()).from_pretrained(folder, quantization_config=lowbit.TernaryConfig())
    for made in (card.model_card(model), card.model_card(model, teacher=str(folder), task="sst2")):
        assert "secret" not in made.content and "`bert-sst2`" in made.text
        assert made.data.base_model is None


def leaving(criterion: object) -> object:
    return lowbit.set_exit(lowbit.add_exits(packed()), criterion)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lowbit.quantize(tiny(), lowbit.BinaryConfig(activation_bits=4)), ["1-1-4", "binary"]),
        (lambda: lowbit.split(lowbit.prepare(tiny(), lowbit.TernaryConfig())), ["1-1-8", "pair", "holds floats"]),
        (lambda: lowbit.slim(tiny(), 0.5), ["float", "2 attention heads"]),
        (lambda: packed(modules_to_not_convert=["pooler"], embedding_bits=None), ["2-32-8", "`pooler`"]),
        (lambda: lowbit.set_length(packed(), lowbit.LengthConfig(keep=(0.9, 0.5))), ["(ratio): 0.9, 0.5"]),
        (lambda: lowbit.add_exits(packed(), "mean", [0, 1]), ["early exits (mean) behind layers 0, 1; none is used"]),
        (lambda: leaving(lowbit.Entropy(0.25)), ["behind layers 1; sentences leave by entropy(threshold=0.25)"]),
        (lambda: leaving(lowbit.Patience(2)), ["sentences leave by patience(times=2)"]),
    ],
)
def test_every_kind_of_model_is_described(make: object, words: list[str]) -> None:
    text = card.model_card(make()).text
    assert all(word in text for word in words), text


def test_a_card_of_a_person_is_never_replaced(tmp_path: Path) -> None:
    path, model = tmp_path / "README.md", packed()
    path.write_text("mine")
    model.save_pretrained(tmp_path)
    assert path.read_text() == "mine"
    path.unlink()
    model.save_pretrained(tmp_path)
    path.write_text(path.read_text().replace("Not measured", "I measured"))
    model.save_pretrained(tmp_path)
    assert "I measured" in path.read_text()
    card.model_card(model, results={"accuracy": 0.9}, task="sst2").save(path)
    model.save_pretrained(tmp_path)
    assert "accuracy" in path.read_text()


def test_a_card_that_nobody_edited_follows_the_model(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    lowbit.quantize(tiny(), lowbit.BinaryConfig()).save_pretrained(tmp_path)
    assert "1-1-8" in (tmp_path / "README.md").read_text()
