"""`fused_embedding`: the CPU path. The formula is in `op.py`."""

from __future__ import annotations

import torch
from torch.nn import functional

from .. import native
from ..embedding.cpu import check_ids
from ..embedding.op import embedding_op
from ..layernorm.cpu import add_layernorm_cpu, code_outputs, with_codes
from ..layernorm.shared import Normalized


def _sum(
    word: torch.Tensor,
    token_type_ids: torch.Tensor,
    token_type_table: torch.Tensor,
    position_ids: torch.Tensor,
    position_table: torch.Tensor,
) -> torch.Tensor:
    """word [M, K] plus the rows of both tables, whose ids are as many as M or repeat after fewer."""
    for ids, table in ((token_type_ids, token_type_table), (position_ids, position_table)):
        rows = functional.embedding(ids, table).to(word.dtype)
        word = (word.view(-1, *rows.shape) + rows).view(word.shape)
    return word


def _single(token_type_table: torch.Tensor, position_table: torch.Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the native kernel takes these."""
    return token_type_table.dtype == position_table.dtype == out_dtype == torch.float32


def _embedding_layernorm_cpu(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    embedding_bits: int,
    token_type_ids: torch.Tensor,
    token_type_table: torch.Tensor,
    position_ids: torch.Tensor,
    position_table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    bits: int,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Normalized:
    M, K = ids.shape[0], weight.shape[0]
    y = weight.new_empty(M, K, dtype=out_dtype)
    if not M or not K:
        return with_codes(y, bits, symmetric)
    if native.available() and _single(token_type_table, position_table, out_dtype):
        # Names hold them until the call is over: the structures have pointers only.
        ids, token_type_ids, position_ids = ids.long(), token_type_ids.long(), position_ids.long()
        words, types, positions = ids.contiguous(), token_type_ids.contiguous(), position_ids.contiguous()
        packed, scale = packed.contiguous(), scale.contiguous()
        token_type_table, position_table = token_type_table.contiguous(), position_table.contiguous()
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        codes = code_outputs(y, bits, symmetric)
        embeddings = native.Embeddings(
            (words.data_ptr(), M, packed.shape[0]),
            (types.data_ptr(), types.shape[0], token_type_table.shape[0]),
            (positions.data_ptr(), positions.shape[0], position_table.shape[0]),
            packed.data_ptr(), packed.shape[1], K, embedding_bits, scale.data_ptr(),
            scale[1].data_ptr() if scale.dim() == 2 else None, scale.shape[-1] > 1,
            token_type_table.data_ptr(), position_table.data_ptr(),
        )  # fmt: skip
        if native.function("embedding_layernorm")(
            embeddings, M, native.norm(weight, bias, eps), bits, y.data_ptr(), *map(native.pointer, codes)
        ):
            return y, *codes
    # The kernel has looked at the ids too, in less time, but does not say which is wrong.
    check_ids("token_type_ids", token_type_ids, token_type_table.shape[0])
    check_ids("position_ids", position_ids, position_table.shape[0])
    word = embedding_op(ids, packed, scale, embedding_bits, K, out_dtype)
    v = _sum(word, token_type_ids, token_type_table, position_ids, position_table)
    return add_layernorm_cpu(v, None, weight, bias, eps, bits, symmetric)
