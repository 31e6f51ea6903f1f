"""Compiles what parts of the run launch, before they do, in as many processes as there are cores.

    python -m benchmarks.gpu_warm model --arch 90 --processes 4 --seconds 40

A part walks on fake tensors (`benchmarks.rehearsal`), and what it would launch is compiled into Triton's cache on disk,
where the part finds it. Nothing here touches the device. What is not compiled in time is compiled at its first launch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from lowbit_kernels.ahead import Compilers

from .gpu_timing import Clock

PARTS = ("model", "linear", "attention", "training")


def run(arch: int, folder: Path, clock: Clock) -> None:
    """Each part in a process of its own, which compiles in some more; ends with the clock.

    Raises:
        RuntimeError: a part could not be walked.
    """
    processes = max(1, (os.cpu_count() or 1) // len(PARTS))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    begun = {}
    for part in PARTS:
        command = [sys.executable, "-m", "benchmarks.gpu_warm", part, "--arch", str(arch)]
        command += ["--processes", str(processes), "--seconds", f"{clock.left():.1f}"]
        begun[part] = subprocess.Popen(command, env=environment)
    failed = [part for part, process in begun.items() if process.wait()]
    if failed:
        raise RuntimeError(f"could not be walked without a device: {', '.join(failed)}")


def compile_part(part: str, arch: int, processes: int, clock: Clock) -> tuple[int, int]:
    """(binaries that were compiled, or were there; those that were not, or failed) of a part's launches."""
    from . import gpu_model
    from .rehearsal.cost import Notes
    from .rehearsal.stage import walk

    ours = [(tier, case) for tier, case in gpu_model.plan() if tier in ("first", "dropping")]  # peers are torch's
    compilers = Compilers(arch, processes)
    try:
        # The folder is for its results, in which every number is made up.
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(gpu_model, "plan", lambda: ours):
            walk(Notes(part), Path(folder), noted=compilers.submit, arch=arch)
        futures = compilers.futures()
        for future in futures:
            try:
                future.result(timeout=max(0.0, clock.left()))
            except Exception as error:
                print(f"{part}: {type(error).__name__}: {error}", file=sys.stderr)
        done = sum(future.done() and not future.cancelled() and future.exception() is None for future in futures)
        return done, len(futures) - done
    finally:
        compilers.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--arch", type=int, required=True, help="compute capability, 90 say")
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="wait no longer for what compiles")
    options = parser.parse_args(arguments)
    clock = Clock(options.seconds)
    done, missing = compile_part(options.part, options.arch, options.processes, clock)
    print(f"{options.part}: {done} binaries compiled ahead, {missing} not, {clock.left():.0f} s left", flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # compilers that are still at work are not waited for
