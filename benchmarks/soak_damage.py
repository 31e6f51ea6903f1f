"""Kinds of damage to a saved model: functions that change a copied folder, drawing from a generator.

Beside the copy are the undamaged checkpoints, in "bases" (`soak_checkpoints.write_bases`).
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lowbit.files import records

Damage = Callable[[Path, random.Random], None]  # changes a copied checkpoint in place

BASES = ("ternary", "sharded", "binary", "split pair", "lengths", "bfloat16", "prepared")


def weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def rewrite_bytes(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def flip(content: bytearray, rng: random.Random, count: int = 1, first: int = 0) -> None:
    for _ in range(count):
        content[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON header of a safetensors file, not the bytes of tensors; a returned text is the new header."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    new = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def names(header: dict[str, Any]) -> list[str]:
    return sorted(name for name in header if name != "__metadata__")


def rewrite_json(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    new = change(values)
    path.write_text(json.dumps(values if new is None else new, indent=2))


def bit_flip(folder: Path, rng: random.Random) -> None:
    rewrite_bytes(weights(folder, rng), lambda content: flip(content, rng))


def header_flip(folder: Path, rng: random.Random) -> None:
    def change(content: bytearray) -> None:
        content[rng.randrange(8 + struct.unpack("<Q", content[:8])[0])] ^= 1 << rng.randrange(8)

    rewrite_bytes(weights(folder, rng), change)


def config_flip(folder: Path, rng: random.Random) -> None:
    rewrite_bytes(folder / "config.json", lambda content: flip(content, rng, rng.choice((1, 1, 1, 4))))


def overwrite(folder: Path, rng: random.Random) -> None:
    def change(content: bytearray) -> None:
        start = rng.randrange(len(content))
        length = rng.randrange(1, 200)
        content[start : start + length] = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(length))

    rewrite_bytes(rng.choice(sorted(folder.iterdir())), change)


def truncate(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    size = path.stat().st_size
    os.truncate(path, rng.choice((0, 1, 7, 8, 9, size - 1, rng.randrange(size))))


def extend(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(256) for _ in range(rng.choice((1, 8, 5000)))))


def header_dtype(folder: Path, rng: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        own = header[rng.choice(names(header))]
        own["dtype"] = rng.choice(
            ("F32", "I32", "F16", "BF16", "I16", "U8", "I8", "BOOL", "F64", "I64", "U32", "F8_E4M3", "F8_E8M0", "F4",
             "C64", "", "f32", "torch.float32", None, 7)
        )  # fmt: skip

    rewrite_header(weights(folder, rng), change)


def header_same_size_dtype(folder: Path, rng: random.Random) -> None:
    """Another type of as many bytes, which only the checksum can tell."""
    twins = {"F32": ("I32", "U32"), "BF16": ("F16", "I16", "U16"), "U8": ("I8", "BOOL", "F8_E4M3")}

    def change(header: dict[str, Any]) -> None:
        own = header[rng.choice(names(header))]
        own["dtype"] = rng.choice(twins.get(own["dtype"], ("F16",)))

    rewrite_header(weights(folder, rng), change)


def header_shape(folder: Path, rng: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        own = header[rng.choice(names(header))]
        shape = own["shape"]
        own["shape"] = rng.choice(
            (shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [], [2**62, 4], [-1], [0], None,
             [n + rng.choice((-1, 1)) for n in shape])
        )  # fmt: skip

    rewrite_header(weights(folder, rng), change)


def header_offsets(folder: Path, rng: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        first, second = header[rng.choice(names(header))], header[rng.choice(names(header))]
        start, end = first["data_offsets"]
        first["data_offsets"] = rng.choice(
            (second["data_offsets"], [start + 1, end + 1], [end, start], [0, 2**63], [start], [-4, end], [start, start],
             [start, end + 4])
        )  # fmt: skip

    rewrite_header(weights(folder, rng), change)


def header_swap(folder: Path, rng: random.Random) -> None:
    """Two tensors change names; those of one shape where there are such."""

    def change(header: dict[str, Any]) -> None:
        one = rng.choice(names(header))
        alike = [name for name in names(header) if header[name]["shape"] == header[one]["shape"] and name != one]
        other = rng.choice(alike or names(header))
        header[one], header[other] = header[other], header[one]

    rewrite_header(weights(folder, rng), change)


def header_rename(folder: Path, rng: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        name = rng.choice(names(header))
        own = header.pop(name)
        header[rng.choice((name + "_", name[1:], name.replace("bert.", ""), "", "x" * 5000, "../" + name))] = own

    rewrite_header(weights(folder, rng), change)


def header_remove(folder: Path, rng: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        del header[rng.choice(names(header))]

    rewrite_header(weights(folder, rng), change)


def remove_tensor(folder: Path, rng: random.Random) -> None:
    """A file that is well-formed but for a tensor, its records as they were."""
    path = weights(folder, rng)
    tensors, metadata = load_file(path), metadata_of(path)
    del tensors[rng.choice(sorted(tensors))]
    save_file(tensors, path, metadata=metadata)


def duplicate_key(folder: Path, rng: random.Random) -> None:
    """A name twice in the JSON header, with the place of another tensor."""

    def change(header: dict[str, Any]) -> str:
        one, other = rng.choice(names(header)), rng.choice(names(header))
        pair = f"{json.dumps(one)}: {json.dumps(header[other])}"
        text = json.dumps(header)
        return rng.choice((f"{text[:-1]}, {pair}}}", f"{{{pair}, {text[1:]}"))

    rewrite_header(weights(folder, rng), change)


def records_removed(folder: Path, rng: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        if rng.random() < 0.2:
            header.pop("__metadata__")
        else:
            del header["__metadata__"][rng.choice(sorted(header["__metadata__"]))]

    for path in sorted(folder.glob("*.safetensors"))[: rng.choice((1, 100))]:
        rewrite_header(path, change)


def records_edited(folder: Path, rng: random.Random) -> None:
    def change(header: dict[str, Any]) -> None:
        key = rng.choice(("lowbit.checksums", "lowbit.config"))
        values = json.loads(header["__metadata__"][key])
        name = rng.choice(sorted(values))
        how = rng.randrange(5)
        if how == 0:
            del values[name]
        elif how == 1:
            values[name] = rng.choice((None, 0, -1, "x", [], {}, 1e400, 2**70))
        elif how == 2:
            values[rng.choice((name + "_", "", "x"))] = values[name]
        elif how == 3:
            values[name] = values[rng.choice(sorted(values))]
        text = rng.choice(("", "[]", "null", "7", "{", "[" * 5000)) if how == 4 else json.dumps(values)
        header["__metadata__"][key] = text

    rewrite_header(weights(folder, rng), change)


def header_length(folder: Path, rng: random.Random) -> None:
    def change(content: bytearray) -> None:
        content[:8] = struct.pack("<Q", rng.choice((0, 1, 2**63, 2**32, len(content), 100_000_001, 2**64 - 1)))

    rewrite_bytes(weights(folder, rng), change)


def header_nested(folder: Path, rng: random.Random) -> None:
    depth = rng.choice((100, 130, 10_000, 200_000))
    rewrite_header(weights(folder, rng), lambda header: '{"a":' * depth + "1" + "}" * depth)


STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1e-3, 2.5, float("nan"), float("inf"), "", "x", "8", "float64", [], {}, [1],
    {"a": 1},
)  # fmt: skip


def _sections(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Where fields of config.json are, ours more often than transformers'."""
    own = values.get("length_config")
    return [values, values["quantization_config"], values["quantization_config"], *([own] if own else [])]


def config_value(folder: Path, rng: random.Random) -> None:
    """A value that another model might have."""

    def change(values: dict[str, Any]) -> None:
        section = rng.choice(_sections(values))
        name = rng.choice(sorted(section))
        old = section[name]
        if name in ALTERNATIVES:
            section[name] = rng.choice(ALTERNATIVES[name])
        elif isinstance(old, bool):
            section[name] = not old
        elif isinstance(old, int | float):
            section[name] = rng.choice((old + 1, old * 2, old / 2, -old, 0, old - 1))
        else:
            section[name] = rng.choice(STRANGE)

    rewrite_json(folder / "config.json", change)


ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("relu", "gelu_new", "gelu_pytorch_tanh", "silu"),
    "dtype": ("float16", "bfloat16", "float64", "float32"),
    "stage": ("float", "prepared", "packed"),
    "weight_quantizer": ("twn", "bwn", "x"),
    "granularity": ("per_row", "per_tensor"),
    "embedding_granularity": ("per_row", "per_tensor"),
    "activation_granularity": ("per_token", "per_tensor"),
    "asymmetric": ([], ["query"], ["attention_probs"], "query", [["query"]], [1]),
    "modules_to_not_convert": (["pooler"], ["layer.0"], "pooler", [1], [[]], ["no such"]),
    "keep": ([1.0], [0.25], [], [0.5, 0.5], ["x"], [None], [2]),
    "unit": ("tokens", "threshold", "x"),
    "score": ("cls", "all"),
    "model_type": ("roberta", "distilbert", "electra", "albert", "gpt2", "t5", "x", ""),
    "hidden_dropout_prob": (0.0, 0.9, 1.5, -0.1),
    "attention_probs_dropout_prob": (0.0, 0.9, 1.5),
    "quant_method": ("bitsandbytes", "torchao", "gptq", "hqq", "x", ""),
}


def config_type(folder: Path, rng: random.Random) -> None:
    def change(values: dict[str, Any]) -> None:
        section = rng.choice(_sections(values))
        section[rng.choice(sorted(section))] = rng.choice(STRANGE)

    rewrite_json(folder / "config.json", change)


def config_removed(folder: Path, rng: random.Random) -> None:
    def change(values: dict[str, Any]) -> None:
        section = rng.choice(_sections(values))
        for _ in range(rng.choice((1, 1, 3))):
            section.pop(rng.choice(sorted(section)), None)

    rewrite_json(folder / "config.json", change)


def config_added(folder: Path, rng: random.Random) -> None:
    """Fields that transformers or a later lowbit may know."""

    def change(values: dict[str, Any]) -> None:
        section = rng.choice(_sections(values))
        name = rng.choice(
            ("chunk_size_feed_forward", "position_embedding_type", "attn_implementation", "_attn_implementation",
             "pruned_heads", "torch_dtype", "num_labels", "embedding_size", "tie_encoder_decoder", "is_encoder_decoder",
             "add_pooling_layer", "transformers_weights", "base_model_tp_plan", "layer_types", "rope_parameters",
             "extra", "sparsity", "length_config", "head_dim", "auto_map", "weights_only", "use_bfloat16", "__class__")
        )  # fmt: skip
        section[name] = rng.choice((*STRANGE, "relative_key", "sdpa", "flash_attention_2", {"0": [1]}, "a/b"))

    rewrite_json(folder / "config.json", change)


def config_bits(folder: Path, rng: random.Random) -> None:
    def change(values: dict[str, Any]) -> None:
        own = values["quantization_config"]
        name = rng.choice([name for name in own if name.endswith("_bits") or name in ("format_version", "split")])
        own[name] = rng.choice([value for value in (None, 1, 2, 4, 8, 3, 16, "2", 2.0, True) if value is not own[name]])

    rewrite_json(folder / "config.json", change)


SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings",
         "type_vocab_size", "num_hidden_layers")  # fmt: skip


def config_sizes(folder: Path, rng: random.Random) -> None:
    def change(values: dict[str, Any]) -> None:
        # A million layers take transformers minutes to build before lowbit is called: a hang, and rarely drawn.
        layers = rng.random() < 0.02
        name = "num_hidden_layers" if layers else rng.choice(SIZES[:-1])
        values[name] = 10**6 if layers else rng.choice((0, 1, -1, 10**6, 2**31, 2**62, 10**30, values[name] * 2))

    rewrite_json(folder / "config.json", change)


def config_layers(folder: Path, rng: random.Random) -> None:
    rewrite_json(folder / "config.json", lambda values: values.update(num_hidden_layers=rng.choice((0, 2, 3, 30, -1))))


def config_nested(folder: Path, rng: random.Random) -> None:
    depth = rng.choice((50, 500, 5_000, 100_000))
    deep = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    path = folder / "config.json"
    text = path.read_text()
    place = rng.choice(('"quantization_config": ', '"hidden_size": ', '"id2label": '))
    path.write_text(rng.choice((deep, text.replace(place, f'"extra": {deep}, {place}'))))


def config_text(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(
        rng.choice(("", "[]", "null", "7", '"x"', "{}", "\ufeff" + text, text.replace("}", ""), text + text,
                    text.replace('"', "'"), text.replace("32", "9" * 5000), text.replace("null", "NaN")))
    )  # fmt: skip


def config_class(folder: Path, rng: random.Random) -> None:
    """Another class of transformers, none, or no class."""

    def change(values: dict[str, Any]) -> None:
        values["architectures"] = rng.choice(
            (["BertModel"], ["BertForTokenClassification"], ["RobertaForSequenceClassification"], ["T5Model"],
             ["BertConfig"], ["pipeline"], ["os"], ["__version__"], ["PreTrainedModel"], ["AutoModel"], ["No such"],
             "BertModel", [1], [None], [], None)
        )  # fmt: skip

    rewrite_json(folder / "config.json", change)


def config_labels(folder: Path, rng: random.Random) -> None:
    """Names of labels are free, their number is not."""

    def change(values: dict[str, Any]) -> None:
        values["id2label"] = {str(i): rng.choice(("yes", "no", "x")) + str(i) for i in range(rng.choice((2, 3, 3, 4)))}
        values["label2id"] = {name: int(i) for i, name in values["id2label"].items()}

    rewrite_json(folder / "config.json", change)


def other_config(folder: Path, rng: random.Random) -> None:
    source = folder.parent / "bases" / rng.choice(BASES)
    shutil.copy(source / "config.json", folder / "config.json")


def other_weights(folder: Path, rng: random.Random) -> None:
    """Whole weights of a model of the same shapes and configuration: nothing is damaged, the load is the other model's.

    Of another configuration, they are refused. The case asks for no wrong mixture, so it draws other configurations.
    """
    source = folder.parent / "bases" / rng.choice(("binary", "split pair", "bfloat16", "lengths", "prepared"))
    for path in folder.glob("model*"):
        path.unlink()
    shutil.copy(source / "model.safetensors", folder / "model.safetensors")


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def index_edited(folder: Path, rng: random.Random) -> None:
    def change(values: dict[str, Any]) -> Any:
        shards = values["weight_map"]
        name = rng.choice(sorted(shards))
        how = rng.randrange(8)
        if how == 0:
            shards[name] = rng.choice(sorted(set(shards.values())))
        elif how == 1:
            del shards[name]
        elif how == 2:
            shards[rng.choice(("x", name + "_"))] = shards[name]
        elif how == 3:
            shards[name] = rng.choice(("no such.safetensors", "", ".", "config.json", "model", None, 7, [], "a\0b"))
        elif how == 4:
            values["weight_map"] = rng.choice((None, {}, [], "x", list(shards)))
        elif how == 5:
            values.pop(rng.choice(("weight_map", "metadata")))
        elif how == 6:
            return rng.choice(([], None, 7, "x"))
        else:
            gone = shards[name]
            values["weight_map"] = {key: value for key, value in shards.items() if value != gone}
        return None

    rewrite_json(index_of(folder), change)


def index_flip(folder: Path, rng: random.Random) -> None:
    rewrite_bytes(index_of(folder), lambda content: flip(content, rng))


def index_outside(folder: Path, rng: random.Random) -> None:
    """A shard is put outside, and the index leads there: by `..`, an absolute path or a link."""
    shard = weights(folder, rng)
    outside = folder.parent / f"{folder.name} outside"
    outside.mkdir()
    moved = Path(shutil.move(shard, outside / shard.name))
    how = rng.randrange(3)
    if how == 2:
        shard.symlink_to(moved)  # as caches do: allowed
        return
    to = f"../{outside.name}/{shard.name}" if how else str(moved)

    def change(values: dict[str, Any]) -> None:
        shards = values["weight_map"]
        values["weight_map"] = {name: to if file == shard.name else file for name, file in shards.items()}

    rewrite_json(index_of(folder), change)


def shards_swapped(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    aside = folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def shard_of_another(folder: Path, rng: random.Random) -> None:
    shard = weights(folder, rng)
    shutil.copy(folder.parent / "bases" / "other sharded" / shard.name, shard)


def shard_copied(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    shutil.copy(one, other)


def file_missing(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(folder.iterdir())).unlink()


def not_a_file(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    path.unlink()
    rng.choice(
        (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("nowhere"), lambda: path.symlink_to(path.name),
         lambda: path.symlink_to("/dev/null"))
    )()  # fmt: skip


def linked(folder: Path, rng: random.Random) -> None:
    """Every file a link to where it is, as in a cache."""
    store = folder.parent / f"{folder.name} outside"
    shutil.move(folder, store)
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).symlink_to(path)


def files_added(folder: Path, rng: random.Random) -> None:
    for name in rng.sample(
        ("model-00009-of-00009.safetensors", "model.fp16.safetensors", "adapter.bin", "generation_config.json",
         "tokenizer.json", "model.safetensors.index.json.old"), 3,
    ):  # fmt: skip
        (folder / name).write_bytes(bytes(rng.randrange(256) for _ in range(100)))


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.write_text, (self.canary, "code of a checkpoint ran")


def canary_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name} canary"


def pickles_planted(folder: Path, rng: random.Random) -> None:
    """Pickles that write a file when they are opened, beside the weights or in place of them."""
    if rng.random() < 0.5:
        for path in folder.glob("model*"):
            path.unlink()
    for name in rng.sample(
        ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.safetensors", "model.pkl", "scheduler.pt",
         "model.pt", "pytorch_model-00001-of-00001.bin"), rng.randrange(1, 5),
    ):  # fmt: skip
        path = folder / name
        if rng.random() < 0.5:
            path.write_bytes(pickle.dumps(Payload(canary_of(folder))))
        else:
            torch.save({"x": Payload(canary_of(folder))}, path)
    if rng.random() < 0.3:
        index = {"metadata": {}, "weight_map": {"x": "pytorch_model.bin"}}
        (folder / rng.choice(("pytorch_model.bin.index.json", index_of(folder).name))).write_text(json.dumps(index))


def code_planted(folder: Path, rng: random.Random) -> None:
    """Python files that write a file when they are imported, and a configuration that names them."""
    code = f"import pathlib\npathlib.Path({str(canary_of(folder))!r}).write_text('code of a checkpoint ran')\n"
    for name in ("modeling_bert.py", "configuration_bert.py", "__init__.py", "sitecustomize.py", "custom.py"):
        (folder / name).write_text(code + "class Own: pass\n")

    def change(values: dict[str, Any]) -> None:
        values["auto_map"] = {
            "AutoConfig": "configuration_bert.Own", "AutoModelForSequenceClassification": "modeling_bert.Own"
        }  # fmt: skip
        if rng.random() < 0.2:
            values["quantization_config"]["quant_method"] = "custom.Own"
        if rng.random() < 0.2:
            values["custom_pipelines"] = {"x": {"impl": "custom.Own"}}

    rewrite_json(folder / "config.json", change)


# Rewritten: tensors are changed and the records made anew, as a program would that uses lowbit's own code.


def metadata_of(path: Path) -> dict[str, str]:
    header = path.read_bytes()
    return json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])["__metadata__"]


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors and their checksums, in all shards."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    where = {name: file for file in files for name in load_file(file)}
    change(tensors)
    checksums = json.dumps({name: records._checksum(tensor) for name, tensor in tensors.items()})
    for file in files:
        own = {name: tensor.contiguous() for name, tensor in tensors.items() if where.get(name) == file}
        save_file(own, file, metadata={**metadata_of(file), "lowbit.checksums": checksums})


def _some(tensors: dict[str, torch.Tensor], rng: random.Random, ending: str = "") -> torch.Tensor:
    return tensors[rng.choice(sorted(name for name in tensors if name.endswith(ending)))]


def rewritten_not_finite(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        values = _some(floats, rng).view(-1)
        values[rng.randrange(len(values))] = rng.choice((float("nan"), float("inf"), float("-inf")))

    rewrite_tensors(folder, change)


def rewritten_scale(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        scale = _some(tensors, rng, "_scale" if any(name.endswith("_scale") for name in tensors) else "").view(-1)
        scale[rng.randrange(len(scale))] = rng.choice((-1.0, -1e-30, float("nan"), float("-inf"), 0.0, 1e-38, 100.0))

    rewrite_tensors(folder, change)


def rewritten_bits(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes = {name: tensor for name, tensor in tensors.items() if not tensor.is_floating_point()}
        tensor = _some(codes or tensors, rng)
        values = tensor.view(torch.uint8).view(-1)
        for _ in range(rng.choice((1, 8))):
            # Of floats the last byte alone: a flipped exponent gives numbers whose products overflow.
            place = rng.randrange(tensor.numel()) * tensor.element_size()
            values[place] ^= 1 << rng.randrange(8)

    rewrite_tensors(folder, change)


def rewritten_swap(folder: Path, rng: random.Random) -> None:
    """Weights of two modules of one shape change places."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        one = rng.choice(sorted(name for name in tensors if "attention" in name and name.endswith(".weight")))
        alike = sorted(name for name, tensor in tensors.items() if tensor.shape == tensors[one].shape)
        other = rng.choice(alike)
        tensors[one], tensors[other] = tensors[other], tensors[one]

    rewrite_tensors(folder, change)


def rewritten_shape(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = rng.choice(sorted(name for name in tensors if "classifier" not in name))
        tensor = tensors[name]
        tensors[name] = rng.choice((tensor[:-1], tensor.t().contiguous() if tensor.dim() == 2 else tensor[1:],
                                    tensor.double(), tensor.to(torch.int32), tensor.unsqueeze(0)))  # fmt: skip

    rewrite_tensors(folder, change)


def rewritten_missing(folder: Path, rng: random.Random) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[rng.choice(sorted(name for name in tensors if "pooler" not in name and "classifier" not in name))]

    rewrite_tensors(folder, change)


KINDS: dict[str, Damage] = {
    "bit flipped in the weights": bit_flip,
    "bit flipped in the header": header_flip,
    "bits flipped in config.json": config_flip,
    "bit flipped in the index": index_flip,
    "bytes overwritten": overwrite,
    "truncated": truncate,
    "extended": extend,
    "header: another type": header_dtype,
    "header: a type of the same size": header_same_size_dtype,
    "header: shape": header_shape,
    "header: offsets": header_offsets,
    "header: names swapped": header_swap,
    "header: renamed": header_rename,
    "header: entry removed": header_remove,
    "header: key twice": duplicate_key,
    "header: length": header_length,
    "header: nested deeply": header_nested,
    "tensor removed": remove_tensor,
    "records removed": records_removed,
    "records edited": records_edited,
    "config.json: values": config_value,
    "config.json: types": config_type,
    "config.json: fields removed": config_removed,
    "config.json: fields added": config_added,
    "config.json: bits": config_bits,
    "config.json: sizes": config_sizes,
    "config.json: layers": config_layers,
    "config.json: nested deeply": config_nested,
    "config.json: text": config_text,
    "config.json: labels": config_labels,
    "config.json: class": config_class,
    "config.json of another model": other_config,
    "weights of another model": other_weights,
    "index edited": index_edited,
    "index leads outside": index_outside,
    "shards swapped": shards_swapped,
    "shard of another model": shard_of_another,
    "shard copied over another": shard_copied,
    "file missing": file_missing,
    "not a regular file": not_a_file,
    "all files links": linked,
    "files added": files_added,
    "pickles planted": pickles_planted,
    "code planted": code_planted,
    "rewritten: NaN or infinity": rewritten_not_finite,
    "rewritten: scale": rewritten_scale,
    "rewritten: bits": rewritten_bits,
    "rewritten: weights swapped": rewritten_swap,
    "rewritten: shape or type": rewritten_shape,
    "rewritten: tensor missing": rewritten_missing,
}
SHARDED = {index_flip, index_edited, index_outside, shards_swapped, shard_of_another, shard_copied}
