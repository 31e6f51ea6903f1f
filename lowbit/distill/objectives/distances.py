"""Distances of vectors, one for each token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F


def unit(x: torch.Tensor, smallest: float = 1e-6) -> torch.Tensor:
    """x / |x| along the last dimension; 0, with no gradient, where |x| is at most `smallest`.

    A zero vector has no direction: x / max(|x|, eps) would hand on gradients of 1 / eps there, and a root of 0 NaN.
    """
    square = x.square().sum(-1, keepdim=True)
    defined = square > smallest**2
    return x * torch.where(defined, square, 1.0).rsqrt() * defined


def squared(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square()


def normalised(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return squared(unit(student), unit(teacher))


def layer_norm(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    width, eps = student.shape[-1:], 1e-12
    return squared(F.layer_norm(student, width, eps=eps), F.layer_norm(teacher, width, eps=eps))


def cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return 1 - (unit(student) * unit(teacher)).sum(-1, keepdim=True)


# [.., d] and [.., d] -> [.., d], or [.., 1] where a distance is of whole vectors.
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": squared,
    "normalised": normalised,
    "layer_norm": layer_norm,
    "cosine": cosine,
}
