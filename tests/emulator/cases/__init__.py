"""The kernels that are run: launches by the public launchers, compared with int64 and float64 definitions."""

from ..trial import Case
from . import attention, embedding, linear, quantize, weights

CASES: list[Case] = [case for module in (linear, quantize, attention, embedding, weights) for case in module.CASES]

__all__ = ["CASES"]
