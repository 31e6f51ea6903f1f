"""Which backend runs here, in one line."""

from __future__ import annotations

import importlib.util

import torch

from lowbit_kernels import native


def backend() -> str:
    """What `lowbit_kernels` dispatches to on this machine, e.g. "cpu: lowbit's AMX kernels, 2 threads".

    The dispatch itself is by tensor: CPU tensors take the CPU path on a GPU machine too. The first call on a CPU may
    compile kernels, for some seconds.

    Raises:
        RuntimeError, ValueError: $LOWBIT_CPU names kernels that do not run here, or that there are none of.
    """
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return f"cuda: {torch.cuda.get_device_name()}, but triton is not installed (pip install triton)"
        import triton

        return f"cuda: triton {triton.__version__} on {torch.cuda.get_device_name()}"
    threads = f"{torch.get_num_threads()} threads"
    kind, _ = native.chosen()
    if kind == "torch":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"cpu: torch {torch.__version__} int8 products, {capability}, {threads}"
    return f"cpu: lowbit's {kind.upper()} kernels, {threads}"
