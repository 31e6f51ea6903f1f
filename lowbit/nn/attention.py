"""`attn_implementation="lowbit"`: attention of encoders, quantized where `lowbit.prepare` says so, float elsewhere.

    scores = q(Q) q(K)^T / sqrt(d)        probs = softmax(scores + mask)        out = q(dropout(probs)) q(V)

(Placement as in the released TernaryBERT and BinaryBERT.) `q` is the module's child `quantizers` (a
`torch.nn.ModuleDict` by site name, put there by `lowbit.prepare`); a float model has none and is left exact.
The scores that distillation compares are returned instead of the probabilities where the caller passes
`output_scores=True` to the model's forward. Keys may be more than queries: a prefix that all see (prefix tuning).

Float attention on the GPU runs in `lowbit_kernels.attention`, over the tokens without padding and without a map of
probabilities, unless a map, scores or dropout are asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowbit_kernels import attention
from lowbit_kernels.varlen_attention import HEAD_DIMS

NAME = "lowbit"

_SCORES_AT_A_TIME = 2**21  # 8 MiB of float32
_MASKS = (
    "accepted: [B, S] of 1 and 0 (padding); or [B, 1 or heads, S, S] of bool (True: seen) or float (added to scores)"
)


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface.

    Args:
        module: the self-attention module; its `quantizers` child, if any, quantizes the four operands.
        query: float [B, H, S, D].
        key, value: float [B, H, P + S, D], in encoders with a prefix of P, else of 0.
        attention_mask: additive float, or bool (True: seen) [B, 1, S, P + S], or a padding mask [B, P + S], or None.
        output_scores: return the scaled scores before mask and softmax in place of the probabilities.

    Returns:
        output [B, S, H, D] and [B, H, S, P + S] probabilities (after dropout) or scores: where the model's forward is
        called with `output_attentions=True`, and where gradients need them, None elsewhere. On the GPU the output of a
        float model is finite at padding, but not that of other implementations.

    Raises:
        ValueError: causal attention, cross-attention, a decoder's cache or grouped heads.
    """
    _refuse_decoders(module, query, key, kwargs)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if key.shape == query.shape and _fits_kernel(module, query, attention_mask, dropout, output_scores, kwargs):
        return attend_without_padding(query, key, value, attention_mask, scaling), None
    quantizers = getattr(module, "quantizers", {})
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    elif attention_mask is not None and not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        raise ValueError(f"attention_mask is {attention_mask.dtype} {tuple(attention_mask.shape)}; {_MASKS}")
    quantize: Any = quantizers["attention_probs"] if quantizers else None
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if not (
        trained
        or output_scores
        or _wants_maps(module, kwargs)
        or (dropout and module.training)
        or torch.compiler.is_compiling()
        or getattr(quantize, "granularity", None) == "per_tensor"
    ):
        return _in_parts(query, key, value, attention_mask, scaling, quantizers), None
    if quantizers:
        query, key, value = quantizers["query"](query), quantizers["key"](key), quantizers["value"](value)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    probs = nn.functional.softmax(_masked(scores, attention_mask), dim=-1)
    probs = nn.functional.dropout(probs, p=dropout, training=module.training)
    if quantize is not None:
        probs = quantize(probs)
    output = torch.matmul(probs, value).transpose(1, 2).contiguous()
    return output, scores if output_scores else probs


def _masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Scores of what is not seen become the least number; a float mask is added."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:  # True where a key is seen
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    quantizers: Any,
) -> torch.Tensor:
    """Attention for as many sentences, or heads, at a time as have scores that fit into a cache: the same bits as all
    at once, in little memory however long they are. [B, H, S, D] -> [B, S, H, D]."""
    B, H, S, _ = query.shape
    output = query.new_empty(B, S, H, value.shape[-1])
    each = S * key.shape[2]
    rows = max(1, min(B, _SCORES_AT_A_TIME // (H * each)))
    heads = max(1, min(H, _SCORES_AT_A_TIME // each))
    for row in range(0, B, rows):
        for head in range(0, H, heads):
            part = slice(row, row + rows), slice(head, head + heads)
            seen = mask
            if mask is not None:
                row_of = part[0] if mask.shape[0] == B else slice(None)
                seen = mask[row_of, part[1] if mask.shape[1] == H else slice(None)]
            q, k, v = query[part], key[part], value[part]
            if quantizers:
                q, k, v = quantizers["query"](q), quantizers["key"](k), quantizers["value"](v)
            probs = nn.functional.softmax(_masked(torch.matmul(q, k.transpose(2, 3)).mul_(scaling), seen), dim=-1)
            if quantizers:
                probs = quantizers["attention_probs"](probs)
            output[part[0], :, part[1]] = torch.matmul(probs, v).transpose(1, 2)
    return output


def attend_without_padding(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Float attention by `lowbit_kernels.attention`, with nothing to wait for: shapes do not depend on the mask.

    The padding of a row becomes a sequence of its own behind that of the row's tokens, wherever it was.

    Args:
        query, key, value: [B, H, S, D]; what other implementations take for granted, rows of [B, S, H, D], is free.
        mask: padding mask [B, S] or None.

    Returns:
        [B, S, H, D]; at padding, something finite.
    """
    B, _, S, _ = query.shape
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if mask is None:
        cu_seqlens = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=query.device)
        return attention(query, key, value, cu_seqlens, S, scaling=scaling).unflatten(0, (B, S))
    order, cu_seqlens = _tokens_first(mask)
    query, key, value = (x.index_select(0, order) for x in (query, key, value))
    output = attention(query, key, value, cu_seqlens, S, scaling=scaling)
    return torch.empty_like(output).index_copy(0, order, output).unflatten(0, (B, S))


def _tokens_first(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places in [B * S], int64, each row's tokens before its padding; where these 2 B sequences begin, int32 [2 B + 1].

    Kept with the mask, which all layers of a forward pass share (`padding_mask` makes a new one for each pass).
    """
    kept = None if torch.compiler.is_compiling() else getattr(mask, "_lowbit_tokens_first", None)
    if kept is not None:
        return kept  # type: ignore[no-any-return]
    B, S = mask.shape
    padding = ~mask.bool()
    begins = torch.arange(0, B * S, S, device=mask.device)
    order = (padding.to(torch.uint8).argsort(stable=True, dim=1) + begins[:, None]).flatten()
    ends = torch.stack([begins + S - padding.sum(1), begins + S], 1).flatten()
    result = order, nn.functional.pad(ends, (1, 0)).int()
    if not torch.compiler.is_compiling():
        mask._lowbit_tokens_first = result  # type: ignore[attr-defined]
    return result


def _fits_kernel(
    module: nn.Module,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    output_scores: bool,
    kwargs: dict[str, Any],
) -> bool:
    """Whether `attend_without_padding` gives all that is asked for."""
    return (
        query.is_cuda
        and len(getattr(module, "quantizers", ())) == 0  # not `not`: Dynamo of torch 2.11 cannot trace that
        and not (_wants_maps(module, kwargs) or output_scores or (dropout and module.training))
        and (mask is None or mask.dim() == 2)
        and query.shape[-1] in HEAD_DIMS
        and query.dtype != torch.float64
    )


def _wants_maps(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for probabilities."""
    maps = kwargs.get("output_attentions")
    return bool(getattr(getattr(module, "config", None), "output_attentions", False) if maps is None else maps)


def _refuse_decoders(module: nn.Module, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]) -> None:
    problem = None
    causal = kwargs.get("is_causal")  # None: as the module says
    if getattr(module, "is_causal", False) if causal is None else causal:
        problem = "causal attention (is_decoder=True?)"
    elif key.shape != query.shape and not _have_prefix(module, query, key):
        problem = f"keys {tuple(key.shape)} for queries {tuple(query.shape)}: cross-attention, a cache or grouped heads"
    elif given := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        problem = f"{given[0]}"
    if problem:
        raise ValueError(
            f"{type(module).__name__} wants {problem}, which attn_implementation='lowbit' does not have: it is that of "
            "encoders; use model.set_attn_implementation('sdpa')"
        )


def _have_prefix(module: nn.Module, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the keys are those of the queries behind some more, in an encoder: only decoders have cross-attention."""
    config, (B, H, S, D) = getattr(module, "config", None), query.shape
    decoder = any(getattr(config, name, False) for name in ("is_decoder", "is_encoder_decoder", "add_cross_attention"))
    return config is not None and not decoder and key.shape[2] > S and key.shape == (B, H, key.shape[2], D)


def padding_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask interface: the padding mask [B, S] or None, a mask [B, 1, S, S] where more is hidden.

    On the GPU a mask that hides nothing stays, where others look whether it does: that is to wait for the device.
    """
    from transformers.masking_utils import bidirectional_mask_function, eager_mask
    from transformers.utils.import_utils import is_tracing

    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:  # those of four dimensions do not come here
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; {_MASKS}")
    plain = kwargs.get("mask_function") is bidirectional_mask_function
    if not plain or not kwargs.get("allow_is_bidirectional_skip", True):  # the model goes on to work with the mask
        return eager_mask(*args, **kwargs)
    if mask is None or (not mask.is_cuda and not is_tracing(mask) and bool(mask.all())):
        return None
    return mask.detach()  # a tensor of our own, see `_tokens_first`


def register() -> None:
    """Make the name known to transformers: attention and mask, since without a mask function padding is ignored."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


register()
