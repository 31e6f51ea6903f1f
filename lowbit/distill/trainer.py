"""Distillation-aware training: `transformers.Trainer` with a teacher and a list of objectives, summed and logged."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from .. import models
from ..elastic.training import Elastic, states_of
from ..files.records import read_json
from ..nn.attention import NAME as LOWBIT_ATTENTION
from . import parameters as of_objectives
from .checks import check_elastic, check_models, check_prompt, inside_peft, slimmed
from .columns import arguments, options, parameters
from .objectives import AttentionScoreLoss, HiddenStateLoss, LogitsLoss, Objective, TaskLoss
from .states import captured, of_kept_heads

logger = logging.getLogger("lowbit")


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
        teacher_dropout: leave the teacher in train mode, as some published codes do.
        elastic: which sub-networks of the student each step trains, all with the same objectives, whose losses are
            summed; afterwards `lowbit.extract` takes any of them (DynaBERT).
        *args, **kwargs: `Trainer`'s own.

    Objectives that are modules with parameters (learned projections) are trained with the student: in its optimizer, at
    their own `learning_rate` where they have one; in checkpoints as
    objectives.safetensors, and never in the student's own file. Objectives with a `view` see another batch than the
    loader's (`lowbit.distill.views.On`).

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
            and `stages`, a stage without objectives, label smoothing, reentrant checkpointing with scores, any with a
            view that is trained, a model that cannot give what an objective needs, tokens of a trained prompt to
            compare with the teacher's, a student with more token ids than the teacher, or what the objectives of any
            stage refuse (another hidden size, layers that do not divide the teacher's, ...).
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
        teacher_dropout: bool = False,
        elastic: Elastic | None = None,
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
        self.stages, self.teacher, self.elastic = list(stages), teacher, elastic
        self.parametrised = of_objectives.modules_of(self.stages)
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor smooths labels, which distillation does not train on; set it to 0")
        if self._needs_scores and self._reentrant:
            raise ValueError("attention scores get no gradient under use_reentrant=True; set it to False")
        if self.args.gradient_checkpointing and any(getattr(each, "alternate", None) for each in self._objectives):
            raise ValueError(
                "a view that is trained against the student (alternate) freezes it for a forward pass, which gradient "
                "checkpointing runs again when it is not; set gradient_checkpointing=False"
            )
        if elastic is not None and (
            self.args.gradient_checkpointing or self.args.n_gpu > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled
        ):
            raise ValueError(
                "elastic runs parts of the student's weights, on one device a process and without "
                "gradient_checkpointing; DeepSpeed, FSDP and DataParallel are not supported"
            )
        self.model_accepts_loss_kwargs = False
        student = self.accelerator.unwrap_model(self.model)
        if self.model_init is None:  # else it was checked when it was made
            self._check_student(student)
        student = inside_peft(student)
        if teacher is not None:
            teacher.to(self.args.device).train(teacher_dropout)
        self._build_objectives(student)
        self.add_callback(of_objectives.ObjectiveParameters(self.parametrised))
        if any(getattr(each, "view", None) is not None for each in self._objectives):
            # A second forward pass would write into buffers that the first one's graph reads.
            self.args.ddp_broadcast_buffers = False
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
    def _objectives(self) -> Iterator[Objective]:
        return (objective for _, objectives in self.stages for objective in objectives)

    @property
    def _needs_scores(self) -> bool:
        return any("scores" in objective.needs for objective in self._objectives)

    def _build_objectives(self, student: Any) -> None:
        """Parameters of the objectives, of the widths of these models; anew for each student."""
        for objective in {id(each): each for each in self._objectives}.values():
            if (build := getattr(objective, "build", None)) is not None:
                build(student, self.teacher)
        self.parametrised.to(self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's, with a group for each objective that has parameters."""
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for group in of_objectives.groups(self.parametrised, self.args.weight_decay):
            if known.isdisjoint(map(id, group["params"])):
                optimizer.add_param_group(group)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; a checkpoint gets the parameters of the objectives, a model of its own does not."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            of_objectives.save(self.parametrised, Path(output_dir))

    def _check_student(self, student: Any) -> None:
        """Raise ValueError for whatever can be known before training; nothing is changed."""
        for _, objectives in self.stages:
            check_prompt(student, objectives)
        check_models(inside_peft(student), self.teacher, [*self._objectives], self.lifts_lengths)
        if self.elastic is not None:
            check_elastic(self.elastic, student, self.teacher, [*self._objectives])

    def _expose_scores(self, model: PreTrainedModel) -> None:
        if self._needs_scores:
            model.set_attn_implementation(LOWBIT_ATTENTION)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = super().call_model_init(trial)
        self._check_student(model)
        self._expose_scores(inside_peft(model))  # train() builds the student again
        self._build_objectives(inside_peft(model))
        self._agree_on_heads(inside_peft(model))
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
        config = slimmed(model)
        if config is not None and self.args.world_size > 1:
            from accelerate.utils import broadcast_object_list

            (config.kept_heads,) = broadcast_object_list([config.kept_heads])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights of a checkpoint, and which heads they are: another student may have been slimmed to resume."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        of_objectives.load(self.parametrised, Path(resume_from_checkpoint))
        path, config = Path(resume_from_checkpoint) / "config.json", slimmed(self.model)
        if config is not None and path.is_file():
            config.kept_heads = read_json(path).get("quantization_config", {}).get("kept_heads")

    @property
    def progress(self) -> float:
        """Share of the steps that is done, 0 to 1: the clock of stages and schedules, so that these resume by it."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def current_objectives(self) -> Sequence[Objective]:
        """The objectives of the stage that the global step is in."""
        return next((objectives for end, objectives in self.stages if self.progress < end), self.stages[-1][1])

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
        for objective in objectives:
            if (advance := getattr(objective, "advance", None)) is not None:
                advance(self.progress)
        if ascending := [each for each in objectives if self._ascends(each)]:
            # Not the student's step: its wrapper for several ranks, which waits for its gradients, is left out.
            student = self.accelerator.unwrap_model(model)
            compared = [part for each in ascending if isinstance(part := getattr(each, "objective", None), nn.Module)]
            with contextlib.ExitStack() as stack:
                for module in (student, self.teacher, *compared):
                    stack.enter_context(of_objectives.frozen(module))
                losses, outputs = self._losses(student, ascending, inputs, ascend=True)
            self._note([(f"{name}_ascent", value) for name, value in losses])
            loss = -sum(value for _, value in losses)
        else:
            losses, outputs = self._losses_of_subnets(model, objectives, inputs)
            self._note(losses)
            loss = sum(value for _, value in losses)
        return (loss, outputs) if return_outputs else loss

    def _ascends(self, objective: Objective) -> bool:
        ascends = getattr(objective, "ascends", None)
        return ascends is not None and ascends(self.state.global_step)

    def _losses_of_subnets(
        self, model: Any, objectives: Sequence[Objective], inputs: Mapping[str, Any]
    ) -> tuple[list[tuple[str, Any]], Any]:
        """`_losses` of the student, or of each sub-network that the step trains; outputs of the last, the largest."""
        if self.elastic is None:
            return self._losses(model, objectives, inputs)
        losses, outputs, student = [], None, self.accelerator.unwrap_model(model)
        for subnet in self.elastic.draw(self.state.global_step):
            shape = subnet.shape(student)
            with self.elastic.running(shape, student, self.teacher):
                found, outputs = self._losses(model, objectives, inputs, layers=shape.layers)
            losses += found
        return losses, outputs

    def _losses(
        self,
        model: Any,
        objectives: Sequence[Objective],
        inputs: Mapping[str, Any],
        ascend: bool = False,
        layers: tuple[int, ...] | None = None,
    ) -> tuple[list[tuple[str, Any]], Any]:
        """Names and losses of objectives, each view run once; the student's outputs, of the loader's batch if run.

        `layers` are those of the teacher's that a sub-network has, None for all.
        """
        views: dict[int, Any] = {id(view): view for view in (getattr(each, "view", None) for each in objectives)}
        outputs, losses = [], []
        for view in sorted(views.values(), key=lambda view: view is not None):
            of_view = [each for each in objectives if getattr(each, "view", None) is view]
            batch = teachers_batch = inputs
            if view is not None:
                with contextlib.nullcontext() if ascend else torch.no_grad(), self.accelerator.autocast():
                    batch, teachers_batch = view(self.accelerator.unwrap_model(model), self.teacher, inputs)
            needs = {need for each in of_view for need in each.needs}
            student = self._run_student(model, batch, needs)
            teacher = self._run_teacher(student, teachers_batch, needs, ascend)
            if layers is not None and "hidden_states" in needs and teacher is not None:
                teacher["hidden_states"] = states_of(teacher["hidden_states"], layers)
            losses += [(each.name, each(student, teacher, batch)) for each in of_view]
            outputs.append(student)
        return losses, outputs[0]

    def _run_student(self, model: Any, batch: Mapping[str, Any], needs: Collection[str]) -> Any:
        inner = inside_peft(self.accelerator.unwrap_model(model))
        with captured(inner, "qkv" in needs) as qkv:
            outputs = model(**arguments(model, batch, self._wanted(needs)))
        if qkv:
            outputs["qkv"] = [tuple(layer) for layer in qkv]
        return outputs

    def _run_teacher(self, student: Any, batch: Mapping[str, Any], needs: Collection[str], ascend: bool) -> Any:
        """The teacher's outputs in float32; with a graph only for who ascends through it."""
        if self.teacher is None:
            return None
        from accelerate.utils import convert_to_fp32  # no trainer is without it, but `import lowbit` may be

        without = {"labels", *self.label_names}
        with contextlib.nullcontext() if ascend else torch.no_grad():
            # under autocast as accelerate wraps the student's own forward
            with self.accelerator.autocast(), captured(self.teacher, "qkv" in needs) as qkv:
                teacher = self.teacher(**arguments(self.teacher, batch, self._wanted(needs), without=without))
            teacher = convert_to_fp32(teacher)
        if qkv:
            teacher["qkv"] = [tuple(each.float() for each in layer) for layer in qkv]
        scores = student.get("attentions"), teacher.get("attentions")
        if "scores" in needs and all(scores):
            teacher.attentions = of_kept_heads(self.model, *scores)
        return teacher

    @staticmethod
    def _wanted(needs: Collection[str]) -> dict[str, bool]:
        return {"return_dict": True, "output_hidden_states": False, **options(needs)}

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, without the columns of the teacher: where there are no labels it calls the model itself."""
        return super().prediction_step(model, self._of_student(model, inputs, self.label_names), *args, **kwargs)

    @staticmethod
    def _of_student(model: Any, inputs: dict[str, Any], besides: Collection[str] = ()) -> dict[str, Any]:
        """The student's columns of a batch, and others that `Trainer` itself reads."""
        own = arguments(model, inputs)
        return {name: value for name, value in inputs.items() if name in own or name in besides}

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
