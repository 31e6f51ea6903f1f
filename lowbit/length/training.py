"""Training for dynamic sequence length, with or without a teacher.

    LengthDropTrainer   the model and sub-models of it that drop tokens, in one step (Length-Adaptive Transformer)
    SoftLengthTrainer   lengths that are learned (learned token pruning, PoWER-BERT)

What comes out is dropped for good by plain training and use of a model with lengths (`lowbit.set_length`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..config import LengthConfig
from ..distill.columns import arguments
from ..distill.objectives import Batch, LogitsLoss, Objective, logits_of
from ..distill.trainer import DistillationTrainer
from ..nn import UnpaddedEncoder
from ..stages.unpadding import encoder_of, set_length, unpadded_encoder
from .soft import SoftLengths

SOFT_FILE = "soft_lengths.safetensors"


class _LengthTrainer(DistillationTrainer):
    """A model that trains has an encoder that can drop tokens; before and after, the one that it came with."""

    needs_teacher = False
    _while_training: contextlib.ExitStack | None = None

    def __init__(self, *args: Any, teacher: PreTrainedModel | None = None, **kwargs: Any) -> None:
        super().__init__(*args, teacher=teacher, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} trains on one device a process, alone or with DistributedDataParallel "
                "(torchrun); DeepSpeed, FSDP and DataParallel are not supported"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            self._while_training = stack
            stack.callback(setattr, self, "_while_training", None)
            if self.model_init is None:  # else train() makes the model
                stack.enter_context(self._in_training(self.model))
            return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        if self._while_training is not None:
            self._while_training.enter_context(self._in_training(model))
        return model

    @contextlib.contextmanager
    def _in_training(self, model: PreTrainedModel) -> Iterator[UnpaddedEncoder]:
        came_with = encoder_of(model)
        encoder = unpadded_encoder(model)
        try:
            yield encoder
        finally:
            if encoder is not came_with:
                set_length(model, None)


@dataclass(frozen=True)
class LengthDrop:
    """How sub-models are drawn: a layer keeps a random share of the tokens that the layer before it keeps.

    Attributes:
        ratio: the most that a layer may drop, p, or one such number for each layer: it keeps between 1 - p and all,
            drawn evenly; the first sub-model of a step, the smallest, 1 - p in every layer.
        sub_models: in each step, besides the full model. Published: 3 (`num_sandwich` + 1). 0 trains the full one only.
        layer_drop: chance of a layer to be left out of a sub-model; it keeps what the layer before it keeps. Published:
            0.2, in the full model too, which here is always whole.
        reverse_kl: minimize KL(sub || full), as the released code does, in place of KL(full || sub).
        importance_weight: question answering only: sub-models also learn what to keep. Weight of the cross-entropy
            between the full model's start and end probabilities and the importance of the tokens, in each layer that
            drops any. Choosing tokens has no gradient of its own; ToP (KDD 2023) trains the choice in a like way.
        seed: of the draws, which else depend on the step only: the same on all ranks, in all accumulated batches of a
            step, and after resuming.
    """

    ratio: float | tuple[float, ...] = 0.2
    sub_models: int = 3
    layer_drop: float = 0.0
    reverse_kl: bool = False
    importance_weight: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ratio", "layer_drop"):
            value = getattr(self, name)
            if not all(0 <= share < 1 for share in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"LengthDrop: {name}={value}; accepted: 0 to below 1")
        if not 0 <= self.importance_weight < math.inf:
            raise ValueError(f"LengthDrop: importance_weight={self.importance_weight}; accepted: a number from 0")
        if not isinstance(self.sub_models, int) or self.sub_models < 0:
            raise ValueError(f"LengthDrop: sub_models={self.sub_models!r}; accepted: a whole number from 0")

    def draw(self, layers: int, step: int) -> list[tuple[tuple[float, ...], frozenset[int]]]:
        """For each sub-model of a step: the share of a sequence that every layer keeps, and the layers left out.

        Raises:
            ValueError: one ratio a layer, for another number of layers.
        """
        ratios = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,) * layers
        if len(ratios) != layers:
            raise ValueError(f"LengthDrop: {len(ratios)} ratios, the model has {layers} layers; give one, or one each")
        generator = random.Random(f"{self.seed} {step}")
        drawn = []
        for number in range(self.sub_models):
            keep, left, skip = [], 1.0, set()
            for layer, ratio in enumerate(ratios):
                share, dropped = generator.random(), generator.random() < self.layer_drop
                if dropped:
                    skip.add(layer)
                else:
                    left *= 1 - ratio * (1.0 if number == 0 else share)
                keep.append(left)
            drawn.append((tuple(keep), frozenset(skip)))
        return drawn


class LengthDropTrainer(_LengthTrainer):
    """Train a model so that it works at any length (LengthDrop and the sandwich rule of Kim and Cho 2021).

    A step trains the full model, all tokens kept, with the objectives; then each sub-model with the KL divergence
    between its logits and those of the full model (squared error for regression), which get no gradient from it. All
    these losses are divided by their number. Afterwards one set of weights serves many `LengthConfig`s.

    Args:
        length_drop: how sub-models are drawn.
        teacher: for the objectives, as in `DistillationTrainer`; None trains the full model on the task's loss.
        *args, **kwargs: `DistillationTrainer`'s own.

    The model's own lengths, if it has any, are those of evaluation; their score, protected tokens and least number are
    those of the sub-models too. Logged: each objective; `loss_sub`, the mean KL divergence of the sub-models; with an
    `importance_weight` `loss_importance`, not weighted; none of them divided. At most one graph is in memory at a time.

    Raises:
        ValueError: as `DistillationTrainer`; DeepSpeed, FSDP or DataParallel; `layer_drop` with gradient checkpointing
            on several ranks; ratios for another number of layers; in training, `importance_weight` with a model that
            has no start and end logits.
    """

    lifts_lengths = True  # of the full model

    def __init__(self, *args: Any, length_drop: LengthDrop | None = None, **kwargs: Any) -> None:
        self.length_drop = LengthDrop() if length_drop is None else length_drop
        self._full_logits: dict[str, torch.Tensor] = {}
        super().__init__(*args, **kwargs)
        self.length_drop.draw(
            self.model.config.num_hidden_layers, 0
        )  # a wrong number of ratios is said before training
        if self.length_drop.layer_drop and self.args.world_size > 1 and self.args.gradient_checkpointing:
            raise ValueError("layer_drop leaves parameters unused, which DistributedDataParallel cannot follow through "
                             "gradient checkpointing; set one of them off")  # fmt: skip

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        inputs = self._prepare_inputs(inputs)
        student = self.accelerator.unwrap_model(model)
        encoder = unpadded_encoder(student)
        subs = self._sub_lengths(encoder)
        needs = any(objective.needs for objective in self.current_objectives())
        # Without padding like the sub-models, unless states of every layer are compared.
        whole = (
            None if needs else dataclasses.replace(self._own(encoder), keep=(1.0,) * len(encoder.layer), unit="ratio")
        )
        # Gradients meet other ranks' once, in the last backward pass.
        with _unsynchronized(self, model, bool(subs)), _run_with(encoder, whole):
            total = super().training_step(model, dict(inputs), num_items_in_batch)
        full = self._full_logits
        target = self._importance_target(full, inputs) if self.length_drop.importance_weight else None
        divergences, distances = [], []
        for number, (lengths, skip) in enumerate(subs, 1):
            with _unsynchronized(self, model, number < len(subs)), _run_with(encoder, lengths, skip):
                with self.compute_loss_context_manager(), _with_target(encoder, target) as losses:
                    outputs = model(**arguments(student, inputs, {"return_dict": True}, without=self.label_names))
                    loss = divergence = self._divergence(full, outputs, student, inputs)
                    if losses:
                        distance = torch.stack(losses).mean()
                        distances.append(distance.detach())
                        loss = loss + self.length_drop.importance_weight * distance
                loss = loss / (len(subs) + 1) / self.current_gradient_accumulation_steps
                self.accelerator.backward(loss)
            total = total + loss.detach()
            divergences.append(divergence.detach())
        if divergences:
            self._note([("sub", torch.stack(divergences).mean())])
        if distances:
            self._note([("importance", torch.stack(distances).mean())])
        self._full_logits = {}
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._full_logits = {name: logits.detach() for name, logits in logits_of(outputs, inputs).items()}
            loss = loss / (self.length_drop.sub_models + 1)
        return (loss, outputs) if return_outputs else loss

    def _sub_lengths(self, encoder: UnpaddedEncoder) -> list[tuple[LengthConfig, frozenset[int]]]:
        drawn = self.length_drop.draw(len(encoder.layer), self.state.global_step)
        own = self._own(encoder)
        least = max(own.min_tokens, 2)  # as published
        return [(dataclasses.replace(own, keep=keep, unit="ratio", min_tokens=least), skip) for keep, skip in drawn]

    def _importance_target(self, full: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """How probable each token is to begin or end the answer, float [T] without padding; 1 in each sequence."""
        if full.keys() != {"start_logits", "end_logits"}:
            raise ValueError(f"importance_weight needs start and end logits, the model gives {', '.join(full)}")
        target = torch.stack([logits.float().softmax(-1) for logits in full.values()]).mean(0)
        mask = batch.get("attention_mask")
        return target.flatten() if mask is None else target[mask.bool()]

    def _own(self, encoder: UnpaddedEncoder) -> LengthConfig:
        return encoder.lengths or LengthConfig((1.0,))

    def _divergence(
        self, full: dict[str, torch.Tensor], sub: Any, student: PreTrainedModel, batch: Batch
    ) -> torch.Tensor:
        # Cross-entropy less entropy, so that what counts as one prediction is said once, in LogitsLoss.
        cross = LogitsLoss(problem_type=getattr(student.config, "problem_type", None))
        target, other = (sub, full) if self.length_drop.reverse_kl else (full, sub)
        return cross(other, target, batch) - cross(target, target, batch)


class SoftLengthTrainer(_LengthTrainer):
    """Train a model together with the lengths that it is to have.

    For as long as `train` runs, `soft_lengths` scales the model's tokens, also in evaluation; its penalty is added to
    the loss (logged as `loss_length`) and its parameters are a group of their own in the optimizer, without weight
    decay. They are saved as soft_lengths.safetensors beside the model, in checkpoints and by `save_model`. Afterwards:
    `lowbit.set_length(model, trainer.soft_lengths.length_config())`, and train on.

    Args:
        soft_lengths: `LearnedThresholds` or `SoftExtract`, for as many layers as the model has.
        teacher: for the objectives; None trains on the task's loss. With a teacher the default is `LogitsLoss`: hidden
            states and scores cannot be compared while tokens are scaled.
        *args, **kwargs: `DistillationTrainer`'s own. `max_grad_norm` clips model and `soft_lengths` together.

    Raises:
        ValueError: as `DistillationTrainer`; DeepSpeed, FSDP or DataParallel; another number of layers; a model whose
            lengths are set; objectives that need hidden states or scores; reentrant checkpointing; a checkpoint
            without soft_lengths.safetensors.
    """

    def __init__(self, *args: Any, soft_lengths: SoftLengths, **kwargs: Any) -> None:
        if not isinstance(soft_lengths, SoftLengths):
            raise ValueError(
                f"soft_lengths must be LearnedThresholds or SoftExtract, got {type(soft_lengths).__name__}"
            )
        self.soft_lengths = soft_lengths
        super().__init__(*args, **kwargs)
        needs = {need for _, objectives in self.stages for objective in objectives for need in objective.needs}
        if needs:
            raise ValueError(
                f"objectives need {', '.join(sorted(needs))}, which there are none of while lengths are learned"
            )
        if self._reentrant:
            raise ValueError("soft lengths get no gradient under use_reentrant=True; set it to False")
        self._check(self.model)
        self.soft_lengths.to(self.args.device)

    def _default_objectives(self, teacher: PreTrainedModel | None) -> Sequence[Objective]:
        return [o for o in super()._default_objectives(teacher) if not o.needs]

    def _check(self, model: PreTrainedModel) -> None:
        count = model.config.num_hidden_layers
        if count != self.soft_lengths.layers:
            raise ValueError(f"soft_lengths has {self.soft_lengths.layers} layers, the model has {count}")
        if getattr(encoder_of(model), "lengths", None) is not None:
            raise ValueError("the model drops tokens already; call lowbit.set_length(model, None) to learn its lengths")

    @contextlib.contextmanager
    def _in_training(self, model: PreTrainedModel) -> Iterator[UnpaddedEncoder]:
        self._check(model)
        with super()._in_training(model) as encoder:
            encoder.soft_mask = self.soft_lengths
            try:
                yield encoder
            finally:
                encoder.soft_mask = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        parameters = list(self.soft_lengths.parameters())
        for parameter in parameters:  # or it would be in one of the model's groups
            parameter.requires_grad_(False)
        optimizer = super().create_optimizer(*args, **kwargs)
        for parameter in parameters:
            parameter.requires_grad_(True)
        groups = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(p is parameters[0] for p in groups):
            group = {"params": parameters, "lr": self.soft_lengths.learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group(group)
            optimizer.register_step_post_hook(lambda *_: self.soft_lengths.clip_())
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            penalty = self.soft_lengths.penalty()
            self._note([("length", penalty)])
            loss = loss + penalty
        return (loss, outputs) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            path = Path(output_dir or self.args.output_dir) / SOFT_FILE
            aside = path.with_suffix(".tmp")
            save_file({name: p.detach().cpu() for name, p in self.soft_lengths.named_parameters()}, aside)
            os.replace(aside, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_soft_lengths(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_soft_lengths(self.state.best_model_checkpoint)

    def _load_soft_lengths(self, folder: str) -> None:
        path = Path(folder) / SOFT_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {SOFT_FILE}; it is no checkpoint of SoftLengthTrainer")
        saved, own = load_file(path), dict(self.soft_lengths.named_parameters())
        shapes, expected = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (saved, own))
        if shapes != expected:
            raise ValueError(f"{path} holds {shapes}, {type(self.soft_lengths).__name__} needs {expected}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])


@contextlib.contextmanager
def _run_with(
    encoder: UnpaddedEncoder, lengths: LengthConfig | None, skip: frozenset[int] = frozenset()
) -> Iterator[None]:
    """Other lengths for the model; its own again afterwards."""
    own = encoder.lengths, encoder.skip
    encoder.lengths, encoder.skip = lengths, skip
    try:
        yield
    finally:
        encoder.lengths, encoder.skip = own


@contextlib.contextmanager
def _with_target(encoder: UnpaddedEncoder, target: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """Collect how far importance is from the target in the layers that drop tokens."""
    encoder.importance_target, encoder.importance_losses = target, []
    try:
        yield encoder.importance_losses
    finally:
        encoder.importance_target, encoder.importance_losses = None, []


def _unsynchronized(trainer: Any, model: Any, wanted: bool) -> Any:
    return trainer.accelerator.no_sync(model) if wanted else contextlib.nullcontext()
