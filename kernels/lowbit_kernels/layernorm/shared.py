"""`layernorm`: what the other files share. The formula is in `op.py`."""

from __future__ import annotations

import torch

Normalized = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # y, codes, scale, zero point
