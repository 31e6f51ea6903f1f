"""When a sentence leaves: criteria that look at what one ramp says, and at what those before it said.

    Entropy             H(softmax z) < threshold, in nats                                 (DeeBERT, 2004.12993)
    NormalizedEntropy   H(softmax z) / ln C <= speed                                      (FastBERT, 2004.02178)
    Patience            the same answer so many times in a row                            (PABEE, 2006.04152)
    Certainty           a learned head says that the answer is wrong, below threshold     (BERxiT, EACL 2021)

A criterion is a frozen dataclass, called with the logits of one ramp. It is kept in `config.json` by its name.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Memory = torch.Tensor | None


class Criterion(Protocol):
    """What a criterion has; those of this file are all that checkpoints can name."""

    def check(self, num_labels: int, problem_type: str | None, certainty: bool) -> None:
        """Raise ValueError for a head whose answers this criterion cannot judge."""
        ...

    def __call__(self, logits: torch.Tensor, wrong: torch.Tensor | None, memory: Memory) -> tuple[torch.Tensor, Memory]:
        """Which sentences leave by this ramp.

        Args:
            logits: float32 [B, C] of the ramp.
            wrong: float32 [B], how probably the answer is wrong, where the ramps say so.
            memory: what this criterion returned at the ramp before for these sentences, [B, ...]; None at the first.

        Returns:
            bool [B]; the memory for the next ramp.
        """
        ...


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Of softmax(logits) in nats: [..., C] -> [...]; finite for finite logits, also where a probability is 0."""
    return torch.special.entr(torch.softmax(logits, -1)).sum(-1)


def _check_number(criterion: Any, name: str, low: float, high: float, accepted: str) -> None:
    value = getattr(criterion, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{type(criterion).__name__}: {name}={value!r}; accepted: {accepted}")


def _check_classes(criterion: Any, num_labels: int, problem_type: str | None) -> None:
    if num_labels < 2 or problem_type not in (None, "single_label_classification"):
        what = problem_type or "regression"
        raise ValueError(
            f"{type(criterion).__name__} needs one answer out of two classes or more; this head has {num_labels} "
            f"({what}). Accepted for regression: Patience(times, threshold=...)"
        )


@dataclass(frozen=True)
class Entropy:
    """Leave where the entropy of the ramp's answer is below a threshold (DeeBERT).

    Attributes:
        threshold: nats, from 0 (nobody leaves). With C classes no entropy is above ln C.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check_number(self, "threshold", 0.0, math.inf, "nats, a number from 0")

    def check(self, num_labels: int, problem_type: str | None, certainty: bool) -> None:
        _check_classes(self, num_labels, problem_type)

    def __call__(self, logits: torch.Tensor, wrong: torch.Tensor | None, memory: Memory) -> tuple[torch.Tensor, Memory]:
        return entropy(logits) < self.threshold, None


@dataclass(frozen=True)
class NormalizedEntropy:
    """Leave where the entropy, divided by that of C equal probabilities, is at most `speed` (FastBERT).

    Attributes:
        speed: 0 to 1. At 1 every sentence leaves by the first ramp.
    """

    speed: float

    def __post_init__(self) -> None:
        _check_number(self, "speed", 0.0, 1.0, "a number from 0 to 1")

    def check(self, num_labels: int, problem_type: str | None, certainty: bool) -> None:
        _check_classes(self, num_labels, problem_type)

    def __call__(self, logits: torch.Tensor, wrong: torch.Tensor | None, memory: Memory) -> tuple[torch.Tensor, Memory]:
        if self.speed == 1:  # entropy of equal probabilities may round to a little more than ln C
            return torch.ones_like(logits[..., 0], dtype=torch.bool), None
        return entropy(logits) / math.log(logits.shape[-1]) <= self.speed, None


@dataclass(frozen=True)
class Patience:
    """Leave after the answer has stayed the same so many times in a row (PABEE).

    The first ramp has nothing to compare with, so that `times + 1` ramps run at least. Published runs wait until a
    whole batch agrees; here each sentence leaves for itself.

    Attributes:
        times: from 1.
        threshold: of regression: two values are the same where they differ by less. None for classes.
    """

    times: int
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.times, int) or isinstance(self.times, bool) or self.times < 1:
            raise ValueError(f"Patience: times={self.times!r}; accepted: a whole number from 1")
        if self.threshold is not None:
            _check_number(self, "threshold", 0.0, math.inf, "None, or a number from 0 (regression)")

    def check(self, num_labels: int, problem_type: str | None, certainty: bool) -> None:
        if problem_type == "multi_label_classification":
            raise ValueError("Patience compares one answer a sentence; this head gives several (multi_label)")
        regression = num_labels == 1 or problem_type == "regression"
        if regression != (self.threshold is not None):
            raise ValueError(
                f"Patience: threshold={self.threshold!r} for a head of {num_labels} labels "
                f"({'regression' if regression else 'classes'}); accepted: a number for regression, None for classes"
            )

    def __call__(self, logits: torch.Tensor, wrong: torch.Tensor | None, memory: Memory) -> tuple[torch.Tensor, Memory]:
        answer = logits if self.threshold is not None else logits.argmax(-1, keepdim=True).to(logits)
        if memory is None:
            memory = torch.cat([answer, torch.zeros_like(answer[:, :1])], 1)
            return torch.zeros_like(answer[:, 0], dtype=torch.bool), memory
        before, count = memory[:, :-1], memory[:, -1]
        difference = (answer - before).abs().amax(1)
        same = difference == 0 if self.threshold is None else difference < self.threshold
        count = torch.where(same, count + 1, torch.zeros_like(count))
        return count >= self.times, torch.cat([answer, count[:, None]], 1)


@dataclass(frozen=True)
class Certainty:
    """Leave where a learned head says that the answer is wrong with less than `threshold` (BERxiT's learning to exit).

    Needs `add_exits(..., certainty=True)`, trained by `ExitCertaintyLoss`. Works for regression too.

    Attributes:
        threshold: 0 to 1.
    """

    threshold: float

    def __post_init__(self) -> None:
        _check_number(self, "threshold", 0.0, 1.0, "a number from 0 to 1")

    def check(self, num_labels: int, problem_type: str | None, certainty: bool) -> None:
        if not certainty:
            raise ValueError(
                "Certainty needs exits that say how certain they are; add them by add_exits(model, certainty=True)"
            )

    def __call__(self, logits: torch.Tensor, wrong: torch.Tensor | None, memory: Memory) -> tuple[torch.Tensor, Memory]:
        assert wrong is not None
        return wrong < self.threshold, None


_CRITERIA: dict[str, Any] = {
    "entropy": Entropy,
    "normalized_entropy": NormalizedEntropy,
    "patience": Patience,
    "certainty": Certainty,
}


def is_criterion(value: Any) -> bool:
    return type(value) in _CRITERIA.values()


def to_dict(criterion: Any) -> dict[str, Any]:
    """JSON-able fields with the criterion's name, as config.json has them."""
    name = next(name for name, kind in _CRITERIA.items() if kind is type(criterion))
    return {"name": name, **dataclasses.asdict(criterion)}


def from_dict(values: Any) -> Any:
    """Inverse of `to_dict`; ValueError for anything else."""
    if not isinstance(values, dict) or values.get("name") not in _CRITERIA:
        raise ValueError(f"exit criterion {values!r}; accepted: a name out of {', '.join(_CRITERIA)}, and its fields")
    fields = {name: value for name, value in values.items() if name != "name"}
    kind = _CRITERIA[values["name"]]
    known = [field.name for field in dataclasses.fields(kind)]
    if set(fields) - set(known):
        raise ValueError(f"exit criterion {values!r}; accepted fields: {', '.join(known)}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(f"exit criterion {values!r}: {error}") from error
