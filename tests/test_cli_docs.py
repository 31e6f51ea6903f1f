"""docs/cli.md has every command with its options as the program has them.

`python tests/test_cli_docs.py` writes them anew.
"""

from __future__ import annotations

import inspect
import re
import shlex
import typing
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import pytest
import typer
from typer.models import ArgumentInfo
from typer.testing import CliRunner

from lowbit.cli import commands
from lowbit.cli.app import app

PAGE = Path(__file__).parents[1] / "docs/cli.md"
COMMANDS = {function.__name__.replace("_", "-"): function for function in commands.COMMANDS}
BEGIN, END = "<!-- options: written by tests/test_cli_docs.py -->", "<!-- end of options -->"


def options(command: Callable[..., None]) -> str:
    """A Markdown table of a command's arguments and options, from its signature."""
    lines = ["| argument | default | |", "| --- | --- | --- |"]
    hints = typing.get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind, given = typing.get_args(hints[parameter.name])[:2]
        kinds = [each for each in (kind, *typing.get_args(kind)) if isinstance(each, type)]
        # typer.Option("--json") in an annotation: the name is where the default would be.
        own = [text for text in (given.default, *(given.param_decls or ())) if str(text).startswith("--")]
        names = own or [f"--{parameter.name.replace('_', '-')}"]
        choices = [each for each in kinds if issubclass(each, Enum)]
        value = given.metavar or ("VALUE" if bool not in kinds else "")
        if choices:
            value = "{" + ",".join(choice.value for choice in choices[0]) + "}"
        name = value if isinstance(given, ArgumentInfo) else f"{names[0]} {value}".strip()
        empty = any(parameter.default is nothing for nothing in (inspect.Parameter.empty, None, False))
        default = "" if empty else f"`{getattr(parameter.default, 'value', parameter.default)}`"
        lines.append(f"| `{name}` | {default} | {given.help or ''} |".replace("|  |", "| |"))
    return "\n".join(lines)


def section(name: str, page: str) -> str:
    found = re.search(rf"^## lowbit {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section '## lowbit {name}'"
    return found[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_the_options_of_the_program(name: str) -> None:
    assert f"{BEGIN}\n\n{options(COMMANDS[name])}\n\n{END}" in section(name, PAGE.read_text())


def test_there_is_no_section_of_a_command_that_is_none() -> None:
    assert re.findall(r"^## lowbit (\S+)$", PAGE.read_text(), re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_options_are_those_of_help(name: str) -> None:
    text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    shown = set(re.findall(r"(--[a-z-]+)", text)) - {"--help"}
    assert {option for option in re.findall(r"^\| `(--[a-z-]+)", options(COMMANDS[name]), re.MULTILINE)} <= shown


def test_every_example_parses() -> None:
    examples = re.findall(r"^lowbit (.+)$", PAGE.read_text(), re.MULTILINE)
    assert {shlex.split(line)[0] for line in examples} >= set(COMMANDS)
    program = typer.main.get_command(app)
    for line in examples:
        name, *arguments = shlex.split(line, comments=True)
        if name in COMMANDS:
            program.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


if __name__ == "__main__":
    text = PAGE.read_text()
    for name, command in COMMANDS.items():
        old = section(name, text)
        table = f"{BEGIN}\n\n{options(command)}\n\n{END}"
        new = re.sub(f"{BEGIN}.*?{END}", lambda _, table=table: table, old, flags=re.DOTALL)
        text = text.replace(old, new)
    PAGE.write_text(text)
