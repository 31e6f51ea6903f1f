"""MobileBERT's progressive transfer (Sun et al. 2020, 2004.02984): layer by layer, from the first to the last.

The transfer is L equal phases, one a layer. In phase l the losses of layer l alone count (`schedules.gates`, as
`layer_weights` of objectives), and layers are trained at the learning rate times

    0 before their phase      3 in it      0.3 after it      0 embeddings, pooler, head, which are the teacher's

Published: f = 100 normalised feature maps, 5000 means, 5 variances, 1 attention, all divided by the number of layers;
then the ordinary task, everything at its full rate. The factors were LAMB's; here they scale the step of any optimizer.

`build` makes a MobileBERT; `transfer` a student of the teacher's own kind, which may be prepared for 2 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import MobileBertConfig, MobileBertForSequenceClassification, PreTrainedModel, TrainerCallback

from ... import models
from ..schedules import gates
from . import Built, copies

NORMS = ("layer_norm", "no_norm")


class LayerRates(TrainerCallback):
    """Scales what an optimizer's step changes, layer by layer: w <- w_old + factor (w_new - w_old).

    A function of the global step alone, so that a run resumes; weight decay and momentum are scaled with the rest.

    Args:
        until: the fraction of the run that is the transfer; afterwards all factors are 1.
        before, during, after: factors of a layer, relative to its phase.
        others: of all that is in no layer.
    """

    def __init__(
        self, until: float = 1.0, before: float = 0.0, during: float = 3.0, after: float = 0.3, others: float = 0.0
    ) -> None:
        if not 0 < until <= 1 or min(before, during, after, others) < 0:
            raise ValueError(
                f"until={until}, before={before}, during={during}, after={after}, others={others}; accepted: a "
                "fraction of the run above 0, and factors of at least 0"
            )
        self.until, self.before, self.during, self.after, self.others = until, before, during, after, others
        self._old: list[tuple[torch.nn.Parameter, torch.Tensor, float]] = []

    def factors(self, progress: float, layers: int) -> list[float] | None:
        """Factors of the layers at a point of the run, None where all are 1."""
        if progress >= self.until:
            return None
        now = gates(progress / self.until, layers).index(1.0)
        return [self.after if layer < now else self.before if layer > now else self.during for layer in range(layers)]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        names = _layer_names(model)
        factors = self.factors(state.global_step / max(state.max_steps, 1), len(names))
        if factors is None:
            return
        for name, parameter in model.named_parameters():
            layer = next((i for i, prefix in enumerate(names) if name.startswith(f"{prefix}.")), None)
            factor = self.others if layer is None else factors[layer]
            if factor != 1 and parameter.requires_grad:
                self._old.append((parameter, parameter.detach().clone(), factor))

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, old, factor in self._old:
            parameter.copy_(old + factor * (parameter - old) if factor else old)
        self._old = []


def _layer_names(model: PreTrainedModel) -> list[str]:
    """Full names of the layers; MobileBERT's, which `lowbit.models` does not describe, are where BERT's are."""
    if models.is_known(model):
        return [name for name, _ in models.layers(model)]
    layers: Any = model.base_model.get_submodule("encoder.layer")
    return [f"{models.base_name(model)}encoder.layer.{index}" for index in range(len(layers))]


def transfer(
    teacher: PreTrainedModel,
    layers: int | None = None,
    which: str | Sequence[int] = "uniform",
    fresh: bool = False,
    seed: int = 0,
    until: float = 1.0,
    before: float = 0.0,
    during: float = 3.0,
    after: float = 0.3,
    others: float = 0.0,
) -> Built:
    """A copy of the teacher, or of some of its layers, and the phases of the transfer; it may be prepared afterwards.

    Args:
        teacher: float, of an architecture that `lowbit.models` describes.
        layers, which: as `copies.layers` takes them; None: all.
        fresh: give the layers random weights by `seed`, as a published student's are; embeddings, pooler and head are
            the teacher's in any case.
        until, before, during, after, others: of `LayerRates`.

    Raises:
        TypeError, ValueError: as `copies.layers` and `LayerRates`.
    """
    callback = LayerRates(until, before, during, after, others)
    student: Any = copies.layers(teacher, len(copies.layers_of(teacher)) if layers is None else layers, which).model
    if fresh:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            other: Any = type(student)(student.config)
        for own, new in zip(copies.layers_of(student), copies.layers_of(other), strict=True):
            own.load_state_dict(new.state_dict())
    return Built(student, (callback,))


def build(
    teacher: PreTrainedModel,
    bottleneck: int = 128,
    heads: int = 4,
    intermediate: int = 512,
    feedforward: int = 4,
    normalization: str = "layer_norm",
    seed: int = 0,
    until: float = 1.0,
    before: float = 0.0,
    during: float = 3.0,
    after: float = 0.3,
    others: float = 0.0,
) -> Built:
    """A MobileBERT of the teacher's depth and of its width between layers, narrow inside; embeddings are the teacher's.

    The published teacher has bottlenecks of its own, and a width of 512; any will do.

    Args:
        teacher: BertForSequenceClassification.
        bottleneck, heads: width and heads inside of a layer.
        intermediate, feedforward: neurons and number of its FFNs.
        normalization: "layer_norm", with which the copied embeddings give what the teacher's do (but for another
            epsilon), or "no_norm" as published (a factor and an addend): quicker, and activations stay unbounded.
        seed: of the layers' random weights.
        until, before, during, after, others: of `LayerRates`.

    Raises:
        TypeError, ValueError: another teacher; a size below 1, heads that do not divide the bottleneck; another norm;
            fields of `LayerRates` that it does not accept.
    """
    given: Any = copies.config_of(teacher)
    if given.model_type != "bert" or not hasattr(teacher, "classifier"):
        raise ValueError(f"a MobileBERT is taught by a BertForSequenceClassification, not a {type(teacher).__name__}")
    copies.check_sizes(hidden=bottleneck, heads=heads, intermediate=intermediate, feedforward=feedforward)
    if normalization not in NORMS:
        raise ValueError(f"normalization={normalization!r}; accepted: {', '.join(NORMS)}")
    callback = LayerRates(until, before, during, after, others)
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "type_vocab_size", "pad_token_id",
        "initializer_range", "id2label", "label2id", "problem_type",
    )  # fmt: skip
    config = MobileBertConfig(
        **{name: getattr(given, name) for name in same},
        embedding_size=given.hidden_size,
        trigram_input=False,
        intra_bottleneck_size=bottleneck,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_feedforward_networks=feedforward,
        normalization_type=normalization,
        classifier_activation=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student: Any = MobileBertForSequenceClassification(config)
    taught: Any = teacher
    pairs = [(student.mobilebert.embeddings, taught.bert.embeddings), (student.mobilebert.pooler, taught.bert.pooler)]
    for own, theirs in (*pairs, (student.classifier, taught.classifier)):
        own.load_state_dict(theirs.state_dict(), strict=False)  # it has a linear that it does not use
    return Built(student.to(device=teacher.device, dtype=teacher.dtype).eval(), (callback,))
