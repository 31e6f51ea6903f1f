"""lowbit distill, search-length: runs that can be resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ...recipes.options import FileOptions
from .arguments import (
    DEFAULTS,
    Cost,
    DataDir,
    Json,
    LabelColumn,
    MaxLength,
    Method,
    ModelName,
    RunFolder,
    Score,
    StudentBits,
    TaskName,
    TextColumn,
    need_one_of,
    no_bars,
    text,
)
from .printing import progress_to_stderr, show, table


def distill(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Float model: folder or Hub id.")],
    out: RunFolder,
    task: TaskName = None,
    data_dir: DataDir = None,
    train_file: Annotated[Path | None, typer.Option(help="CSV, TSV, JSON lines or parquet, instead of a task.")] = None,
    validation_file: Annotated[Path | None, typer.Option(help="As the training file, other rows.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    max_length: MaxLength = DEFAULTS.max_length,
    recipe: Annotated[
        str | None,
        typer.Option(help="A system by name (`lowbit recipes`) or a YAML file; without: TernaryBERT or BinaryBERT."),
    ] = None,
    text_file: Annotated[
        Path | None,
        typer.Option(
            help="Texts without labels for recipes that read some (.txt, JSON lines); without: the task's own."
        ),
    ] = None,
    bits: Annotated[
        StudentBits | None,
        typer.Option(
            help="Of the student's weights; float with a recipe only.", show_default="the recipe's, or ternary"
        ),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Binary: tws (ternary weight splitting) or bwn (binary at once).")
    ] = Method.tws,
    width: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Binary, tws: share of heads and FFN neurons kept before the split.")
    ] = DEFAULTS.width,
    teacher_steps: Annotated[
        int, typer.Option(min=0, help="Fine-tuning of MODEL first; 0: it is fine-tuned for the task already.")
    ] = DEFAULTS.teacher_steps,
    steps: Annotated[int, typer.Option(min=0, help="Of each distillation stage.")] = DEFAULTS.steps,
    slim_steps: Annotated[
        int, typer.Option(min=0, help="Binary, tws: distillation of the slimmed float model.")
    ] = DEFAULTS.slim_steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Of training.")] = DEFAULTS.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Of distillation; published for BERT-base: 2e-5, after the split 5e-5.")
    ] = DEFAULTS.learning_rate,
    split_learning_rate: Annotated[
        float | None, typer.Option(help="Binary, tws: of distillation after the split.", show_default="--learning-rate")
    ] = None,
    teacher_learning_rate: Annotated[
        float, typer.Option(help="Of fine-tuning and of the slimmed float model; BERT-base: 2e-5 to 5e-5.")
    ] = DEFAULTS.teacher_learning_rate,
    max_train_samples: Annotated[
        int, typer.Option(min=0, help="Use only the first N training examples, 0: all.")
    ] = DEFAULTS.max_train_samples,
    save_steps: Annotated[
        int, typer.Option(min=0, help="Checkpoints to resume from inside a stage, 0: none.")
    ] = DEFAULTS.save_steps,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = DEFAULTS.seed,
    as_json: Json = False,
) -> None:
    """Train a student of a float model: fine-tune the teacher, distil, pack, measure.

    OUT gets a folder for each stage, options.json, results.json, and the packed model with a model card. To resume an
    interrupted run, run the same command again.
    """
    need_one_of(("--task", task), ("--train-file", train_file))
    if (train_file is None) != (validation_file is None):
        raise typer.BadParameter("--train-file and --validation-file go together")
    if recipe is None and text_file is not None:
        raise typer.BadParameter("--text-file is read by recipes only; see lowbit recipes")
    if recipe is None and bits == StudentBits.float:
        raise typer.BadParameter("--bits float needs a --recipe; see lowbit recipes")
    from ...recipes import require
    from ...recipes.data import load_files, load_glue, offline_if_local

    require("accelerate", "datasets", "sklearn")
    offline_if_local(model, data_dir, text(train_file))
    with progress_to_stderr():
        from ...data.tasks import tokenize
        from ...recipes import stages
        from ...recipes.measure import measure
        from ...recipes.systems import recipe as recipes
        from ...recipes.systems.checking import check
        from ...recipes.systems.distilling import distil_by_recipe
        from .. import loading

        loading.quiet()
        no_bars()
        chosen = recipes.load(recipe) if recipe else None
        options = FileOptions(
            data_dir=data_dir, model=loading.for_transformers(model), output_dir=str(out),
            max_train_samples=max_train_samples, teacher_steps=teacher_steps, steps=steps, batch_size=batch_size,
            learning_rate=learning_rate, teacher_learning_rate=teacher_learning_rate, save_steps=save_steps, seed=seed,
            task=task or "",
            method=method.value, width=width, slim_steps=slim_steps, split_learning_rate=split_learning_rate,
            bits=bits.value if bits else "" if recipe else StudentBits.ternary.value, recipe=recipe,
            text_file=text(text_file),
            train_file=text(train_file), validation_file=text(validation_file),
            text_columns=text_column or [], label_column=label_column, max_length=max_length,
        )  # fmt: skip
        if task:
            given, data = load_glue(options)
        else:
            names = None if teacher_steps else loading.label_names(model)
            files = {"train": str(train_file), "validation": str(validation_file)}
            given, data = load_files(files, text_column or (), label_column, names, max_length, max_train_samples)
        tokenizer = loading.load_tokenizer(model)
        untrained, _ = stages.load_teacher(options, given)  # refuses a model that is no teacher before OUT is written
        tokens = tokenize(data, tokenizer, given)
        if chosen:
            check(stages.Run(options, given, tokens, tokenizer, raw=data), untrained, chosen, options.bits or None)
        run = stages.start(options, given, tokens, tokenizer, raw=data)
        teacher = stages.teacher_stage(run)
        if chosen:
            packed = distil_by_recipe(run, teacher, chosen, options.bits or None)
        else:
            packed = (stages.binary_stages if bits == StudentBits.binary else stages.ternary_stages)(run, teacher)
        results = {name: measure(run, name) for name in ("teacher", packed)}
        if packed.endswith("-packed"):  # a float student's card is the user's to write
            _write_card(out / packed, task or Path(str(validation_file)).stem, model, results)
        result = {
            "model": str(out / packed),
            "task": task or str(train_file),
            "teacher": str(out / "teacher"),
            "results": results,
        }
    rows = [{"model": name, **row} for name, row in results.items()]
    show(result, as_json, table(rows, {key: key for key in rows[0]}), f"student: {out / packed}")


def _write_card(folder: Path, task: str, teacher: str, results: dict[str, dict[str, Any]]) -> None:
    """The packed model's README.md: what it is, and its metrics (shares, as the Hub has them) beside the teacher's."""
    metrics = {
        name: {key: round(value / 100, 4) for key, value in row.items() if not key.endswith(("_ms", "_mb"))}
        for name, row in results.items()
    }
    from ...files.card import model_card
    from .. import loading

    model = loading.load_model(str(folder))
    card = model_card(
        model, results=metrics[folder.name], teacher=teacher, teacher_results=metrics["teacher"], task=task
    )
    card.save(folder / "README.md")


def search_length(
    model: ModelName,
    out: RunFolder,
    task: TaskName = None,
    data_dir: DataDir = None,
    file: Annotated[Path | None, typer.Option(help="CSV, TSV, JSON lines or parquet file to score on.")] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = "label",
    max_length: MaxLength = DEFAULTS.max_length,
    samples: Annotated[int, typer.Option(min=1, help="Examples: the last of a task's training set.")] = 1000,
    iterations: Annotated[int, typer.Option(min=0, help="Of 10 mutations and 10 crossovers each.")] = 5,
    cost: Annotated[Cost, typer.Option(help="What is saved; latency measures a table first.")] = Cost.macs,
    score: Annotated[Score, typer.Option(help="Attention received from all tokens, or from the first.")] = Score.all,
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="Nx", help="Save the model with the best lengths at N times less cost in OUT/Nx; repeat."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
    as_json: Json = False,
) -> None:
    """Search which layer of a classifier may drop how many tokens: accuracy against cost.

    Writes OUT/front.json and front.png; `lowbit.length.Front.load("OUT/front.json").for_budget("2x")` picks from it. To
    resume an interrupted search, run the same command again. Score on examples that the model was not trained on.
    """
    need_one_of(("--task", task), ("--file", file))
    from ...recipes import require
    from ...recipes.data import labels_of, load_files, offline_if_local

    require("datasets", "sklearn")
    offline_if_local(model, data_dir, text(file))
    with progress_to_stderr():
        import lowbit

        from ...data.tasks import get_task, load_task, tokenize
        from ...length.front import times_less
        from ...recipes import lengths, stages
        from ...recipes.measure import evaluate as metrics
        from .. import loading

        for name in budget or ():
            times_less(name)  # refuses what is no budget before the search
        known = get_task(task) if task else None
        classifier = loading.load_classifier(model, known.labels if known else None)
        if task and known:
            given, data = known, load_task(task, data_dir, ["train"])
            rows = data["train"]
        else:
            names = labels_of(model, classifier.config)
            given, data = load_files({"search": str(file)}, text_column or (), label_column, names, max_length)
            rows = data["search"]
        data = type(data)({"search": rows.select(range(max(0, len(rows) - samples), len(rows)))})
        tokenizer = loading.load_tokenizer(model)
        no_bars()
        options = SearchOptions(
            model, str(out), task, data_dir, text(file), text_column or [], label_column, max_length, samples,
            iterations, cost.value, score.value, seed,
        )  # fmt: skip
        given = dataclasses.replace(given, validation=("search",))
        run = stages.start(options, given, tokenize(data, tokenizer, given), tokenizer)
        packed = getattr(getattr(classifier.config, "quantization_config", None), "stage", "float") == "packed"
        if packed:
            lowbit.fuse(classifier)
        tokens = [len(ids) for ids in run.data["search"]["input_ids"]]
        front = lengths.search(run, "model", classifier, lambda m: next(iter(metrics(run, m).values())), tokens)
        budgets = {name: front.for_budget(name) for name in budget or ()}
        for name, config in budgets.items():
            lowbit.set_length(classifier, config)
            loading.save(classifier, model, out / name)
        points = [{"keep": list(p.config.keep), "cost": p.cost, "score": p.score,
                   "times_less": round(front.full_cost / p.cost, 2)} for p in front.points]  # fmt: skip
        result = {"front": str(out / "front.json"), "cost_unit": front.cost_unit, "full_cost": front.full_cost,
                  "full_score": front.full_score, "points": points,
                  "saved": {name: str(out / name) for name in budgets}}  # fmt: skip
    shown = [
        {**point, "keep": " ".join(f"{k:g}" for k in config.keep)}
        for point, (config, *_) in zip(points, front.points, strict=True)
    ]
    lines = [f"all tokens: score {front.full_score}, {front.full_cost:g} {front.cost_unit}", f"front: {out}/front.json"]
    lines += [f"{name}: {out / name}" for name in budgets]
    columns = {"keep": "keep", "score": "score", "cost": front.cost_unit, "times_less": "times less"}
    show(result, as_json, table(shown, columns), *lines)


@dataclasses.dataclass
class SearchOptions:
    """What a search is asked to do; recorded with it."""

    model: str
    output_dir: str
    task: str | None
    data_dir: str | None
    file: str | None
    text_columns: list[str]
    label_column: str
    max_length: int
    samples: int
    iterations: int
    cost: str
    score: str
    seed: int
