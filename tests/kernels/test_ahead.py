"""Binaries noted and compiled ahead are those that a launch takes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lowbit_kernels import ahead, configs, packing
from lowbit_kernels._triton import INTERPRET
from lowbit_kernels.linear import gpu as linear_gpu
from lowbit_kernels.linear.gpu import Tile

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
TILE = Tile(16, 32, 32, 4, 2)


def launch(N: int = 768, K: int = 768, offset: int = 0, tile: Tile = TILE) -> None:
    """A ternary product of which only the arguments' types and places matter."""
    x = torch.empty(16, K, dtype=torch.int8)
    scale = torch.ones(N + 4)[offset : offset + N]
    packed = torch.empty(N, -(-K // 128) * 32, dtype=torch.uint8)
    linear_gpu.launch(x, packed, scale, None, torch.ones(16), None, None, torch.float16, "ternary", tile)


def test_launches_are_noted_and_not_run() -> None:
    with ahead.recording(90) as binaries:
        launch()
        launch()
        launch(offset=1)  # 4 bytes on: no longer a multiple of 16
        launch(N=70)
        launch(tile=Tile(16, 64, 32, 4, 2))
    assert [binary.kernel for binary in binaries] == ["_linear_kernel"] * 5
    assert binaries[0] == binaries[1] and len(set(binaries)) == 4
    assert pickle.loads(pickle.dumps(binaries[0])) == binaries[0]


def test_a_grid_beyond_what_cuda_takes_is_an_error() -> None:
    codes, packed, sums = (torch.empty(4, 256, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.int32))
    constants = {"VALUES": 4, "SPLIT": False, "BLOCK": 128}
    with ahead.recording(90):
        packing._pack_kernel[(4, 65535)](codes, packed, sums, 4, 256, 64, **constants)
        for grid in ((4, 65536), (0,), (2**31,)):
            with pytest.raises(ValueError, match="CUDA takes"):
                packing._pack_kernel[grid](codes, packed, sums, 4, 256, 64, **constants)


def test_what_was_compiled_ahead_a_launch_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ahead.recording(90) as binaries:
        launch()
    (future,) = ahead.compile_all(binaries, 90, processes=1)
    assert future.exception() is None
    compiled = sorted(tmp_path.rglob("*.cubin"))
    assert len(compiled) == 1

    run = JITFunction.run  # a launch as Triton makes it, but for the last step

    def warm_up(self, *arguments, grid, warmup, **options):
        return run(self, *arguments, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", warm_up)
    device = ahead._Driver(90)
    monkeypatch.setattr(device, "get_current_device", lambda: 7)
    monkeypatch.setattr(driver, "_active", device)
    launch()
    assert sorted(tmp_path.rglob("*.cubin")) == compiled
    launch(offset=1)
    assert len(list(tmp_path.rglob("*.cubin"))) == 2  # what was not compiled ahead is compiled now


def test_what_does_not_compile_says_so_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with ahead.recording(90) as binaries:
        launch()
    broken = ahead.Binary("lowbit_kernels.linear.gpu", "_no_such_kernel", "", {}, {})
    failed, done = ahead.compile_all([broken, binaries[0]], 90, processes=1)
    assert "_no_such_kernel" in str(failed.exception()) and done.exception() is None


def test_nothing_stays_replaced() -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, JITFunction._do_compile, driver._active
    with pytest.raises(KeyError), ahead.recording(90):
        raise KeyError
    assert (JITFunction.run, JITFunction._do_compile, driver._active) == before
    assert configs.device_arch(torch.device("cpu")) is None
