"""Which sub-networks a training step runs, and as what: width-adaptive, then width- and depth-adaptive (DynaBERT)."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import layout
from .running import running
from .subnet import Shape, Subnet, check_depth

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLERS = ("all", "sandwich", "random")
TEACHERS = ("same", "full")


@dataclass(frozen=True)
class Elastic:
    """Sub-networks of a student, trained together: the losses of those that a step runs are summed.

    Attributes:
        widths, depths: every pair of them is a sub-network (`lowbit.Subnet`). Published: widths 0.25 to 1 in the first
            stage; in the second depths 0.5, 0.75 and 1, too.
        sampler: which of them a step runs: "all" (published); "sandwich": the largest, the smallest, and two others
            drawn at random; "random": one.
        teacher_width: which part of the teacher teaches a sub-network: "same", that of its width (of all layers),
            which asks for a teacher with the student's order of heads: the model of the first stage; or "full", as
            the first stage is published, and the released code has both.
        layers: which layers a depth keeps, see `lowbit.elastic.depth.kept_layers`.
        seed: of the draws, which else depend on the step only: the same on all ranks, in all accumulated batches of a
            step, and after resuming.

    Raises:
        ValueError: no widths or depths, another sampler or teacher.
    """

    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    depths: tuple[float, ...] = (1.0,)
    sampler: str = "all"
    teacher_width: str = "same"
    layers: str = "dynabert"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("widths", "depths"):
            shares = getattr(self, name)
            fit = isinstance(shares, list | tuple) and all(
                isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) and 0 < each <= 1
                for each in shares
            )
            if not fit or not shares:
                raise ValueError(f"Elastic: {name}={shares!r}; accepted: shares greater than 0, at most 1")
            object.__setattr__(self, name, tuple(sorted(shares)))
        for name, accepted in (("sampler", SAMPLERS), ("teacher_width", TEACHERS)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"Elastic: {name}={getattr(self, name)!r}; accepted: {', '.join(map(repr, accepted))}")

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise TypeError or ValueError for models without these sub-networks."""
        checked = [student] if teacher is None or self.teacher_width == "full" else [student, teacher]
        for model in checked:
            layout.describe(model, "Elastic", ("float", "prepared"))
            layout.check_parted(model, "Elastic")
        if min(self.depths) < 1:
            check_depth(student)
        shapes = [[subnet.shape(model) for subnet in self.subnets()] for model in checked]
        if any(other != shapes[0] for other in shapes):
            raise ValueError("Elastic: the teacher has other sizes than the student; pass teacher_width='full'")

    def subnets(self) -> list[Subnet]:
        """All of them, from the smallest to the largest."""
        return [Subnet(width, depth, self.layers) for depth in self.depths for width in self.widths]

    def draw(self, step: int) -> list[Subnet]:
        """Those of a step, the largest of them last."""
        every = self.subnets()
        generator = random.Random(f"{self.seed} {step}")
        if self.sampler == "random":
            return [generator.choice(every)]
        if self.sampler == "sandwich" and len(every) > 4:
            drawn = sorted(generator.sample(range(1, len(every) - 1), 2))
            return [every[index] for index in (0, *drawn, len(every) - 1)]
        return every

    @contextlib.contextmanager
    def running(self, shape: Shape, student: PreTrainedModel, teacher: PreTrainedModel | None) -> Iterator[None]:
        """While open, the student is its sub-network of a shape, and the teacher what teaches it: of all its layers."""
        with contextlib.ExitStack() as stack:
            if teacher is not None and self.teacher_width == "same":
                every = tuple(range(len(layout.sizes(teacher))))
                stack.enter_context(running(teacher, shape._replace(layers=every)))
            stack.enter_context(running(student, shape))
            yield


def states_of(states: tuple[Any, ...], layers: tuple[int, ...]) -> tuple[Any, ...]:
    """A teacher's hidden states for a student that keeps some of its layers: the inputs of these, and the final output.

    (Hou et al. 2020 as released: each kept layer is to read what the layer of its number reads in the teacher.)
    """
    return (*(states[index] for index in layers), states[-1])
