"""The BERT inside a Q-Former: rows share self-attention; query rows read visual tokens.

Source: official LAVIS `Qformer.py` (Li et al. 2023, BLIP-2 section 3.1).

Letters: B rows, T tokens of a row (Q queries, then text), S tokens that are seen (cached ones
first), M width, P visual tokens, D encoder width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import merge_heads, split_heads
from lightning_internvl.messages import check_choice

KeyValues = tuple[Tensor, Tensor]


class QFormerLM(nn.Module):
    """A BERT with cross-attention in layers 0, k, 2k, ... and feed-forwards of their own for
    queries and for text.

    Args:
        vocab_size: rows of the embedding table; None leaves out all that only text needs.
        writes: with a language head, whose output table is the input table.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        visual_dim: int,
        cross_every: int,
        vocab_size: int | None,
        max_positions: int,
        writes: bool,
        eps: float,
        act: str,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        check_choice("middleware act", act, ACT2FN)
        self.embeddings = nn.Module()
        self.embeddings.norm = nn.LayerNorm(dim, eps=eps)
        self.embeddings.drop = nn.Dropout(dropout)
        if vocab_size is not None:
            self.embeddings.words = nn.Embedding(vocab_size, dim)
            self.embeddings.positions = nn.Embedding(max_positions, dim)
        self.layers = nn.ModuleList(
            QFormerLayer(
                dim, heads, mlp_dim, visual_dim if i % cross_every == 0 else None, vocab_size is not None,
                eps=eps, act=act, dropout=dropout, attention_dropout=attention_dropout,
            )
            for i in range(depth)
        )  # fmt: skip
        words = vocab_size if writes else None
        self.head: Any = _WordHead(dim, words, eps, act) if words is not None else None

    def embed_text(self, ids_BL: Tensor, start: int = 0) -> Tensor:
        """Word and position embeddings from `start`, before the norm: (B, L) -> (B, L, M)."""
        longest, end = self.embeddings.positions.num_embeddings, start + ids_BL.shape[1]
        if end > longest:
            most = f"the {longest} positions of the Q-Former"
            raise ValueError(f"a text of {end} tokens is longer than {most}")
        positions = torch.arange(start, end, device=ids_BL.device)
        return self.embeddings.words(ids_BL) + self.embeddings.positions(positions)

    def forward(
        self,
        embeds_BTM: Tensor,
        *,
        queries: int,
        visual_BPD: Tensor | None = None,
        mask: Tensor | None = None,
        cache: list[KeyValues] | None = None,
    ) -> tuple[Tensor, list[KeyValues]]:
        """Run the norm of the embeddings and all layers.

        Args:
            queries: how many of the T tokens are queries; they stand first.
            visual_BPD: visual tokens, read by the queries only.
            mask: bool, broadcastable to (B, heads, T, S), True where a token may look; None:
                everywhere.
            cache: keys and values of tokens that were read before, one pair a layer.

        Returns:
            states (B, T, M) and the keys and values of all tokens so far.
        """
        x, kept = self.embeddings.drop(self.embeddings.norm(embeds_BTM)), []
        for index, layer in enumerate(self.layers):
            x, key_values = layer(x, queries, visual_BPD, mask, cache[index] if cache else None)
            kept.append(key_values)
        return x, kept

    def logits(self, states: Tensor) -> Tensor:
        """Scores of the next word: (..., M) -> (..., V)."""
        return self.head(states, self.embeddings.words.weight)


class QFormerLayer(nn.Module):
    """Self-attention of all tokens, cross-attention of the queries (where the layer has one),
    feed-forward; norms come after."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        visual_dim: int | None,
        text: bool,
        *,
        eps: float,
        act: str,
        dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = _Attention(dim, dim, heads, eps, dropout, attention_dropout)
        self.cross_attn = _Attention(dim, visual_dim, heads, eps, dropout, attention_dropout) if visual_dim else None
        self.query_ffn = _FeedForward(dim, mlp_dim, eps, act, dropout)
        self.text_ffn: Any = _FeedForward(dim, mlp_dim, eps, act, dropout) if text else None

    def forward(
        self, x: Tensor, queries: int, visual: Tensor | None, mask: Tensor | None, past: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        x, key_values = self.self_attn(x, x, mask, past)
        parts = []
        if queries:
            asked = x[:, :queries]
            if self.cross_attn is not None:
                asked, _ = self.cross_attn(asked, visual)
            parts.append(self.query_ffn(asked))
        if x.shape[1] > queries:
            parts.append(self.text_ffn(x[:, queries:]))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], key_values


class _Attention(nn.Module):
    def __init__(self, dim: int, key_dim: int, heads: int, eps: float, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(key_dim, dim), nn.Linear(key_dim, dim)
        self.o_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, seen: Tensor, mask: Tensor | None = None, past: KeyValues | None = None
    ) -> tuple[Tensor, KeyValues]:
        q, k, v = (split_heads(p(s), self.heads) for p, s in ((self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen)))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = merge_heads(attend(q, k, v, mask=mask, dropout=self.attention_dropout if self.training else 0.0))
        return self.norm(x + self.drop(self.o_proj(out))), (k, v)


class _FeedForward(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, eps: float, act: str, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        self.act, self.norm, self.drop = ACT2FN[act], nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.drop(self.down(self.act(self.up(x)))))


class _WordHead(nn.Module):
    """BERT's language head; its output table is given, because it is the table of the input."""

    def __init__(self, dim: int, vocab_size: int, eps: float, act: str) -> None:
        super().__init__()
        self.dense, self.act, self.norm = nn.Linear(dim, dim), ACT2FN[act], nn.LayerNorm(dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states: Tensor, table_VM: Tensor) -> Tensor:
        return F.linear(self.norm(self.act(self.dense(states))), table_VM, self.bias)
