"""CLIP's other tower: a ResNet with a stem of three layers, anti-aliased strides and attention pooling
(Radford et al. 2021, section 2.4; openai/CLIP `model.py`, `ModifiedResNet`).

Module names are those of OpenAI's files below `visual.`. Letters: N images, H and W sides in pixels,
C channels, G side of the last map, D its width, P tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_internvl.layers.basic import merge_heads, resize_positions
from lightning_internvl.messages import check_choice
from lightning_internvl.protocols import Part

HEADS = ("first", "none")
STRIDE = 32  # pixels of a token to a side
HEAD_DIM = 64  # of attention pooling


class CLIPResNet(Part):
    """Pixels to the tokens of the last map, behind the pooled vector.

    Norms are batch norms. Where they train, a step normalises by the pictures that one process reads
    at once: those of its micro-batch, so that accumulation and more processes change the numbers, as
    in OpenAI's and open_clip's training. Running averages of these (momentum 0.1, every process its
    own; a checkpoint holds those of the first) normalise in evaluation and wherever the norm is
    frozen, whatever mode the model is in, and are then left as they are. Blocks that are computed
    again for backward, and chunks that are embedded twice, move the averages twice.

    Args:
        image_size: side in pixels of the stored positions of attention pooling; other multiples of
            32 resize them at run time.
        width: channels after the stem (RN50: 64); the last map has D = 32 * width.
        depths: blocks of the four stages (RN50: 3, 4, 6, 3).
        head: what becomes of attention pooling: its vector stands in front of the tokens, as a CLS
            token would ("first": contrastive use), or there is none ("none": tokens for chat). The
            layer behind it, to the contrastive width, is the middleware's projection of pictures.

    Attributes:
        special_tokens: tokens that come before those of the map.
    """

    gives_one_layer = True
    no_summary_if: ClassVar = {"head": ("none",)}
    roles: ClassVar = {"patch_embedding": ("conv1",)}

    def __init__(self, *, image_size: int, width: int, depths: Sequence[int], head: str = "first") -> None:
        super().__init__()
        check_choice("head", head, HEADS)
        if len(depths) != 4 or min(depths) < 1 or width % 2 or image_size < STRIDE:
            given = f"image_size={image_size}, width={width}, depths={list(depths)}"
            raise ValueError(f"a ResNet of CLIP has four stages, an even width and pictures of {STRIDE} px or more: {given}")
        self.image_size, self.width, self.depths, self.head = image_size, width, tuple(depths), head
        self.dim, self.patch_size, self.special_tokens = STRIDE * width, STRIDE, int(head == "first")
        sizes = (3, width // 2, width // 2, width)
        for number, (before, after) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"conv{number}", nn.Conv2d(before, after, 3, 2 if number == 1 else 1, 1, bias=False))
            self.add_module(f"bn{number}", BatchNorm(after))
        before = width
        for stage, depth in enumerate(depths):
            planes = width * 2**stage
            blocks = [Bottleneck(before if i == 0 else 4 * planes, planes, 2 if stage and i == 0 else 1) for i in range(depth)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            before = 4 * planes
        self.attnpool = AttentionPool(image_size // STRIDE, self.dim) if head == "first" else None

    def num_tokens(self, image_size: int | None = None) -> int:
        """Tokens of one square image, the pooled one included."""
        return self.special_tokens + ((image_size or self.image_size) // STRIDE) ** 2

    def resize(self, image_size: int) -> None:
        """Expect images of `image_size` pixels; positions are resized at run time."""
        self.image_size = image_size

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one."""
        return [block for number in range(1, 5) for block in self.get_submodule(f"layer{number}").children()]

    def forward(self, pixels_N3HW: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """Encode images.

        Returns:
            (N, P, D) for each of `layers`

        Raises:
            ValueError: for other layers than the last, a share of the tokens, or sides that are no
                multiple of 32.
        """
        if set(layers) != {-1} or keep != 1.0:
            raise ValueError(f"a ResNet gives its last map, whole: {layers=}, {keep=}; give middleware.patch_layer=-1")
        if any(side % STRIDE for side in pixels_N3HW.shape[-2:]):
            sides = f"both sides must divide by {STRIDE}, as encoder.image_size does"
            raise ValueError(f"images of {tuple(pixels_N3HW.shape[-2:])} pixels: {sides}")
        x = pixels_N3HW.to(self.get_parameter("conv1.weight").dtype)
        for number in (1, 2, 3):
            x = F.relu(self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x)))
        x = F.avg_pool2d(x, 2)
        for block in self.sharding_units():
            x = block(x)
        grid, tokens = (x.shape[2], x.shape[3]), x.flatten(2).transpose(1, 2)
        if self.attnpool is not None:
            tokens = torch.cat([self.attnpool(tokens, grid), tokens], dim=1)
        return [tokens] * len(layers)


class Bottleneck(nn.Module):
    """Three convolutions beside the identity; strides are averages of neighbours."""

    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(before, planes, 1, bias=False), BatchNorm(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), BatchNorm(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), BatchNorm(4 * planes)
        self.downsample: nn.Module | None = None
        if stride > 1 or before != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(before, 4 * planes, 1, bias=False), BatchNorm(4 * planes))
        nn.init.zeros_(self.bn3.weight)  # a block begins as the identity

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x_NCHW)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self._smaller(x)))
        identity = x_NCHW if self.downsample is None else self.downsample(self._smaller(x_NCHW))
        return F.relu(x + identity)

    def _smaller(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class BatchNorm(nn.Module):
    """Batch norm that keeps to its running averages where it is frozen (see `CLIPResNet`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        learns = self.training and self.weight.requires_grad
        return F.batch_norm(x_NCHW, self.running_mean, self.running_var, self.weight, self.bias, training=learns)


class AttentionPool(nn.Module):
    """The mean of all tokens asks all tokens, and itself, once."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.heads = max(1, dim // HEAD_DIM)
        self.positional_embedding = nn.Parameter(torch.randn(1, grid**2 + 1, dim) * dim**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(layer.weight, std=dim**-0.5)

    def forward(self, tokens_NPD: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, P, D) of a map of `grid` -> (N, 1, D), before the layer to the contrastive width."""
        x = torch.cat([tokens_NPD.mean(dim=1, keepdim=True), tokens_NPD], dim=1)
        x = x + resize_positions(self.positional_embedding, grid, 1).to(x.dtype)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, y in self._asked(x))
        return merge_heads(F.scaled_dot_product_attention(q, k, v))

    def _asked(self, x: Tensor) -> tuple[tuple[nn.Linear, Tensor], ...]:
        return (self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x)
