"""Quantizers of weights and the packer."""

from __future__ import annotations

import functools
import itertools

import torch

from lowbit_kernels import packing, reference
from lowbit_kernels.split import gpu as split_gpu
from lowbit_kernels.weights import gpu as weights_gpu

from ..trial import Case, Tensors, Trial, guarded, off_by


def _codes(got: Tensors, want: tuple[torch.Tensor, torch.Tensor], flips: int) -> int:
    """Scales to float32 sums; `flips` weights at a threshold may take the other code, which moves the scale too."""
    found = off_by(got[1], want[1], (1e-5 if flips == 0 else 1e-3) * want[1].abs())
    other = off_by(got[0], want[0])
    return found + (other if other > flips else 0)


def _ternarize(shape: tuple[int, int], per_row: bool, iterations: int | None) -> Trial:
    w = guarded(torch.randn(shape))
    curvature = None if iterations is None else guarded(torch.rand(shape) ** 4 + 1e-3)
    granularity = "per_row" if per_row else "per_tensor"
    want = reference.ternarize(w, granularity=granularity, curvature=curvature, iterations=iterations or 0)
    return Trial(
        [w, curvature],
        lambda: weights_gpu.launch_ternarize(w, per_row, curvature, iterations or 0),
        lambda got: _codes(got, want, 2),
    )


def _binarize(shape: tuple[int, int], per_row: bool) -> Trial:
    w = guarded(torch.randn(shape))
    want = reference.binarize(w, granularity="per_row" if per_row else "per_tensor")
    return Trial([w], lambda: weights_gpu.launch_binarize(w, per_row), lambda got: _codes(got, want, 0))


def _split(shape: tuple[int, int], per_row: bool) -> Trial:
    w = guarded(torch.randn(shape))
    want = reference.split_ternary(w, granularity="per_row" if per_row else "per_tensor")

    def wrong(got: Tensors) -> int:
        return sum(off_by(a, b, 1e-6 + 1e-5 * b.abs()) for a, b in zip(got, want, strict=True))

    return Trial([w], lambda: split_gpu.launch_split(w, per_row), wrong)


def _pack(layout: str, N: int, K: int) -> Trial:
    signs = torch.randint(0, 2, (2, N, K), dtype=torch.int8) * 2 - 1
    codes = {"ternary": torch.randint(-1, 2, (N, K), dtype=torch.int8), "binary": signs[0], "split": signs}[layout]
    codes = guarded(codes)
    pack = getattr(reference, f"pack_{layout}")
    want, sums = pack(*codes) if layout == "split" else pack(codes), codes.long().sum(-1)
    return Trial(
        [codes],
        lambda: packing.launch_pack(codes, layout),
        lambda got: off_by(got[0], want) + off_by(got[1], sums),
    )


def _cases() -> list[Case]:
    makes = {}
    for shape, per_row in itertools.product(((3, 129), (20, 1000)), (True, False)):
        name = f"{shape[0]}x{shape[1]} {'rows' if per_row else 'tensor'}"
        makes[f"ternarize {name}"] = functools.partial(_ternarize, shape, per_row, None)
        makes[f"ternarize {name}, loss-aware"] = functools.partial(_ternarize, shape, per_row, 3)
        makes[f"binarize {name}"] = functools.partial(_binarize, shape, per_row)
        makes[f"split {name}"] = functools.partial(_split, shape, per_row)
    for layout, (N, K) in itertools.product(("ternary", "binary", "split"), ((3, 127), (2, 768))):
        makes[f"pack {layout} {N}x{K}"] = functools.partial(_pack, layout, N, K)
    return [Case(f"weights {name}", make) for name, make in makes.items()]


CASES = _cases()
