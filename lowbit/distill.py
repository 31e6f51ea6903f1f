"""Distillation-aware training: `transformers.Trainer` with a teacher and a list of objectives.

    hidden      sum over layers of MSE(student hidden, teacher hidden)                      (TernaryBERT eq. 7)
    attention   sum over layers of MSE(student scores, teacher scores), before softmax      (TernaryBERT eq. 7)
    logits      -sum softmax(teacher / T) log softmax(student / T), MSE for regression      (TernaryBERT eq. 8)

An objective is a small object called with (student outputs, teacher outputs, batch); the trainer sums and logs them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer

from . import models
from .checkpoints import read_json
from .config import LowbitConfig
from .nn.attention import NAME as LOWBIT_ATTENTION

logger = logging.getLogger("lowbit")

Batch = Mapping[str, torch.Tensor]


class Objective(Protocol):
    """A named loss: any object with these two attributes and this call will do.

    Attributes:
        name: logged as `loss_<name>`.
        needs: what forward has to return besides: "hidden_states", "scores" (of attention before softmax, as
            `attentions`), or nothing.
    """

    name: str
    needs: tuple[str, ...]

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        """The loss of a batch, a float scalar, already weighted.

        Args:
            student, teacher: outputs of the two models, as transformers gives them; the teacher's carry no gradient,
                and its scores are of the heads that a student of `lowbit.slim` kept.
            batch: what the student was called with.
        """
        ...


def _layer_map(student: Sequence[Any], teacher: Sequence[Any], what: str) -> list[tuple[Any, Any]]:
    """Pair layers one to one, or every k-th teacher layer when it has k times as many (uniform map)."""
    if not student or not teacher:
        raise ValueError(
            f"{what}: {len(student)} student layers, {len(teacher)} teacher layers in the outputs; "
            f'scores need model.set_attn_implementation("{LOWBIT_ATTENTION}")'
        )
    if len(teacher) % max(len(student), 1):
        raise ValueError(f"{what}: {len(student)} student layers do not divide {len(teacher)} teacher layers evenly")
    step = len(teacher) // len(student)
    return list(zip(student, teacher[step - 1 :: step], strict=True))


@dataclass
class HiddenStateLoss:
    """MSE of the embedding output and of every layer, summed over layers; padded tokens do not count.

    Args:
        weight: factor of the loss.
        include_padding: average over padded tokens too (the published mode).
    """

    weight: float = 1.0
    include_padding: bool = False
    name: str = "hidden"
    needs: tuple[str, ...] = ("hidden_states",)

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        s_embedding, *s_layers = student.hidden_states
        t_embedding, *t_layers = teacher.hidden_states
        if s_embedding.shape[-1] != t_embedding.shape[-1]:
            raise ValueError(
                f"HiddenStateLoss: student hidden size {s_embedding.shape[-1]}, teacher {t_embedding.shape[-1]}; "
                "they must be equal"
            )
        mask = None if self.include_padding else batch.get("attention_mask")
        pairs = [(s_embedding, t_embedding), *_layer_map(s_layers, t_layers, "HiddenStateLoss")]
        loss: Any = sum(_mean((s - t).float().square().mean(-1), mask) for s, t in pairs)
        return self.weight * loss


@dataclass
class AttentionScoreLoss:
    """MSE of the attention scores before softmax, summed over layers; padded queries and keys do not count.

    Where the numbers of heads differ both are averaged over heads, since heads cannot be paired. For a slimmed student
    they are equal: of the teacher's scores `DistillationTrainer` takes those of the heads that `lowbit.slim` kept.

    Args:
        weight: factor of the loss.
        include_padding: set masked keys to 0 in both and average over all entries (the published mode).
    """

    weight: float = 1.0
    include_padding: bool = False
    name: str = "attention"
    needs: tuple[str, ...] = ("scores",)

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        mask = batch.get("attention_mask")
        loss: Any = 0.0
        for s, t in _layer_map(student.attentions, teacher.attentions, "AttentionScoreLoss"):
            if s.shape[1] != t.shape[1]:
                s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
            difference = (s - t).float().square()
            if mask is None:
                loss = loss + difference.mean()
                continue
            keys = mask.reshape(-1, 1, 1, mask.shape[-1]).to(difference)
            if self.include_padding:
                loss = loss + (difference * keys).mean()
            else:
                pairs = (keys * keys.transpose(2, 3)).expand_as(difference)
                loss = loss + (difference * pairs).sum() / pairs.sum().clamp(min=1)
        return self.weight * loss


# What the heads of transformers call their logits; a head with two kinds gets the mean of both losses.
LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")


def logits_of(outputs: Mapping[str, Any], batch: Batch) -> dict[str, torch.Tensor]:
    """A head's logits; of question answering, where a prediction is over tokens, padding is none of them (-1e30)."""
    found = {name: outputs[name] for name in LOGITS if name in outputs}
    mask = batch.get("attention_mask")
    for name in ("start_logits", "end_logits"):
        if mask is not None and name in found:
            found[name] = found[name].float().masked_fill(~mask.bool(), -1e30)  # -inf times its share, 0, is NaN
    return found


@dataclass
class LogitsLoss:
    """Soft cross-entropy of the logits; MSE for regression, binary cross-entropy where several labels may hold.

    Labels of the logits' own shape [B, S] are one yes or no a token (ELECTRA's discriminator). Start and end logits of
    question answering are over the tokens of a text, without its padding.

    Args:
        weight: factor of the loss.
        temperature: T; the loss is not rescaled by T^2.
        problem_type: as transformers' configurations name it: "regression", "single_label_classification" or
            "multi_label_classification". None: regression where there is one logit, multi-label where the labels are
            float, else single-label.
    """

    weight: float = 1.0
    temperature: float = 1.0
    problem_type: str | None = None
    name: str = "logits"
    needs: tuple[str, ...] = ()

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        students, teachers = logits_of(student, batch), logits_of(teacher, batch)
        if not students:
            raise ValueError("LogitsLoss: the student returns no logits; use a model with a task head")
        if lacking := students.keys() - teachers.keys():
            raise ValueError(f"LogitsLoss: the teacher returns no {', '.join(sorted(lacking))}; use the student's head")
        loss: Any = sum(self._loss(logits, teachers[name], batch) for name, logits in students.items())
        return self.weight * loss / len(students)

    def _loss(self, student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
        labels, mask = batch.get("labels"), None
        problem_type = self.problem_type
        if problem_type is None and labels is not None and labels.is_floating_point() and student.shape[-1] > 1:
            problem_type = "multi_label_classification"
        if problem_type is None and labels is not None and labels.shape == student.shape[:2] == student.shape:
            student, teacher, mask = student.unsqueeze(-1), teacher.unsqueeze(-1), batch.get("attention_mask")
            return _mean(self._distance(student, teacher, "multi_label_classification"), mask)
        if student.dim() == 3:  # one prediction a token: labelled tokens count, or all real ones
            mask = batch.get("attention_mask") if labels is None else labels != -100
        return _mean(self._distance(student, teacher, problem_type), mask)

    def _distance(self, student: torch.Tensor, teacher: torch.Tensor, problem_type: str | None) -> torch.Tensor:
        """One loss for each row of logits [..., C] -> [...]."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"LogitsLoss: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}; equal needed"
            )
        student, teacher = student.float(), teacher.float()
        if problem_type == "regression" or (problem_type is None and student.shape[-1] == 1):
            return (student - teacher).square().mean(-1)
        if problem_type == "multi_label_classification":
            target = torch.sigmoid(teacher / self.temperature)
            return F.binary_cross_entropy_with_logits(student / self.temperature, target, reduction="none").mean(-1)
        target = F.softmax(teacher / self.temperature, -1)
        return -(target * F.log_softmax(student / self.temperature, -1)).sum(-1)


@dataclass
class TaskLoss:
    """The student's own loss against the labels (not part of the published recipes)."""

    weight: float = 1.0
    name: str = "task"
    needs: tuple[str, ...] = ()

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        if student.loss is None:
            raise ValueError("TaskLoss: the batch has no labels")
        return self.weight * student.loss


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over tokens [B, S], over the unmasked ones if there is a mask."""
    if mask is None:
        return values.mean()
    mask = mask.reshape(values.shape).to(values)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _refuse_shared_parameters(student: nn.Module, teacher: nn.Module) -> None:
    """`prepare` works in place: a teacher that is the same model would follow its student."""
    taught = {id(parameter) for parameter in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and id(parameter) in taught:
            raise ValueError(
                f"student and teacher share the trainable parameter {name}; "
                "give each its own: student = lowbit.prepare(copy.deepcopy(teacher), ...)"
            )


def _inside_peft(model: Any) -> PreTrainedModel:
    """The model of transformers in a `PeftModel`; another one is itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_prompt(student: Any, objectives: Sequence[Objective]) -> None:
    """Raise ValueError where a student whose prompt is trained has other tokens or keys than its teacher."""
    config = getattr(student, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return
    prefix = config.peft_type == "PREFIX_TUNING"
    for objective in objectives:
        if isinstance(objective, AttentionScoreLoss if prefix else HiddenStateLoss | AttentionScoreLoss):
            raise ValueError(
                f"{type(objective).__name__} compares token by token, and the student's {config.num_virtual_tokens} "
                f"virtual tokens ({type(config).__name__}) are none of the teacher's; accepted: "
                "objectives=[lowbit.LogitsLoss()]"
            )


def _slimmed(model: nn.Module) -> LowbitConfig | None:
    """The configuration of a model of `lowbit.slim`."""
    config = getattr(model.config, "quantization_config", None)
    return config if isinstance(config, LowbitConfig) and config.num_attention_heads is not None else None


class DistillationTrainer(Trainer):
    """`transformers.Trainer` whose loss is a sum of objectives between the model (student) and a teacher.

    Args:
        teacher: float model of the same task; moved to the training device, put in eval mode, run without gradients,
            under autocast where training is. What it returns is float32, as of the student.
        objectives: summed all the time (joint schedule); default: hidden, attention and logits; without attention for
            models whose attention does not give its scores (it does in the architectures that `lowbit.models`
            describes, but for MPNet).
        stages: instead of `objectives`, a schedule [(end, objectives), ...] with `end` the fraction of all steps at
            which the stage ends, ascending, the last one 1.0. BinaryBERT's two stages are
            `[(0.5, [HiddenStateLoss(), AttentionScoreLoss()]), (1.0, [LogitsLoss()])]`.
        *args, **kwargs: `Trainer`'s own.

    The student may be a `PeftModel`: its adapters are trained; beside a trained prompt, `LogitsLoss` has to do.

    Evaluation computes the ordinary task loss without the teacher. Losses are logged as loss_hidden and so on, each the
    mean over the batches in which it was active. Each is a mean over its batch: accumulation steps and ranks are
    averaged with equal weights, whatever their number of tokens. Where an objective compares scores, student and
    teacher are switched to the "lowbit" attention and stay so. Resume, multi-GPU, mixed precision and checkpoints are
    `Trainer`'s.

    Raises:
        ValueError: no teacher, one that shares trainable parameters with the student, both or ill-ordered `objectives`
            and `stages`, a stage without objectives, label smoothing, reentrant checkpointing with scores, a model
            that cannot give them, or tokens of a trained prompt to compare with the teacher's.
    """

    # Losses are per-batch means, so Trainer must divide them by the accumulation steps; it would not for models that
    # take **kwargs, as BERT does. `model_accepts_loss_kwargs` below says the same to transformers before 5.19.
    loss_is_scaled_for_ga = False

    # Subclasses that can do without a teacher say so; their objectives then get None for its outputs.
    needs_teacher = True

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None,
        objectives: Sequence[Objective] | None = None,
        stages: Sequence[tuple[float, Sequence[Objective]]] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher, PreTrainedModel) and (teacher is not None or self.needs_teacher):
            raise ValueError(f"teacher must be a transformers model, got {type(teacher).__name__}")
        if objectives is not None and stages is not None:
            raise ValueError("pass objectives (joint) or stages (a schedule), not both")
        if stages is None:
            stages = [(1.0, self._default_objectives(teacher) if objectives is None else objectives)]
        ends = [end for end, _ in stages]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1.0:
            raise ValueError(f"stages end at {ends}; accepted: ascending fractions, the last one 1.0")
        if not all(objectives for _, objectives in stages):
            raise ValueError("every stage needs at least one objective")
        self.stages = list(stages)
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor smooths labels, which distillation does not train on; set it to 0")
        if self._needs_scores and self._reentrant:
            raise ValueError("attention scores get no gradient under use_reentrant=True; set it to False")
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher
        if teacher is not None:
            _refuse_shared_parameters(self.model, teacher)
            teacher.to(self.args.device).eval()
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        student = self.accelerator.unwrap_model(self.model)
        for _, objectives in self.stages:
            _check_prompt(student, objectives)
        student = _inside_peft(student)
        for model in (teacher, student):
            if model is not None:
                self._expose_scores(model)
        self._agree_on_heads(student)

    def _default_objectives(self, teacher: PreTrainedModel | None) -> Sequence[Objective]:
        if teacher is None:
            return (TaskLoss(),)
        logits = LogitsLoss(problem_type=getattr(teacher.config, "problem_type", None))
        if not models.has_plain_attention(teacher):
            logger.warning("%s does not give attention scores: distilling without them", type(teacher).__name__)
            return (HiddenStateLoss(), logits)
        return (HiddenStateLoss(), AttentionScoreLoss(), logits)

    @property
    def _reentrant(self) -> bool:
        """Whether layers are checkpointed in the way that gives no gradient to what they note on the side."""
        names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # transformers 6 and 5
        checkpointing = next((getattr(self.args, name) for name in names if getattr(self.args, name, None)), None)
        return bool((checkpointing or {}).get("use_reentrant"))

    @property
    def _needs_scores(self) -> bool:
        return any("scores" in objective.needs for _, objectives in self.stages for objective in objectives)

    def _expose_scores(self, model: PreTrainedModel) -> None:
        if self._needs_scores:
            models.describe_attention(model, "AttentionScoreLoss")
            model.set_attn_implementation(LOWBIT_ATTENTION)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        self._expose_scores(_inside_peft(model))  # train() builds the student again
        self._agree_on_heads(_inside_peft(model))
        return model

    def _agree_on_heads(self, model: PreTrainedModel) -> None:
        """Ranks that slimmed by batches of their own kept other heads; they train rank 0's weights."""
        config = _slimmed(model)
        if config is not None and self.args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            (config.kept_heads,) = broadcast_object_list([config.kept_heads])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights of a checkpoint, and which heads they are: another student may have been slimmed to resume."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path, config = Path(resume_from_checkpoint) / "config.json", _slimmed(self.model)
        if config is not None and path.is_file():
            config.kept_heads = read_json(path).get("quantization_config", {}).get("kept_heads")

    def current_objectives(self) -> Sequence[Objective]:
        """The objectives of the stage that the global step is in (so resuming needs no state of its own)."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return next((objectives for end, objectives in self.stages if progress < end), self.stages[-1][1])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        objectives = self.current_objectives()
        needs = {need for objective in objectives for need in objective.needs}
        wanted = {
            "return_dict": True,
            "output_hidden_states": "hidden_states" in needs,
            **({"output_attentions": True, "output_scores": True} if "scores" in needs else {}),
        }
        student = model(**inputs, **wanted)
        teacher = None
        if self.teacher is not None:
            from accelerate.utils import convert_to_fp32  # no trainer is without it, but `import lowbit` may be

            with torch.no_grad(), self.accelerator.autocast():  # as accelerate wraps the student's own forward
                teacher = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}, **wanted)
            teacher = convert_to_fp32(teacher)
            scores = student.get("attentions"), teacher.get("attentions")
            if "scores" in needs and all(scores):
                teacher.attentions = self._of_kept_heads(*scores)
        losses = [(objective.name, objective(student, teacher, inputs)) for objective in objectives]
        self._note(losses)
        loss = sum(value for _, value in losses)
        return (loss, student) if return_outputs else loss

    def _of_kept_heads(
        self, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """The teacher's scores [B, H, S, S] of each layer, only of the heads that a slimmed student kept."""
        config = _slimmed(self.model)
        if config is None or config.kept_heads is None or len(teacher) % len(config.kept_heads):
            return teacher
        kept = config.kept_heads
        full = self.model.config.num_attention_heads
        if any(s.shape[1] != len(kept[0]) for s in student) or any(t.shape[1] != full for t in teacher):
            return teacher
        step = len(teacher) // len(kept)  # as `_layer_map` pairs them: a layer learns from the last of `step`
        # Stacked views: an index would be copied to the GPU in every layer, and each copy waits for it.
        return tuple(torch.stack([t[:, head] for head in kept[i // step]], 1) for i, t in enumerate(teacher))

    def _note(self, losses: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Count the named losses of a batch for the log."""
        for name, value in losses:
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        for name in {name for name, _ in losses}:
            self._counts[name] = self._counts.get(name, 0) + 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each named loss since the last log, over all ranks."""
        if "loss" in logs:
            for name, total in self._sums.items():
                mean = self.accelerator.gather((total / self._counts[name]).reshape(1)).mean()
                logs[f"loss_{name}"] = round(float(mean), 6)
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)
