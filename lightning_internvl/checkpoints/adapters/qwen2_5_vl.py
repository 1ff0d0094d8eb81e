"""Qwen2.5-VL as released, and as transformers' class of the same names reads it: Qwen2-VL with
another tower, and positions in time that count in seconds."""

from __future__ import annotations

from typing import ClassVar

from lightning_internvl.checkpoints.adapters.qwen2_vl import PATCHES, ROPE, TEXT, TOP, Qwen2VL
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.decoders.mrope import MRopeCausalLM
from lightning_internvl.encoders.qwen2_vit import Qwen2ViT

VISION: Config = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "hidden_act": "silu", **PATCHES,
    "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584, "tokens_per_second": 4,
    "rope_parameters": ROPE,
}  # fmt: skip


class Qwen25VL(Qwen2VL):
    NAME = "Qwen2.5-VL (model_type 'qwen2_5_vl')"
    MODEL_TYPES = ("qwen2_5_vl",)
    ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
    DEFAULTS = TOP | {"tie_word_embeddings": False, "vision_config": VISION, "text_config": TEXT, **TEXT}
    VISION: ClassVar[Config] = VISION

    def tower(self, vision: Config) -> Config:
        return {
            "dim": vision["hidden_size"],
            "mlp_dim": vision["intermediate_size"],
            "gated": True,
            "norm": "rms_norm",
            "window": vision["window_size"],
            "full_layers": [layer for layer in vision["fullatt_block_indexes"] if layer < vision["depth"]],
        }

    def tower_fields(self, encoder: Qwen2ViT, decoder: MRopeCausalLM) -> Config | None:
        if not (encoder.window and encoder.gated and encoder.norm == "rms_norm"):
            return None
        if decoder.tokens_per_second is None or decoder.tokens_per_second % 1:
            return None
        return {
            "hidden_size": encoder.dim,
            "intermediate_size": encoder.mlp_dim,
            "window_size": encoder.window,
            "fullatt_block_indexes": list(encoder.full_layers),
            "out_hidden_size": decoder.dim,
            "tokens_per_second": int(decoder.tokens_per_second),
        }


LAYOUT = Qwen25VL()
