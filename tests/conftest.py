"""Random inputs are drawn anew for each test from its name, so a failure can be repeated.

LOWBIT_SEED=N draws others: `LOWBIT_SEED=$RANDOM make unit`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import zlib
from collections.abc import Generator, Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch

from lowbit_kernels import native

# Read at MKL's first product. Else, on AMD, a product with few columns rounds by where in memory it lies.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Triton 3.6's interpreter does `int(array of one)` for each loop over an argument, which numpy 2.4 made an error.

    Nothing that a kernel can avoid, and nothing that a GPU meets. Later Tritons do it otherwise.
    """
    try:
        return (yield)
    except Exception as error:
        if os.environ.get("TRITON_INTERPRET") != "1" or "only 0-dimensional arrays can be converted" not in str(error):
            raise
        if not version("triton").startswith("3.6.") or tuple(map(int, version("numpy").split(".")[:2])) < (2, 4):
            raise
        pytest.skip("Triton 3.6's interpreter cannot loop with numpy 2.4 or later: pip install 'numpy<2.4'")


@pytest.fixture(autouse=True, scope="session")
def launches_say_whether_they_fuse() -> Iterator[None]:
    """Each that the interpreter sees: where one does not, Triton 3.9 warns users, and 3.10 no longer fuses."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime.interpreter import InterpretedFunction

            run = InterpretedFunction.run

            def checked(self: Any, *args: Any, **options: Any) -> None:
                assert "enable_fp_fusion" in options, f"the launch of {self} lacks enable_fp_fusion"
                run(self, *args, **options)

            patch.setattr(InterpretedFunction, "run", checked)
        yield


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take torch's own int8 products, as where there is no compiler."""
    monkeypatch.setattr(native, "chosen", lambda: ("torch", "asked for by a test"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    value = zlib.crc32(f"{os.environ.get('LOWBIT_SEED', 0)} {request.node.nodeid}".encode())
    random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def accelerate_anew() -> Iterator[None]:
    """accelerate remembers the precision of the last trainer for as long as the process lives."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """The program sets up logging for its own process; the other tests share this one."""
    import transformers

    logger, verbosity = logging.getLogger("lowbit"), transformers.logging.get_verbosity()
    level, propagate, handlers = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.propagate, logger.handlers = propagate, handlers
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Programs that a test runs inside of its process set variables, which later tests would hand on to theirs."""
    before = dict(os.environ)
    yield
    own = {"PYTEST_CURRENT_TEST": os.environ["PYTEST_CURRENT_TEST"]}  # another one now
    if {**os.environ, **own} != {**before, **own}:
        os.environ.clear()
        os.environ.update({**before, **own})
