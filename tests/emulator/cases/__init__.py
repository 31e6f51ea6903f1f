"""The kernels that are run: launches by the public launchers, compared with int64 and float64 definitions."""

from ..trial import Case
from . import attention, linear, quantize

CASES: list[Case] = [*linear.CASES, *quantize.CASES, *attention.CASES]

__all__ = ["CASES"]
