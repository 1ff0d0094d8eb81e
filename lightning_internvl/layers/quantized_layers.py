"""Layers whose weights are held in 4, 8 or 16 bits (see `lightning_internvl.layers.quantization`).

Letters: V words, H width of the model, I width in and O width out of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_internvl.layers.basic import autocast_type

# weights that share a scale; bitsandbytes' CPU kernels are wrong for rows that are no whole number
# of blocks
BLOCK = 64


class Int8Table(nn.Module):
    """A table of token embeddings in 8 bits, one scale a row.

    Args:
        table: (V, H)
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.rows: Tensor
        self.scale: Tensor
        self.dtype = table.dtype
        self.num_embeddings, self.embedding_dim = table.shape
        scale_V1 = table.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("rows", torch.round(table.float() / scale_V1).to(torch.int8))
        self.register_buffer("scale", scale_V1)

    @property
    def weight(self) -> Tensor:
        """What the rows stand for: (V, H)."""
        return (self.rows * self.scale).to(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., H)"""
        return (F.embedding(ids, self.rows) * F.embedding(ids, self.scale)).to(self.dtype)


class Int8Head(nn.Module):
    """The output layer over a table in 8 bits: its own, or that of the input embeddings, which it
    then does not hold."""

    def __init__(self, table: Int8Table, bias: Tensor | None = None, *, tied: bool) -> None:
        super().__init__()
        self.table = None if tied else table
        # a tuple, because a tied table belongs to another module
        self._table, self.bias = (table,), bias

    @property
    def weight(self) -> Tensor:
        """(V, H)"""
        return self._table[0].weight

    def forward(self, states: Tensor) -> Tensor:
        """(..., H) -> (..., V)"""
        return F.linear(states, self.weight.to(states.dtype), self.bias)


class Nf4Weight(nn.Module):
    """A weight in 4 bits (NF4).

    Codes, two a byte, and behind them a float32 scale for each `BLOCK` weights are the bytes of one
    parameter, which is divided among devices like any other.

    Args:
        weight: (..., O, I), I a multiple of `BLOCK`
    """

    def __init__(self, weight: Tensor) -> None:
        import bitsandbytes.functional as kernels

        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        codes, state = kernels.quantize_4bit(weight.detach().contiguous(), blocksize=BLOCK, quant_type="nf4")
        packed = torch.cat([codes.flatten(), state.absmax.float().view(torch.uint8)])
        self.packed = nn.Parameter(packed, requires_grad=False)

    def hold_as(self, dtype: torch.dtype) -> None:
        """Let the bytes pass for numbers of a type, for what would cast those of others."""
        self.packed = nn.Parameter(self.packed.data.view(dtype), requires_grad=False)

    def codes(self, dtype: torch.dtype, packed: Tensor | None = None) -> tuple[Tensor, Any]:
        """The codes, and what the kernels need to read them as numbers of this type; of `packed`, as
        it was at another time, where it is given."""
        from bitsandbytes.functional import QuantState

        own = self.packed if packed is None else packed
        own = own.full_tensor() if isinstance(own, DTensor) else own
        codes, scales = own.view(torch.uint8).tensor_split([self.shape.numel() // 2])
        state = QuantState(scales.view(torch.float32), self.shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return codes.view(-1, 1), state

    def as_numbers(self, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
        """What the codes stand for: (..., O, I)."""
        import bitsandbytes.functional as kernels

        return kernels.dequantize_4bit(*self.codes(dtype, packed))

    @property
    def weight(self) -> Tensor:
        """What the codes stand for: (..., O, I). Where they are divided, all processes must ask."""
        return self.as_numbers(self.dtype)


class Nf4Linear(Nf4Weight):
    """A linear layer in 4 bits (NF4). It computes in the type of what it reads, or of automatic
    mixed precision."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.weight)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias

    def forward(self, states: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        from bitsandbytes import matmul_4bit

        dtype = autocast_type(states.device) or states.dtype
        codes, state = self.codes(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return matmul_4bit(states.to(dtype), codes, quant_state=state, bias=bias)


class Bf16Linear(nn.Linear):
    """A linear layer whose weight is held in bfloat16; it computes in that type and answers in the
    type that it was asked in."""

    def forward(self, states: Tensor) -> Tensor:
        """(..., I) -> (..., O)"""
        # which says the types, as for any other layer
        if torch.is_autocast_enabled(states.device.type):
            return super().forward(states)
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(states.to(dtype), self.weight, bias).to(states.dtype)


class Bf16Table(nn.Embedding):
    """A table of token embeddings held in bfloat16."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., H), in the type of the run"""
        return super().forward(ids).to(torch.get_default_dtype())
