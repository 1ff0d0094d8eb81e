"""The pre-norm block of CLIP and SigLIP, for both sides, under transformers' names.

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import LayerNorm, merge_heads, split_heads
from lightning_internvl.messages import check_choice
from lightning_internvl.protocols import TensorPlan


def quick_gelu(x: Tensor) -> Tensor:
    """The activation of OpenAI's CLIP: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}
GATES = {**ACTIVATIONS, "silu": F.silu}  # of MLPs with a gate


class Block(nn.Module):
    """LayerNorm, self-attention, LayerNorm, two-layer MLP, each half added to what came in.

    Args:
        act: a name in `ACTIVATIONS`.

    Raises:
        ValueError: for an unknown activation, or heads that do not divide the width.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, act: str, eps: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim=} must divide by {heads=}")
        self.layer_norm1, self.layer_norm2 = LayerNorm(dim, eps=eps), LayerNorm(dim, eps=eps)
        self.self_attn = SelfAttention(dim, heads)
        self.mlp = MLP(dim, mlp_dim, act)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, D); `mask` and `causal` as in `attend`."""
        x = x_BTD + self.self_attn(self.layer_norm1(x_BTD), mask, causal)
        return x + self.mlp(self.layer_norm2(x))


class BlockList(nn.Module):
    """Blocks under the name `layers`, as transformers' checkpoints have them."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)


class SelfAttention(nn.Module):
    """Attention with biases everywhere and no positions of its own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        found = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # all heads, or this process's share
        q, k, v = (split_heads(y, y.shape[-1] // self.head_dim) for y in found)
        return self.out_proj(merge_heads(attend(q, k, v, mask=mask, causal=causal)))


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, mlp_dim: int, act: str) -> None:
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"activation {act!r} is not known; valid choices: {', '.join(ACTIVATIONS)}")
        self.act = act
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class GatedMLP(nn.Module):
    """The activation of one linear layer times another, then a third: SwiGLU (Shazeer 2020) with
    "silu". Parameter names are those of LLaMA.

    Args:
        act: a name in `GATES`.
    """

    def __init__(self, dim: int, mlp_dim: int, act: str = "silu", bias: bool = True) -> None:
        super().__init__()
        check_choice("activation", act, GATES)
        self.act = act
        self.gate_proj, self.up_proj = nn.Linear(dim, mlp_dim, bias=bias), nn.Linear(dim, mlp_dim, bias=bias)
        self.down_proj = nn.Linear(mlp_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(GATES[self.act](self.gate_proj(x)) * self.up_proj(x))


def block_plan(blocks: str, heads: int, mlp_dim: int) -> TensorPlan:
    """How blocks are divided among processes; `blocks` is a pattern of their names."""
    columns = (f"{blocks}.self_attn.[qkv]_proj", f"{blocks}.mlp.fc1")
    return TensorPlan(columns, (f"{blocks}.self_attn.out_proj", f"{blocks}.mlp.fc2"), {"heads": heads, "mlp_dim": mlp_dim})


def init_blocks(blocks: Iterable[nn.Module], dim: int) -> None:
    """Start as OpenAI's CLIP: deviations by width and depth, zero biases."""
    blocks = [block for block in blocks if isinstance(block, Block)]
    attention, narrow = dim**-0.5, dim**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        layers, mlp = block.self_attn, block.mlp
        deviations = dict.fromkeys((layers.q_proj, layers.k_proj, layers.v_proj), attention)
        deviations |= {layers.out_proj: narrow, mlp.fc2: narrow, mlp.fc1: (2 * dim) ** -0.5}
        for layer, std in deviations.items():
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
