"""CUDA graphs: how they are captured, and what they hold on to. torch.cuda is replaced by notes of what is called."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowbit
from helpers import tiny
from lowbit import graphs
from lowbit_kernels import linear, linear_triton


class Stream(SimpleNamespace):
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is captured and how each capture ends, in order."""
    noted: list[str] = []

    @contextmanager
    def graph(graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        noted.append(f"begin, {capture_error_mode}" + ("" if pool is None else ", in the pool"))
        try:
            yield
        except BaseException:
            noted.append("failed")
            raise
        noted.append("end")

    stream = Stream(device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: noted.append("replay")))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())
    return noted


def test_a_capture_comes_after_a_run_and_minds_its_own_thread_only(calls: list[str]) -> None:
    def run() -> torch.Tensor:
        calls.append("run")
        return torch.ones(1)

    replay, output = graphs._capturing(torch.device("cpu"))(run)
    replay()
    assert output == 1
    assert calls == ["run", "begin, thread_local, in the pool", "run", "end", "replay"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()], ids=repr)
def test_after_a_failed_capture_something_else_is_captured(error: BaseException, calls: list[str]) -> None:
    """Else the random generator of a device raises from then on."""

    def run() -> torch.Tensor:
        if calls:
            raise error
        return torch.ones(1)

    with pytest.raises(type(error)) as raised:
        graphs._capturing(torch.device("cpu"))(run)
    assert raised.value is error
    assert calls == ["begin, thread_local, in the pool", "failed", "begin, thread_local", "end"]


def test_the_error_that_is_raised_is_the_first_one(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is lost, nothing can be captured any more."""

    def run() -> torch.Tensor:
        if calls:
            monkeypatch.setattr(torch, "zeros", fail)
            raise RuntimeError("illegal memory access")
        return torch.ones(1)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        graphs._capturing(torch.device("cpu"))(run)
    assert calls[-2:] == ["begin, thread_local", "failed"]


def joint_product(weights: list[torch.Tensor]) -> torch.Tensor:
    """What is made of the weights of one product for the GPU: joined, and the sums of their codes."""
    (packed, _, _) = linear._joined(weights, [torch.ones(5)] * 2, [None, None])
    return linear_triton._w_sum(packed, 128, "ternary")


def test_what_graphs_read_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.full((5, 32), 0b01010101, dtype=torch.uint8) for _ in range(2)]
    read: list[weakref.ref[torch.Tensor]] = []

    def run(tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        read.append(weakref.ref(joint_product(weights)))
        return tokens

    def capture(run: Any) -> Any:
        return lambda: None, run()

    shapes = [graphs.Shape(8, 8, 1)]
    held = graphs.Graphs(run, shapes, 4, torch.float32, torch.device("cpu"), capture=capture, weights=weights)
    weights[0].zero_()
    assert read[0]() is not joint_product(weights)  # made anew, and the old one is read by a graph
    assert read[0]() is not None and read[0]().sum() == 0  # codes 1 stand for 0
    place, alive = weakref.ref(weights[1]), held
    weights.clear()
    gc.collect()
    assert place() is not None
    del held, alive
    gc.collect()
    assert place() is None and read[0]() is None


@pytest.mark.parametrize("move", [lambda model: model.half(), lambda model: model.to("meta")], ids=["half", "to"])
def test_graphs_are_given_up_where_weights_move(move: Callable[[Any], Any]) -> None:
    model = lowbit.quantize(tiny(), lowbit.TernaryConfig(), fused=True)
    encoder: Any = model.bert.encoder
    encoder.run = captured = object()
    model.to("cpu").float()
    assert encoder.run is captured  # nothing moved
    move(model)
    assert encoder.run == encoder._run
