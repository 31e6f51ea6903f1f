"""A model's first calls may come from several threads: trying what is fast, in one, reaches none of the others."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import lowbit
from helpers import batch, tiny
from lowbit.nn.unpadded.aside import trying
from lowbit.nn.unpadded.heads import reads_first_token_only


@pytest.fixture
def eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    "head", ["BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice"]
)
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.usefixtures("eager_switching")
def test_first_answers_of_threads_are_those_of_one_thread(head: str, fused: bool | None) -> None:
    for trial in range(5):
        torch.manual_seed(trial)
        model = lowbit.quantize(tiny(head), lowbit.TernaryConfig(), fused=fused)
        given = [batch(head, length=length) for length in range(3, 15)]
        alone = copy.deepcopy(model)
        with torch.inference_mode():
            expected = [alone(**each).logits for each in given]
        together, answers = threading.Barrier(4), {}

        def ask(first: int) -> None:
            together.wait()  # noqa: B023
            with torch.inference_mode():
                for number in range(first, len(given), 4):  # noqa: B023
                    try:
                        answers[number] = model(**given[number]).logits  # noqa: B023
                    except Exception as error:
                        answers[number] = error  # noqa: B023

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, answer in enumerate(expected):
            assert torch.is_tensor(answers[number]), answers[number]
            assert torch.equal(answers[number], answer)


def test_what_is_tried_on_a_copy_does_not_reach_the_model() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig()).train()
    seen: list[str] = []
    encoder = model.bert.encoder
    encoder.layer[0].register_forward_hook(lambda *_: seen.append("layer"))
    encoder.original.register_forward_pre_hook(lambda *_: seen.append("encoder"))
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with trying(model) as tried:
        assert not tried.bert.encoder.training and not tried.bert.encoder.original.training
        tried.bert.encoder.__dict__["forward"] = None
        tried.bert.encoder.layer[0].register_forward_hook(lambda *_: seen.append("tried"))
        assert model.training and model.bert.encoder.original.training
        model(**batch())
        assert {"layer", "encoder"} <= set(seen) and "tried" not in seen
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert {id(tensor) for tensor in (*tried.parameters(), *tried.buffers())} == shared
    assert tried.config is model.config
    assert tried.bert.encoder.layer is tried.bert.encoder.original.layer is not encoder.layer


def test_a_model_that_cannot_be_copied_runs_by_its_modules() -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig())
    expected = model(**batch()).logits.shape
    model.bert.encoder.layer[0].lock = threading.Lock()
    model.lock = threading.Lock()
    assert not reads_first_token_only(model)
    assert "cannot be tried" in model.bert.encoder.prevented()
    assert model(**batch()).logits.shape == expected
