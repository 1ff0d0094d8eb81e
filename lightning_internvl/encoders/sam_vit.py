"""The image encoder of SAM, brought down to the grid of another tower, as DeepSeek-VL has it
(Kirillov et al. 2023, appendix A; Lu et al. 2024, section 3.1; official `sam.py`).

Module names are those of SAM. Letters: N images, S side in pixels, G side of the patch grid, D
width, W side of a window, T tokens of a window, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.encoders.tower import Tower
from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.basic import init_normal, merge_heads, resize_positions
from lightning_internvl.layers.transformer import MLP


class SamViT(Tower):
    """Pixels to a map of tokens: windowed and global attention with relative positions, a neck, and
    two strided convolutions.

    A second way leads from the first global block through a neck of its own and the same
    convolutions, and is added with a learned weight that starts at 0.

    Args:
        image_size: side in pixels of the stored positions; other multiples of `patch_size` resize
            them at run time.
        dim, depth, heads, mlp_dim, patch_size: the size of the tower (B: 768, 12, 12, 3072, 16).
        window: W, side of a window in patches.
        global_layers: blocks that see the whole map; the second way starts at the one named first.
        neck_dim: channels after a neck; the tokens have four times as many.
        out_grid: side of the map of tokens that leaves the tower.
        qkv_bias: whether queries, keys and values have a bias.
        positions, relative_positions: whether there is a learned map at the start, and learned
            distances in every block.
    """

    special_tokens = 0
    gives_one_layer = True
    roles: ClassVar = {"patch_embedding": ("patch_embed",)}

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        window: int = 14,
        global_layers: Sequence[int] = (2, 5, 8, 11),
        neck_dim: int = 256,
        out_grid: int = 24,
        act: str = "gelu",
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        positions: bool = True,
        relative_positions: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if dim % heads or image_size % patch_size:
            raise ValueError(f"{dim=} must divide by {heads=} and {image_size=} by {patch_size=}")
        if not global_layers or not all(0 <= i < depth for i in global_layers):
            given = f"global_layers={list(global_layers)}"
            raise ValueError(f"{given} must name blocks from 0 to {depth - 1}, at least one")
        self.image_size, self.patch_size, self.out_grid, self.dim = image_size, patch_size, out_grid, 4 * neck_dim
        self.window, self.global_layers = window, tuple(global_layers)
        grid = image_size // patch_size
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim)) if positions else None
        self.blocks = nn.ModuleList()
        for index in range(depth):
            side = 0 if index in self.global_layers else window
            attention = _Attention(dim, heads, qkv_bias, (side or grid) if relative_positions else None)
            self.blocks.append(_Block(attention, MLP(dim, mlp_dim, act), dim, norm_eps, side))
        self.neck, self.neck_hd = _Neck(dim, neck_dim), _Neck(dim, neck_dim)
        self.downsamples = nn.Sequential(
            nn.Conv2d(neck_dim, 2 * neck_dim, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(2 * neck_dim, 4 * neck_dim, 3, stride=2, padding=1, bias=False),
        )
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))
        init_normal(self.blocks, init_std)
        nn.init.normal_(self.patch_embed.weight, std=(3 * patch_size**2) ** -0.5)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=init_std)

    def num_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one image, whatever its size."""
        return self.out_grid**2

    def forward(self, pixels_N3SS: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """Encode images.

        Returns:
            (N, out_grid^2, 4 * neck_dim) for each of `layers`

        Raises:
            ValueError: for other layers than the last, for a share of the patches, or sides that
                are no multiple of a patch.
        """
        if set(layers) != {-1} or keep != 1.0:
            raise ValueError(f"SAM gives its last map, of all patches: {layers=}, {keep=}")
        size = pixels_N3SS.shape[-1]
        if pixels_N3SS.shape[-2] != size or size % self.patch_size:
            fault = f"square sides that divide by {self.patch_size}"
            raise ValueError(f"images of {tuple(pixels_N3SS.shape[-2:])} pixels: {fault}")
        x = self.patch_embed(pixels_N3SS.to(self.patch_embed.weight.dtype)).permute(0, 2, 3, 1)
        if self.pos_embed is not None:
            table = resize_positions(self.pos_embed.flatten(1, 2), x.shape[1], special=0)
            x = x + table.unflatten(1, (x.shape[1], -1)).to(x.dtype)
        first_global = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            first_global = x if index == self.global_layers[0] else first_global
        x = self._down(self.neck(x)) + self._down(self.neck_hd(first_global)) * self.hd_alpha_downsamples
        return [x.flatten(2).transpose(1, 2)] * len(layers)

    def _down(self, map_NCGG: Tensor) -> Tensor:
        """To the grid of the other tower; resized in float32, as in the original."""
        side = 4 * self.out_grid
        larger = F.interpolate(map_NCGG.float(), size=(side, side), mode="bilinear", align_corners=False)
        return self.downsamples(larger.to(map_NCGG.dtype))


class _Neck(nn.Sequential):
    """(N, G, G, D) -> (N, C, G, G), with the numbers of SAM's checkpoints."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Conv2d(dim, out_dim, 1, bias=False),
            _LayerNorm2d(out_dim, eps=1e-6),
            nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False),
            _LayerNorm2d(out_dim, eps=1e-6),
        )

    def forward(self, x_NGGD: Tensor) -> Tensor:
        return super().forward(x_NGGD.permute(0, 3, 1, 2))


class _LayerNorm2d(nn.LayerNorm):
    """Over the channels of a map (N, C, G, G)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    def __init__(self, attn: _Attention, mlp: MLP, dim: int, eps: float, window: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn, self.mlp, self.window = attn, mlp, window

    def forward(self, x_NGGD: Tensor) -> Tensor:
        grid, x = x_NGGD.shape[1], self.norm1(x_NGGD)
        size = self.window
        x = from_windows(self.attn(to_windows(x, size)), size, grid) if size else self.attn(x)
        x = x_NGGD + x
        return x + self.mlp(self.norm2(x))


def to_windows(x_NGGD: Tensor, window: int) -> Tensor:
    """A map cut into windows, zeros at its right and lower edge: (N * windows, W, W, D)."""
    missing = -x_NGGD.shape[1] % window
    x = F.pad(x_NGGD, (0, 0, 0, missing, 0, missing))
    return x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3).flatten(0, 2)


def from_windows(x: Tensor, window: int, grid: int) -> Tensor:
    """The map that `to_windows` has cut, without what was filled up: (N, G, G, D)."""
    count = -(-grid // window)
    x = x.unflatten(0, (-1, count, count)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :grid, :grid]


class _Attention(nn.Module):
    """Attention inside a square, whose scores learn from the distance in rows and in columns.

    Args:
        side: of the square for which distances are stored; None for none.
    """

    never_decays = ("rel_pos_*",)

    def __init__(self, dim: int, heads: int, bias: bool, side: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        if side is not None:
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(2 * side - 1, dim // heads)) for _ in range(2))
        self.relative = side is not None

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[1]
        # each (N, heads, T, K)
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self._distances(q.unflatten(2, (side, side))) if self.relative else None
        return self.proj(merge_heads(attend(q, k, v, bias=bias))).unflatten(1, (side, side))

    def _distances(self, q: Tensor) -> Tensor:
        """What rows and columns add to the scores: (N, heads, T, T)."""
        rows = torch.einsum("nhyxk,ydk->nhyxd", q, relative_positions(self.rel_pos_h, q.shape[2]))
        columns = torch.einsum("nhyxk,xdk->nhyxd", q, relative_positions(self.rel_pos_w, q.shape[3]))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def relative_positions(table: Tensor, side: int) -> Tensor:
    """Entries of a table of distances for all pairs of places: (side, side, K); a table of another
    size is resized (linear)."""
    if len(table) != 2 * side - 1:
        resized = F.interpolate(table.float().T[None], size=2 * side - 1, mode="linear")
        table = resized[0].T.to(table.dtype)
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places[None, :] + side - 1]
