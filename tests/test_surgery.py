"""Model surgery: a few hundred of the random programs of `surgery`, of which `make soak` runs thousands."""

from __future__ import annotations

import logging
import os

import pytest
import torch

import surgery

SEED = int(os.environ.get("LOWBIT_SEED", 0))
DRAWS, PARTS = 400, 8


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "lowbit")


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs_keep_the_function_or_are_refused(part: int) -> None:
    """The message is a program as Python: `surgery.check(Program(...))` runs it again."""
    for case in range(part, DRAWS, PARTS):
        program = surgery.draw(SEED, case)
        if reason := surgery.failure(program):
            shorter = surgery.shrunk(program)
            pytest.fail(f"case {case} of seed {SEED}: {shorter}\n{surgery.failure(shorter) or reason}")


def test_a_program_is_what_it_prints() -> None:
    program = surgery.draw(SEED, 3)
    assert eval(repr(program), vars(surgery)) == program == surgery.draw(SEED, 3)


def test_a_fault_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed encoder that forgets the attention mask."""
    from lowbit.nn import encoder

    monkeypatch.setattr(encoder, "without_padding", lambda states, mask: _without_padding(states, None))
    failing = next(p for case in range(200) if surgery.failure(p := surgery.draw(SEED, case)) is not None)
    shorter = surgery.shrunk(failing)
    assert len(shorter.steps) <= 2 and "differs from the twin" in (surgery.failure(shorter) or "")


def _without_padding(states: torch.Tensor, mask: None) -> object:
    from lowbit.nn.sequences import without_padding

    return without_padding(states, mask)
