"""CLIP with a ResNet under the names of OpenAI and open_clip (RN50, RN101, RN50x4, x16, x64)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from lightning_internvl.checkpoints.adapters.clip_openai import CLIPOpenAI, reads_as_openai
from lightning_internvl.checkpoints.adapters.layout import BESIDE
from lightning_internvl.checkpoints.families.clip import add_first_dimension
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.checkpoints.weight_files import OPEN_CLIP
from lightning_internvl.encoders.clip_resnet import STRIDE, CLIPResNet
from lightning_internvl.encoders.tower import special_tokens
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM

POOL = "visual.attnpool"


class CLIPResNetOpenAI(CLIPOpenAI):
    NAME = f"CLIP with a ResNet, of OpenAI and open_clip (`visual.layer1.*`; activation and heads {BESIDE} or {OPEN_CLIP})"
    BUFFERS: ClassVar[tuple[str, ...]] = (*CLIPOpenAI.BUFFERS, "num_batches_tracked")

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        names = {self.canonical(name) for name in shapes}
        return {"visual.layer1.0.conv1.weight", f"{POOL}.c_proj.weight", "token_embedding.weight"} <= names

    def tower_rules(self) -> list[NameRule]:
        names = (*(f"layer{stage}.**" for stage in range(1, 5)), *(f"{kind}{i}.*" for kind in ("conv", "bn") for i in (1, 2, 3)))
        return [
            *(rename(f"encoder.{name}", f"visual.{name}") for name in names),
            add_first_dimension("encoder.attnpool.positional_embedding", f"{POOL}.positional_embedding"),
            *(rename(f"encoder.attnpool.{x}_proj.*", f"{POOL}.{x}_proj.*") for x in "qkv"),
            rename("middleware.visual_projection.*", f"{POOL}.c_proj.*"),
        ]

    def tower(self, config: Config, shapes: Shapes) -> tuple[CLIPResNet, Config]:
        starts = [f"visual.layer{stage}." for stage in range(1, 5)]
        depths = [sum(n.startswith(start) and n.endswith(".conv1.weight") for n in shapes) for start in starts]
        size = STRIDE * math.isqrt(shapes[f"{POOL}.positional_embedding"][0] - 1)
        width = shapes["visual.layer1.0.conv1.weight"][0]
        return CLIPResNet(image_size=size, width=width, depths=depths), {"image_bias": True}

    def side(self, found: dict[str, Tensor]) -> int:
        return STRIDE * math.isqrt(found[f"{POOL}.positional_embedding"].shape[0] - 1)

    def holds(self, model: VLM) -> bool:
        """As of the other towers, heads, activation and end token must be OpenAI's."""
        encoder, middleware = model.encoder, model.middleware
        if not (isinstance(encoder, CLIPResNet) and isinstance(middleware, CLIPText) and special_tokens(encoder)):
            return False
        projection = middleware.visual_projection
        if model.decoder is not None or set(model.objectives) != {"itc"} or projection is None or projection.bias is None:
            return False
        return reads_as_openai(middleware)


LAYOUT = CLIPResNetOpenAI()
