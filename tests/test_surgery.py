"""Model surgery: a few hundred of the random programs of `surgery`, of which `make soak` runs thousands."""

from __future__ import annotations

import logging
import os

import pytest
import torch

import surgery
from surgery import Program

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


# Programs that failed once, as short as they became, by what was wrong.
ONCE = {
    "trying a head called the hooks of embeddings": Program(
        "DistilBert", "ForSequenceClassification", "4 bits", (("change after words", 695), ("quantize", 276))
    ),
    "looking at an activation called its hooks": Program(
        "Electra", "ForQuestionAnswering", "no words", (("change before activation", 859), ("quantize", 537)), 16
    ),
    "a hook on the encoder saw states of first tokens": Program(
        "Bert", "ForSequenceClassification", "float attention", (("quantize", 1), ("watch after encoder", 4))
    ),
    "a copied layer kept an attention of its own": Program(
        "XLMRoberta", "ForTokenClassification", "binary", (("layer replaced", 807), ("quantize", 659)), 221
    ),
    "fused=True failed and left the model packed": Program(
        "XLMRoberta", "ForSequenceClassification", "float attention", (("norm eps", 771), ("quantize fused", 172)), 143
    ),
    "embeddings without LayerNorm were an AttributeError": Program(
        "Camembert", "ForSequenceClassification", "ternary", (("norm identity", 546), ("quantize", 788)), 68
    ),
    "an encoder of the fallback under another name was an AttributeError": Program(
        "DebertaV2", "ForSequenceClassification", "ternary", (("other name", 348), ("quantize", 80)), 913
    ),
    "and a NotImplementedError": Program(
        "RoFormer", "ForMaskedLM", "ternary", (("other name", 858), ("quantize", 116)), 120
    ),
    "a head on a packed body could be slimmed, to no end": Program(
        "XLMRoberta", "ForSequenceClassification", "4 bits",
        (("quantize", 655), ("shared body", 27), ("slim", 773)), 622,
    ),
    "a head on a packed body was another after it could not be saved": Program(
        "Camembert", "ForMultipleChoice", "4 bits",
        (("linear shared", 457), ("quantize", 498), ("shared body", 176), ("reload", 388)), 340,
    ),
    "fuse failed and the model dropped no tokens any more": Program(
        "DistilBert", "Model", "float attention",
        (("norm own", 389), ("quantize", 420), ("drop", 585), ("fuse", 859)), 404,
    ),
    "dequantize lost a forward that was put over the encoder's": Program(
        "Electra", "ForMultipleChoice", "4 bits", (("quantize", 25), ("own forward of encoder", 938),
        ("dequantize", 370), ("train", 123)), 764,
    ),
    "MPNet counted distances without the padding inside": Program(
        "MPNet", "ForQuestionAnswering", "no words", (("quantize", 26),), 854
    ),
    "a model made from the configuration of a packed MPNet added its padding mask to scores": Program(
        "MPNet", "ForSequenceClassification", "float attention", (("quantize", 627), ("new of the configuration", 548))
    ),
    "a decoder with another table than the words lost its bias in files": Program(
        "Roberta", "ForMaskedLM", "float attention", (("set_input_embeddings", 250), ("quantize", 806), ("reload", 4))
    ),
    "a model made from a configuration with output_attentions was not saved": Program(
        "Camembert", "ForSequenceClassification", "ternary",
        (("output_attentions", 567), ("quantize", 506), ("new of the configuration", 643)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", ONCE.values(), ids=ONCE)
def test_what_failed_once(program: Program) -> None:
    surgery.check(program)


def test_a_program_is_what_it_prints() -> None:
    program = surgery.draw(SEED, 3)
    assert eval(repr(program), vars(surgery)) == program == surgery.draw(SEED, 3)


def test_a_fault_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed encoder that forgets the attention mask."""
    from lowbit.nn.unpadded import encoder

    monkeypatch.setattr(encoder, "without_padding", lambda states, mask: _without_padding(states, None))
    failing = next(p for case in range(200) if surgery.failure(p := surgery.draw(SEED, case)) is not None)
    shorter = surgery.shrunk(failing)
    assert len(shorter.steps) <= 2 and "differs from the twin" in (surgery.failure(shorter) or "")


def _without_padding(states: torch.Tensor, mask: None) -> object:
    from lowbit.nn.unpadded.sequences import without_padding

    return without_padding(states, mask)
