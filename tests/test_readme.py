"""README and docs/ hold: Python runs as it stands, commands and options exist, figures are those that were measured.

In a page, blocks run top to bottom in one namespace; a block of the README runs by itself. What a print statement has
as a comment in its line has to appear in what is printed. The folder has the models that pages name: my-finetuned-bert
and all-MiniLM-L6-v2. `torch.compile` is asked for but runs eagerly: tests/test_compile.py compiles.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import logging
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, BertTokenizerFast

from helpers import minilm_folder, tiny_config
from lowbit import models, quantizers
from lowbit.data import sentiment

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}

# Columns of tables: the cases of one machine, and of another one by the suffix.
CPU = {
    case + suffix: rows
    for suite, suffix in (("cpu-encoder", ""), ("cpu-vnni-encoder", ", no AMX"))
    for case, rows in json.loads((ROOT / f"benchmarks/results/{suite}.json").read_text())["results"].items()
}


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def runs_here(block: str) -> bool:
    """A block that begins with `# pip install X` needs X, or is left out."""
    needed = re.match(r"# pip install (\S+)", block)
    return needed is None or importlib.util.find_spec(needed[1].replace("-", "_")) is not None


def programs() -> dict[str, list[str]]:
    """What runs in one namespace: the blocks of a page, each block of the README."""
    readme = {f"README.md {number}": [block] for number, block in enumerate(blocks(PAGES["README.md"], "python"), 1)}
    pages = {page: [*filter(runs_here, blocks(PAGES[page], "python"))] for page in PAGES if page != "README.md"}
    return {**readme, **{page: found for page, found in pages.items() if found}}


def commands() -> list[tuple[str, str]]:
    return [
        (page, line)
        for page in PAGES
        for block in blocks(PAGES[page], "bash", "console", "sh", "shell")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models that pages name: tiny and random, but for all-MiniLM-L6-v2 where it is installed."""
    folder = tmp_path_factory.mktemp("pages")
    bert = folder / "my-finetuned-bert"
    config = tiny_config(hidden_size=128, intermediate_size=256, vocab_size=2500, max_position_embeddings=128)
    BertForSequenceClassification(config).save_pretrained(bert)
    words = sorted({word for row in sentiment.generate(64, False, 0) for word in row["sentence"].split()})
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast.from_pretrained(bert).save_pretrained(bert)
    encoder = folder / "all-MiniLM-L6-v2"
    if real := minilm_folder():
        encoder.symlink_to(real, target_is_directory=True)
    else:
        shutil.copytree(bert, encoder)
        BertModel(config).save_pretrained(encoder)
    return folder


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Pages register quantizers and architectures; other tests do not see them."""
    tables: list[tuple[dict, dict]] = [(t, dict(t)) for t in (quantizers.WEIGHT_QUANTIZERS, models.ARCHITECTURES)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


def run(program: list[str], name: str) -> str:
    """What the blocks print, one after the other in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(program, 1):
            exec(compile(block, f"{name}, block {number}", "exec", dont_inherit=True), namespace)
    return printed.getvalue()


@pytest.mark.parametrize("name", programs())
def test_python_runs_and_prints_what_its_comments_say(
    name: str, stage: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for model in stage.iterdir():
        (tmp_path / model.name).symlink_to(model, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    program = programs()[name]
    with torch.compiler.set_stance("force_eager"):
        printed = run(program, name)
    place = 0
    for promised in re.findall(r"^ *print\(.*\)  # (.+)$", "".join(program), re.MULTILINE):
        found = printed.find(promised, place)
        assert found >= 0, f"{name} does not print {promised!r} after {printed[:place]!r}, but {printed[place:]!r}"
        place = found + len(promised)


@functools.cache
def help_of(target: str) -> str:
    """What `python script.py --help` or, for a name with no suffix, `python -m module --help` prints."""
    printed, argv, path = io.StringIO(), sys.argv, list(sys.path)
    level = logging.getLogger("transformers").level  # which the examples change
    sys.argv = [target, "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            if target.endswith(".py"):
                sys.path.insert(0, str((ROOT / target).parent))
                runpy.run_path(str(ROOT / target), run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path[:] = argv, path
        logging.getLogger("transformers").setLevel(level)
    return printed.getvalue()


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_and_their_options_exist(page: str, line: str) -> None:
    command, *arguments = shlex.split(line, comments=True) or [""]
    if command == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [argument for argument in arguments if "=" not in argument]
        assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif command in ("python", "torchrun"):
        if arguments[0] == "-m":
            arguments.pop(0)
            assert importlib.util.find_spec(arguments[0])
        else:
            assert (ROOT / arguments[0]).is_file()
        if options := [argument.split("=")[0] for argument in arguments if argument.startswith("--")]:
            known = set(re.findall(r"--[\w-]+", help_of(arguments[0])))
            assert set(options) <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_resolve(page: str) -> None:
    """Of the README, anchors too; within the site `mkdocs build --strict` (make docs) looks at those."""
    for link, anchor in re.findall(r"\]\(((?!http)[^)#\s]+)#?([^)]*)\)", PAGES[page]):
        target = (ROOT / page).parent / link
        assert target.exists(), link
        if anchor and page == "README.md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}, link


def measured(page: str) -> list[tuple[str, str, str]]:
    """(case, runner, cell) of the tables that have cases of `CPU` among their columns."""
    found, columns = [], []
    for line in PAGES[page].splitlines():
        runner, *cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else [""]
        if not cells or set(cells) & set(CPU):
            columns = cells
        elif set(columns) & set(CPU) and not runner.startswith("---"):
            found += [(case, runner, cell) for case, cell in zip(columns, cells, strict=True) if case in CPU]
    return found


@pytest.mark.parametrize("page", filter(measured, PAGES))
def test_figures_are_those_that_were_measured(page: str) -> None:
    """Milliseconds and, in brackets, the ratio to float32 eager, as rounded as they are written."""
    for case, runner, cell in measured(page):
        row, (milliseconds, *ratio) = CPU[case][runner], map(float, re.findall(r"[\d.]+", cell))
        assert abs(milliseconds - row["median_ms"]) <= 0.5 + 1e-6, (case, runner)
        if runner != "float32 eager":
            assert abs(ratio[0] - row["over float32 eager"]) <= 0.005 + 1e-6, (case, runner)


def public() -> list[tuple[str, Any]]:
    return [(f"{name}.{attribute}", getattr(importlib.import_module(name), attribute))
            for name in ("lowbit", "lowbit.nn", "lowbit.length", "lowbit_kernels")
            for attribute in importlib.import_module(name).__all__]  # fmt: skip


def test_the_reference_has_every_public_name() -> None:
    listed = set(re.findall(r"^::: (\S+)", "\n".join(PAGES.values()), re.MULTILINE))
    missing = {name for name, value in public() if not inspect.ismodule(value)} - listed
    assert missing == {"lowbit.length.LengthConfig"}  # which is lowbit.LengthConfig


@pytest.mark.parametrize(("name", "value"), [pair for pair in public() if not inspect.ismodule(pair[1])])
def test_docstrings_describe_arguments_that_exist(name: str, value: Any) -> None:
    text = inspect.getdoc(value)
    assert text
    if section := re.search(r"^Args:\n((?: +.*\n?|\n)+)", text, re.MULTILINE):
        described = [part.strip(" *") for names in re.findall(r"^ {4}([\w*, ]+):", section[1], re.MULTILINE)
                     for part in names.split(",")]  # fmt: skip
        classes = value.__mro__[:-1] if inspect.isclass(value) else [value]  # what *args and **kwargs go on to
        assert set(described) <= {name for each in classes for name in inspect.signature(each).parameters}


def test_extending_takes_less_than_forty_lines_each() -> None:
    sections = re.split(r"^## ", PAGES["docs/extending.md"], flags=re.MULTILINE)[1:]
    lines = [sum(len(code.splitlines()) for code in blocks(section, "python")) for section in sections]
    assert len(lines) == 3 and all(0 < count < 40 for count in lines), lines


def test_there_is_something_to_test() -> None:
    assert len(programs()) >= 15 and len(commands()) >= 8 and len(measured("docs/faq.md")) >= 30
