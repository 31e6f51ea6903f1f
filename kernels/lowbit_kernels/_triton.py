"""Triton where it is installed, else stand-ins: op files define their kernels either way, and CPU users need neither.

`INTERPRET` is true where TRITON_INTERPRET=1 runs kernels in Python on CPU tensors; inline assembly is then replaced
by plain operations.
"""

from __future__ import annotations

import os
from typing import Any

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

try:
    import triton
    import triton.language as tl
except ImportError:

    class _MissingKernel:
        """What `@triton.jit` makes of a kernel where there is no Triton."""

        def __init__(self, function: Any) -> None:
            self.name = function.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError(f"the kernel {self.name} needs Triton on CUDA tensors: pip install triton")

    class _Missing:
        constexpr = Any

        @staticmethod
        def jit(function: Any = None, **_options: Any) -> Any:
            return _MissingKernel if function is None else _MissingKernel(function)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << max(0, n - 1).bit_length()

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

    triton = tl = _Missing()  # type: ignore[assignment]

__all__ = ["INTERPRET", "tl", "triton"]
