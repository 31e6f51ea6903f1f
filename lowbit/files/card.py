"""Model cards: the README.md of a saved model, with what its bits, sizes and measured results are.

`save_pretrained` writes a card without results where the folder has no card that a person wrote. One with results:

    card = lowbit.card.model_card(model, results={"accuracy": 0.91}, teacher="org/bert-sst2", task="sst2")
    card.save("bert-2bit/README.md")
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_kernels import archive_bytes

from .. import models
from ..config import LengthConfig, LowbitConfig
from ..errors import check_import
from ..nn import PackedDecoder, QuantDecoder
from ..nn._packed import Packed
from . import weights

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard
    from transformers import PreTrainedModel

FILE = "README.md"
_MARK = re.compile(r"\n<!-- lowbit ([0-9a-f]{8}): written again with the model, unless edited -->\n*\Z")
_GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
_DATASETS = {**dict.fromkeys(_GLUE, "nyu-mll/glue"), "squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}
# Ending of a head's class name -> the pipeline that runs it.
_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForMultipleChoice": "multiple-choice",
}


def model_card(
    model: PreTrainedModel,
    *,
    results: Mapping[str, float] | None = None,
    teacher: str | PreTrainedModel | None = None,
    teacher_results: Mapping[str, float] | None = None,
    task: str | None = None,
    command: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """A card that says what is quantized, to how many bits, how large it is, and what was measured.

    Args:
        model: slimmed, prepared or packed.
        results: metric -> value as measured, on the validation split of `task`.
        teacher: Hub id or model that was quantized or distilled from; `base_model` on the Hub where it is a Hub id.
        teacher_results: the same metrics, of the teacher.
        task: "sst2", "squad" or any other name of what `results` were measured on.
        command: that trained and measured the model.
        tags: more of them.

    Returns:
        `huggingface_hub.ModelCard`: `card.save(path)`, `card.data`, `card.text`.

    Raises:
        ValueError: not a model of lowbit, or results without a task.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = getattr(model.config, "quantization_config", None)
    check_import(config, LowbitConfig, f"this {type(model).__name__}")
    if not isinstance(config, LowbitConfig):
        raise ValueError(f"{type(model).__name__} is a float model; model_card takes one that lowbit has changed")
    if results and task is None:
        raise ValueError(f"results={dict(results)} without a task; say what they were measured on: task='sst2'")
    head = type(model).__name__.removeprefix("FSDP")  # fully_shard gives models a class of their own
    pipeline = next((name for ending, name in _PIPELINES.items() if head.endswith(ending)), None)
    if model is model.base_model:
        pipeline = "feature-extraction"
    parent = _name(teacher if teacher is not None else model)
    hub_id = parent if parent and re.fullmatch(r"[\w.-]+/[\w.-]+", parent) and not Path(parent).exists() else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline,
        base_model=hub_id,
        base_model_relation="quantized" if hub_id else None,
        datasets=[_DATASETS[task]] if task in _DATASETS else None,
        metrics=sorted(results) if results else None,
        tags=["lowbit", *_kinds(config), *tags],
        model_name=_title(config, parent, head) if results else None,
        eval_results=_eval_results(results, task, pipeline or head) if results and task else None,
    )
    parts = [
        f"# {_title(config, parent, head)}",
        _description(model, config, parent, head),
        _sizes(model, config),
        _usage(head),
        _measured(results, teacher_results, task),
        f"## Training\n\n```bash\n{command}\n```" if command else "",
    ]
    text = "\n\n".join(part for part in parts if part)
    if not (results or teacher is not None or task or command):
        text = f"{text}\n\n<!-- lowbit {_checksum(text)}: written again with the model, unless edited -->"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n", ignore_metadata_errors=True)


def may_write(path: Path) -> bool:
    """Whether there is no card at `path`, or one that `save_pretrained` wrote and nobody has edited since."""
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A---\n.*?\n---\n\n", "", text, flags=re.DOTALL)
    mark = _MARK.search(text)
    return mark is not None and _checksum(text[: mark.start()].rstrip("\n")) == mark[1]


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _name(model: str | PreTrainedModel) -> str | None:
    """A Hub id as it is, of a folder its last part (paths are nobody's business), None where there is no name."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        return None
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else Path(name).name


def _bits(config: LowbitConfig) -> str:
    """W-E-A as the papers write it: 2-2-8; 32 for what is float."""
    return "-".join(str(bits or 32) for bits in (config.weight_bits, config.embedding_bits, config.activation_bits))


def _kinds(config: LowbitConfig) -> list[str]:
    if config.stage == "float":
        return ["slim"]
    return [{2: "ternary", 1: "binary", None: "quantized"}[config.weight_bits], _bits(config)]


def _title(config: LowbitConfig, parent: str | None, head: str) -> str:
    what = "slim" if config.stage == "float" else _bits(config)
    return f"{(parent or head).rpartition('/')[2]} {what}"


def _description(model: PreTrainedModel, config: LowbitConfig, parent: str | None, head: str) -> str:
    source = f", made from `{parent}`" if parent else ""
    if config.stage == "float":
        lines = [f"`{head}`{source}, float, with {_heads(config)}."]
    else:
        kind = {2: "ternary (2-bit)", 1: "binary (1-bit)", None: "float"}[config.weight_bits]
        pairs = ", each the sum of a pair of binary matrices" if config.split else ""
        packed = "packed" if config.stage == "packed" else "prepared for training (the file holds floats)"
        lines = [
            f"`{head}`{source}, quantized with lowbit, {packed}. Bits of weights, embeddings and "
            f"activations: **{_bits(config)}**.",
            "",
            f"- linear weights: {kind}{pairs}, scales {_words(config.granularity)}",
            f"- word embedding: {_width(config.embedding_bits)}; position embedding: "
            f"{_width(config.position_embedding_bits)}",
            *_decoder(model),
            f"- activations: {_width(config.activation_bits)}, {_words(config.activation_granularity)}; attention "
            f"{'quantized too' if config.quantize_attention and config.activation_bits else 'float'}",
        ]
        if config.num_attention_heads is not None:
            lines.append(f"- width: {_heads(config)}")
        if config.modules_to_not_convert:
            lines.append(f"- left in float: {', '.join(f'`{name}`' for name in config.modules_to_not_convert)}")
    lengths = getattr(model.config, "length_config", None)
    if lengths is not None:
        keep = LengthConfig.from_dict(lengths)
        lines.append(f"- tokens kept by the layers ({keep.unit}): {', '.join(f'{k:g}' for k in keep.keep)}")
    exits = getattr(model.config, "exit_config", None)
    if exits is not None:
        lines.append(f"- {exits_in_words(exits)}")
    return "\n".join(lines)


def _heads(config: LowbitConfig) -> str:
    heads = config.num_attention_heads
    if isinstance(heads, list):
        return f"{', '.join(map(str, heads))} attention heads in layers 0 to {len(heads) - 1}"
    return f"{'all' if heads is None else heads} attention heads a layer"


def exits_in_words(config: Mapping[str, Any]) -> str:
    """What the `exit_config` of a model says: its ramps, and by which criterion sentences leave."""
    layers, criterion = ", ".join(map(str, config["layers"])), config["criterion"]
    leave = "none is used"
    if criterion is not None:
        given = {name: value for name, value in criterion.items() if name != "name" and value is not None}
        leave = f"sentences leave by {criterion['name']}({', '.join(f'{name}={v:g}' for name, v in given.items())})"
    return f"early exits ({config['kind']}) behind layers {layers}; {leave}"


def _decoder(model: PreTrainedModel) -> list[str]:
    """What the decoder of a head that scores words is stored in: it may be most of the file."""
    found, size = models.decoder(model), models.float_decoder_bytes(model)
    if found is None:
        return []
    if isinstance(found[1], PackedDecoder | QuantDecoder):
        return ["- decoder: 8 bits, scales per row"]
    own = f"a table of its own of {size / 1e6:.2f} MB (`output_embedding_bits=8` stores it in 8 bits)"
    return [f"- decoder: float, {own if size else 'the table of the word embedding'}"]


def _words(granularity: str) -> str:
    return granularity.replace("_", " ")


def _width(bits: int | None) -> str:
    return "float" if bits is None else f"{bits} bit{'s' if bits > 1 else ''}"


def sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the model's tensors in its file, and of the same tensors as float32."""
    saved = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]  # tied ones once
    tensors = [tensor for name, tensor in named if name in saved]
    stored = sum(tensor.nbytes for tensor in tensors)
    as_float = sum(4 * tensor.numel() for tensor in tensors)
    version = getattr(model.config.quantization_config, "format_version", 1)
    for module in model.modules():
        if not isinstance(module, Packed):
            continue
        rows = module.weight.shape[0]
        as_float += 4 * (rows * module.row_length - module.weight.numel() - module.weight_scale.numel())
    for module in weights.archived(model, version).values():
        stored += module.weight.shape[0] * archive_bytes(module.row_length, module.layout) - module.weight.nbytes
    return stored, as_float


def _sizes(model: PreTrainedModel, config: LowbitConfig) -> str:
    stored, as_float = sizes(model)
    times = f", {as_float / stored:.1f} times as large as packed" if config.stage == "packed" else ""
    return (
        "## Size\n\n| | MB |\n| --- | --- |\n"
        f"| weights in this folder | {stored / 1e6:.2f} |\n| the same as float32{times} | {as_float / 1e6:.2f} |"
    )


def _usage(head: str) -> str:
    return (
        "## Use\n\nWith lowbit installed:\n\n```python\nimport lowbit  # registers with transformers\n"
        f'from transformers import {head}\n\nmodel = {head}.from_pretrained("folder or Hub id")\n```'
    )


def _eval_results(results: Mapping[str, float], task: str, pipeline: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=_DATASETS.get(task, task),
            dataset_name=task,
            dataset_config=task if task in _GLUE else None,
            dataset_split="validation",
            metric_type=metric,
            metric_value=float(value),
        )
        for metric, value in results.items()
    ]


def _measured(results: Mapping[str, float] | None, teacher: Mapping[str, float] | None, task: str | None) -> str:
    if not results:
        return "## Results\n\nNot measured."
    teacher = teacher or {}
    rows = [
        f"| {metric} | {value:.4g} | {f'{teacher[metric]:.4g}' if metric in teacher else 'not measured'} |"
        for metric, value in results.items()
    ]
    head = f"## Results\n\nOn the validation split of {task}:\n\n| | this model | teacher |\n| --- | --- | --- |"
    return "\n".join([head, *rows])
