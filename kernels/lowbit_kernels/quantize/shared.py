"""`quantize`: what the other files share. The formula is in `op.py`."""

from __future__ import annotations

import torch

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# A smaller scale (the smallest normal float32) has no accurate reciprocal: it counts as 0.
TINY = 2.0**-126

# An asymmetric scale this far below the values cannot resolve them in float32, and would overflow the zero point.
FLAT = 2.0**-30
