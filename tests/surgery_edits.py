"""What users do to a model with their own hands, as small functions in one table: `EDITS`.

An edit takes a model at any stage and a `random.Random`, and changes the model in place. It raises `Unfit` where the
model has no such part. Parts are found by their names in transformers, not by what lowbit says of an architecture.
"""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

Edit = Callable[[Any, random.Random], None]


class Unfit(Exception):
    """The model has no part that this edit is for."""


# ------------------------------------------------------------------------------------------------ parts of users' own


class Square(nn.Module):
    """An activation of the user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sigmoid() * 2 - 0.5


class Scaled(nn.Module):
    """A norm of the user's own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.norm(x) + 0.1 * x


class LouderNorm(nn.LayerNorm):
    """A class derived from torch's, with tensors of the same names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(x) + 0.2


class Reader(nn.Module):
    """A head or pooler that reads more of [B, S, H] than its first token."""

    def __init__(self, how: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.how, self.out = how, nn.Linear(inputs, outputs)

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.out(read(states, self.how))


def read(states: torch.Tensor, how: str) -> torch.Tensor:
    if states.dim() < 3:
        return states
    if how == "max":
        return states.amax(1)
    return states[:, -1] if how == "last" else states.mean(1)


def read_by_hand(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
    """`forward` of a head that a user derived: the states of all tokens, averaged."""
    kwargs.pop("labels", None)
    outputs = self.base_model(input_ids, attention_mask=attention_mask, **kwargs)
    logits = self.own_head(outputs[0].mean(1))
    if kwargs.get("return_dict") is False:
        return logits, *outputs[1:]
    return transformers.modeling_outputs.SequenceClassifierOutput(
        logits=logits, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
    )


def derived(kind: type) -> type:
    """A class of the user's own, at home in this module, so that it can be pickled."""
    name = f"Own{kind.__name__}"
    if name not in globals():
        globals()[name] = type(name, (kind,), {"forward": read_by_hand, "__module__": __name__})
    return globals()[name]


class Watch:
    """Hooks: what they have seen, multiplied by `factor` before it goes on (1: left alone)."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.seen: list[torch.Tensor] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = first_tensor((args, kwargs))
        if found is None:
            return None
        self.seen.append(found.detach().clone())
        return None if self.factor == 1 else (scaled(args, found, self.factor), scaled(kwargs, found, self.factor))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        found = first_tensor(output)
        if found is None:
            return None
        self.seen.append(found.detach().clone())
        return None if self.factor == 1 else scaled(output, found, self.factor)


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in tuples and dictionaries."""
    if torch.is_tensor(value):
        return value if value.is_floating_point() else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def scaled(value: Any, found: torch.Tensor, factor: float) -> Any:
    """A copy of nested values, `found` multiplied."""
    if value is found:
        return found * factor
    if isinstance(value, dict):
        new = copy.copy(value)
        for key in value:
            new[key] = scaled(value[key], found, factor)
        return new
    return type(value)(scaled(part, found, factor) for part in value) if type(value) in (list, tuple) else value


class Louder:
    """A `forward` that is put over the one of an instance."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        found = first_tensor(output)
        return output if found is None else scaled(output, found, 1.5)


# ------------------------------------------------------------------------------------------------------ finding parts


def pick(rng: random.Random, options: Any) -> Any:
    options = list(options)
    if not options:
        raise Unfit
    return rng.choice(options)


def inside(model: Any, *endings: str) -> list[str]:
    """Names in the base model that end so, of modules."""
    found = (name for name, module in model.base_model.named_modules() if module is not None)
    return [name for name in found if name.endswith(endings)]


def layers(model: Any) -> tuple[nn.Module, str]:
    """Where the list of layers is: its owner, its name there."""
    for module in model.base_model.modules():
        for name, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and name in ("layer", "layers") and len(child):
                return module, name
    raise Unfit


def linears(model: Any) -> list[str]:
    """Names, in the base model, of linears of all stages."""
    kinds = ("Linear", "QuantLinear", "PackedLinear")
    return [name for name, module in model.base_model.named_modules() if type(module).__name__ in kinds]


def norms(model: Any) -> list[str]:
    return [name for name, module in model.base_model.named_modules() if isinstance(module, nn.LayerNorm)]


def owner(model: Any, name: str) -> tuple[Any, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def put(model: Any, name: str, module: nn.Module) -> None:
    parent, last = owner(model, name)
    setattr(parent, last, module.train(parent.training).to(model.dtype))


def wide(table: Any) -> int:
    return table.embedding_dim


# -------------------------------------------------------------------------------------------------------------- heads


def head_reads(how: str) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        classifier = getattr(model, "classifier", None)
        if classifier is None:
            raise Unfit
        first = next(module for module in classifier.modules() if isinstance(module, nn.Linear))
        put(model, "classifier", Reader(how, first.in_features, getattr(model, "num_labels", None) or 1))

    return edit


def pooler_reads(how: str) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        if getattr(model.base_model, "pooler", None) is None:
            raise Unfit
        hidden = model.config.hidden_size
        put(model.base_model, "pooler", Reader(how, hidden, hidden))

    return edit


def deeper_head(model: Any, rng: random.Random) -> None:
    if not isinstance(getattr(model, "classifier", None), nn.Linear):
        raise Unfit
    old = model.classifier
    put(model, "classifier", nn.Sequential(nn.Linear(old.in_features, 16), nn.Tanh(), nn.Linear(16, old.out_features)))


def derived_class(model: Any, rng: random.Random) -> None:
    if "ForSequenceClassification" not in type(model).__name__ or type(model).__name__.startswith("Own"):
        raise Unfit
    model.own_head = nn.Linear(model.config.hidden_size, 3).to(model.dtype)
    model.__class__ = derived(type(model))


# ------------------------------------------------------------------------------------------------ modules of the layers

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu_new": transformers.activations.NewGELUActivation,
    "own": Square,
    "prelu": nn.PReLU,
}


def activation(kind: str, all_layers: bool) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        names = inside(model, "intermediate_act_fn", "ffn.activation")
        for name in names if all_layers and names else [pick(rng, names)]:
            put(model.base_model, name, ACTIVATIONS[kind]())

    return edit


def norm(kind: str) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        name = pick(rng, norms(model))
        old = model.base_model.get_submodule(name)
        if kind == "eps":
            old.eps = 0.3
        elif kind == "own":
            put(model.base_model, name, Scaled(old))
        elif kind == "identity":
            put(model.base_model, name, nn.Identity())
        elif kind == "plain":
            put(model.base_model, name, nn.LayerNorm(old.normalized_shape, elementwise_affine=False))
        else:
            new = LouderNorm(old.normalized_shape, old.eps)
            new.load_state_dict(old.state_dict())
            put(model.base_model, name, new)

    return edit


def table(ending: str, by_call: bool = False, rows: int = 0) -> Edit:
    """Another table in the place of one of the embeddings'."""

    def edit(model: Any, rng: random.Random) -> None:
        name = pick(rng, [n for n in inside(model, ending) if n.startswith("embeddings")])
        old: Any = model.base_model.get_submodule(name)
        new = nn.Embedding(old.num_embeddings + rows, wide(old), old.padding_idx)
        new.weight.data.normal_(std=0.5)
        if by_call:
            model.set_input_embeddings(new.to(model.dtype))
        else:
            put(model.base_model, name, new)

    return edit


def new_values(model: Any, rng: random.Random) -> None:
    """In place, of a parameter: a table, a norm or a bias."""
    name = pick(rng, [name for name, _ in model.base_model.named_parameters()])
    parameter = model.base_model.get_parameter(name)
    with torch.no_grad():
        parameter.add_(torch.randn_like(parameter) * 0.3)


# ------------------------------------------------------------------------------------------------------------- layers


def change_layers(how: str) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        parent, name = layers(model)
        own: Any = getattr(parent, name)
        if how == "removed":
            if len(own) < 2:
                raise Unfit
            del own[rng.randrange(len(own))]
        elif how == "sliced":
            setattr(parent, name, own[:1])
            model.config.num_hidden_layers = 1
        elif how == "reordered":
            setattr(parent, name, nn.ModuleList(reversed(list(own))))
        elif how == "appended":
            own.append(copy.deepcopy(own[0]))
        elif how == "shared":
            own[-1] = own[0]
        else:
            other = copy.deepcopy(own[rng.randrange(len(own))])
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            own[rng.randrange(len(own))] = other

    return edit


def shared_linear(model: Any, rng: random.Random) -> None:
    """One module in the places of two."""
    names = linears(model)
    one = pick(rng, names)
    own: Any = model.base_model.get_submodule(one)
    sizes = {name: _sizes(model.base_model.get_submodule(name)) for name in names}
    same = [name for name in names if name != one and sizes[name] == sizes[one]]
    parent, last = owner(model.base_model, pick(rng, same))
    setattr(parent, last, own)


def _sizes(linear: Any) -> tuple[int, int]:
    return linear.in_features, linear.out_features


# -------------------------------------------------------------------------------------------------------------- hooks

PLACES: dict[str, Callable[[Any, random.Random], Any]] = {
    "layer": lambda model, rng: pick(rng, getattr(*layers(model))),
    "attention": lambda model, rng: model.base_model.get_submodule(pick(rng, inside(model, "attention", ".self"))),
    "linear": lambda model, rng: model.base_model.get_submodule(pick(rng, linears(model))),
    "norm": lambda model, rng: model.base_model.get_submodule(pick(rng, norms(model))),
    "activation": lambda model, rng: model.base_model.get_submodule(
        pick(rng, inside(model, "intermediate_act_fn", "activation"))
    ),
    "words": lambda model, rng: model.base_model.get_submodule(pick(rng, inside(model, "word_embeddings"))),
    "embeddings": lambda model, rng: model.base_model.get_submodule(pick(rng, inside(model, "embeddings"))),
    "encoder": lambda model, rng: layers(model)[0],
    "base model": lambda model, rng: model.base_model,
    "head": lambda model, rng: pick(rng, [m for n, m in model.named_modules() if n in ("classifier", "qa_outputs")]),
    "model": lambda model, rng: model,
    "pooler": lambda model, rng: model.base_model.get_submodule(pick(rng, inside(model, "pooler"))),
}


def hook(place: str, when: str, factor: float) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        module, watch = PLACES[place](model, rng), Watch(factor)
        if when == "before":
            module.register_forward_pre_hook(watch.before, with_kwargs=True)
        else:
            module.register_forward_hook(watch.after, with_kwargs=True)

    return edit


def watches(model: Any) -> list[Watch]:
    """Of all hooks, in the order of the modules."""
    found = []
    for module in model.modules():
        for each in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(getattr(each, "__self__", None), Watch):
                found.append(each.__self__)
    return found


def without_watches(model: Any) -> None:
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, each in hooks.items() if isinstance(getattr(each, "__self__", None), Watch)]:
                del hooks[key]


def own_forward(place: str) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        module = PLACES[place](model, rng)
        if "forward" in module.__dict__:
            raise Unfit
        module.forward = Louder(module.forward)

    return edit


# ----------------------------------------------------------------------------------------- parameters and configuration


def frozen(model: Any, rng: random.Random) -> None:
    for parameter in pick(rng, [model.base_model, *model.base_model.children()]).parameters():
        parameter.requires_grad_(False)


def reparametrized(how: str) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        parent, name = layers(model)
        named = [n for n, m in getattr(parent, name).named_modules() if type(m) is nn.Linear]
        linear: Any = getattr(parent, name).get_submodule(pick(rng, named))
        if "weight" not in linear._parameters:
            raise Unfit
        if how == "pruned":
            prune.l1_unstructured(linear, "weight", amount=0.3)
        elif how == "weight_norm":
            parametrizations.weight_norm(linear)
        else:
            parametrize.register_parametrization(linear, "weight", nn.Hardtanh(-0.05, 0.05))

    return edit


def pruned_for_good(model: Any, rng: random.Random) -> None:
    parent, name = layers(model)
    named = [n for n, m in getattr(parent, name).named_modules() if type(m) is nn.Linear and "weight" in m._parameters]
    linear = getattr(parent, name).get_submodule(pick(rng, named))
    prune.l1_unstructured(linear, "weight", amount=0.3)
    prune.remove(linear, "weight")


def second_encoder(model: Any, rng: random.Random) -> None:
    if model.base_model is model:
        raise Unfit
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        raise Unfit
    model.teacher = type(model.base_model)(config).eval()


def other_name(model: Any, rng: random.Random) -> None:
    """The encoder under another name than its class says."""
    if model.base_model is model or getattr(model.config, "quantization_config", None) is not None:
        raise Unfit
    prefix = model.base_model_prefix
    body = getattr(model, prefix)
    delattr(model, prefix)
    model.body = body
    model.forward = types.MethodType(_call_body, model)


def _call_body(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model.body(*args, **kwargs)


def dropout_on(model: Any, rng: random.Random) -> None:
    dropout = pick(rng, [m for m in model.modules() if isinstance(m, nn.Dropout)])
    dropout.p = 0.5
    dropout.training = True


def setting(name: str) -> Edit:
    def edit(model: Any, rng: random.Random) -> None:
        if name == "output_attentions" and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("eager")
        setattr(model.config, name, True)

    return edit


def resized(model: Any, rng: random.Random) -> None:
    if type(model.get_input_embeddings()) is not nn.Embedding:
        raise Unfit
    model.resize_token_embeddings(200 + rng.choice([1, 7, 64]))


# ---------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """An edit, and what may follow from it.

    Attributes:
        apply: the edit.
        kept: whether a file says it: "yes", "no" (as with transformers' own models), "loud" (it may be refused).
        refused: whether `prepare` may refuse the model: "no", "may", "must".
        reads_padding: what the head reads depends on hidden states at padding, which are 0 without padding.
        random: outputs are.
    """

    apply: Edit
    kept: str = "no"
    refused: str = "no"
    reads_padding: bool = False
    random: bool = False


EDITS: dict[str, Row] = {
    **{f"head reads {how}": Row(head_reads(how), reads_padding=True) for how in ("mean", "last", "max")},
    **{f"pooler reads {how}": Row(pooler_reads(how), "no", "may", True) for how in ("mean", "last")},
    "deeper head": Row(deeper_head),
    "derived class": Row(derived_class, reads_padding=True),
    **{f"{kind} everywhere": Row(activation(kind, True)) for kind in ACTIVATIONS},
    **{f"{kind} in one layer": Row(activation(kind, False)) for kind in ACTIVATIONS},
    **{f"norm {kind}": Row(norm(kind)) for kind in ("eps", "own", "identity", "plain", "louder")},
    "set_input_embeddings": Row(table("word_embeddings", by_call=True), "loud"),
    "more words": Row(table("word_embeddings", rows=5)),
    "words": Row(table("word_embeddings"), "loud"),
    "positions": Row(table("position_embeddings"), "yes"),
    "more positions": Row(table("position_embeddings", rows=9)),
    "types": Row(table("token_type_embeddings"), "yes"),
    "new values": Row(new_values, "yes"),
    "layer removed": Row(change_layers("removed"), "loud"),
    "layers sliced": Row(change_layers("sliced"), "yes"),
    "layers reordered": Row(change_layers("reordered"), "yes"),
    "layer appended": Row(change_layers("appended")),
    "layer shared": Row(change_layers("shared"), "loud", "may"),
    "layer replaced": Row(change_layers("replaced"), "yes"),
    "linear shared": Row(shared_linear, "loud", "may"),
    **{
        f"{'change' if factor != 1 else 'watch'} {when} {place}": Row(
            hook(place, when, factor), "no" if factor != 1 else "yes"
        )
        for place in PLACES
        for when in ("before", "after")
        for factor in (1.0, 1.5)
    },
    **{f"own forward of {place}": Row(own_forward(place), "no", "may") for place in PLACES},
    "frozen": Row(frozen, "yes"),
    **{f"{how}": Row(reparametrized(how), "no", "must") for how in ("pruned", "weight_norm", "parametrized")},
    "pruned for good": Row(pruned_for_good, "yes"),
    "second encoder": Row(second_encoder, "no", "must"),
    "other name": Row(other_name, "no", "must"),
    "dropout on": Row(dropout_on, "yes", random=True),
    "output_attentions": Row(setting("output_attentions"), "yes"),
    "output_hidden_states": Row(setting("output_hidden_states"), "yes"),
    "resized": Row(resized, "yes"),
}
