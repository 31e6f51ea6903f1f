"""A proof by trying: do layers without padding compute what a model's own layers compute?

What an encoder runs is taken from an `Architecture`, which says how layers of a type are built, not how those of this
very model are: users replace activations, linears and whole layers, and derive classes. So a model's own encoder is
run on a few tokens, what enters and leaves every layer is noted, and each layer is run on the same without padding.
Codes flip where an activation lies on a tie between two, in few tokens; another function differs in most.

Takes two forward passes of 25 tokens, in float32 on the CPU (of a copy, where the model is elsewhere).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...models import Architecture
from ...quantizers import ActivationQuantizer
from .aside import trying
from .sequences import Sequences

_SITES = ("query", "key", "value", "attention_probs")
_SHAPES = ((2, 12), (1, 1))  # of the batches that are tried; all sequences together without padding
_TYPICAL = 2e-3  # relative error of the token in the middle: no code of it has flipped
_LITTLE = 0.01  # of all tokens together: of few columns a code more or less is much
_IN_ALL = {None: 0.01, 8: 0.1, 4: 0.5}  # of all tokens together, by the bits of activations


def attention_options(architecture: Architecture, layer: nn.Module) -> dict[str, Any]:
    """Of `lowbit_kernels.attention`, for a layer: how it scales its scores, and its quantizers (none: float)."""
    module: Any = layer.get_submodule(architecture.attention)
    options: dict[str, Any] = {"scaling": getattr(module, "scaling", architecture.head_dim(layer) ** -0.5)}
    quantizers = getattr(module, "quantizers", None)
    if quantizers:
        options["bits"] = quantizers["query"].bits
        options["asymmetric"] = tuple(site for site in _SITES if not quantizers[site].symmetric)
    return options


def prove(encoder: Any) -> str | None:
    """Why an `UnpaddedEncoder` cannot run its layers without padding, in words; None where it can.

    Args:
        encoder: whose layers are looked at and tried; it is left as it was.
    """
    try:
        for number, layer in enumerate(encoder.layer):
            if problem := _unknown(encoder.architecture, layer):
                return f"layer.{number}{problem}"
        if problem := encoder.problem():
            return str(problem)
        tensors = [*encoder.layer.parameters(), *encoder.layer.buffers()]
        # Offloaded, or sharded by FSDP2: what is not here is not tried.
        if any(tensor.is_meta or hasattr(tensor, "full_tensor") for tensor in tensors):
            return None
        if any(tensor.device.type != "cpu" or is_half(tensor) for tensor in tensors):
            encoder = copy.deepcopy(encoder).cpu().float()
        return _difference(encoder)
    except Exception as error:  # of modules that may be anything
        return f"its layers cannot be tried on a few tokens ({type(error).__name__}: {error})"


def is_half(tensor: torch.Tensor) -> bool:
    """Whether its rounding would hide what is to be seen."""
    return tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)


def _unknown(architecture: Architecture, layer: nn.Module) -> str | None:
    """What a layer lacks, or has besides, so that an architecture cannot speak of it."""
    called = architecture.called()
    known = (*called, architecture.attention)
    lacking = next((path for path in known if not _has(layer, path)), None)
    if lacking is not None:
        return f" has no {lacking}"
    for name, module in layer.named_modules():
        inside = any(f"{name}.".startswith(f"{path}.") for path in known)
        if not inside and (module._parameters or module._buffers):
            return f".{name} ({type(module).__name__}) has parameters of its own, and is no part of the architecture"
        if "forward" in module.__dict__ and not hasattr(module, "_hf_hook") and name not in called:
            return f"{'.' if name else ''}{name} has a forward of its own"
    return None


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _difference(encoder: Any) -> str | None:
    """Where the layers of an encoder on the CPU, and the same layers without padding, begin to differ."""
    norm: Any = encoder.layer[0].get_submodule(encoder.architecture.attention_norm)
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(*shape, norm.normalized_shape[0], generator=generator, dtype=norm.weight.dtype, device="cpu")
        for shape in _SHAPES
    ]
    with trying(encoder) as encoder:
        passes = []
        for states in batches:
            calls = _by_layer(encoder.original, encoder.layer, states)
            if isinstance(calls, str):
                return calls
            passes.append(calls)
        lengths = [length for rows, length in _SHAPES for _ in range(rows)]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        sequences = Sequences(starts, max(lengths), starts)
        bits = next((each.bits for each in encoder.layer.modules() if isinstance(each, ActivationQuantizer)), None)
        for number in range(len(encoder.layer)):
            before, expected = (torch.cat([calls[number][place].flatten(0, 1) for calls in passes]) for place in (0, 1))
            error = (encoder.one_layer(number, before, sequences) - expected).double()
            relative = error.norm(dim=-1) / expected.double().norm(dim=-1).clamp(min=1e-12)
            total = float(error.norm() / expected.double().norm().clamp(min=1e-12))
            rounding = float(relative.median()) <= _TYPICAL or total <= _LITTLE
            if not (rounding and total <= _IN_ALL[bits]):  # not `>`: NaN
                return (
                    f"layer.{number} computes something else than a layer of this architecture (relative difference "
                    f"{total:.2g} on {len(before)} random tokens)"
                )
    return None


def _by_layer(original: nn.Module, layers: Any, states: torch.Tensor) -> str | list[tuple[torch.Tensor, torch.Tensor]]:
    """What enters and leaves each layer of transformers' encoder; in words where it does more than to run them."""
    calls: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        calls.append((layer, args[0] if args else kwargs["hidden_states"], output))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in dict.fromkeys(layers)]
    try:
        result = original.forward(states, None)
    finally:
        for hook in hooks:
            hook.remove()
    result = result[0] if isinstance(result, tuple) else result.last_hidden_state
    ends = [states, *(output for _, _, output in calls)]
    begins = [*(given for _, given, _ in calls), result]
    if [layer for layer, _, _ in calls] != list(layers) or not all(map(torch.equal, ends, begins)):
        return f"{type(original).__name__} does more than to run its layers one after the other"
    return [(given, output) for _, given, output in calls]
