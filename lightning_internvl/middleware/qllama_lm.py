"""The language model inside QLLaMA: LLaMA whose query rows also read visual tokens (official
`modeling_qllama.py`).

Letters: R rows (streams x B), B images, T tokens of a row (Q queries, then L text), M width, P
visual tokens, D encoder width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat, nn

from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import RMSNorm, merge_heads, rotate, split_heads
from lightning_internvl.layers.transformer import GatedMLP

KeyValues = tuple[Tensor, Tensor]


class QLlamaLM(nn.Module):
    """A LLaMA with cross-attention before the MLP in every `cross_every`-th layer.

    Without `visual_dim` it is a plain text encoder: no cross-attention, and no language head.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        visual_dim: int | None,
        cross_every: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(vocab_size, dim)
        widths = [visual_dim if i % cross_every == 0 else None for i in range(depth)]
        self.model.layers = nn.ModuleList(QLlamaLayer(dim, heads, mlp_dim, width, eps) for width in widths)
        self.model.norm = RMSNorm(dim, eps)
        self.lm_head: Any = nn.Linear(dim, vocab_size, bias=False) if visual_dim else None

    def forward(
        self,
        embeds_RTM: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        visual_BPD: Tensor | None = None,
        queries: int = 0,
        cache: list[KeyValues] | None = None,
    ) -> tuple[Tensor, list[KeyValues]]:
        """Run all layers and the final norm.

        Args:
            mask: bool (R, 1, T, S), True where a row may look; None means causal.
            visual_BPD: visual tokens, read by the first `queries` rows only; R is a multiple of B
                (streams of the same images).
            cache: keys and values of earlier tokens, one pair a layer.

        Returns:
            hidden states (R, T, M) and the keys and values of all tokens so far.
        """
        kept: list[KeyValues] = []
        for index, layer in enumerate(self.model.layers):
            past = cache[index] if cache else None
            embeds_RTM, key_values = layer(embeds_RTM, rotary, mask, visual_BPD, queries, past)
            kept.append(key_values)
        return self.model.norm(embeds_RTM), kept


class QLlamaLayer(nn.Module):
    """Self-attention, cross-attention of query rows (if any), MLP; each with its residual."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, visual_dim: int | None, eps: float) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(dim, heads)
        self.cross_attn = _CrossAttention(dim, visual_dim, heads, eps) if visual_dim else None
        self.mlp = GatedMLP(dim, mlp_dim, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        visual: Tensor | None,
        queries: int,
        past: KeyValues | None,
    ) -> tuple[Tensor, KeyValues]:
        attended, key_values = self.self_attn(self.input_layernorm(x), rotary, mask, past)
        x = x + attended
        if self.cross_attn is not None and visual is not None and queries:
            asked = x[:, :queries]
            x = cat([asked + self.cross_attn(asked, visual), x[:, queries:]], dim=1)
        return x + self.mlp(self.post_attention_layernorm(x)), key_values


class _SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotary), rotate(k, rotary)
        if past is not None:
            k, v = cat([past[0], k], dim=2), cat([past[1], v], dim=2)
        # One new token after a cache sees every key, so it needs no mask at all.
        out = attend(q, k, v, mask=mask, causal=mask is None and past is None)
        return self.o_proj(merge_heads(out)), (k, v)


class _CrossAttention(nn.Module):
    """Queries read visual tokens: own norms, no bias, no rotary positions, no mask."""

    def __init__(self, dim: int, visual_dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(dim, eps), RMSNorm(visual_dim, eps)
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k_proj, self.v_proj = nn.Linear(visual_dim, dim, bias=False), nn.Linear(visual_dim, dim, bias=False)

    def forward(self, x_RQM: Tensor, visual_BPD: Tensor) -> Tensor:
        visual = self.norm2(visual_BPD)
        q = split_heads(self.q_proj(self.norm1(x_RQM)), self.heads)
        # Streams of the same images share one projection of keys and values.
        streams = len(x_RQM) // len(visual_BPD)
        k, v = (split_heads(p(visual), self.heads).repeat(streams, 1, 1, 1) for p in (self.k_proj, self.v_proj))
        return self.o_proj(merge_heads(attend(q, k, v)))
