"""Probes: a classifier in the middleware's place, for measuring what a frozen tower knows (InternVL
section 4.2).

Source: official `classification/models/intern_vit_6b.py` ("cls_patch_concat" and "clip_projector").

Letters: N images, P visual tokens (CLS first), D encoder width, F feature width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_internvl.distributed.collectives import gather_with_grad, world_size
from lightning_internvl.layers.basic import AttentionPooling
from lightning_internvl.protocols import Part

EPS = 1e-6


class _Probe(Part):
    """Features of the tower, normalised over the batch, then one linear layer: its output is a
    score for each class."""

    hands_tokens = False  # to a decoder

    def __init__(self, features: int, classes: int, layer: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a probe tells 2 classes apart or more: {classes=}")
        self.classes, self.layers = classes, (layer,)
        self.norm = GlobalBatchNorm(features, eps=EPS)
        self.head = nn.Linear(features, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def tokens_out(self, tokens_in: int) -> int:
        """A probe hands nothing to a decoder."""
        return 0

    def sharding_units(self) -> list[nn.Module]:
        """A probe is small and stays in one piece."""
        return []

    def features(self, visual_NPD: Tensor) -> Tensor:
        """One vector an image: (N, P, D) -> (N, F)."""
        raise TypeError(f"{type(self).__name__} must say what it reads of the tower")

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Scores of the classes: one (N, P, D) -> (N, C)."""
        return self.head(self.norm(self.features(feats[0])))


class LinearProbe(_Probe):
    """Reads the CLS token beside the mean of the patches; nothing but the last layer learns.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        classes: how many classes there are.
        layer: the encoder layer that is read.
    """

    def __init__(self, *, encoder_dim: int, classes: int, layer: int = -1) -> None:
        super().__init__(2 * encoder_dim, classes, layer)

    def features(self, visual_NPD: Tensor) -> Tensor:
        """(N, P, D) -> (N, 2 D)"""
        return torch.cat([visual_NPD[:, 0], visual_NPD[:, 1:].mean(dim=1)], dim=-1)


class AttentionProbe(_Probe):
    """Reads all tokens through an attention pooling of its own.

    Args:
        encoder_dim: width of the visual tokens (completed from the encoder).
        classes: how many classes there are.
        heads: heads of the pooling (6B: 25).
        pooled_dim: width of the pooled vector (6B: 768).
        layer: the encoder layer that is read.
    """

    def __init__(self, *, encoder_dim: int, classes: int, heads: int, pooled_dim: int, layer: int = -1) -> None:
        super().__init__(pooled_dim, classes, layer)
        if encoder_dim % heads:
            raise ValueError(f"the encoder's width {encoder_dim} must divide by {heads=} of the probe")
        self.pooling = AttentionPooling(encoder_dim, heads, pooled_dim)

    def features(self, visual_NPD: Tensor) -> Tensor:
        """(N, P, D) -> (N, F)"""
        return self.pooling(visual_NPD)


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm over equally large batches of all processes; PyTorch's refuses CPUs."""

    def forward(self, x_NF: Tensor) -> Tensor:
        """(N, F) -> (N, F)"""
        if not self.training or world_size() == 1:
            return super().forward(x_NF)
        x = x_NF.float()
        mean = gather_with_grad(x.mean(dim=0, keepdim=True)).mean(dim=0)
        variance = gather_with_grad((x - mean).square().mean(dim=0, keepdim=True)).mean(dim=0)
        with torch.no_grad():
            count = len(x) * world_size()
            assert self.num_batches_tracked is not None and self.momentum is not None  # noqa: PT018
            assert self.running_mean is not None and self.running_var is not None  # noqa: PT018
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        normed = (x - mean) * (variance + self.eps).rsqrt()
        return (normed * self.weight + self.bias).to(x_NF.dtype)
