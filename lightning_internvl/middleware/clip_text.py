"""The text tower of CLIP or SigLIP beside the projections of both sides (Radford et al. 2021; Zhai
et al. 2023).

Module names are those of transformers' `CLIPModel` and `SiglipModel`. Letters: B rows, L text
length, M width of the text tower, N images, P visual tokens (CLS or the pooled vector first), D
encoder width, E contrastive width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_internvl.layers.transformer import Block, BlockList, init_blocks
from lightning_internvl.protocols import Part

POOLINGS = ("eos", "argmax", "last")


class CLIPText(Part):
    """Captions and pictures to one space; it hands nothing to a decoder.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        vocab_size: rows of the embedding table (completed from the tokenizer).
        special_tokens: tokens that the encoder puts before its patches (completed from the
            encoder); the first one is the picture's embedding, so there must be one.
        positions: the longest text (CLIP: 77, SigLIP: 64).
        dim, depth, heads, mlp_dim: the text tower (L/14: 768, 12, 12, 3072).
        embed_dim: width of the contrastive space (L/14: 768).
        pooling: which token speaks for a text: the first end token ("eos"), the largest id
            ("argmax", OpenAI, whose end token has the largest id of all), or the last of the row
            whether it is padding or not ("last", SigLIP: rows of equal length).
        eos_token_id: for "eos" (completed from the tokenizer).
        causal: whether a token sees those after it (SigLIP) or not (CLIP).
        project_images: a linear layer without bias on the picture's embedding; SigLIP's pooling
            head makes it unnecessary.
        image_bias: whether that layer has a bias (CLIP's ResNets).
        text_bias: whether the projection of texts has a bias.
        embed_std: deviation of the initial token embeddings; positions have half of it (OpenAI:
            0.02 and 0.01).
    """

    roles: ClassVar = {"generative": (), "language_head": ()}  # it contrasts, and does nothing else
    hands_tokens = False  # to a decoder
    needs_summary = True  # a token of the encoder that stands for the picture

    def __init__(
        self,
        *,
        encoder_dim: int,
        vocab_size: int,
        positions: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        embed_dim: int,
        special_tokens: int = 1,
        pooling: str = "eos",
        eos_token_id: int | None = None,
        causal: bool = True,
        project_images: bool = True,
        image_bias: bool = False,
        text_bias: bool = False,
        act: str = "quick_gelu",
        norm_eps: float = 1e-5,
        embed_std: float = 0.02,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS or (pooling == "eos" and eos_token_id is None):
            choices = f"{', '.join(POOLINGS)}; eos needs the end token's id"
            raise ValueError(f"{pooling=} with {eos_token_id=}: choose from {choices}")
        if special_tokens < 1:
            lacking = "no token before its patches that could stand for the picture"
            raise ValueError(f"the encoder puts {lacking} (SigLIP: head=first)")
        if not project_images and encoder_dim != embed_dim:
            wanted = f"the encoder's width {encoder_dim}"
            raise ValueError(f"without a projection of pictures {embed_dim=} must be {wanted}")
        self.dim, self.embed_dim, self.pooling, self.eos_token_id, self.causal = dim, embed_dim, pooling, eos_token_id, causal
        self.layers, self.max_text = (-1,), positions
        self.text_model = TextTower(vocab_size, positions, dim, depth, heads, mlp_dim, act, norm_eps, embed_std)
        self.text_projection = nn.Linear(dim, embed_dim, bias=text_bias)
        self.visual_projection = nn.Linear(encoder_dim, embed_dim, bias=image_bias) if project_images else None
        nn.init.normal_(self.text_projection.weight, std=dim**-0.5)
        if text_bias:
            nn.init.zeros_(self.text_projection.bias)
        if self.visual_projection is not None:
            nn.init.normal_(self.visual_projection.weight, std=encoder_dim**-0.5)
            if image_bias:
                nn.init.zeros_(self.visual_projection.bias)

    def tokens_out(self, tokens_in: int) -> int:
        """Nothing goes to a decoder."""
        return 0

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return list(self.text_model.encoder.layers)

    def embed_image(self, feats: list[Tensor], mode: str = "c") -> Tensor:
        """The first token of the tower, projected: (N, P, D) -> (N, E), not normalised."""
        if mode != "c":
            raise ValueError(f"CLIP embeds pictures in mode 'c' alone, not in {mode!r}")
        picture = feats[0][:, 0]
        return picture if self.visual_projection is None else self.visual_projection(picture)

    def embed_text(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Texts in the contrastive space: (B, L) -> (B, E), not normalised; no mask: all words."""
        hidden = self.text_model(ids_BL, self._mask(ids_BL, mask_BL), self.causal and mask_BL is None)
        rows = torch.arange(len(ids_BL), device=ids_BL.device)
        return self.text_projection(hidden[rows, self._speaker(ids_BL)])

    def forward(self, feats: list[Tensor]) -> Tensor:
        """CLIP has no tokens for a decoder."""
        advice = "choose another middleware for stages with one, such as mlp"
        raise ValueError(f"CLIP hands nothing to a decoder; {advice}")

    def _speaker(self, ids_BL: Tensor) -> Tensor:
        """The place of the token that speaks for each text: (B,)."""
        if self.pooling == "last":
            return torch.full_like(ids_BL[:, 0], ids_BL.shape[1] - 1)
        if self.pooling == "argmax":
            return ids_BL.argmax(dim=1)
        assert self.eos_token_id is not None  # checked in __init__
        return ids_BL.eq(self.eos_token_id).int().argmax(dim=1)

    def _mask(self, ids_BL: Tensor, mask_BL: Tensor | None) -> Tensor | None:
        """Who may look at whom: bool (B, 1, L, L); padding on the left sees itself."""
        if mask_BL is None:
            return None
        square = torch.ones(ids_BL.shape[1], ids_BL.shape[1], dtype=torch.bool, device=ids_BL.device)
        allowed = (square.tril() if self.causal else square) & mask_BL.bool()[:, None]
        empty = ~allowed.any(dim=-1, keepdim=True)
        return (allowed | (empty & torch.eye(len(square), dtype=torch.bool, device=ids_BL.device)))[:, None]


class _Embeddings(nn.Module):
    def __init__(self, vocab_size: int, positions: int, dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Embedding(positions, dim)


class TextTower(nn.Module):
    """Token and position tables, blocks, and a final norm."""

    def __init__(
        self,
        vocab_size: int,
        positions: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        act: str,
        eps: float,
        embed_std: float,
    ) -> None:
        super().__init__()
        self.embeddings = _Embeddings(vocab_size, positions, dim)
        self.encoder = BlockList([Block(dim, heads, mlp_dim, act, eps) for _ in range(depth)])
        self.final_layer_norm = nn.LayerNorm(dim, eps=eps)
        nn.init.normal_(self.embeddings.token_embedding.weight, std=embed_std)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=embed_std / 2)
        init_blocks(self.encoder.layers, dim)

    def forward(self, ids_BL: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """(B, L) -> (B, L, M)

        Raises:
            ValueError: for texts longer than the position table.
        """
        positions = self.embeddings.position_embedding.weight
        length = ids_BL.shape[1]
        if length > len(positions):
            most = f"the text tower has positions for {len(positions)}"
            raise ValueError(f"texts of {length} tokens: {most}; lower max_length")
        x = self.embeddings.token_embedding(ids_BL) + positions[:length]
        for block in self.encoder.layers:
            x = block(x, mask, causal)
        return self.final_layer_norm(x)
