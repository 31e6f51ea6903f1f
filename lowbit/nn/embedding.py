"""Quantized embedding tables: `QuantEmbedding` trains on latent floats, `PackedEmbedding` gathers packed rows."""

from __future__ import annotations

import torch
from torch import nn

from lowbit_kernels import (
    pack_binary,
    pack_split,
    pack_ternary,
    quantize_per_token,
    quantized_embedding,
)

from ..quantizers import DEFAULT_FOR_BITS, StraightThrough, weight_codes
from ._packed import Packed, refuse_tracing


def table_codes(weight: torch.Tensor, bits: int, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of an embedding table [V, K] or pair [2, V, K]; 8 bits are symmetric, one scale a row."""
    if bits == 8:
        codes, scale, _ = quantize_per_token(weight.detach(), 8, True)
        return codes, scale
    return weight_codes(weight, DEFAULT_FOR_BITS[bits], granularity)


class QuantEmbedding(nn.Module):
    """Embedding with a fake-quantized table, for training; the latent `weight` keeps its name.

    Args:
        embedding: float embedding whose table is taken over (not copied).
        bits: 2, 1 or 8.
        granularity: "per_row" or "per_tensor" (8 bits: always per row).

    `weight` is float [V, K], or [2, V, K] after `lowbit.split`.
    """

    def __init__(self, embedding: nn.Embedding, bits: int, granularity: str = "per_row") -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.weight = embedding.weight
        self.bits, self.granularity = bits, granularity

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> float [..., K], straight-through gradient to the table."""
        if self.weight.dim() == 2:
            return self._gather(self.weight, ids)
        return self._gather(self.weight[0], ids) + self._gather(self.weight[1], ids)

    def _gather(self, table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding(ids, table, self.padding_idx)
        # Rows are quantized one by one, so only those of the batch need it; a shared scale needs the whole table.
        if self.granularity == "per_row" or self.bits == 8:
            codes, scale = table_codes(rows.detach().reshape(-1, self.embedding_dim), self.bits, "per_row")
            codes, scale = codes.view(rows.shape), scale.view(ids.shape)
        else:
            codes, scale = table_codes(table, self.bits, self.granularity)
            codes = codes[ids]
        return StraightThrough.apply(rows, (codes * scale.unsqueeze(-1)).to(rows.dtype))

    def extra_repr(self) -> str:
        planes = ", split" if self.weight.dim() == 3 else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, {self.granularity}{planes}"


class PackedEmbedding(Packed):
    """Embedding on packed codes: `weight` uint8 (lb2, lb1) or int8 (8 bits), `weight_scale` float32.

    Args:
        num_embeddings, embedding_dim: V and K.
        bits: 2, 1 or 8; with `split`, a pair of binary planes.
        granularity: "per_row" or "per_tensor" (8 bits: always per row).
        dtype: of the output.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        granularity: str = "per_row",
        split: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.row_length = embedding_dim
        self.layout = "split" if split else {2: "ternary", 1: "binary", 8: "int8"}[bits]
        block = {"ternary": 128, "split": 128, "binary": 256}
        columns = embedding_dim if bits == 8 else -(-embedding_dim // block[self.layout]) * 32
        rows = num_embeddings if granularity == "per_row" or bits == 8 else 1
        code_dtype = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("weight", torch.empty(num_embeddings, columns, dtype=code_dtype, device=device))
        scale_shape = (2, rows) if split else (rows,)
        self.register_buffer("weight_scale", torch.empty(scale_shape, dtype=torch.float32, device=device))
        # The output dtype follows .half() and .to(dtype) as a float table's would.
        self._dtype: torch.Tensor
        self.register_buffer("_dtype", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding | QuantEmbedding, bits: int = 2, granularity: str = "per_row"
    ) -> PackedEmbedding:
        """Quantize and pack an embedding; a `QuantEmbedding` is packed as it was trained, whatever the arguments.

        Raises:
            TypeError: another kind of module.
            ValueError: NaN or infinity in the table.
        """
        if not isinstance(embedding, nn.Embedding | QuantEmbedding):
            raise TypeError(
                f"PackedEmbedding.from_float takes torch.nn.Embedding or QuantEmbedding, got {type(embedding).__name__}"
            )
        weight = embedding.weight
        split = weight.dim() == 3
        if isinstance(embedding, QuantEmbedding):
            bits, granularity = embedding.bits, embedding.granularity
        packed = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            bits,
            granularity,
            split,
            embedding.padding_idx,
            weight.device,
            weight.dtype,
        )
        codes, scale = table_codes(weight, bits, granularity)
        packed.check_finite(scale)
        pack = {"ternary": pack_ternary, "binary": pack_binary, "int8": lambda c: c}
        packed.weight.copy_(pack_split(*codes) if split else pack[packed.layout](codes))
        packed.weight_scale.copy_(scale)
        return packed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 or int32 [...] -> float [..., K]; IndexError for an id outside the table (CPU)."""
        refuse_tracing()
        return quantized_embedding(ids, *self.table(), embedding_dim=self.embedding_dim, out_dtype=self._dtype.dtype)

    def table(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Packed codes, scales and bits, as the kernels take them (a pair counts as 2 bits)."""
        return self.weight, self.weight_scale, {"ternary": 2, "split": 2, "binary": 1, "int8": 8}[self.layout]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.layout}"
