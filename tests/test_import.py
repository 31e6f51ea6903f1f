"""`import lowbit` is cheap, needs neither triton nor a GPU, and the kernels/ folder shadows nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(program: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_takes_less_than_0_3_s_more_than_torch() -> None:
    program = "import torch, time; t = time.perf_counter(); import lowbit; print(time.perf_counter() - t)"
    assert statistics.median(float(run(program)) for _ in range(3)) < 0.3


def test_import_loads_neither_transformers_nor_triton() -> None:
    program = "import lowbit, sys; print([m for m in ('transformers', 'triton', 'datasets') if m in sys.modules])"
    assert run(program) == "[]"


def test_everything_public_resolves_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch, lowbit, lowbit_kernels
for module in (lowbit, lowbit_kernels):
    for name in module.__all__:
        assert getattr(module, name) is not None
packed = lowbit.nn.PackedLinear.from_float(torch.nn.Linear(100, 30))
print(tuple(packed(torch.randn(2, 100)).shape), lowbit.backend().startswith("cpu"))
"""
    assert run(program) == "(2, 30) True"


def test_functions_are_not_shadowed_by_their_modules() -> None:
    program = """
import lowbit, transformers.modeling_utils
print(all(callable(getattr(lowbit, n)) for n in ("slim", "convert", "prepare", "quantize", "split", "compile")))
"""
    assert run(program) == "True"


def test_transformers_imports_at_the_repository_root() -> None:
    assert run("import transformers; transformers.BertModel; print('ok')") == "ok"
