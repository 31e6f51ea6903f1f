"""Distillation-aware training: `transformers.Trainer` with a teacher and a list of objectives.

    hidden      sum over layers of MSE(student hidden, teacher hidden)                      (TernaryBERT eq. 7)
    attention   sum over layers of MSE(student scores, teacher scores), before softmax      (TernaryBERT eq. 7)
    logits      -sum softmax(teacher / T) log softmax(student / T), MSE for regression      (TernaryBERT eq. 8)

An objective is a small object called with (student outputs, teacher outputs, batch); the trainer sums and logs them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from . import models
from ._columns import arguments, parameters
from .checkpoints import read_json
from .config import LowbitConfig
from .nn import UnpaddedEncoder
from .nn.attention import NAME as LOWBIT_ATTENTION

logger = logging.getLogger("lowbit")

Batch = Mapping[str, torch.Tensor]


class Objective(Protocol):
    """A named loss: any object with these two attributes and this call will do.

    Attributes:
        name: logged as `loss_<name>`.
        needs: what forward has to return besides: "hidden_states", "scores" (of attention before softmax, as
            `attentions`), or nothing.

    It may also have a method `check(student, teacher)`, called with the two models when the trainer is made, and with
    each student that a `model_init` makes: to raise a ValueError that says what to pass instead, before training. The
    teacher is None where a trainer has none.
    """

    name: str
    needs: tuple[str, ...]

    def __call__(self, student: Any, teacher: Any, batch: Batch) -> torch.Tensor:
        """The loss of a batch, a float scalar, already weighted.

        Args:
            student, teacher: outputs of the two models, as transformers gives them; the teacher's carry no gradient,
                and its scores are of the heads that a student of `lowbit.slim` kept.
            batch: the columns that either model's forward names; with `remove_unused_columns=False` all.
        """
        ...


def _layer_map(student: Sequence[Any], teacher: Sequence[Any], what: str) -> list[tuple[Any, Any]]:
    """Pair layers one to one, or every k-th teacher layer when it has k times as many (uniform map)."""
    if not student or not teacher:
        raise ValueError(
            f"{what}: {len(student)} student layers, {len(teacher)} teacher layers in the outputs; "
            f'scores need model.set_attn_implementation("{LOWBIT_ATTENTION}")'
        )
    _refuse_uneven_layers(what, len(student), len(teacher))
    step = len(teacher) // len(student)
    return list(zip(student, teacher[step - 1 :: step], strict=True))


def _refuse_uneven_layers(what: str, student: int, teacher: int) -> None:
    if teacher % student:
        fitting = ", ".join(str(layers) for layers in range(1, teacher + 1) if teacher % layers == 0)
        raise ValueError(
            f"{what}: {student} student layers do not divide {teacher} teacher layers evenly; take a student of "
            f"{fitting} layers, or objectives that compare no layers: objectives=[LogitsLoss()]"
        )


def _need_teacher(what: str, teacher: PreTrainedModel | None) -> PreTrainedModel:
    if teacher is None:
        raise ValueError(f"{what} compares with a teacher, and there is none; pass teacher=..., or leave it out")
    return teacher


def _sizes(name: str, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[int, int] | None:
    """A field of both configurations, None where one of them has no such number."""
    sizes = getattr(student.config, name, None), getattr(teacher.config, name, None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # type: ignore[return-value]


def _check_layers(what: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    if counts := _sizes("num_hidden_layers", student, teacher):
        _refuse_uneven_layers(what, *counts)


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

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for another hidden size, layers that do not divide the teacher's, or no teacher."""
        teacher = _need_teacher("HiddenStateLoss", teacher)
        widths = _sizes("hidden_size", student, teacher)
        if widths and widths[0] != widths[1]:
            scores = all(map(models.has_plain_attention, (student, teacher)))
            raise ValueError(
                f"HiddenStateLoss: student hidden size {widths[0]}, teacher {widths[1]}; they must be equal. Pass "
                f"objectives=[{'AttentionScoreLoss(), ' if scores else ''}LogitsLoss()], or stages without "
                f"HiddenStateLoss, or take a student of hidden size {widths[1]}"
            )
        _check_layers("HiddenStateLoss", student, teacher)

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

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for layers that do not divide the teacher's, or no teacher."""
        _check_layers("AttentionScoreLoss", student, _need_teacher("AttentionScoreLoss", teacher))

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

    def check(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Raise ValueError for another number of labels or words, a teacher without a head, or none."""
        teacher = _need_teacher("LogitsLoss", teacher)
        if type(teacher).__name__ in MODEL_MAPPING_NAMES.values():
            raise ValueError(
                f"LogitsLoss: the teacher, a {type(teacher).__name__}, has no head and returns no logits; load it as "
                f"the student's kind ({type(student).__name__}), or pass objectives=[HiddenStateLoss()]"
            )
        labels = getattr(student, "num_labels", None), getattr(teacher, "num_labels", None)  # of heads that have some
        if None not in labels and labels[0] != labels[1]:
            raise ValueError(
                f"LogitsLoss: student of {labels[0]} labels, teacher of {labels[1]}; equal needed. Load the student "
                f"with num_labels={labels[1]}, or take a teacher of the student's task"
            )
        words = _sizes("vocab_size", student, teacher)
        predict_words = all(model.get_output_embeddings() is not None for model in (student, teacher))
        if words and words[0] != words[1] and predict_words:
            raise ValueError(
                f"LogitsLoss: the student predicts {words[0]} words, the teacher {words[1]}; equal needed. Take models "
                "of one tokenizer, or leave LogitsLoss out"
            )

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


def _compare_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Both models read the same token ids: those that the teacher does not have are refused, fewer are warned of."""
    sizes = _sizes("vocab_size", student, teacher)
    if sizes is None or sizes[0] == sizes[1]:
        return
    own, taught = sizes
    if own > taught:
        raise ValueError(
            f"the student has a vocabulary of {own} tokens, the teacher of {taught}: both read the same token ids, and "
            f"{taught} to {own - 1} are none of the teacher's. Take a student with the teacher's tokenizer; if it has "
            f"it, and the rest of its table is spare, call teacher.resize_token_embeddings({own})"
        )
    logger.warning(
        "The student has a vocabulary of %d tokens, the teacher of %d. Both read the same token ids: with tokenizers "
        "that differ these mean other words to the teacher, and nothing can be learned from it.",
        own,
        taught,
    )


def _drops_tokens(model: nn.Module) -> bool:
    return any(isinstance(module, UnpaddedEncoder) and module.lengths is not None for module in model.modules())


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

    Of a batch each model is called with the columns that its own forward names, the teacher without labels. A column
    that only one of them names (`token_type_ids` of a BERT beside a DistilBERT) is kept for it, and objectives see all.

    Evaluation computes the ordinary task loss without the teacher. Losses are logged as loss_hidden and so on, each the
    mean over the batches in which it was active. Each is a mean over its batch: accumulation steps and ranks are
    averaged with equal weights, whatever their number of tokens. Where an objective compares scores, student and
    teacher are switched to the "lowbit" attention and stay so. Resume, multi-GPU, mixed precision and checkpoints are
    `Trainer`'s.

    Raises:
        ValueError: no teacher, one that shares trainable parameters with the student, both or ill-ordered `objectives`
            and `stages`, a stage without objectives, label smoothing, reentrant checkpointing with scores, a model
            that cannot give what an objective needs, tokens of a trained prompt to compare with the teacher's, a
            student with more token ids than the teacher, or what the objectives of any stage refuse (another hidden
            size, layers that do not divide the teacher's, ...).
    """

    # Losses are per-batch means, so Trainer must divide them by the accumulation steps; it would not for models that
    # take **kwargs, as BERT does. `model_accepts_loss_kwargs` below says the same to transformers before 5.19.
    loss_is_scaled_for_ga = False

    # Subclasses that can do without a teacher say so; their objectives then get None for its outputs.
    needs_teacher = True

    # Subclasses say so whose student keeps all tokens where objectives compare those of every layer.
    lifts_lengths = False

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
        self.stages, self.teacher = list(stages), teacher
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor smooths labels, which distillation does not train on; set it to 0")
        if self._needs_scores and self._reentrant:
            raise ValueError("attention scores get no gradient under use_reentrant=True; set it to False")
        self.model_accepts_loss_kwargs = False
        student = self.accelerator.unwrap_model(self.model)
        if self.model_init is None:  # else it was checked when it was made
            self._check_student(student)
        student = _inside_peft(student)
        if teacher is not None:
            teacher.to(self.args.device).eval()
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
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

    def _check_student(self, student: Any) -> None:
        """Raise ValueError for whatever can be known before training; nothing is changed."""
        for _, objectives in self.stages:
            _check_prompt(student, objectives)
        student = _inside_peft(student)
        pair = [model for model in (student, self.teacher) if model is not None]
        if self.teacher is not None:
            _refuse_shared_parameters(student, self.teacher)
            _compare_vocabularies(student, self.teacher)
        for _, objectives in self.stages:
            for objective in objectives:
                if (check := getattr(objective, "check", None)) is not None:
                    check(student, self.teacher)
        needs = {need for _, objectives in self.stages for objective in objectives for need in objective.needs}
        asked = self._asked_for(needs)
        for model in pair:
            if "scores" in needs:
                models.describe_attention(model, "AttentionScoreLoss")
            if lacking := asked.keys() - arguments(model, {}, asked).keys():
                raise ValueError(
                    f"{type(model).__name__}.forward does not take {', '.join(sorted(lacking))}, which the objectives "
                    "need; give it **kwargs and pass them on, or pass objectives that need less"
                )
            if asked and _drops_tokens(model) and (model is self.teacher or not self.lifts_lengths):
                raise ValueError(
                    f"{' and '.join(sorted(needs))} of all tokens are compared, and the "
                    f"{'teacher' if model is self.teacher else 'student'} drops tokens on the way; call "
                    "lowbit.set_length(model, None), or pass objectives=[LogitsLoss()]"
                )

    def _expose_scores(self, model: PreTrainedModel) -> None:
        if self._needs_scores:
            model.set_attn_implementation(LOWBIT_ATTENTION)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        self._check_student(model)
        self._expose_scores(_inside_peft(model))  # train() builds the student again
        self._agree_on_heads(_inside_peft(model))
        self._signature_columns = None  # this one's forward may name others
        return model

    def _set_signature_columns_if_needed(self) -> None:
        """Trainer keeps the columns that these name: the student's and the teacher's."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            names: Any = self._signature_columns  # a list of Trainer's own
            for model in (self.model, self.teacher):
                names += [] if model is None else parameters(model)[0]

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
            labels = () if self.compute_loss_func is None else ("labels",)  # which are not for the model then
            return super().compute_loss(model, self._of_student(model, inputs, labels), return_outputs)
        objectives = self.current_objectives()
        needs = {need for objective in objectives for need in objective.needs}
        wanted = {"return_dict": True, "output_hidden_states": False, **self._asked_for(needs)}
        student = model(**arguments(model, inputs, wanted))
        teacher = None
        if self.teacher is not None:
            from accelerate.utils import convert_to_fp32  # no trainer is without it, but `import lowbit` may be

            with torch.no_grad(), self.accelerator.autocast():  # as accelerate wraps the student's own forward
                teacher = self.teacher(**arguments(self.teacher, inputs, wanted, without={"labels", *self.label_names}))
            teacher = convert_to_fp32(teacher)
            scores = student.get("attentions"), teacher.get("attentions")
            if "scores" in needs and all(scores):
                teacher.attentions = self._of_kept_heads(*scores)
        losses = [(objective.name, objective(student, teacher, inputs)) for objective in objectives]
        self._note(losses)
        loss = sum(value for _, value in losses)
        return (loss, student) if return_outputs else loss

    @staticmethod
    def _asked_for(needs: Collection[str]) -> dict[str, bool]:
        """Options of forward for what objectives need."""
        return {
            **({"output_hidden_states": True} if "hidden_states" in needs else {}),
            **({"output_attentions": True, "output_scores": True} if "scores" in needs else {}),
        }

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, without the columns of the teacher: where there are no labels it calls the model itself."""
        return super().prediction_step(model, self._of_student(model, inputs, self.label_names), *args, **kwargs)

    @staticmethod
    def _of_student(model: Any, inputs: dict[str, Any], besides: Collection[str] = ()) -> dict[str, Any]:
        """The student's columns of a batch, and others that `Trainer` itself reads."""
        own = arguments(model, inputs)
        return {name: value for name, value in inputs.items() if name in own or name in besides}

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
