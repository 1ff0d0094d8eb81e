"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size and videos in one
sequence (Wang et al. 2024, section 2.1, official `modeling_qwen2_vl.py`; Bai et al. 2025, section
2.1.1, official `modeling_qwen2_5_vl.py`; `modeling_qwen3_vl.py`). Parameter names are those of the
official checkpoints, below `visual.`.

Letters: P patches of all pictures, one after the other, C values of a patch, D width, H heads, K
width of a head; a picture is a grid of t (steps of two frames) x h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.encoders.grid_positions import interpolated
from lightning_internvl.encoders.tower import Tower
from lightning_internvl.encoders.windows import Grid, step_lengths, window_order
from lightning_internvl.layers.attention import attend
from lightning_internvl.layers.attention_masks import Mask, on_device, packed
from lightning_internvl.layers.basic import NORMS, init_normal, merge_heads
from lightning_internvl.layers.transformer import ACTIVATIONS, GATES, MLP, GatedMLP
from lightning_internvl.messages import check_choice


class Qwen2ViT(Tower):
    """Patches of pictures to visual tokens, one a patch; each step attends within itself, or within
    its windows.

    Args:
        image_size: side in pixels of the largest square picture that is expected; nothing in the
            tower depends on it.
        patch_size: side of a patch in pixels.
        frames: consecutive frames in one patch; a still picture is shown that often.
        dim, depth, heads, mlp_dim: the size of the tower (published: 1280, 32, 16, 5120).
        merge_size: the middleware merges this many patches to a side, so they arrive block by
            block.
        theta: base of the rotary angles, half of which turn with the row and half with the column.
        activation: "quick_gelu" or "gelu", with a gate "silu" too.
        gated: whether the MLP has a gate (SwiGLU), as in Qwen2.5-VL.
        window: side in pixels of the squares within which patches see each other; None: each step as
            a whole.
        full_layers: with windows, the blocks, counted from 0, in which a step sees itself whole.
        norm: "layer_norm", or "rms_norm" as in Qwen2.5-VL.
        norm_eps: added to the variance.
        init_std: deviation of the initial weights.
        channels: of a picture.
        positions: rows and columns of a square table of learned positions, which is interpolated to
            each picture (Qwen3-VL, 48); None: there is none.
        patch_bias: whether the embedding of patches has a bias, as in Qwen3-VL.
    """

    inputs = ("image_grid_thw",)
    gives = "blocks"  # of neighbouring patches, one after the other
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
        frames: int = 2,
        merge_size: int = 2,
        theta: float = 10000.0,
        activation: str = "quick_gelu",
        gated: bool = False,
        window: int | None = None,
        full_layers: Sequence[int] = (),
        norm: str = "layer_norm",
        norm_eps: float = 1e-6,
        init_std: float = 0.02,
        channels: int = 3,
        positions: int | None = None,
        patch_bias: bool = False,
    ) -> None:
        super().__init__()
        check_choice("encoder activation", activation, GATES if gated else ACTIVATIONS)
        check_choice("encoder norm", norm, NORMS)
        if dim % heads or dim // heads % 4:
            four = "4 (rows and columns, sine and cosine)"
            raise ValueError(f"{dim=} must divide by {heads=}, and the width of a head by {four}")
        self.dim, self.depth, self.heads, self.image_size, self.patch_size = dim, depth, heads, image_size, patch_size
        self.frames, self.merge_size, self.theta, self.activation = frames, merge_size, theta, activation
        self.window, self.full_layers, self.gated, self.norm, self.mlp_dim = window, tuple(full_layers), gated, norm, mlp_dim
        self._check_windows()
        self.positions = positions
        self.patch_embed = _PatchEmbed(channels, dim, (frames, patch_size, patch_size), patch_bias)
        if positions is not None:
            self.pos_embed = nn.Embedding(positions**2, dim)
        blocks = []
        for number in range(depth):
            mlp = (GatedMLP if gated else MLP)(dim, mlp_dim, activation)
            blocks.append(_Block(dim, heads, mlp, norm, norm_eps, number not in self.full_layers))
        self.blocks = nn.ModuleList(blocks)
        init_normal(self, init_std)
        # Patches enter at about unit size whatever their number of pixels; a still picture is the
        # sum of equal frames.
        nn.init.normal_(self.patch_embed.proj.weight, std=(channels * patch_size**2) ** -0.5 / frames)
        if (bias := self.patch_embed.proj.bias) is not None:
            nn.init.zeros_(bias)

    def num_tokens(self, image_size: int | None = None) -> int:
        """Visual tokens of one square picture."""
        return ((image_size or self.image_size) // self.patch_size) ** 2

    def blank(self, pixel_values: Tensor) -> dict[str, Any]:
        """The smallest picture, of nothing: what the tower reads in a batch without pictures."""
        side = self.merge_size
        return {"pixel_values": pixel_values.new_zeros(side**2, *pixel_values.shape[1:]), "image_grid_thw": [(1, side, side)]}

    def forward(
        self, pixels_PC: Tensor, *, image_grid_thw: Tensor | Sequence[Grid], layers: Sequence[int] = (-1,), keep: float = 1.0
    ) -> list[Tensor]:
        """Encode pictures and videos.

        Args:
            pixels_PC: flat patches (channel, frame, row, column inside), in blocks of `merge_size`
                x `merge_size`.
            image_grid_thw: (t, h, w) of each picture, (N, 3) or a list.
            layers: which hidden states to return, as in Hugging Face: 0 is the embedding output, -1
                the last block.
            keep: 1.0; patches of pictures that differ in size are not left out.

        Returns:
            One (P, D) tensor for each entry of `layers`; nothing is normalised after the last
            block.

        Raises:
            ValueError: if patches and grids do not fit together.
        """
        if keep != 1.0:
            raise ValueError(f"keep_tokens={keep}: a tower of any resolution sees all patches; set it to 1.0")
        numbers = self.layer_numbers(layers)
        grids = as_grids(image_grid_thw)
        self._check(grids, pixels_PC)
        x = self.patch_embed(pixels_PC)
        places = torch.cat([patch_places(grid, self.merge_size, x.device) for grid in grids])
        if self.positions is not None:
            x = x + interpolated(self.pos_embed, self.positions, places, grids).to(x.dtype)
        steps = packed([step_lengths(grids)], len(x), causal=False)
        if self.window is None:
            return self.hidden_states(x, numbers, self._rotary(places), steps, steps)
        order, lengths = window_order(grids, self.merge_size, self.window // self.patch_size // self.merge_size)
        order, back = (on_device(indices, x.device) for indices in (order, order.argsort()))
        windows = packed([lengths], len(x), causal=False)
        states = self.hidden_states(x[order], numbers, self._rotary(places[order]), steps, windows)
        return [state[back] for state in states]

    def _check_windows(self) -> None:
        block = self.patch_size * self.merge_size
        if self.window is not None and self.window < block:
            raise ValueError(f"encoder window={self.window} px holds no block of {block} px (patch_size x merge_size)")
        if odd := [layer for layer in self.full_layers if not 0 <= layer < self.depth]:
            raise ValueError(f"encoder full_layers={odd} do not exist; with depth={self.depth} they are 0 to {self.depth - 1}")
        if self.full_layers and self.window is None:
            raise ValueError(f"encoder full_layers={list(self.full_layers)} are exceptions from windows; give window too")

    def _check(self, grids: list[Grid], pixels_PC: Tensor) -> None:
        values = self.patch_embed.proj.weight[0].numel()
        patches = sum(t * h * w for t, h, w in grids)
        if pixels_PC.ndim != 2 or tuple(pixels_PC.shape) != (patches, values):
            raise ValueError(
                f"pixels are {tuple(pixels_PC.shape)}, the grids {grids[:8]} ask for ({patches}, {values}); "
                "this tower reads flat patches of pictures of any size: use processor=any_resolution with its patch size"
            )
        merge = self.merge_size
        if odd := [grid for grid in grids if min(grid) < 1 or grid[1] % merge or grid[2] % merge]:
            needs = f"at least 1 and divide by merge_size={self.merge_size}"
            raise ValueError(f"grids {odd[:8]} must be {needs} in rows and columns")

    def _rotary(self, places_P2: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of patches by row and column, each (P, K), float32."""
        quarter = self.dim // self.heads // 4
        frequency = self.theta ** -(torch.arange(quarter, device=places_P2.device).float() / quarter)
        angles = (places_P2[..., None].float() * frequency).flatten(1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def as_grids(grid_thw: Tensor | Sequence[Grid]) -> list[Grid]:
    """(N, 3) as a list of (t, h, w)."""
    rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
    return [(t, h, w) for t, h, w in rows]


def patch_places(grid: Grid, merge: int, device: torch.device | str = "cpu") -> Tensor:
    """Row and column of every patch in the order of the processor: (t * h * w, 2), `merge` x
    `merge` blocks in reading order."""
    t, h, w = grid
    rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).unflatten(1, (w // merge, merge)).unflatten(0, (h // merge, merge))
    return places.transpose(1, 2).reshape(h * w, 2).repeat(t, 1)


class _PatchEmbed(nn.Module):
    """Flat patches to tokens."""

    def __init__(self, channels: int, dim: int, kernel: tuple[int, int, int], bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, kernel, stride=kernel, bias=bias)

    def forward(self, x_PC: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is one matrix product over flat patches.
        return F.linear(x_PC.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp: nn.Module, norm: str, eps: float, windowed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](dim, eps=eps), NORMS[norm](dim, eps=eps)
        self.attn, self.mlp, self.windowed = _Attention(dim, heads), mlp, windowed

    def forward(self, x_PD: Tensor, table: tuple[Tensor, Tensor], steps: Mask, windows: Mask) -> Tensor:
        x = x_PD + self.attn(self.norm1(x_PD), table, windows if self.windowed else steps)
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x_PD: Tensor, table: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in self.qkv(x_PD).chunk(3, dim=-1))
        q, k = (_rotated(x, table) for x in (q, k))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return self.proj(merge_heads(attend(q, k, v, mask=mask))[0])


def _rotated(x_PHK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions, computed in float32."""
    cos, sin = (t[:, None] for t in table)
    first, second = x_PHK.float().chunk(2, dim=-1)
    return (x_PHK.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x_PHK.dtype)
