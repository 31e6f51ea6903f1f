"""Dropped tokens: training, lengths that are searched or learned, and what they cost and lose."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel

import lowbit

from ..length import (
    Front,
    LatencyTable,
    batch_macs,
    kept_lengths,
    macs,
    measure_latency,
    observed_lengths,
    search_lengths,
)
from ..length.soft import LearnedThresholds, SoftExtract
from . import RecipeError, log
from .measure import table
from .stages import Run, arguments, common, distill, fine_tune, train, without_dropout

BUDGETS = ("1.5x", "2x", "3x")
COSTS = ("macs", "latency")
METHODS = ("lengthdrop", "ltp", "power_bert")


def check_lengths(options: Any, layers: int) -> None:
    """Before anything is trained: `LengthOptions` for a model of so many layers.

    Raises:
        RecipeError: `drop_ratio` or `keep` for another number of layers, or a value that training, search or
            comparison would refuse.
    """
    if len(options.drop_ratio) not in (1, layers):
        raise RecipeError(
            f"--drop_ratio has {len(options.drop_ratio)} numbers; accepted: one, or one for each of {layers}"
        )
    if len(options.keep) not in (0, layers):
        raise RecipeError(f"--keep has {len(options.keep)} numbers; accepted: none, or one for each of {layers}")
    if options.cost not in COSTS:
        raise RecipeError(f"--cost {options.cost}: accepted are {' and '.join(COSTS)}")
    if options.length_method not in METHODS:
        raise RecipeError(f"--length_method {options.length_method}: accepted are {', '.join(METHODS)}")
    learned = options.length_method != "lengthdrop"
    protect = getattr(options, "protect_question", False)
    if learned and (options.score != "all" or not options.length_steps or protect):
        raise RecipeError(
            f"--length_method {options.length_method} takes --score all, --length_steps above 0 and no protected "
            f"question; got --score {options.score} --length_steps {options.length_steps} --protect_question {protect}"
        )
    if options.length_weight is not None and not learned:
        raise RecipeError("--length_weight is of --length_method ltp and power_bert")
    try:
        lowbit.LengthConfig(tuple(options.keep) or (1.0,) * layers, score=options.score)
        soft_lengths_of(options, layers, 1) if learned else length_drop_of(options)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def adaptive_stages(run: Run, teacher: PreTrainedModel, **fields: Any) -> tuple[str, PreTrainedModel, PreTrainedModel]:
    """The model that drops tokens, and its stage: training for that comes last, after quantization.

    (QuaLA-MiniLM: quantizing costs less than dropping, and what may be dropped depends on it.)

    Args:
        run: where its data have "unlabelled" examples, the model learns on these to drop tokens, taught by `teacher`;
            else on the training examples, a float model by their labels.
        teacher: the float model; what drops tokens is a copy of it.
        **fields: of the `LengthConfig`s that LengthDrop trains for, as in `search`.

    Returns:
        The stage, its model, and what that was before it was trained to drop tokens.
    """
    name, model, options = "teacher", teacher, run.options
    if options.ternary:
        name = "ternary"

        def quantized() -> PreTrainedModel:
            student = lowbit.prepare(copy.deepcopy(teacher), lowbit.TernaryConfig())
            return distill(run, "ternary", student, teacher, options.steps, options.learning_rate)

        model = run.stage(name, quantized)
    before, guide = model, teacher if options.ternary or "unlabelled" in run.data else None
    if "unlabelled" in run.data:
        run = dataclasses.replace(run, data={**run.data, "train": run.data["unlabelled"]})
    if options.length_method != "lengthdrop":
        name = "hard"
        soft = run.stage("soft", lambda: learn_lengths(run, before, guide))
        model = run.stage(name, lambda: train_with_learned(run, soft, guide))
    elif options.length_steps:
        name = "adaptive"
        model = run.stage(name, lambda: length_drop(run, before, guide, **fields))
    if options.ternary:
        name = "packed"
        prepared = model
        model = lowbit.fuse(run.stage(name, lambda: lowbit.convert(prepared)))
    return name, model, before


def length_drop(run: Run, model: PreTrainedModel, teacher: PreTrainedModel | None, **fields: Any) -> PreTrainedModel:
    """The sandwich: all tokens on the labels (or the teacher), fewer tokens on what the model says with all."""
    options = run.options
    model = without_dropout(copy.deepcopy(model))
    everything = (1.0,) * model.config.num_hidden_layers
    lowbit.set_length(model, lowbit.LengthConfig(everything, score=options.score, **fields))
    args = arguments(run, "adaptive", options.length_steps, options.length_learning_rate)
    objectives = None if teacher is None else [lowbit.LogitsLoss()]
    given = {"args": args, "length_drop": length_drop_of(options), **common(run)}
    trainer = lowbit.LengthDropTrainer(model=model, teacher=teacher, objectives=objectives, **given)
    return lowbit.set_length(train(run, "adaptive", trainer), None)


def learn_lengths(run: Run, model: PreTrainedModel, teacher: PreTrainedModel | None) -> PreTrainedModel:
    """The soft phase: the model, and in its configuration the lengths that it has learned."""
    options = run.options
    longest = max(map(len, run.data["train"]["input_ids"]))
    soft = soft_lengths_of(options, model.config.num_hidden_layers, longest)
    args = arguments(run, "soft", options.length_steps, options.length_learning_rate)
    given = {"args": args, "soft_lengths": soft, **common(run)}
    trainer = lowbit.SoftLengthTrainer(model=_student(model, teacher), teacher=teacher, **given)
    return lowbit.set_length(train(run, "soft", trainer), soft.length_config())


def train_with_learned(run: Run, model: PreTrainedModel, teacher: PreTrainedModel | None) -> PreTrainedModel:
    """The hard phase: the model learns to work with what it keeps."""
    options = run.options
    model = lowbit.set_length(_student(model, teacher), learned_lengths(model))
    if teacher is None:
        return fine_tune(run, "hard", model, options.length_steps, options.length_learning_rate)
    args = arguments(run, "hard", options.length_steps, options.length_learning_rate)
    given = {"args": args, "objectives": [lowbit.LogitsLoss()], **common(run)}
    return train(run, "hard", lowbit.DistillationTrainer(model=model, teacher=teacher, **given))


def _student(model: PreTrainedModel, teacher: PreTrainedModel | None) -> PreTrainedModel:
    """A copy to train: without dropout where it learns from a teacher, with its own where it learns from labels."""
    return copy.deepcopy(model) if teacher is None else without_dropout(copy.deepcopy(model))


def learned_lengths(model: PreTrainedModel) -> lowbit.LengthConfig:
    """What `learn_lengths` left in the configuration."""
    return lowbit.LengthConfig.from_dict(model.config.length_config)


def soft_lengths_of(options: Any, layers: int, longest: int) -> LearnedThresholds | SoftExtract:
    """What learns lengths, by `options.length_method`, for sequences of up to `longest` tokens."""
    weight = {} if options.length_weight is None else {"weight": options.length_weight}
    if options.length_method == "ltp":
        return lowbit.LearnedThresholds(layers, **weight)
    return lowbit.SoftExtract(layers, longest, **weight)


def length_drop_of(options: Any) -> lowbit.LengthDrop:
    """How sub-models are drawn."""
    ratios = tuple(options.drop_ratio)
    return lowbit.LengthDrop(
        ratio=ratios if len(ratios) > 1 else ratios[0],
        sub_models=options.sub_models,
        importance_weight=getattr(options, "importance_weight", 0.0),
        seed=options.seed,
    )


def choose_lengths(
    run: Run,
    name: str,
    model: PreTrainedModel,
    metric: Callable[[PreTrainedModel], float],
    lengths: Sequence[int],
    **fields: Any,
) -> dict[str, lowbit.LengthConfig]:
    """What to compare: `options.keep`, and what was learned or what the search finds for the budgets; as `search`."""
    options, configs = run.options, {}
    if options.keep:
        configs["given"] = lowbit.LengthConfig(tuple(options.keep), score=options.score, **fields)
    if options.length_method == "lengthdrop":
        front = search(run, name, model, metric, lengths, **fields)
        return configs | {
            f"{budget} fewer": front.for_budget(budget) for budget in BUDGETS if affordable(front, budget)
        }
    return configs | {"learned": learned_lengths(model)}


def search(
    run: Run,
    name: str,
    model: PreTrainedModel,
    metric: Callable[[PreTrainedModel], float],
    lengths: Sequence[int],
    **fields: Any,
) -> Front:
    """The Pareto front of a metric over cost on the examples set apart; resumes from its store.

    Args:
        name: of the stage that `model` is.
        metric: of a model on these examples.
        lengths: their tokens.
        **fields: of every `LengthConfig`.
    """

    cost, unit = cost_of(run, name, model, lengths)
    bf16 = getattr(run.options, "bf16", False)

    def evaluate(config: lowbit.LengthConfig) -> float:
        lowbit.set_length(model, config)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return metric(model)

    front = search_lengths(
        model,
        evaluate,
        cost=cost,
        cost_unit=unit,
        population=10,
        iterations=run.options.iterations,
        mutations=10,
        crossovers=10,
        first=trained_for(run.options),
        seed=run.options.seed,
        path=run.folder / f"search-{name}.json",
        score=run.options.score,
        **fields,
    )
    lowbit.set_length(model, None)
    if run.options.cost == "macs":
        # Budgets count what the last layer saves where only the first token is read.
        front = dataclasses.replace(front, full_cost=macs(model, None, lengths, first_token_only=False))
    front.save(run.folder / "front.json")
    if importlib.util.find_spec("matplotlib"):
        front.plot(run.folder / "front.png")
    else:
        log.warning("front.png is not drawn: pip install matplotlib")
    log.info("front: %s", run.folder / "front.json")
    return front


def trained_for(options: Any, count: int = 10) -> list[tuple[float, ...]]:
    """What the sub-models of LengthDrop keep where each layer has a ratio of its own, from hardly less to the least."""
    ratios = getattr(options, "drop_ratio", ())
    if len(ratios) < 2:
        return []  # the search starts from such anyway
    scaled = [[1 - ratio * number / count for ratio in ratios] for number in range(1, count + 1)]
    return [tuple(itertools.accumulate(shares, operator.mul)) for shares in scaled]


def cost_of(
    run: Run, name: str, model: PreTrainedModel, lengths: Sequence[int]
) -> tuple[Callable[[lowbit.LengthConfig], float], str]:
    """What a configuration costs, and in what: multiply-accumulates, or milliseconds of a batch of 8 by a table."""
    if run.options.cost == "macs":
        return lambda config: macs(model, config, lengths), "MACs"
    if run.options.cost not in COSTS:
        raise RecipeError(f"cost {run.options.cost}: accepted are {' and '.join(COSTS)}")
    path = run.folder / f"latency-{name}.json"
    if not path.is_file():  # measured once: a search that is resumed needs the same costs
        measure_latency(model, 8, round(statistics.mean(lengths)), score=run.options.score).save(path)
    return LatencyTable.load(path).latency, "ms"


def compare(
    run: Run,
    model: PreTrainedModel,
    chosen: Mapping[str, lowbit.LengthConfig],
    metrics: Callable[[PreTrainedModel], Mapping[str, float]],
    examples: Sequence[Mapping[str, Any]],
    before: PreTrainedModel,
    batch_size: int = 8,
    batches: int = 40,
) -> str:
    """A table of lengths: multiply-accumulates, metrics and time on real batches.

    Budgets are of the multiply-accumulates that all tokens take, padding not counted. The model "without lengths" runs
    as it did before, a float one with padding; what its batches take with it is what "fewer_than_padded" is beside.
    "all tokens" drops nothing, but has no padding: what is faster than that is so by dropping. "keep" is the share of
    the tokens that each layer has left, by the configuration or, where it names none, of all examples.

    Args:
        chosen: lengths by name.
        examples: of the validation data, as the model reads them; batches are drawn from them in a fixed random order.
        before: the model that was trained to drop tokens, as it was; its metrics are the first row.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    full = macs(model, None, lengths, first_token_only=False)
    everything = lowbit.LengthConfig((1.0,) * model.config.num_hidden_layers)
    configs: dict[str, lowbit.LengthConfig | None] = {"without lengths": None, "all tokens": everything, **chosen}
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    collate = DataCollatorWithPadding(run.tokenizer)
    groups = [order[i : i + batch_size] for i in range(0, min(len(order), batches * batch_size), batch_size)]
    times = timed(model, configs, [collate([dict(examples[i]) for i in group]).to(model.device) for group in groups])
    kept: dict[str, Any] = {}  # for each layer, tokens of each example
    for name, config in configs.items():
        if config is None:
            kept[name] = None
        elif config.unit == "threshold":
            lowbit.set_length(model, config)
            kept[name] = observed_lengths(model, (collate([dict(each)]).to(model.device) for each in examples))
        else:
            kept[name] = kept_lengths(lengths, config)
    lowbit.set_length(model, None)
    timed_rows = [i for group in groups for i in group]
    parts = {name: layers and [[layer[i] for i in timed_rows] for layer in layers] for name, layers in kept.items()}
    padded, costs = batch_macs(model, parts, [[lengths[i] for i in group] for group in groups])
    rows: dict[str, dict[str, Any]] = {"before": dict(metrics(before))}
    run.record("before", **rows["before"])
    for name, config in configs.items():
        lowbit.set_length(model, config)
        cost = macs(model, kept[name], lengths) if config else full
        shares: Sequence[float] = ()
        if config is not None:
            shares = (
                config.keep if config.unit == "ratio" else [round(sum(layer) / sum(lengths), 3) for layer in kept[name]]
            )
        rows[name] = {
            "keep": " ".join(f"{share:g}" for share in shares) or "-",
            "gmacs": round(cost / len(lengths) / 1e9, 3),
            "times_fewer_macs": round(full / cost, 2),
            "fewer_than_padded": round(padded / costs[name], 2),
            **metrics(model),
            "ms": round(times[name], 1),
            "times_as_fast": round(times["without lengths"] / times[name], 2),
            "by_dropping": round(times["all tokens"] / times[name], 2),
        }
        run.record(name, **rows[name], length_config=config and config.to_dict())
    lowbit.set_length(model, None)
    headings = {key: key.replace("_", " ") for key in rows["all tokens"]}
    return table(rows, headings | {"gmacs": "GMACs", "ms": f"ms, batch {batch_size}"})


def affordable(front: Front, budget: str) -> bool:
    """Whether the search found anything for the budget; says so if not."""
    try:
        front.for_budget(budget)
    except ValueError as error:
        log.warning("%s", error)
        return False
    return True


@torch.inference_mode()
def timed(
    model: PreTrainedModel, configs: Mapping[str, lowbit.LengthConfig | None], batches: Sequence[Any], repeats: int = 3
) -> dict[str, float]:
    """Mean milliseconds a batch (of each batch the median); configurations take turns, so that drift hits all."""
    model.eval()
    times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in configs}
    for repeat in range(repeats + 1):
        for name, config in configs.items():
            lowbit.set_length(model, config)
            for number, batch in enumerate(batches):
                begin = time.perf_counter()
                model(**{key: value for key, value in batch.items() if key != "labels"})
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:
                    times[name][number].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.mean(map(statistics.median, each)) for name, each in times.items()}


def set_apart(run: Run, count: int) -> None:
    """Split `run.data["train"]`: its last `4 * count` examples are not trained on; of these some are searched on.

    Raises:
        RecipeError: none of them has 9 tokens or more and is not among those trained on.
    """
    train = run.data["train"]
    begin = max(len(train) - 4 * count, len(train) // 2)
    known = {tuple(ids) for ids in train.select(range(begin))["input_ids"]}
    ids = train["input_ids"]
    chosen = [i for i in range(begin, len(train)) if len(ids[i]) >= 9 and tuple(ids[i]) not in known]
    if not chosen:
        raise RecipeError("no training example is fit to search lengths on; use more of them (--max_train_samples)")
    run.data["train"], run.data["search"] = train.select(range(begin)), train.select(chosen[:count])
