"""The resampler of Flamingo: learned latents read a picture or video of any length, layer by layer
(Alayrac et al. 2022, section 2.1 and appendix A.1.1; public design of OpenFlamingo, whose parameter
names these are, below `perceiver.`).

Letters: N pictures, P visual tokens, D encoder width, T latents, F frames.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import feed_forward, init_normal, merge_heads, split_heads
from lightning_internvl.protocols import Part


class PerceiverResampler(Part):
    """Visual tokens to a fixed number of latents of the same width; in each layer these attend to
    the tokens and to themselves.

    Args:
        encoder_dim: width of the visual tokens and of the latents (completed from the encoder).
        latents: T (published: 64).
        depth, heads, head_dim: of the layers (published: 6, 8, 64).
        mlp_ratio: width of the feed-forward layers over `encoder_dim`.
        patch_layer: which hidden state of the encoder is read.
        special_tokens: leading tokens that are left out, as CLS is (completed from an encoder that
            says how many it has).
        max_frames: frames of a video that have an embedding of their own; 0 for pictures alone.
        init_std: deviation of the initial weights.
        latent_std: deviation of the initial latents; smaller ones let the picture be heard beside
            them from the first step.
    """

    keeps_width = True  # that of the encoder, where others hand tokens of the decoder's
    never_decays = ("*",)  # as OpenFlamingo trains it (`train/train.py`, `apply_decay`)

    def __init__(
        self,
        *,
        encoder_dim: int,
        latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        patch_layer: int = -1,
        special_tokens: int | None = None,
        max_frames: int = 0,
        init_std: float = 0.02,
        latent_std: float = 1.0,
    ) -> None:
        super().__init__()
        if min(latents, depth, heads, head_dim) < 1:
            given = f"{latents=}, {depth=}, {heads=}, {head_dim=}"
            raise ValueError(f"a resampler needs 1 or more of each: {given}")
        self.layers, self.special_tokens = (patch_layer,), 1 if special_tokens is None else special_tokens
        self.latents = nn.Parameter(torch.empty(latents, encoder_dim))
        self.frame_embs = nn.Parameter(torch.empty(max_frames, encoder_dim)) if max_frames else None
        self.blocks = nn.ModuleList(_Layer(encoder_dim, heads, head_dim, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(encoder_dim)
        init_normal(self, init_std)
        nn.init.normal_(self.latents, std=latent_std)
        if self.frame_embs is not None:
            nn.init.normal_(self.frame_embs)

    def tokens_out(self, tokens_in: int) -> int:
        """Latents of one picture."""
        return len(self.latents)

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return list(self.blocks)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """[(N, P, D)] -> (N, T, D), or for videos [(N, F, P, D)] -> (N, T, D)."""
        x = feats[0][..., self.special_tokens :, :]
        if x.ndim == 4:
            x = self._frames(x).flatten(1, 2)
        latents = self.latents.expand(len(x), -1, -1).to(x.dtype)
        for block in self.blocks:
            latents = block(x, latents)
        return self.norm(latents)

    def _frames(self, x_NFPD: Tensor) -> Tensor:
        if self.frame_embs is None:
            return x_NFPD
        if x_NFPD.shape[1] > len(self.frame_embs):
            most = f"max_frames={len(self.frame_embs)}"
            raise ValueError(f"a video of {x_NFPD.shape[1]} frames; the resampler has {most}")
        return x_NFPD + self.frame_embs[: x_NFPD.shape[1], None]


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attn, self.ff = _LatentAttention(dim, heads, head_dim), feed_forward(dim, mlp_ratio)

    def forward(self, x_NPD: Tensor, latents_NTD: Tensor) -> Tensor:
        latents = latents_NTD + self.attn(x_NPD, latents_NTD)
        return latents + self.ff(latents)


class _LatentAttention(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x_NPD: Tensor, latents_NTD: Tensor) -> Tensor:
        latents = self.norm_latents(latents_NTD)
        keys, values = self.to_kv(torch.cat([self.norm_media(x_NPD), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads) for t in (self.to_q(latents), keys, values))
        return self.to_out(merge_heads(attend(q, k, v)))
