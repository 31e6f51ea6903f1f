"""Small outputs of two models in float64, and what objectives are compared with: plain loops and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

# Three sentences of 5, 3 and 1 tokens. Student: 2 layers of width 4; teacher: 4 of width 6; 2 heads; 3 classes.
LENGTHS = (5, 3, 1)
STUDENT = {"width": 4, "layers": 2}
TEACHER = {"width": 6, "layers": 4}
HEADS, CLASSES = 2, 3


def batch(lengths: tuple[int, ...] = LENGTHS, size: int | None = None) -> dict[str, torch.Tensor]:
    size = size or max(lengths)
    return {"attention_mask": torch.tensor([[1] * length + [0] * (size - length) for length in lengths])}


def outputs(width: int, layers: int, rows: int = len(LENGTHS), size: int = max(LENGTHS), scale: float = 1.0) -> Any:
    """Random outputs, padding included, each a leaf that wants its gradient."""

    def new(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    return SimpleNamespace(
        hidden_states=tuple(new(rows, size, width) for _ in range(layers + 1)),
        attentions=tuple(new(rows, HEADS, size, size) for _ in range(layers)),
        qkv=tuple(tuple(new(rows, size, width) for _ in range(3)) for _ in range(layers)),
        logits=new(rows, CLASSES),
    )


class Outputs(dict):
    """As transformers' outputs: names that are there, as attributes and as items."""

    __getattr__ = dict.__getitem__


def run(model: Any, columns: dict[str, torch.Tensor]) -> Any:
    """Outputs of a BERT with all that objectives may need."""
    model.set_attn_implementation("lowbit")
    found: list[torch.Tensor] = []
    hooks = [
        getattr(layer.attention.self, which).register_forward_hook(lambda module, inputs, output: found.append(output))
        for layer in model.bert.encoder.layer
        for which in ("query", "key", "value")
    ]
    outputs = model(**columns, output_hidden_states=True, output_attentions=True, output_scores=True)
    for hook in hooks:
        hook.remove()
    outputs["qkv"] = tuple(tuple(found[i : i + 3]) for i in range(0, len(found), 3))
    return outputs


def pair(width: int | None = None, layers: int | None = None, scale: float = 1.0) -> tuple[Any, Any]:
    """Outputs of a student and a teacher; `width`, `layers`: of the teacher, where they are to be others."""
    teacher = {"width": width or TEACHER["width"], "layers": layers or TEACHER["layers"]}
    return tuple(Outputs(vars(outputs(**sizes, scale=scale))) for sizes in (STUDENT, teacher))  # type: ignore[return-value]


def leaves(given: Any) -> list[torch.Tensor]:
    """All tensors in outputs."""
    if torch.is_tensor(given):
        return [given]
    values = given.values() if isinstance(given, dict) else given
    return [leaf for value in values for leaf in leaves(value)]


def changed(given: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure of changed tensors."""
    if torch.is_tensor(given):
        return change(given)
    if isinstance(given, dict):
        return Outputs({name: changed(value, change) for name, value in given.items()})
    return tuple(changed(value, change) for value in given)


def gradients(loss: torch.Tensor, student: Any) -> list[torch.Tensor]:
    """Of all that a student returned; zeros for what the loss does not read."""
    found = torch.autograd.grad(loss, leaves(student), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves(student), found, strict=True)]


def agrees(
    objective: Any, student: Any, teacher: Any, columns: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    """Assert that an objective has the value and the gradients of a loss that plain loops came to."""
    loss = objective(student, teacher, columns)
    assert loss.shape == () and torch.isfinite(loss)
    torch.testing.assert_close(loss, expected.reshape(()), rtol=1e-9, atol=1e-12)
    assert expected.requires_grad, "the loops lead back to the student"
    for ours, theirs in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def real(columns: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(sentence, token) of all that is not padding."""
    return [(b, i) for b, row in enumerate(columns["attention_mask"].tolist()) for i, one in enumerate(row) if one]


def every(columns: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    rows, size = columns["attention_mask"].shape
    return [(b, i) for b in range(rows) for i in range(size)]


def mean(values: Any) -> torch.Tensor:
    values = [*values]
    return sum(values) / len(values)


def log_softmax(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """From the definition, shifted by the largest."""
    largest = max(value.item() for value in values)
    total = sum((value - largest).exp() for value in values)
    return [value - largest - total.log() for value in values]


def dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return sum(a * b for a, b in zip(x, y, strict=True))  # type: ignore[return-value]


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()
