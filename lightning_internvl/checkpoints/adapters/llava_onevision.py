"""LLaVA-OneVision as transformers' `LlavaOnevisionForConditionalGeneration` reads it: LLaVA-NeXT with
larger grids, of which a reduced map goes on, and videos."""

from __future__ import annotations

import re
from typing import ClassVar

from lightning_internvl.checkpoints.adapters.llava_next import LlavaNext
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.middleware.anyres import AnyresMLP
from lightning_internvl.model.vlm import VLM


class LlavaOnevision(LlavaNext):
    NAME = "LLaVA-OneVision of transformers (model_type 'llava_onevision')"
    MODEL_TYPES = ("llava_onevision",)
    ARCHITECTURE = "LlavaOnevisionForConditionalGeneration"
    TOP: ClassVar[Config] = {
        "image_token_index": 151646,
        "video_token_index": 151647,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": True,
        "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        "vision_aspect_ratio": "anyres_max_9",
    }
    TEXT = "qwen2"
    # The tower where a config leaves it out whole.
    TOWER: ClassVar[Config] = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip

    def tokens(self, top: Config) -> Config:
        return super().tokens(top) | {"video_token_id": top.get("video_token_id", top["video_token_index"])}

    def kind(self, top: Config) -> Config:
        named = top["vision_aspect_ratio"]
        most = re.fullmatch(r"anyres_max_([1-9]\d*)", str(named))
        if most is None:
            raise ValueError(f"vision_aspect_ratio={named!r} is not known; it must be anyres_max_9 or another number")
        return {"map_squares": int(most[1]), "frame_pool": 2}

    def kind_fields(self, connector: AnyresMLP, model: VLM) -> Config | None:
        if not connector.map_squares or connector.frame_pool != 2 or model.video_token_id is None:
            return None
        return {"vision_aspect_ratio": f"anyres_max_{connector.map_squares}", "video_token_index": model.video_token_id}


LAYOUT = LlavaOnevision()
