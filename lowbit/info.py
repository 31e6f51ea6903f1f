"""Which backend runs here, in one line, and which C++ compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch


def backend() -> str:
    """What `lowbit_kernels` dispatches to on this machine, e.g. "triton 3.7.1 on NVIDIA H200" or "cpu: ...".

    The dispatch itself is by tensor: CPU tensors take the CPU path on a GPU machine too.
    """
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            return f"cuda: {torch.cuda.get_device_name()}, but triton is not installed (pip install triton)"
        import triton

        return f"cuda: triton {triton.__version__} on {torch.cuda.get_device_name()}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu: torch {torch.__version__} int8 products, {capability}, {torch.get_num_threads()} threads"


def cpp_compiler() -> tuple[str, str | None]:
    """The C++ compiler that Inductor runs on a CPU, and its path (None: not there): $CXX, else g++, and no other."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return name, shutil.which(name)
