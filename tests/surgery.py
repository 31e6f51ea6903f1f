"""Random programs of verbs, edits, saves and calls on a model, each checked against a twin that takes no fast path.

A program is an architecture, a head, options of the configuration and steps; a step is a name and a number, from which
all of its random choices are made, so a program is printed as the Python that runs it again, and shrunk by leaving
steps out. The model and its twin get the same steps, but

    what changes nothing    the twin is spared: it never has lowbit's encoder or embeddings, is not saved and loaded,
                            not copied; with a configuration that quantizes nothing it stays transformers' float model
    what fails              must be one of `CLEAR`, and leaves the model as it was, to the last bit of its outputs

After every step both are called on the same random input, of any mask, and their outputs, errors and what hooks have
seen of them are compared (`compare`).
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn

import lowbit
from lowbit.stages import convert as convert_module
from lowbit.stages import unpadding
from surgery_edits import EDITS, Unfit, watches, without_watches
from surgery_edits import layers as layers_of

CLEAR = (ValueError, TypeError)  # lowbit.CheckpointError is a ValueError

SIZES: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 80, "initializer_range": 0.08, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": 200, "dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128, "max_position_embeddings": 64,
    "initializer_range": 0.08, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1, "type_vocab_size": 2},
    "XLMRoberta": {**SIZES, "pad_token_id": 1},
    "Camembert": {**SIZES, "pad_token_id": 1},
    "DistilBert": _DISTILBERT,
    "Electra": {**SIZES, "embedding_size": 32},
    "MPNet": {**SIZES, "pad_token_id": 1},
}
OTHERS: dict[str, dict[str, Any]] = {
    "Albert": {**SIZES, "embedding_size": 32, "classifier_dropout_prob": 0.0},
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "BigBird": {**SIZES, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
    "Nystromformer": {**SIZES, "segment_means_seq_len": 64, "num_landmarks": 8},
    "MegatronBert": SIZES,
    "Ernie": SIZES,
    "RoFormer": {**SIZES, "embedding_size": 64},
    "ModernBert": {**SIZES, "pad_token_id": 0, "global_attn_every_n_layers": 1, "attention_dropout": 0.0},
    "ConvBert": {**SIZES, "embedding_size": 64},
}
FAMILIES = KNOWN | OTHERS
HEADS = (
    "Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForMultipleChoice",
    "ForTokenClassification", "ForQuestionAnswering", "ForNextSentencePrediction",
)  # fmt: skip
PLAIN = [name for name in KNOWN if name != "MPNet"]  # attention by transformers' interface
CONFIGS: dict[str, lowbit.LowbitConfig] = {
    "ternary": lowbit.TernaryConfig(),
    "float attention": lowbit.TernaryConfig(quantize_attention=False),
    "binary": lowbit.BinaryConfig(quantize_attention=False, asymmetric=["linear", "ffn_output"]),
    "4 bits": lowbit.BinaryConfig(activation_bits=4, quantize_attention=False),
    "weights only": lowbit.TernaryConfig(activation_bits=None, position_embedding_bits=8),
    "no words": lowbit.TernaryConfig(embedding_bits=None, quantize_attention=False),
    "nothing": lowbit.LowbitConfig(weight_bits=None, embedding_bits=None, activation_bits=None),
}
Step = tuple[str, int]


@dataclass(frozen=True)
class Program:
    """What is done to which model."""

    family: str
    head: str
    config: str
    steps: tuple[Step, ...]
    seed: int = 0


class Failure(AssertionError):
    """Something that must not happen."""


class End(Exception):
    """There is nothing left to compare."""


@dataclass
class Pair:
    """A model and its twin on their way through a program."""

    model: Any
    twin: Any
    config: lowbit.LowbitConfig
    config_name: str
    family: str
    stage: str = "float"
    edits: list[str] = field(default_factory=list)
    lengths: bool = False  # are set, which layers as they are cannot give all of
    drops: bool = False  # tokens
    slim: bool = False
    shared: bool = False

    @property
    def float_twin(self) -> bool:
        return self.config_name == "nothing"

    def any(self, attribute: str, *values: Any) -> bool:
        return any(getattr(EDITS[name], attribute) in values for name in self.edits)


# ------------------------------------------------------------------------------------------------------------- models


def build(program: Program) -> Any:
    """A model with random weights, biases and norms, in eval mode; RoBERTa's heads of transformers and so on."""
    torch.manual_seed(program.seed)
    model = getattr(transformers, f"{program.family}{program.head}")(config_of(program.family, program.head))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "relative" in name:
                parameter.normal_(std=1.0)
    return model.eval()


def config_of(family: str, head: str) -> Any:
    labels = {"num_labels": 3} if head in ("ForSequenceClassification", "ForTokenClassification") else {}
    return getattr(transformers, f"{family}Config")(**FAMILIES[family], **labels)


@contextmanager
def no_stand_ins() -> Iterator[None]:
    """Packed models keep transformers' encoder and embeddings."""
    with (
        mock.patch.object(convert_module, "fuse_where_possible", lambda model: model),
        mock.patch.object(unpadding, "fuse_where_possible", lambda model: model),
    ):
        yield


# ------------------------------------------------------------------------------------------------------------- inputs


@dataclass
class Call:
    """Keywords of a forward pass, and how."""

    inputs: dict[str, Any]
    real: torch.Tensor  # bool [rows, S]: tokens, not padding
    by_place: bool = False
    gradients: bool = False
    plain: bool = False  # nothing but ids and a padding mask, on the right
    ordinary: bool = True  # no mask but one of padding
    no_mask: bool = False  # what is given is none, by lowbit's error


def draw_call(pair: Pair, rng: random.Random, ids_seed: int) -> Call:
    """A batch; `ids_seed` changes nothing but the tokens."""
    model, config = pair.model, pair.model.config
    choices = 2 if "ForMultipleChoice" in type(model).__name__ else 1
    rows, length = rng.randint(1, 4) * choices, rng.choice([1, 4, 5, 9, 13])  # no number of labels
    if pair.family in ("BigBird", "Nystromformer"):
        length = rng.choice([16, 16, 32]) if pair.family == "BigBird" else 64
    generator = torch.Generator().manual_seed(ids_seed)
    padding = getattr(config, "pad_token_id", None) or 0
    ids = torch.randint(2, 200, (rows, length), generator=generator)
    real, side = torch.ones(rows, length, dtype=torch.bool), rng.choice(["none", "right", "left", "inside", "empty"])
    side = "none" if pair.family == "Nystromformer" else side  # which fails on padding itself
    for row in range(rows) if side != "none" else ():
        number = rng.randint(0, length - 1)
        real[row, slice(length - number, None) if side in ("right", "empty") else slice(0, number)] = False
        if side == "inside":
            real[row] = torch.tensor([rng.random() < 0.6 for _ in range(length)])
            real[row, rng.randrange(length)] = True
    if side == "empty":
        real[rng.randrange(rows)] = False
    if rng.random() < 0.8:
        ids = ids.where(real, torch.tensor(padding))
    inputs: dict[str, Any] = {"input_ids": ids}
    mask = None if side == "none" and rng.random() < 0.5 else real.to(rng.choice([torch.long, torch.bool, torch.float]))
    mask = mask if mask is None or pair.family in KNOWN else mask.long()
    kind = rng.choice(["2-D"] * 8 + ["3-D", "4-D bool", "4-D float", "4-D int"])
    eager = pair.family in PLAIN and pair.twin.config._attn_implementation == "eager"
    kind = "4-D float" if kind == "4-D bool" and eager else kind  # which adds 1 where it is True
    if kind != "2-D" and pair.family in KNOWN and choices == 1:
        seen = torch.rand(rows, length, length, generator=torch.Generator().manual_seed(ids_seed)) < 0.7
        seen |= torch.eye(length, dtype=torch.bool)
        mask = {
            "3-D": seen.long(), "4-D bool": seen[:, None], "4-D int": seen[:, None].long(),
            "4-D float": seen.new_zeros(rows, 1, length, length, dtype=model.dtype).masked_fill(
                ~seen[:, None], torch.finfo(model.dtype).min
            ),
        }[kind]  # fmt: skip
        real = torch.ones_like(real)
    if mask is not None:
        inputs["attention_mask"] = mask
    no_mask = kind in ("3-D", "4-D int") and mask is not None and mask.dim() > 2
    ordinary = mask is None or mask.dim() == 2
    call = Call(inputs, real, plain=ordinary and side in ("none", "right"), ordinary=ordinary, no_mask=no_mask)
    extras = {
        "nothing": lambda: None,
        "embeds": lambda: _embeds(model, inputs, generator),
        "positions": lambda: inputs.update(position_ids=torch.randint(2, 40, (rows, length), generator=generator)),
        "types": lambda: inputs.update(token_type_ids=torch.randint(0, 2, (rows, length), generator=generator)),
        "states": lambda: inputs.update(output_hidden_states=True),
        "maps": lambda: inputs.update(output_attentions=True),
        "tuple": lambda: inputs.update(return_dict=False),
        "by place": lambda: setattr(call, "by_place", True),
        "gradients": lambda: setattr(call, "gradients", True),
    }
    names = ["nothing"] * 4 + [name for name in extras if pair.family in KNOWN or name in ("states", "tuple")]
    for name in rng.choices(names, k=rng.choice([1, 1, 2])):
        if name == "types" and not getattr(config, "type_vocab_size", 0) > 1:
            continue
        if name == "tuple" and getattr(config, "output_attentions", False):
            continue  # of which "sdpa" gives none, and then places are others
        if name == "positions" and pair.family in ("DistilBert",):
            continue
        if name == "maps" and "sdpa" in (config._attn_implementation, pair.twin.config._attn_implementation):
            continue
        call.plain &= name in ("nothing", "tuple", "by place")
        extras[name]()
    if choices == 2:
        call.inputs = {
            key: value.view(-1, 2, *value.shape[1:]) if torch.is_tensor(value) else value
            for key, value in inputs.items()
        }
    return call


def _embeds(model: Any, inputs: dict[str, Any], generator: torch.Generator) -> None:
    if (ids := inputs.pop("input_ids", None)) is not None:
        wide = getattr(model.config, "embedding_size", None) or model.config.hidden_size
        inputs["inputs_embeds"] = torch.randn(*ids.shape, wide, generator=generator).to(model.dtype)


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All floating-point tensors of an output, by their place."""
    if torch.is_tensor(value):
        return {name: value.detach()} if value.is_floating_point() else {}
    found: dict[str, torch.Tensor] = {}
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            found |= tensors(part, f"{name}.{key}")
    return found


def run(model: Any, call: Call) -> dict[str, torch.Tensor] | Exception:
    """Outputs of a call, with a gradient at the inputs where one is asked for; or its error."""
    inputs = dict(call.inputs)
    for watch in watches(model):
        watch.seen.clear()
    embeds = inputs.get("inputs_embeds")
    if call.gradients and embeds is not None:
        inputs["inputs_embeds"] = embeds = embeds.clone().requires_grad_()
    args = []
    if (
        call.by_place
        and "input_ids" in inputs
        and [*inspect.signature(model.forward).parameters][1] == "attention_mask"
    ):
        args = [inputs.pop("input_ids"), *([inputs.pop("attention_mask")] if "attention_mask" in inputs else [])]
    try:
        with torch.set_grad_enabled(call.gradients):
            output = model(*args, **inputs)
        found = tensors(output)
        if call.gradients and embeds is not None:
            first = next(x for x in (output.values() if isinstance(output, dict) else output) if torch.is_tensor(x))
            if first.requires_grad:
                weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first.dtype)
                valid = rows_of(first, call.real, False)
                (gradient,) = torch.autograd.grad((first * weights)[valid].sum(), embeds)
                found["gradient"] = gradient
        return found
    except Exception as error:
        return error


# --------------------------------------------------------------------------------------------------------- comparisons


def rows_of(tensor: torch.Tensor, real: torch.Tensor, reads_padding: bool) -> Any:
    """Which entries of an output are defined, as an index: those of tokens, or of rows that have some."""
    if tensor.shape[:2] == real.shape:
        return real
    rows = real.all(1) if reads_padding else real.any(1)
    if tensor.dim() and tensor.shape[0] and len(rows) % tensor.shape[0] == 0:  # choices are rows of one question
        return rows.view(tensor.shape[0], -1).all(1)
    return ...


def distance(got: torch.Tensor, expected: torch.Tensor, real: torch.Tensor, reads_padding: bool) -> float:
    """Relative error of what is defined; infinite where one is finite and the other not."""
    if got.shape != expected.shape:
        return float("inf")
    valid = rows_of(expected, real, reads_padding)
    got, expected = got[valid].double(), expected[valid].double()
    if not expected.numel():
        return 0.0
    same = (got == expected) | (got.isnan() & expected.isnan())
    error = (got - expected).where(~same, torch.zeros((), dtype=torch.double))
    size = expected.nan_to_num(0.0, 0.0, 0.0).norm()
    value = float(error.norm() / size.clamp(min=1e-6))
    return value if value == value else float("inf")


def tolerance(pair: Pair, padded: bool) -> float:
    """Of outputs whose activations were quantized from values that differ by rounding; see `compare`."""
    half = pair.model.dtype in (torch.float16, torch.bfloat16)
    if pair.config_name in ("nothing", "weights only") or pair.stage == "float":
        return 0.05 if half else 1e-4
    if pair.config_name == "4 bits":
        return 0.5
    # Of a padded sentence, probabilities are quantized over its own tokens only, where there is no padding.
    return 0.25 if half else 0.12 if padded and pair.config_name == "ternary" else 0.02


def compare(pair: Pair, number: int) -> str:
    """Call both: "equal", or "refused" by both.

    Codes flip where an activation lies on a tie between two, for some tokens; so where outputs differ by more than
    rounding, the call is made with other tokens, up to four times. What differs for a reason does so with any.
    """
    worst = ""
    for attempt in range(4):
        call = draw_call(pair, random.Random(number), number + 1000 * attempt)
        torch.manual_seed(number)
        expected = run(pair.twin, call)
        torch.manual_seed(number)
        got = run(pair.model, call)
        shown = f"called with {show(call)}: "
        if call.no_mask and pair.stage == "float" and not pair.lengths:
            return "refused"  # or added to the scores as it is, by some attention
        if call.no_mask and pair.family in KNOWN and (pair.stage != "float" or pair.lengths):
            clear = isinstance(got, ValueError) and (pair.lengths or "attention" in str(got))
            if not clear and pair.family in PLAIN:
                raise Failure(f"{shown}no clear error about the mask, but {got!r:.300}")
            return "refused"
        if isinstance(expected, Exception):
            if not isinstance(got, Exception):
                raise Failure(f"{shown}gives an output, where the twin raises {expected!r:.300}")
            if call.ordinary and pair.stage != "float":
                raise Failure(f"{shown}{type(expected).__name__}: {expected!s:.300}") from expected
            return "refused"
        if isinstance(got, Exception):
            if pair.lengths and isinstance(got, ValueError):
                return "refused"
            raise Failure(f"{shown}{type(got).__name__}: {got!s:.300}; the twin has an output") from got
        if "sdpa" in (pair.model.config._attn_implementation, pair.twin.config._attn_implementation):
            got, expected = ({k: v for k, v in of.items() if ".attentions" not in k} for of in (got, expected))
        if got.keys() != expected.keys():
            raise Failure(f"{shown}gives {[*got]}, the twin {[*expected]}")
        if pair.any("random", True):
            return "random"
        if pair.drops:
            return _alone(pair, call, got)
        reads_padding = pair.any("reads_padding", True)
        pairs = {name: (got[name], expected[name]) for name in got}
        ours, theirs = watches(pair.model), watches(pair.twin)
        if len(ours) != len(theirs):
            raise Failure(f"{shown}{len(ours)} hooks, the twin has {len(theirs)}")
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if pair.lengths and not call.real.any():
                continue  # no token, nothing to run
            if len(one.seen) != len(other.seen):
                raise Failure(f"{shown}hook {place} was called {len(one.seen)} times, {len(other.seen)} expected")
            for n, (mine, its) in enumerate(zip(one.seen, other.seen, strict=True)):
                if mine.shape == its.shape or not pair.lengths:  # with lengths, modules run without padding
                    pairs[f"hook {place}.{n}"] = mine, its
        limit = tolerance(pair, not bool(call.real.all()))
        errors = {name: distance(*both, call.real, reads_padding) for name, both in pairs.items()}
        bad = {name: round(error, 5) for name, error in errors.items() if not error <= limit}
        if not bad:
            return "equal"
        worst = worst or f"{shown}differs from the twin by {bad}"
    raise Failure(worst)


def _alone(pair: Pair, call: Call, got: dict[str, torch.Tensor]) -> str:
    """Sentences whose layers drop tokens, each by itself, without padding."""
    if not call.plain or call.real.shape[0] != next(iter(got.values())).shape[0] or pair.any("reads_padding", True):
        return "dropped"
    for row in range(call.real.shape[0]):
        if not call.real[row].any():
            continue
        ids = call.inputs["input_ids"][row : row + 1, call.real[row]]
        with torch.no_grad():
            alone = tensors(pair.model(input_ids=ids))
        for name, value in alone.items():
            name = name if name in got else [*got][[*alone].index(name)]
            if got[name].dim() == 0 or got[name].shape[0] != call.real.shape[0]:
                continue
            batch = got[name][row : row + 1]
            if batch.dim() > 1 and batch.shape[1] == call.real.shape[1]:
                batch = batch[:, call.real[row]]
            error = distance(batch, value, torch.ones(1, 1, dtype=torch.bool), False)
            if not error <= max(tolerance(pair, False), 0.02):
                raise Failure(f"called with {show(call)}: sentence {row} alone differs by {error:.4f} in {name}")
    return "dropped"


def show(call: Call) -> str:
    parts = []
    for name, value in call.inputs.items():
        parts.append(f"{name} {value.dtype} {[*value.shape]}" if torch.is_tensor(value) else f"{name}={value}")
    padding = "" if bool(call.real.all()) else f", tokens at {call.real.int().tolist()}"
    return ", ".join(parts) + padding + (", gradients" if call.gradients else "") + (", by place" * call.by_place)


def state_of(model: Any) -> dict[str, Any]:
    """All that a failed call must leave as it was, but for the values of tensors."""
    # transformers notes two of the fields whenever it begins to save.
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("architectures", "dtype")}
    state: dict[str, Any] = {"config": repr(config), "attention": model.config._attn_implementation}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        state[f"module {name}"] = (
            id(module), type(module), module.training, list(map(repr, hooks)), sorted(module.__dict__),
            [(key, id(value), value.requires_grad) for key, value in module._parameters.items() if value is not None],
        )  # fmt: skip
    return state


def attempt(pair: Pair, act: Callable[[Any], Any], may_refuse: bool, must_refuse: bool = False) -> bool:
    """Do something to the model; False where it was refused, which leaves it as it was."""
    call = Call({"input_ids": torch.arange(2, 130).view(2, 64)}, torch.ones(2, 64, dtype=torch.bool))
    if "ForMultipleChoice" in type(pair.model).__name__:
        call.inputs["input_ids"] = call.inputs["input_ids"][None]
    state, tensors_before = state_of(pair.model), {k: v.clone() for k, v in pair.model.state_dict().items()}
    torch.manual_seed(0)
    before = run(pair.model, call)
    try:
        result = act(pair.model)
    except CLEAR as error:
        if not may_refuse and not must_refuse:
            raise Failure(f"refused: {type(error).__name__}: {error!s:.400}") from error
        if not str(error) or type(error).__module__.startswith("torch"):
            raise Failure(f"no clear error: {error!r}") from error
        now = state_of(pair.model)
        changed = [key for key in {**state, **now} if state.get(key) != now.get(key)]
        values = pair.model.state_dict()
        changed += [k for k in {**values, **tensors_before} if not _same(values.get(k), tensors_before.get(k))]
        if changed:
            raise Failure(f"refused ({error!s:.200}), but changed {changed[:4]}") from error
        torch.manual_seed(0)
        after = run(pair.model, call)
        if isinstance(before, dict) and not (
            isinstance(after, dict) and all(_same(after.get(name), before[name]) for name in before)
        ):
            raise Failure(f"refused ({error!s:.200}), but outputs are others") from error
        return False
    except Exception as error:
        raise Failure(f"no clear error: {type(error).__name__}: {error!s:.400}") from error
    if must_refuse:
        raise Failure("not refused")
    pair.model = result
    return True


def _same(one: Any, other: Any) -> bool:
    return (
        one is not None
        and other is not None
        and one.dtype == other.dtype
        and bool(torch.equal(one, other) or (one.shape == other.shape and ((one == other) | (one != one)).all()))
    )


# -------------------------------------------------------------------------------------------------------------- verbs


def cannot_be_prepared(model: Any) -> bool:
    """Weights that are computed, an encoder too many, or elsewhere."""
    parent, name = layers_of(model)
    computed = any("original" in name or "_orig" in name for name, _ in getattr(parent, name).named_parameters())
    return computed or hasattr(model, "teacher") or hasattr(model, "body")


def prepare(pair: Pair, rng: random.Random) -> None:
    unfit = pair.stage != "float"
    before = {name: type(module) for name, module in pair.model.named_modules()}
    must = cannot_be_prepared(pair.model) and pair.family in KNOWN and pair.config.weight_bits is not None
    done = attempt(
        pair, lambda model: lowbit.prepare(model, pair.config), unfit or pair.any("refused", "may", "must"),
        must and not unfit,
    )  # fmt: skip
    if not done:
        return
    swapped = {nn.Linear: "QuantLinear", nn.Embedding: "QuantEmbedding"}
    for name, module in pair.model.named_modules():
        kind = before.get(name)
        if kind is not None and type(module) is not kind and swapped.get(kind) != type(module).__name__:
            raise Failure(f"prepare made {type(module).__name__} of {name}, {kind.__name__}")
    pair.stage = "prepared"
    if not pair.float_twin:
        lowbit.prepare(pair.twin, pair.config)


def convert(pair: Pair, rng: random.Random, fused: bool = False) -> None:
    unfit = pair.stage != "prepared" or fused
    if not attempt(pair, lambda model: lowbit.convert(model, fused), unfit or bool(pair.edits) or pair.shared):
        return
    pair.stage = "packed"
    if pair.float_twin:
        return
    call = draw_call(pair, rng, rng.randrange(1000))
    torch.manual_seed(1)
    before = run(pair.twin, call)
    with no_stand_ins():
        lowbit.convert(pair.twin)
    torch.manual_seed(1)
    after = run(pair.twin, call)
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in before if name != "gradient"]
        exact = pair.config.activation_bits is not None
        if exact and not all(_same(after[name], before[name]) for name in names):
            raise Failure(f"convert changes outputs, called with {show(call)}")
    elif type(before) is not type(after):
        raise Failure(f"convert changes {before!r:.300} to {after!r:.300}, called with {show(call)}")


def quantize(pair: Pair, rng: random.Random) -> None:
    prepare(pair, rng)
    if pair.stage == "prepared":
        convert(pair, rng)


def quantize_fused(pair: Pair, rng: random.Random) -> None:
    prepare(pair, rng)
    if pair.stage == "prepared":
        convert(pair, rng, True)


def fuse(pair: Pair, rng: random.Random) -> None:
    fusable = pair.stage == "packed" and pair.family in KNOWN and pair.config.activation_bits is not None
    fusable &= pair.config.weight_bits is not None
    attempt(pair, lambda model: lowbit.fuse(model), not fusable or bool(pair.edits) or pair.shared)


def split(pair: Pair, rng: random.Random) -> None:
    fits = pair.stage == "prepared" and pair.config.weight_quantizer == "twn" and pair.config.weight_bits == 2
    fits &= not getattr(pair.model.config.quantization_config, "split", False) if pair.stage == "prepared" else False
    if attempt(pair, lambda model: lowbit.split(model), not fits):
        lowbit.split(pair.twin)


def slim(pair: Pair, rng: random.Random) -> None:
    fits = pair.stage == "float" and pair.family in PLAIN and not pair.slim and not pair.edits and not pair.drops
    fits &= pair.model.base_model is not pair.model
    if attempt(pair, lambda model: lowbit.slim(model, 0.5), not fits or pair.family == "DistilBert"):
        lowbit.slim(pair.twin, 0.5)
        pair.slim = True


def set_length(*keep: float) -> Callable[[Pair, random.Random], None]:
    def verb(pair: Pair, rng: random.Random) -> None:
        count = len(getattr(*layers_of(pair.model))) if pair.family in KNOWN else 2
        config = lowbit.LengthConfig((*keep, *[min(keep)] * count)[:count]) if keep else None
        plain = pair.config.activation_bits is None or pair.config.activation_granularity == "per_token"
        fits = pair.family in PLAIN and plain and not pair.edits
        if attempt(pair, lambda model: lowbit.set_length(model, config), not fits):
            pair.lengths, pair.drops = bool(keep), bool(keep) and min(keep) < 1

    return verb


def dequantize(pair: Pair, rng: random.Random) -> None:
    if pair.shared:
        raise Unfit  # the twin, which is not saved, does not know that its body is packed
    if not attempt(pair, lambda model: model.dequantize(), True):
        return
    if pair.stage == "float":
        raise End
    if not pair.float_twin:
        pair.twin.dequantize()
    pair.stage, pair.lengths, pair.drops = "float", False, False


def cast(pair: Pair, rng: random.Random) -> None:
    dtype = rng.choice([torch.bfloat16, torch.float64, torch.float32])
    pair.model.to(dtype)
    pair.twin.to(dtype)


def train(pair: Pair, rng: random.Random) -> None:
    """Dropout is 0 everywhere."""
    pair.model.train()
    pair.twin.train()


def evaluate(pair: Pair, rng: random.Random) -> None:
    pair.model.eval()
    pair.twin.eval()


def whole(copy_of: Callable[[Any], Any]) -> Callable[[Pair, random.Random], None]:
    def verb(pair: Pair, rng: random.Random) -> None:
        try:
            copy_of(pair.twin)
        except Exception as error:  # of hooks that transformers itself leaves, for one
            raise Unfit from error
        attempt(pair, copy_of, False)

    return verb


def torch_saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# -------------------------------------------------------------------------------------------------------------- files


def save(pair: Pair, folder: str) -> None:
    """`save_pretrained`; ends the program where it is refused, and may be."""
    odd = pair.any("kept", "no", "loud") or pair.any("refused", "may", "must")
    if pair.stage == "float" and not pair.slim:  # transformers' own
        try:
            pair.model.save_pretrained(folder)
        except Exception as error:
            if odd or "eager" in str(error) or "tied" in str(error):
                raise End from error
            raise Failure(f"save_pretrained: {type(error).__name__}: {error!s:.300}") from error
        return
    kept = [pair.model]

    def act(model: Any) -> Any:
        try:
            model.save_pretrained(folder)
        except RuntimeError as error:  # transformers' word for shared tensors
            raise (ValueError(str(error)) if odd and "shar" in str(error).lower() else error) from error
        return model

    if not attempt(pair, act, odd):
        raise End
    assert pair.model is kept[0]


def load(pair: Pair, loader: Callable[..., Any], folder: str, **options: Any) -> Any:
    """A model from a folder, in eval mode; ends the program where there is none, and need not be one."""
    try:
        return loader(folder, **options).eval()
    except Exception as error:
        if pair.any("kept", "no", "loud") and isinstance(error, (*CLEAR, RuntimeError, OSError)):
            raise End from error
        raise Failure(f"{loader.__qualname__}: {type(error).__name__}: {error!s:.400}") from error


def after_load(pair: Pair, loaded: Any, twin: Any) -> None:
    """Go on with a loaded model, if the file could say all that the model was."""
    pair.model = loaded
    if pair.any("kept", "no"):
        raise End
    if pair.lengths and pair.stage == "float" and not pair.slim:
        pair.lengths = pair.drops = False  # of float models, users set lengths again
    pair.twin = twin.eval()
    without_watches(pair.twin)
    if pair.stage == "float" and pair.twin.dtype != pair.model.dtype:
        raise Failure(f"loaded in {pair.model.dtype}, saved in {pair.twin.dtype}")


def reload(pair: Pair, rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(pair, folder)
        own = type(pair.model)
        auto = getattr(transformers, f"AutoModel{own.__name__.removeprefix(pair.family).removeprefix('Model')}", own)
        loaders = [own.from_pretrained, own.from_pretrained]
        if not own.__name__.startswith("Own"):
            loaders += [auto.from_pretrained] + [lowbit.from_pretrained] * (pair.stage != "float")
        options = _no_pooler(pair, own)
        after_load(pair, load(pair, rng.choice(loaders), folder, dtype="auto", **options), pair.twin)


def _no_pooler(pair: Pair, kind: type) -> dict[str, Any]:
    takes = "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if takes and getattr(pair.twin.base_model, "pooler", None) is None else {}


def reload_body(pair: Pair, rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(pair, folder)
        kind = getattr(transformers, f"{pair.family}Model")
        options = _no_pooler(pair, kind)
        loaded = load(pair, rng.choice([kind, transformers.AutoModel]).from_pretrained, folder, dtype="auto", **options)
        after_load(pair, loaded, pair.twin.base_model)


def reload_head(pair: Pair, rng: random.Random) -> None:
    """Another head on the encoder: of both, the bodies are compared from here on."""
    kind = getattr(transformers, f"{pair.family}ForTokenClassification")
    with tempfile.TemporaryDirectory() as folder:
        save(pair, folder)
        loaded = load(pair, kind.from_pretrained, folder, dtype="auto", ignore_mismatched_sizes=True)
        body = pair.twin.base_model
        if getattr(body, "pooler", None) is not None and getattr(loaded.base_model, "pooler", None) is None:
            body.pooler = None
        after_load(pair, loaded, body)
        pair.model = loaded.base_model


def reload_fewer(pair: Pair, rng: random.Random) -> None:
    """The first layer alone."""
    if pair.family not in KNOWN or any("layer" in name for name in pair.edits):
        raise Unfit
    with tempfile.TemporaryDirectory() as folder:
        save(pair, folder)
        options = _no_pooler(pair, type(pair.model))
        loaded = load(pair, type(pair.model).from_pretrained, folder, dtype="auto", num_hidden_layers=1, **options)
        parent, name = layers_of(pair.twin)
        setattr(parent, name, getattr(parent, name)[:1])
        pair.edits.append("layers sliced")
        after_load(pair, loaded, pair.twin)


def new_of_config(pair: Pair, rng: random.Random) -> None:
    """A new float model of the same configuration, saved and loaded."""
    fresh = type(pair.model)(pair.model.config).eval()
    if type(fresh).__name__.startswith("Own") or pair.slim or any("layer" in name for name in pair.edits):
        raise Unfit
    with tempfile.TemporaryDirectory() as folder:
        fresh.save_pretrained(folder)
        loaded = load(pair, type(fresh).from_pretrained, folder, dtype=fresh.dtype)
        new = Pair(loaded, fresh, pair.config, pair.config_name, pair.family)
        compare(new, rng.randrange(1000))


def shared_body(pair: Pair, rng: random.Random) -> None:
    """Go on with a tagger that has the same body."""
    prefix = pair.model.base_model_prefix
    if pair.model.base_model is pair.model or pair.any("refused", "must") or pair.float_twin:
        raise Unfit
    kind = getattr(transformers, f"{pair.family}ForTokenClassification")
    own_config = rng.random() < 0.5 and not pair.slim and not pair.edits  # which may have changed the configuration
    others = []
    for model in (pair.model, pair.twin):
        torch.manual_seed(5)
        config = config_of(pair.family, "ForTokenClassification") if own_config else model.config
        other = kind(config).to(model.dtype)
        if (getattr(other.base_model, "pooler", None) is None) != (getattr(model.base_model, "pooler", None) is None):
            raise Unfit
        setattr(other, prefix, getattr(model, prefix))
        others.append(other.eval())
    pair.model, pair.twin = others
    pair.shared = True


def composite(pair: Pair, rng: random.Random) -> None:
    """An encoder-decoder made of the body."""
    if pair.family not in ("Bert", "Roberta") or pair.stage == "float" or pair.float_twin:
        raise Unfit
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    both = transformers.EncoderDecoderModel(encoder=pair.model.base_model, decoder=decoder)
    with tempfile.TemporaryDirectory() as folder:
        try:
            both.save_pretrained(folder)
        except CLEAR as error:
            raise End from error
        raise Failure("an encoder-decoder with a quantized encoder was saved")


# ----------------------------------------------------------------------------------------------------------- programs

VERBS: dict[str, Callable[[Pair, random.Random], None]] = {
    "prepare": prepare, "convert": convert, "quantize": quantize, "quantize fused": quantize_fused, "split": split,
    "slim": slim, "fuse": fuse, "keep all": set_length(1.0), "drop": set_length(0.7, 0.4), "lengths none": set_length(),
    "dequantize": dequantize, "cast": cast, "train": train, "eval": evaluate, "deepcopy": whole(copy.deepcopy),
    "pickle": whole(lambda model: pickle.loads(pickle.dumps(model))), "torch.save": whole(torch_saved),
    "reload": reload, "reload body": reload_body, "reload head": reload_head,
    "reload fewer layers": reload_fewer, "new of the configuration": new_of_config, "shared body": shared_body,
    "composite": composite,
}  # fmt: skip
# Ways to where things get interesting; then anything follows.
WAYS: tuple[tuple[str, ...], ...] = (
    *[("quantize",)] * 8, ("quantize fused",), ("prepare",), ("prepare", "convert"), ("prepare", "split", "convert"),
    ("slim", "quantize"), ("slim",), ("keep all",), ("keep all", "quantize"), ("quantize", "keep all"),
    ("quantize", "drop"), ("quantize", "drop", "reload fewer layers"), ("quantize", "shared body", "reload"),
    ("drop",), (), ("quantize", "fuse"), ("quantize", "reload"), ("quantize", "deepcopy"),
)  # fmt: skip
_LATER = [*VERBS, *["reload"] * 3, *["fuse"] * 3]


_OFTEN = {"watch": 6, "change": 3, "head": 3, "tables": 3, "layers": 2, "activations": 2}  # of many places each


def draw(seed: int, case: int) -> Program:
    """Program `case` of a seed."""
    rng = random.Random(f"{seed} {case}")
    family = rng.choice(list(KNOWN)) if rng.random() < 0.85 else rng.choice(list(OTHERS))
    heads = [head for head in HEADS if hasattr(transformers, f"{family}{head}") and fits(family, head)]
    head = rng.choice([*heads, *["ForSequenceClassification"] * 3])

    def edits(count: int) -> list[Step]:
        kinds = rng.choices(list(GROUPS), [_OFTEN.get(kind, 1) for kind in GROUPS], k=count)
        return [(rng.choice(GROUPS[kind]), rng.randrange(1000)) for kind in kinds]

    steps = edits(rng.choice([0, 0, 1, 1, 2]))
    steps += [(name, rng.randrange(1000)) for name in rng.choice(WAYS)]
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        steps += edits(1) if rng.random() < 0.5 else [(rng.choice(_LATER), rng.randrange(1000))]
    config = rng.choice([*CONFIGS, "ternary", "float attention", "float attention"])
    return Program(family, head, config, tuple(steps), rng.randrange(1000))


def fits(family: str, head: str) -> bool:
    """Whether transformers itself builds and runs this head: those that miss the pooler that they read do not."""
    return not (head == "ForMultipleChoice" and family in ("MPNet", "BigBird", "ConvBert", "Nystromformer", "RoFormer"))


def _groups() -> dict[str, list[str]]:
    """Edits by their kind, so that a kind of many is not drawn more often than one of few."""
    groups: dict[str, list[str]] = {}
    for name in EDITS:
        first = name.split()[0]
        kind = {
            "layer": "layers",
            "positions": "tables",
            "words": "tables",
            "types": "tables",
            "more": "tables",
            "set_input_embeddings": "tables",
        }
        groups.setdefault(kind.get(first, "activations" if "everywhere" in name or "in one" in name else first), [])
        groups[kind.get(first, "activations" if "everywhere" in name or "in one" in name else first)].append(name)
    return groups


GROUPS = _groups()


def check(program: Program) -> list[str]:
    """Run a program: what every step came to; raises `Failure`."""
    model = build(program)
    config = CONFIGS[program.config].replace()
    pair = Pair(model, copy.deepcopy(model), config, program.config, program.family)
    outcomes = []
    for name, number in program.steps:
        try:
            outcomes.append(f"{name}: {_step(pair, name, number)}")
        except Unfit:
            outcomes.append(f"{name}: unfit")
        except End:
            outcomes.append(f"{name}: end")
            break
        except Failure as failure:
            raise Failure(f"{name!r}: {failure}") from failure
    return outcomes


def _step(pair: Pair, name: str, number: int) -> str:
    rng = random.Random(number)
    torch.manual_seed(number)
    if name in EDITS and name not in VERBS:
        _edit(pair, name, number)
    else:
        VERBS[name](pair, rng)
    return compare(pair, number)


def _edit(pair: Pair, name: str, number: int) -> None:
    if name == "output_attentions" and (pair.stage != "float" or pair.lengths):
        raise Unfit  # transformers refuses it where attention is "lowbit"
    if name in ("other name", "second encoder") and pair.stage != "float":
        raise Unfit
    errors: list[Exception | None] = []
    for model in (pair.twin, pair.model):
        torch.manual_seed(number)
        try:
            EDITS[name].apply(model, random.Random(number))
            errors.append(None)
        except Unfit:
            raise
        except Exception as error:  # of torch, which cannot do so to modules of this kind
            errors.append(error)
    if type(errors[0]) is not type(errors[1]):
        raise Failure(f"{errors[1]!r:.300}; for the twin {errors[0]!r:.300}")
    if errors[0] is not None:
        raise Unfit
    pair.edits.append(name)


def shrunk(program: Program) -> Program:
    """A shorter program that fails too, with as few steps as leaving one out at a time comes to."""
    steps = program.steps
    place = 0
    while place < len(steps):
        shorter = Program(
            program.family, program.head, program.config, (*steps[:place], *steps[place + 1 :]), program.seed
        )
        if failure(shorter) is None:
            place += 1
        else:
            steps = shorter.steps
    return Program(program.family, program.head, program.config, steps, program.seed)


def failure(program: Program) -> str | None:
    """What is wrong with a program, None where nothing is."""
    try:
        check(program)
    except Failure as found:
        return str(found)
    return None
