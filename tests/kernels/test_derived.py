"""What is derived from packed weights on a device is written before others see it, and not kept from a capture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lowbit_kernels._derived import Derived


class Device:
    """A GPU as far as `Derived` asks for one; CPU tensors say that they are on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, derived: Derived) -> None:
        self.derived, self.capturing, self.pool = derived, False, (0, 0)
        self.made: list[torch.Tensor] = []
        self.seen_while_waiting: list[list[torch.Tensor]] = []
        stream = SimpleNamespace(synchronize=self.wait)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
        monkeypatch.setattr(torch.cuda, "memory_snapshot", self.snapshot)

    def wait(self) -> None:
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.seen_while_waiting.append(self.derived.values())

    def snapshot(self) -> list[dict[str, object]]:
        return [{"address": t.data_ptr(), "total_size": t.nbytes, "segment_pool_id": self.pool} for t in self.made]

    def get(self, weight: torch.Tensor) -> torch.Tensor:
        def make() -> torch.Tensor:
            self.made.append(weight * 2)
            return self.made[-1]

        return self.derived.get([weight], (), make)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch, Derived())


def test_the_stream_is_waited_for_once_before_others_see_the_value(device: Device) -> None:
    weight = torch.randn(5)
    first = device.get(weight)
    assert device.seen_while_waiting == [[]]  # waited for while there was nothing to see
    assert device.derived.values() == [first]
    assert device.get(weight) is first and len(device.made) == len(device.seen_while_waiting) == 1
    weight.add_(1)
    assert torch.equal(device.get(weight), weight * 2) and len(device.seen_while_waiting) == 2
    assert device.seen_while_waiting[1][0] is first  # of the old weight: whoever holds that may still read it


@pytest.mark.parametrize("where", ["capture", "private pool"])
def test_what_does_not_last_is_neither_kept_nor_waited_for(where: str, device: Device) -> None:
    weight = torch.randn(5)
    device.capturing, device.pool = where == "capture", (0, 1) if where == "private pool" else (0, 0)
    for _ in range(2):
        assert torch.equal(device.get(weight), weight * 2)
    assert len(device.made) == 2 and device.derived.values() == [] and device.seen_while_waiting == []
