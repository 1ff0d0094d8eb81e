"""The vision tower of Qwen-VL: open_clip's ViT-bigG without its CLS token and its pooling (Bai et
al. 2023, section 2.1; official `visual.py`).

Letters: N images, P tokens, D width, S side in pixels.
"""

from __future__ import annotations

from torch import nn

from lightning_internvl.encoders.clip_vit import CLIPViT


class OpenCLIPViT(CLIPViT):
    """A CLIP tower of patches alone, with a norm in front and none at the end.

    The position table has a size of its own, whatever the resolution: it is resized whenever
    pictures have another number of patches, and stays as it is in the checkpoint.

    Args:
        image_size: side in pixels of the pictures that are expected; any other is accepted at run
            time.
        positions: side of the stored position table, in patches.
        tower: `patch_size`, `dim`, `depth`, `heads`, `mlp_dim` and `embed_std`, as in `CLIPViT`
            (bigG: 14, 1664, 48, 16, 8192).
    """

    special_tokens = 0

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        act: str = "gelu",
        norm_eps: float = 1e-6,
        positions: int = 16,
        embed_std: float | None = None,
    ) -> None:
        super().__init__(
            image_size=positions * patch_size, patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, act=act,
            norm_eps=norm_eps, cls=False, pre_norm=True, post_norm="unused", embed_std=embed_std,
        )  # fmt: skip
        self.image_size, self.positions = image_size, positions
        self.post_layernorm = nn.Identity()

    def resize(self, image_size: int) -> None:
        """Expect images of `image_size` pixels. The stored table stays, as in the original."""
        self.image_size = image_size
