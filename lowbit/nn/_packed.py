"""What packed modules share: codes and float32 scales survive `.half()`, bad codes and tracers of float are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C import _get_tracing_state  # `torch.jit.is_tracing` takes twice as long, and runs in every module

from lowbit_kernels import archive_bytes, from_archive


class Packed(nn.Module):
    """A module with packed `weight` codes (uint8 or int8) and float32 `weight_scale` buffers."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    layout: str
    row_length: int  # codes a row

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Packed:
        """Move with the module, but keep the scales float32: half precision would change what was trained."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the form of files, rows without padding, too: `Trainer` resumes from them by `load_state_dict`."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None:
            state_dict = {**state_dict, f"{prefix}weight": self.from_file(weight)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def from_file(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as this module holds it, of one as files of any format version do; ValueError for damaged bytes."""
        if self.layout == "int8" or weight.dtype != torch.uint8:
            return weight
        if weight.shape[-1] != archive_bytes(self.row_length, self.layout):
            return weight  # the module's form, or none: rows of the two forms have one length only where they are equal
        return from_archive(weight, self.row_length, self.layout)

    @staticmethod
    def check_finite(scale: torch.Tensor) -> None:
        """Raise ValueError where a scale is NaN, infinite or negative: the float weight was not finite."""
        if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
            raise ValueError("the weight holds NaN or infinity and cannot be quantized; check the float model")

    def problems(self) -> str | None:
        """What is wrong with the loaded codes and scales, in words; None if nothing."""
        if not bool(torch.isfinite(self.weight_scale).all()) or bool((self.weight_scale < 0).any()):
            return "weight_scale must be finite and not negative"
        if self.layout == "ternary":
            for part in self.weight.split(4096):  # a whole word embedding would take as much memory again
                if bool((part & (part >> 1) & 0x55).any()):
                    return "ternary codes must be 0, 1 or 2, found 3"
        return None


def refuse_tracing() -> None:
    """Raise RuntimeError inside of torch.jit.trace and torch.onnx.export, which take no packed codes.

    `torch.compile` and `torch.export` do.
    """
    if _get_tracing_state() or (torch.compiler.is_exporting() and _for_onnx()):
        raise RuntimeError(
            "torch.jit.trace and torch.onnx.export take no packed model: its weights are codes that only lowbit's "
            "kernels read. For a file that runs without lowbit call lowbit.export(model, 'model.pt2'), which makes an "
            "AOTInductor package; for ONNX or TorchScript make it a float model first: model.dequantize()"
        )


@torch.compiler.assume_constant_result  # or dynamo, which the exporter tries when this has raised, takes it for False
def _for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()
