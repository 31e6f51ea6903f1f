"""Clocks of the GPU run: what is left of a part's time, milliseconds on the device, watts, and the machine's name."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

GRAPH_REP_MS = 5.0  # of a replay, ten times; calls of a few microseconds fill it with hundreds
MODEL_REP_MS = 200.0  # of a whole model, whose calls take milliseconds
WATTS_SECONDS = 0.5


class TimeUp(Exception):
    """A part's time is over, and it has not done all."""


class Clock:
    """When a part has to stop beginning things."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def check(self) -> None:
        """Raise TimeUp when there are none left."""
        if self.left() <= 0:
            raise TimeUp


def median_ms(run: Callable[[], Any], rep: float = 15) -> float:
    """Median milliseconds of a call as Python makes it, caches flushed between calls, for about `rep` milliseconds."""
    from triton.testing import do_bench

    return do_bench(run, warmup=5, rep=rep, return_mode="median")


def model_ms(run: Callable[[], Any]) -> float:
    """`median_ms` for calls of milliseconds."""
    return median_ms(run, MODEL_REP_MS)


def replay_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of a call in a CUDA graph: what the device needs, without Python.

    Raises:
        Exception: whatever keeps the call from being captured; what comes after it can be run as before.
    """
    from triton.testing import do_bench_cudagraph

    try:
        return do_bench_cudagraph(run, rep=GRAPH_REP_MS, return_mode="median")
    except Exception:
        with contextlib.suppress(Exception):  # the first error says more
            _end_capture()
        raise


def _end_capture() -> None:
    """Capture something. A capture that failed leaves CUDA's random generator as in a capture: randn would raise."""
    x = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x + 1


def check_alive() -> None:
    """Raise what the device says where an earlier error, an illegal access say, has left it unusable."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Device, driver and versions: what the figures hold for."""
    import transformers
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _driver() -> str:
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    return _nvidia_smi("driver_version") or "unknown"


def _nvidia_smi(field: str, *options: str) -> str | None:
    """A field of the first device that is asked for; None where there is no nvidia-smi, or it tells nothing."""
    query = ["nvidia-smi", *options, f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=5).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.strip() or None


def power_meter() -> Callable[[], float | None]:
    """A function that reads the board's power now, in watts: by NVML, else by nvidia-smi; None where neither tells."""
    gpu = str(torch.cuda.get_device_properties(0).uuid)
    uuid = gpu if gpu.startswith("GPU-") else f"GPU-{gpu}"
    try:
        import pynvml

        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(uuid)

        def by_nvml() -> float | None:
            (field,) = pynvml.nvmlDeviceGetFieldValues(device, [pynvml.NVML_FI_DEV_POWER_INSTANT])
            return None if field.nvmlReturn else field.value.uiVal / 1000

        if by_nvml() is not None:
            return by_nvml
    except Exception:  # no package, a container that hides the device, an older driver
        pass

    def by_nvidia_smi() -> float | None:
        answer = _nvidia_smi("power.draw.instant", "-i", uuid)  # power.draw is a mean over a second
        return float(answer) if answer and answer.replace(".", "", 1).isdigit() else None

    return by_nvidia_smi


def mean_watts(run: Callable[[], Any], seconds: float = WATTS_SECONDS) -> float | None:
    """Mean board power while `run` repeats; None where nothing tells it."""
    meter, done = power_meter(), threading.Event()
    samples: list[float] = []

    def sample() -> None:
        while not done.is_set():
            watts = meter()
            if watts is None:
                return
            samples.append(watts)
            done.wait(0.02)

    thread = threading.Thread(target=sample)
    thread.start()
    begin = time.perf_counter()
    try:
        while time.perf_counter() - begin < seconds and (samples or thread.is_alive()):
            run()
            torch.cuda.synchronize()
    finally:
        done.set()
        thread.join()
    settled = samples[len(samples) // 2 :]  # power follows the load with a delay
    return sum(settled) / len(settled) if settled else None
