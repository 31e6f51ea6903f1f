"""Attention with quantized Q, K, V and probabilities, registered with transformers as `attn_implementation="lowbit"`.

    scores = q(Q) q(K)^T / sqrt(d)        probs = softmax(scores + mask)        out = q(dropout(probs)) q(V)

(Placement as in the released TernaryBERT and BinaryBERT.) `q` is the module's child `quantizers` (a
`torch.nn.ModuleDict` by site name, put there by `lowbit.prepare`); a float model has none and is left exact.
The scores that distillation compares are returned instead of the probabilities where the caller passes
`output_scores=True` to the model's forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAME = "lowbit"
UNPADDED = "lowbit_unpadded"  # of a model with an `UnpaddedEncoder`, which wants the padding mask itself


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    output_scores: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' attention interface.

    Args:
        module: the self-attention module; its `quantizers` child, if any, quantizes the four operands.
        query, key, value: float [B, H, S, D].
        attention_mask: additive float, or bool (True: seen) [B, 1, S, S], or a padding mask [B, S], or None.
        output_scores: return the scaled scores before mask and softmax in place of the probabilities.

    Returns:
        output [B, S, H, D] and [B, H, S, S] probabilities (after dropout) or scores.
    """
    quantizers = getattr(module, "quantizers", {})
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if quantizers:
        query, key, value = quantizers["query"](query), quantizers["key"](key), quantizers["value"](value)
    if attention_mask is not None and attention_mask.dim() == 2:
        # A padding mask as it came: of a model made from the configuration of one that wants it so (`UNPADDED`).
        attention_mask = attention_mask[:, None, None, :].bool()
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    masked = scores
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:  # True where a key is seen
            masked = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            masked = scores + attention_mask
    probs = nn.functional.softmax(masked, dim=-1)
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    if quantizers:
        probs = quantizers["attention_probs"](probs)
    output = torch.matmul(probs, value).transpose(1, 2).contiguous()
    return output, scores if output_scores else probs


def padding_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    """transformers' mask interface for `UNPADDED`: the padding mask [B, S] as it came."""
    return attention_mask


def register() -> None:
    """Make both names known to transformers: attention and mask, since without a mask function padding is ignored."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    for name, mask in ((NAME, eager_mask), (UNPADDED, padding_mask)):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, mask)


register()
