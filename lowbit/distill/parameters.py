"""What objectives train besides the student: projections, generators. In checkpoints, never in the student's file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from ..files.atomic import staging
from .objectives import Objective

FILE = "objectives.safetensors"


def modules_of(stages: Sequence[tuple[float, Sequence[Objective]]]) -> nn.ModuleList:
    """The objectives that are modules, each once, in the order of the stages."""
    found = {id(each): each for _, objectives in stages for each in objectives if isinstance(each, nn.Module)}
    return nn.ModuleList(found.values())


def groups(modules: nn.ModuleList, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: each objective's, at its own `learning_rate` where it has one."""
    seen: set[int] = set()
    found = []
    for module in modules:
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        rate = getattr(module, "learning_rate", None)
        if own:
            found.append({"params": own, "weight_decay": weight_decay, **({} if rate is None else {"lr": rate})})
    return found


def save(modules: nn.ModuleList, folder: Path) -> None:
    """Write what the objectives hold into a folder; nothing where they hold nothing."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in modules.state_dict().items()}
    if state:
        with staging(folder) as aside:
            save_file(state, aside / FILE)
            os.replace(aside / FILE, folder / FILE)


def load(modules: nn.ModuleList, folder: Path) -> None:
    """Read what `save` wrote.

    Raises:
        ValueError: the folder holds other parameters than these objectives have.
    """
    own, path = modules.state_dict(), folder / FILE
    saved = load_file(path) if path.is_file() else {}
    shapes, found = ({name: tuple(value.shape) for name, value in each.items()} for each in (own, saved))
    if shapes != found:
        names = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        first = names[0]
        raise ValueError(
            f"{folder} was saved with other objectives: {first} is {found.get(first, 'not there')}, needed: "
            f"{shapes.get(first, 'none')} ({len(names)} differ). Pass the objectives that it was trained with, or "
            "train from the start"
        )
    modules.load_state_dict(saved)


class ObjectiveParameters(TrainerCallback):
    """Around each optimizer step: gradients of the objectives are averaged over ranks and clipped, then cleared.

    DistributedDataParallel and `Trainer` do so for the student's alone. They are clipped by their own norm.
    """

    def __init__(self, modules: nn.ModuleList) -> None:
        self.modules = modules

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [p for p in self.modules.parameters() if p.requires_grad]
        if not trained:
            return
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            ranks = torch.distributed.get_world_size()
            has = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
            torch.distributed.all_reduce(has)
            for parameter in (p for p, some in zip(trained, has.tolist(), strict=True) if some):
                # A rank whose batch has no gradient gives zeros, so that all wait for the same sums.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(gradient)
                parameter.grad = gradient / ranks
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.modules.zero_grad()


@contextmanager
def frozen(model: nn.Module | None) -> Iterator[None]:
    """No gradients for a model's parameters, but through it."""
    trained = [p for p in model.parameters() if p.requires_grad] if model is not None else []
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
