"""The ops that stay opaque when CPU code is traced, in terms of torch's own: for programs that run without lowbit.

    program = torch.export.export(model, ...).run_decompositions(TABLE)

The same integers as the ops. Weights stay packed in the program and are unpacked in every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .embedding.cpu import gather_rows
from .embedding.op import embedding_op
from .linear.cpu import joint_codes, scaled_op, sum_of_values


def _product(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    scale: Sequence[torch.Tensor],
    x_zero_point: torch.Tensor | None,
    layout: str,
) -> torch.Tensor:
    codes, scales, offsets = joint_codes(packed, scale, x.shape[1], layout)
    x = x.contiguous()
    if layout in ("int8", "uniform8"):  # in halves: where the program runs torch's product may saturate
        odd = codes & 1
        y = (2 * torch._int_mm(x, ((codes - odd) >> 1).t()) + torch._int_mm(x, odd.t())).float()
    else:
        y = torch._int_mm(x, codes.t()).float()
    if x_zero_point is not None:
        y = y - x_zero_point.float().unsqueeze(-1) * codes.sum(1, dtype=torch.int32).float()
    y = y * scales
    return y if offsets is None else y + sum_of_values(x, x_zero_point).unsqueeze(-1) * offsets


TABLE = {scaled_op: _product, embedding_op: gather_rows}
