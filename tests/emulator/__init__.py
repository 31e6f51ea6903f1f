"""A PTX emulator: executes what Triton compiled for a GPU, on CPU tensors, and checks every access to memory.

    with emulated(arch=90, inputs=[x, packed, scale]) as log:
        y = linear.gpu.launch(x, packed, scale, ...)   # compiled for sm_90 as a launch on it would be, then executed
    log.findings                                          # races, accesses out of bounds, ... ; empty if there are none

`python -m emulator` runs the table of `cases` and mutations of the compiled code (`mutations.py`). What this shows
and what it cannot show: docs/checked-without-a-gpu.md.
"""

from .findings import Fault
from .launch import Log, emulated, execute

__all__ = ["Fault", "Log", "emulated", "execute"]
