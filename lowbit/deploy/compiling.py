"""torch.compile, layer by layer: all layers share one compilation, which takes seconds instead of a minute.

On a CPU it needs a C++ compiler. Where torch's int8 products run, it about halves the latency of a packed BERT:
Inductor turns quantization, softmax, LayerNorm, GELU and the epilogues of the products into a few loops. lowbit's own
CPU kernels leave little of that to do, and in a fused model next to nothing.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from lowbit_kernels.native import cpp_compiler

from .. import models
from ..nn import UnpaddedEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Compile the encoder layers of a model in place; the first forward of a new kind of shape takes seconds.

    Compile after `lowbit.fuse` and `lowbit.set_length`, which replace what is compiled.

    Args:
        model: of an architecture that `lowbit.models` describes, usually packed.
        **options: of `torch.compile`, `dynamic=True` say.

    Returns:
        The same model. Outputs may differ in rounding: where an activation lies on a tie between two codes.

    Raises:
        RuntimeError: a model on the CPU, and no C++ compiler.
        TypeError, ValueError: not a supported model.
    """
    layers = [layer for _, layer in models.layers(model)]
    if model.device.type == "cpu":
        check_compiler()
    encoders = [module for module in model.modules() if isinstance(module, UnpaddedEncoder)]
    for encoder in encoders:
        encoder.compile_layers(**options)
    for layer in [] if encoders else layers:
        layer.compile(**options)
    return model


def check_compiler() -> None:
    """Raise RuntimeError where Inductor finds no C++ compiler for what it makes for a CPU."""
    name, command = cpp_compiler()
    if command and shutil.which(name) is None:
        raise RuntimeError(
            f"torch.compile on a CPU takes the name or path of one program from CXX, as it is, and got CXX={name!r}; "
            "name a compiler, or a script that calls it so, before torch is imported"
        )
    if not command:
        raise RuntimeError(
            f"torch.compile on a CPU needs a C++ compiler and found no {name!r}; install one (apt install g++) or name "
            "another in CXX, or run the model as it is"
        )
