"""What is in a checkpoint: modules, their bits, shapes, bytes, scales and zeros, read tensor by tensor.

Float checkpoints are read without transformers. Those of lowbit are laid over the model's modules on the meta device,
which know how many values a packed row holds; no weight is loaded into a model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files.records import checksums_of
from .weights import pickled, weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


@dataclass(frozen=True)
class Module:
    """One module of a checkpoint.

    Attributes:
        kind: "ternary", "binary", "split" (a pair of binary planes), "int8", or "float"; a module in training is
            "ternary, in training" and so on: its file holds floats.
        bits: of a weight once packed: 2, 1, 8, twice 1 in a pair; of a float its size.
        shape: of the weight, unpacked.
        bytes: of all tensors of the module in the file.
        scale: the least and the largest scale; None where there is none.
        sparsity: share of zeros among the (quantized) weights; None for a pair, whose sum has hardly any.
    """

    name: str
    part: str
    kind: str
    bits: int
    shape: tuple[int, ...]
    bytes: int
    scale: tuple[float, float] | None
    sparsity: float | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any stage.

    Attributes:
        stage: "float", "prepared" or "packed"; or the quantization method of another library.
        config: its `LowbitConfig` as in config.json, None without.
        checksums: tensors whose CRC-32 was compared; 0 in files without.
        damaged: tensors that do not match.
        float_decoder: name of a packed model's decoder that is float and has a table of its own; None where none has.
    """

    path: str
    model_class: str
    stage: str
    config: dict[str, Any] | None
    length_config: dict[str, Any] | None
    exit_config: dict[str, Any] | None
    bytes: int
    checksums: int
    damaged: tuple[str, ...]
    modules: tuple[Module, ...]
    float_decoder: str | None = None

    def parts(self) -> dict[str, int]:
        """Bytes by part and kind, the largest first."""
        found: dict[str, int] = defaultdict(int)
        for module in self.modules:
            found[f"{module.part}, {module.kind}"] += module.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with `parts`."""
        return {**asdict(self), "parts": self.parts()}


def read(folder: Path) -> Checkpoint:
    """Read all that config.json and the files of weights say.

    Args:
        folder: the model's own.

    Raises:
        FileNotFoundError: no weights.
        CheckpointError: a file that is none, or not the one that config.json describes.
    """
    files = weight_files(folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config")
    stage = "float"
    if quantization:
        ours = quantization.get("quant_method") == "lowbit"
        stage = quantization.get("stage", "float") if ours else str(quantization.get("quant_method"))
    built, decoder = _quantized_modules(folder, quantization) if stage in ("prepared", "packed") else ({}, None)
    modules, damaged, checked = [], [], 0
    for name, tensors, problems, compared in _grouped(files):
        modules.append(_module(name, tensors, built.get(name)))
        damaged += problems
        checked += compared
    own_table = any(each.name == decoder and each.kind == "float" and len(each.shape) == 2 for each in modules)
    if missing := built.keys() - {module.name for module in modules}:
        raise CheckpointError(f"{folder}: no tensors of {sorted(missing)[0]}, which config.json describes")
    return Checkpoint(
        path=str(folder),
        model_class=(config.get("architectures") or ["unknown"])[0],
        stage=stage,
        config=quantization,
        length_config=config.get("length_config"),
        exit_config=config.get("exit_config"),
        bytes=sum(file.stat().st_size for file in files),
        checksums=checked,
        damaged=tuple(damaged),
        modules=tuple(modules),
        float_decoder=decoder if own_table and stage == "packed" else None,
    )


def _grouped(files: list[Path]) -> Iterator[tuple[str, dict[str, torch.Tensor], list[str], int]]:
    """Module name, its tensors, those of them that do not match their checksum, and how many have one."""
    checksums: dict[str, int] = {}
    checksum: Any = None
    members: dict[str, dict[str, Callable[[str], torch.Tensor]]] = defaultdict(dict)  # of a module: tensors' full names
    with ExitStack() as stack:
        for path in files:
            if path.suffix != ".safetensors":
                names, read_one = (tensors := pickled(path)).keys(), tensors.__getitem__
            else:
                try:
                    file = stack.enter_context(safe_open(path, framework="pt"))
                    recorded, checksum = checksums_of(path, file.metadata() or {})
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
                checksums |= recorded
                names, read_one = file.keys(), file.get_tensor
            for name in names:
                members[name.rpartition(".")[0]][name] = read_one
        for module, readers in sorted(members.items(), key=lambda item: _natural(item[0])):
            group = {name: read_one(name) for name, read_one in readers.items()}
            compared = [name for name in group if name in checksums]
            damaged = [name for name in compared if checksum(group[name]) != checksums[name]]
            yield module, {name.rpartition(".")[2]: tensor for name, tensor in group.items()}, damaged, len(compared)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Layer 10 after layer 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split(".")]


def _quantized_modules(folder: Path, quantization: dict[str, Any]) -> tuple[dict[str, nn.Module], str | None]:
    """The lowbit modules that a model of the checkpoint has, without weights, and the name of its decoder.

    Not those whose weight another module has in the file.
    """
    import transformers

    from ..config import LowbitConfig
    from ..models import decoder
    from ..nn import QuantDecoder, QuantEmbedding, QuantLinear
    from ..nn._packed import Packed
    from ..stages.build import build

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
            build(model, LowbitConfig.from_dict(quantization))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    kinds = (Packed, QuantLinear, QuantEmbedding, QuantDecoder)
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and f"{name}.weight" not in model.all_tied_weights_keys
    }
    return found, None if (scores := decoder(model)) is None else scores[0]


def _module(name: str, tensors: dict[str, torch.Tensor], built: nn.Module | None) -> Module:
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    part = _part(name)
    weight = tensors.get("weight")
    if built is None or weight is None:
        largest = max(tensors.values(), key=torch.Tensor.numel)
        weight = largest if weight is None else weight
        zeros = (weight == 0).float().mean().item() if weight.numel() and weight.is_floating_point() else None
        kind = "float" if weight.is_floating_point() else str(weight.dtype).removeprefix("torch.")
        return Module(name, part, kind, 8 * weight.element_size(), tuple(weight.shape), stored, None, zeros)
    try:
        kind, codes, scale = _codes(built, tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name} is not what config.json describes: {error}") from error
    bits = {"ternary": 2, "binary": 1, "split": 2, "int8": 8}[kind.partition(",")[0]]
    zeros = None if codes.dim() == 3 else (codes == 0).float().mean().item()
    span = (scale.min().item(), scale.max().item())
    return Module(name, part, kind, bits, tuple(codes.shape), stored, span, zeros)


def _codes(module: Any, tensors: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Kind, codes [N, K] (of a pair [2, N, K]) and scales of a lowbit module."""
    from lowbit_kernels import unpack_binary, unpack_split, unpack_ternary

    from ..nn._packed import Packed
    from ..nn.embedding import table_codes
    from ..quantizers import WEIGHT_QUANTIZERS, weight_codes

    weight = tensors["weight"]
    if not isinstance(module, Packed):  # a latent float weight: what it would be packed to now
        quantizer = getattr(module, "quantizer", None)
        if quantizer is None:
            codes, scale = table_codes(weight, module.bits, module.granularity)
            bits = module.bits
        else:
            codes, scale = weight_codes(weight, quantizer, module.granularity)
            bits = WEIGHT_QUANTIZERS[quantizer][0]
        kind = "split" if codes.dim() == 3 else {2: "ternary", 1: "binary", 8: "int8"}[bits]
        return f"{kind}, in training", codes, scale
    K, kind, weight = module.row_length, module.layout, module.from_file(weight)
    if kind == "int8":
        codes = weight
    elif kind == "split":
        codes = torch.stack(unpack_split(weight, K))
    else:
        codes = (unpack_binary if kind == "binary" else unpack_ternary)(weight, K)
    return kind, codes, tensors["weight_scale"]


def _part(name: str) -> str:
    """Where in a model a module is, by its name."""
    parts = name.split(".")
    if any("embeddings" in part for part in parts):
        return "embeddings"
    if any(part.isdigit() for part in parts):
        return "attention" if any("attention" in part for part in parts) else "feed-forward"
    return "pooler" if "pooler" in parts else "head"
