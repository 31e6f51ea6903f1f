"""Which widths the tensors of a narrower student have, beside those of its teacher: side by side, axis by axis."""

from __future__ import annotations

from torch import Size, nn
from transformers import PreTrainedModel

from ... import models


class Sides:
    """Kinds of axes: "hidden" (between blocks), "heads" (inside of attention), "inner" (FFN), None (equal in both).

    Attributes:
        sizes: kind -> (the student's, the teacher's).
        heads: (heads of the student, width of one, width of one of the teacher's).
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        hidden = student.config.hidden_size, teacher.config.hidden_size
        inner = models.intermediate_size(student), models.intermediate_size(teacher)
        self.sizes = {"hidden": hidden, "heads": hidden, "inner": inner}
        count = student.config.num_attention_heads
        self.heads = count, hidden[0] // count, hidden[1] // teacher.config.num_attention_heads
        parts = models.describe(student)
        by_path = {
            **dict.fromkeys(parts.projections, ("heads", "hidden")),
            parts.attention_output: ("hidden", "heads"),
            parts.ffn_input: ("inner", "hidden"),
            parts.ffn_output: ("hidden", "inner"),
        }
        layers = [name for name, _ in models.layers(student)]
        self._places = {f"{layer}.{path}": kinds for layer in layers for path, kinds in by_path.items()}
        self._tables = {name for name, module in student.named_modules() if isinstance(module, nn.Embedding)}

    def is_table(self, name: str) -> bool:
        """Whether a tensor is a table of embeddings."""
        return name.rpartition(".")[0] in self._tables

    def of(self, name: str, own: Size, taught: Size) -> tuple[str | None, ...]:
        """Kinds of the axes of a tensor of the student: of a matrix two, of a vector one.

        Raises:
            ValueError: an axis is neither of the hidden sizes nor equal.
        """
        kinds = self._places.get(name.rpartition(".")[0])
        if kinds is not None:
            return kinds[: len(own)]
        first = (None,) if self.is_table(name) else ()
        rest = zip(own[len(first) :], taught[len(first) :], strict=True)
        return *first, *(self._kind(name, *pair) for pair in rest)

    def _kind(self, name: str, own: int, taught: int) -> str | None:
        if (own, taught) == self.sizes["hidden"]:
            return "hidden"
        if own != taught:
            raise ValueError(f"{name} has {own} entries, the teacher's {taught}: neither equal nor the hidden sizes")
        return None
