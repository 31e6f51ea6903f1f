"""`weights`: what the other files share. The formula is in `op.py`."""

from __future__ import annotations

import torch

Codes = tuple[torch.Tensor, torch.Tensor]

THRESHOLD = 0.7
