"""The test files of what changed, for `make quick`: `python tests/changed.py [COMMIT]` prints them, one a line.

Changed since COMMIT (default: HEAD), committed or not. A test file belongs to a module whose name, or a name of
`lowbit` that is at home there, it mentions; to itself; and those of the house are always among them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALWAYS = ("tests/test_layers.py", "tests/test_golden.py")


def _git(*call: str) -> str:
    return subprocess.run(["git", *call], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def changed(commit: str) -> list[str]:
    """Paths of files that are not as in the commit, new ones too."""
    calls = (["diff", "--name-only", commit], ["ls-files", "--others", "--exclude-standard"])
    return sorted({line for call in calls for line in _git(*call).splitlines()})


def mentions(path: str) -> list[str]:
    """What a test of this file would mention."""
    if not path.endswith(".py"):
        return [Path(path).name] if path.startswith(("docs/", "README")) else []
    module = path.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    names = [module, f"{module.rpartition('.')[0]} import {module.rpartition('.')[2]}"]
    if module.startswith("lowbit."):
        import lowbit

        names += [f"lowbit.{name}" for name, home in lowbit._HOME.items() if f"lowbit.{home}" == module]
    return names


def files_for(paths: list[str]) -> list[str]:
    """Test files, relative to the repository."""
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    wanted = {path for path in paths if path in texts} | set(ALWAYS)
    for path in paths:
        for name in mentions(path):
            pattern = re.compile(rf"\b{re.escape(name)}\b")
            wanted |= {test for test, text in texts.items() if pattern.search(text)}
    return sorted(wanted)


if __name__ == "__main__":
    print(*files_for(changed(sys.argv[1] if len(sys.argv) > 1 else "HEAD")), sep="\n")
