"""transformers' own calls on lowbit models: loading and quantizing by them, pushing, and what they must not do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertModel,
    T5Config,
    T5EncoderModel,
    pipeline,
)
from transformers.quantizers import HfQuantizer

import lowbit
from helpers import batch, outputs, tiny
from lowbit.nn import PackedLinear

Auto = AutoModelForSequenceClassification


def equal(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    inputs = batch()
    return all(map(torch.equal, outputs(model.eval(), inputs), outputs(other.eval(), inputs)))


# ---------------------------------------------------------------------------------------------- quantizing on load


@pytest.mark.parametrize("config", [lowbit.TernaryConfig(), lowbit.BinaryConfig()], ids=["ternary", "binary"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "device_map": "cpu"},
        {"dtype": "auto", "device_map": "auto"},
        {"device_map": {"": "cpu"}},
    ],
    ids=["bfloat16", "float16 on the cpu", "auto", "device map"],
)
def test_quantizing_on_load_is_loading_then_quantizing(
    options: dict[str, Any], config: lowbit.LowbitConfig, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Auto.from_pretrained(tmp_path, quantization_config=config, **options)
    assert isinstance(loaded.bert.pooler.dense, PackedLinear)
    assert equal(loaded, lowbit.quantize(Auto.from_pretrained(tmp_path, **options), config))
    assert config.stage == "float"  # what the user holds can be used again
    loaded.save_pretrained(tmp_path / "packed")
    assert equal(loaded, Auto.from_pretrained(tmp_path / "packed", dtype="auto"))


def test_quantizing_on_load_with_a_head_that_the_file_lacks(tmp_path: Path) -> None:
    base = tiny("BertModel")
    base.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = Auto.from_pretrained(tmp_path, quantization_config=lowbit.TernaryConfig(), num_labels=4)
    assert outputs(loaded, batch())[0].shape == (3, 4)
    inputs = batch()
    expected = outputs(lowbit.quantize(base, lowbit.TernaryConfig()), inputs)[0]
    assert torch.equal(outputs(loaded.eval().bert, inputs)[0], expected)


def test_quantizing_on_load_refuses_offloaded_weights(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    tiny().save_pretrained(tmp_path)
    where = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0.* is offloaded"):
        Auto.from_pretrained(
            tmp_path,
            quantization_config=lowbit.TernaryConfig(),
            device_map=where,
            offload_folder=tmp_path / "offload",
        )


def test_a_packed_checkpoint_is_not_quantized_a_second_time(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized with TernaryConfig but you are passing a BinaryConfig"):
        Auto.from_pretrained(tmp_path, quantization_config=lowbit.BinaryConfig())
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = Auto.from_pretrained(tmp_path, quantization_config=lowbit.TernaryConfig(activation_bits=4))
    assert equal(model, loaded)
    lowbit.slim(tiny(), 0.5).save_pretrained(tmp_path / "slim")
    with pytest.raises(ValueError, match="LowbitConfig but you are passing a TernaryConfig"):
        Auto.from_pretrained(tmp_path / "slim", quantization_config=lowbit.TernaryConfig())


# --------------------------------------------------------------------------------------------------- packed files


def test_shards_of_a_variant_load_with_a_device_map(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path, variant="int2", max_shard_size="20KB")
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.int2.json" in names and "model.safetensors" not in names
    assert sum(name.startswith("model.int2-0000") for name in names) > 1
    assert equal(model, Auto.from_pretrained(tmp_path, variant="int2", device_map="auto"))


def test_the_base_model_of_a_head_saves_itself(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.base_model.save_pretrained(tmp_path)
    loaded, report = BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and equal(model.bert, loaded)


def test_pipelines_run_packed_models(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=True)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    tokenizer = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    texts = ["a b c d", "e f"]
    answers = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, batch_size=2)
    logits = outputs(model, dict(tokenizer(texts, padding=True, return_tensors="pt")))[0]
    for answer, row in zip(answers, logits, strict=True):
        assert answer["label"] == f"LABEL_{int(row.argmax())}"
        assert answer["score"] == pytest.approx(float(row.softmax(-1).max()), abs=1e-5)


def test_self_contained_folders_load_without_importing_lowbit(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path / "packed", self_contained=True)
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    ids = torch.arange(1, 9).view(1, 8)
    program = f"""
        import json, sys, torch
        from transformers import AutoModel, AutoModelForSequenceClassification
        assert "lowbit" not in sys.modules
        folder = {str(tmp_path / "packed")!r}
        model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
        base = AutoModel.from_pretrained(folder, trust_remote_code=True)
        ids = torch.arange(1, 9).view(1, 8)
        model.save_pretrained(folder + "-again")
        print(json.dumps([model(ids).logits.tolist(), base(ids).pooler_output.tolist()]))
    """
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    logits, pooled = (torch.tensor(values) for values in json.loads(result.stdout.splitlines()[-1]))
    assert torch.equal(logits, outputs(model, {"input_ids": ids})[0])
    assert torch.equal(pooled, outputs(model.bert, {"input_ids": ids})[1])
    assert equal(model, Auto.from_pretrained(tmp_path / "packed"))  # and with `import lowbit` as ever
    assert equal(model, Auto.from_pretrained(tmp_path / "packed-again", trust_remote_code=False))


# ----------------------------------------------------------------------------------------------------------- Hub


class Hub:
    """In place of the Hub's network calls: what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cards: set[str] = frozenset()) -> None:
        self.created: list[tuple[str, Any]] = []
        self.commits: list[tuple[str, dict[str, bytes], dict[str, Any]]] = []

        def create_repo(api: HfApi, repo_id: str, *, private: bool | None = None, **_: Any) -> Any:
            self.created.append((repo_id, private))
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(api: HfApi, repo_id: str, operations: Any, **options: Any) -> str:
            files = {}
            for operation in operations:
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
            self.commits.append((repo_id, files, options))
            return "committed"

        def download(api: HfApi, repo_id: str, name: str, **_: Any) -> None:
            if repo_id not in cards:
                raise LocalEntryNotFoundError(name)

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        monkeypatch.setattr(HfApi, "create_branch", lambda *args, **kwargs: None)
        monkeypatch.setattr(HfApi, "hf_hub_download", download)


def test_push_to_hub_uploads_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hub = lowbit.quantize(tiny(), lowbit.TernaryConfig()), Hub(monkeypatch)
    model.push_to_hub("me/bert-2bit", private=True, commit_message="first", tags=["mine"], max_shard_size="20KB")
    assert hub.created == [("me/bert-2bit", True)]
    (repo_id, files, options) = hub.commits[0]
    assert repo_id == "me/bert-2bit" and options["commit_message"] == "first"
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1 and files.keys() == {"README.md", "config.json", "model.safetensors.index.json", *shards}
    assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "lowbit"
    assert "- mine\n" in files["README.md"].decode()
    # As the Hub's cache would hold it: loading by name.
    folder = tmp_path / "models--me--bert-2bit"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for name, content in files.items():
        (folder / "snapshots" / ("0" * 40) / name).write_bytes(content)
    assert equal(model, Auto.from_pretrained("me/bert-2bit", cache_dir=tmp_path, local_files_only=True))


def test_saving_with_push_to_hub_uploads_the_folder_but_no_card_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hub = lowbit.quantize(tiny(), lowbit.TernaryConfig()), Hub(monkeypatch, {"me/has-a-card"})
    folder = tmp_path / "bert-2bit"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder, push_to_hub=True)
    model.save_pretrained(folder, push_to_hub=True, repo_id="me/has-a-card", revision="pruned", create_pr=True)
    assert [(repo_id, set(files)) for repo_id, files, _ in hub.commits] == [
        ("bert-2bit", {"README.md", "config.json", "model.safetensors"}),
        ("me/has-a-card", {"config.json", "model.safetensors"}),
    ]
    assert hub.commits[1][2]["revision"] == "pruned" and hub.commits[1][2]["create_pr"] is True
    assert equal(model, Auto.from_pretrained(folder))


# -------------------------------------------------------------------------------------------- what must not happen


@pytest.mark.parametrize("verb", [lowbit.prepare, lowbit.quantize])
def test_a_quantized_table_is_not_resized(verb: Any) -> None:
    model = verb(tiny(), lowbit.TernaryConfig())
    for one in (model, model.bert):
        with pytest.raises(ValueError, match=r"word embedding is quantized.*before quantizing"):
            one.resize_token_embeddings(120)
    assert model.resize_token_embeddings() is model.get_input_embeddings()


def test_a_float_table_is_resized() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(embedding_bits=None))
    model.resize_token_embeddings(120)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 120


@pytest.mark.parametrize("form", ["prepared", "packed", "fused", "loaded"])
def test_no_other_attention_replaces_the_quantized_one(form: str, tmp_path: Path, caplog: Any) -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    model = lowbit.convert(model, fused=form == "fused") if form != "prepared" else model
    if form == "loaded":
        model.save_pretrained(tmp_path)
        model = Auto.from_pretrained(tmp_path, attn_implementation="sdpa")
    inputs = batch()
    expected, name = outputs(model, inputs)[0], model.config._attn_implementation
    for one in (model, model.bert):
        for other in ("sdpa", {"": "sdpa"}):
            with pytest.raises(ValueError, match=r"would leave out the quantization.*'lowbit'"):
                one.set_attn_implementation(other)
        with caplog.at_level(logging.WARNING, "lowbit"):
            one.set_attn_implementation("eager")
        assert "kept 'lowbit'" in caplog.text
        one.set_attn_implementation("lowbit")
        assert model.config._attn_implementation == name
        assert torch.equal(outputs(model, inputs)[0], expected)


def test_float_attention_may_be_any() -> None:
    inputs = batch()
    for model in (
        lowbit.quantize(tiny(), lowbit.TernaryConfig(quantize_attention=False)),
        lowbit.slim(tiny(), 0.5),
    ):
        expected = outputs(model, inputs)[0]
        for name in ("eager", "sdpa", "lowbit"):
            model.set_attn_implementation(name)
            assert model.config._attn_implementation == name
            assert (outputs(model, inputs)[0] - expected).norm() < 0.02 * expected.norm()


def test_an_encoder_that_drops_tokens_keeps_its_attention_where_that_is_float(caplog: Any) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(quantize_attention=False))
    lowbit.set_length(model, lowbit.LengthConfig((0.6, 0.3)))
    inputs = batch()
    expected, name = outputs(model, inputs)[0], model.config._attn_implementation
    with pytest.raises(ValueError, match=r"set_length.*runs attention itself"):
        model.set_attn_implementation("sdpa")
    with caplog.at_level(logging.WARNING, "lowbit"):
        model.set_attn_implementation("eager")
    assert "kept 'lowbit'" in caplog.text and model.config._attn_implementation == name
    assert torch.equal(outputs(model, inputs)[0], expected)


needs_to_be_asked = pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_attn_implementation"), reason="this transformers does not say what was asked for"
)


@needs_to_be_asked
@pytest.mark.parametrize("stage", ["float", "prepared", "packed"])
@pytest.mark.parametrize("asked", ["sdpa", "eager", {"": "sdpa"}, "lowbit", None])
def test_attention_asked_for_at_loading_is_granted_or_refused_aloud(
    asked: str | dict[str, str] | None, stage: str, tmp_path: Path, caplog: Any
) -> None:
    for quantized in (True, False):
        config = lowbit.TernaryConfig(quantize_attention=quantized)
        model, options = tiny(), {"quantization_config": config} if stage == "float" else {}
        if stage != "float":
            model = lowbit.prepare(model, config) if stage == "prepared" else lowbit.quantize(model, config)
        model.save_pretrained(tmp_path)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lowbit"):
            loaded = Auto.from_pretrained(tmp_path, attn_implementation=asked, **options)
        name = asked[""] if isinstance(asked, dict) else asked
        assert loaded.config._attn_implementation == ("lowbit" if quantized or name is None else name)
        assert ("kept 'lowbit'" in caplog.text) is (quantized and name in ("sdpa", "eager"))
        expected = outputs(model if stage != "float" else lowbit.quantize(model, config), inputs := batch())[0]
        assert (outputs(loaded, inputs)[0] - expected).norm() < (1e-6 if quantized else 0.02) * expected.norm()


@needs_to_be_asked
def test_lengths_are_kept_whatever_attention_is_asked_for(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(quantize_attention=False))
    lowbit.set_length(model, lowbit.LengthConfig((0.6, 0.3)))
    model.save_pretrained(tmp_path)
    loaded, inputs = Auto.from_pretrained(tmp_path, attn_implementation="sdpa"), batch()
    assert torch.equal(outputs(loaded, inputs)[0], outputs(model, inputs)[0])


def test_loading_a_base_model_of_a_packed_head_by_auto_class(tmp_path: Path) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    assert type(loaded) is BertModel and equal(model.bert, loaded)


# ------------------------------------------------------------------------------------------------- ties, arguments


@pytest.mark.parametrize("verb", ["prepare", "quantize", "split"])
@pytest.mark.parametrize("fields", [{"modules_to_not_convert": ["word_embeddings"]}, {"embedding_bits": 8}, {}])
def test_a_decoder_is_loaded_as_it_was_saved(verb: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Tied where the table stays float or latent: one of the two tensors is in the file, the other is no new one."""
    model, config = tiny("BertForMaskedLM"), lowbit.TernaryConfig(**fields)
    if verb == "split":
        lowbit.split(lowbit.prepare(model, config))
    else:
        getattr(lowbit, verb)(model, config)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert equal(model, loaded)
    assert not report["missing_keys"]


def test_tied_tables_of_other_architectures_need_one_tensor(tmp_path: Path) -> None:
    """T5 has its table twice; its `wo` reads its own dtype, and transformers says that it stays float32."""
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    model = T5EncoderModel(T5Config(**sizes)).eval()
    ids = torch.randint(5, 99, (2, 9))
    lowbit.quantize(model, lowbit.TernaryConfig())
    assert model.config.quantization_config.modules_to_not_convert[0] == "wo"
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in lowbit.left_in_float(model)
    model.save_pretrained(tmp_path)
    loaded = T5EncoderModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_save_pretrained_takes_the_arguments_of_transformers_by_place(tmp_path: Path) -> None:
    model = lowbit.prepare(tiny(), lowbit.TernaryConfig())
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, state)
    loaded = Auto.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, 2 * model.classifier.weight)


def test_a_missing_pooler_says_how_to_load_without(tmp_path: Path) -> None:
    lowbit.quantize(tiny("BertForMaskedLM"), lowbit.TernaryConfig()).save_pretrained(tmp_path)
    with pytest.raises(lowbit.CheckpointError, match=r"^[^;]*holds no pooler.*; pass add_pooling_layer=False$"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(lowbit.CheckpointError, match=r"holds no pooler.*; load the class that was saved$"):
        Auto.from_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path, add_pooling_layer=False), BertModel)
