"""Every Python block of the README runs as it stands, and every command it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
BASH = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs_and_prints_what_its_comments_say(block: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for promised in re.findall(r"# (torch\.Size\(.*?\))", block, re.MULTILINE):
        assert promised in result.stdout


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in BASH:
        command, *arguments = line.split()
        if command == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE), line
        elif command == "python":
            assert (ROOT / arguments[0]).is_file(), line


def test_there_is_something_to_test() -> None:
    assert len(PYTHON) >= 4
    assert len(BASH) >= 4


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)\)", README))
def test_links_resolve(link: str) -> None:
    assert (ROOT / link).exists()
