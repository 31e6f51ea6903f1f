"""A packed model as an AOTInductor package: one file that runs without lowbit, transformers or a Python model.

    lowbit.export(model, "model.pt2")
    run = torch._inductor.aoti_load_package("model.pt2")          # in any process; a C++ one too, with libtorch
    run(input_ids=ids, attention_mask=mask, token_type_ids=types)["logits"]

`torch.export.export` traces the model, the two ops of lowbit that stay opaque on a CPU are replaced by torch's own, and
Inductor compiles the rest. Weights keep their 2 or 1 bits in the file.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import models
from ..files.stage import current_config
from ..nn import UnpaddedEncoder
from .compiling import check_compiler

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _TensorsByName(nn.Module):
    """The model with a plain dict for its output: transformers' classes cannot be read where it is not installed."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return dict(self.model(input_ids=input_ids, attention_mask=attention_mask, **types, return_dict=True).items())


def program(model: PreTrainedModel) -> torch.export.ExportedProgram:
    """The model as a `torch.export` program of torch's own ops, for any batch size and length.

    Args:
        model: packed, on the CPU, in eval mode.

    Returns:
        A program of keyword arguments `input_ids`, `attention_mask` and, where the model has several token types,
        `token_type_ids`, int64 [B, S] each, to a dict of the outputs that the model gives without labels.

    Raises:
        TypeError, ValueError: not a supported model, not packed, not on the CPU, in training mode, dropping tokens, or
            a multiple-choice head.
    """
    _check(model)
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 1) > 1:
        names.append("token_type_ids")
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=models.longest(model))
    # Of a size that is not traced as if it were the only one, which 0 and 1 are.
    inputs = {name: torch.ones(2, 7, dtype=torch.int64) for name in names}
    shapes = {name: {0: batch, 1: length} for name in names}
    with torch.no_grad():
        exported = torch.export.export(_TensorsByName(model), (), kwargs=inputs, dynamic_shapes=shapes)
    from lowbit_kernels.decompositions import TABLE

    return exported.run_decompositions(TABLE)


def export(model: PreTrainedModel, path: str | os.PathLike[str], **options: Any) -> Path:
    """Compile a packed model to an AOTInductor package for any batch size and length; takes a minute or more.

    Args:
        model: packed, on the CPU, in eval mode; a fused one is exported by its modules.
        path: of the package, which ends in ".pt2"; written aside and renamed.
        **options: of Inductor (`inductor_configs` of `torch._inductor.aoti_compile_and_package`).

    Returns:
        The path. See `program` for the arguments and results of what
        `torch._inductor.aoti_load_package` makes of it. Outputs differ from the model's in rounding, as those of
        `lowbit.compile`. Ids outside the table are an error of the package's or undefined, not an IndexError.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        RuntimeError: no C++ compiler.
        TypeError, ValueError: a model that `program` does not take, or another ending of the path.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"an AOTInductor package is a file that ends in '.pt2', got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder, so {path.name} cannot be written there")
    _check(model)
    check_compiler()  # before minutes of tracing
    exported = program(model)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        torch._inductor.aoti_compile_and_package(exported, package_path=str(aside), inductor_configs=options)
        os.replace(aside, path)
    return path


def _check(model: PreTrainedModel) -> None:
    models.describe(model)
    stage = current_config(model).stage
    if stage != "packed":
        raise ValueError(f"lowbit.export takes a packed model, this one is {stage}; call lowbit.convert or quantize")
    if model.device.type != "cpu":
        raise ValueError(f"lowbit.export compiles for the CPU, the model is on {model.device}; move it with .to('cpu')")
    if model.training:
        raise ValueError("lowbit.export takes a model in eval mode; call model.eval()")
    if any(isinstance(module, UnpaddedEncoder) and module.lengths is not None for module in model.modules()):
        raise ValueError(
            "a model that drops tokens has sizes that depend on its input, which an exported program cannot have; "
            "lowbit.set_length(model, None) keeps all tokens"
        )
    if getattr(getattr(model, "exits", None), "criterion", None) is not None:
        raise ValueError(
            "sentences leave this model early, which an exported program cannot do; lowbit.set_exit(model, None) "
            "runs all layers"
        )
    if type(model).__name__.endswith("ForMultipleChoice"):
        raise ValueError("lowbit.export takes inputs [B, S], a multiple-choice head reads [B, choices, S]")
