"""Qwen3-VL as released, and as transformers' class of the same name reads it (Bai et al. 2025,
section 2; official `modeling_qwen3_vl.py`)."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.adapters.qwen2_vl import PATCHES, ROPE, TOP, tower_config, tower_sizes
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.mrope import MRopeCausalLM
from lightning_internvl.encoders.qwen2_vit import Qwen2ViT
from lightning_internvl.middleware.deepstack import DeepStackMerger
from lightning_internvl.middleware.patch_merger import PatchMerger
from lightning_internvl.model.vlm import VLM

VISION: Config = {
    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304, "num_heads": 16,
    **PATCHES, "patch_size": 16, "out_hidden_size": 3584, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24], "rope_parameters": ROPE,
}  # fmt: skip
ONLY_TEXT: Config = {"attention_dropout": 0.0}
ONLY_ROPE: Config = {"mrope_interleaved": True}
MERGER = {"ln_q": "norm", "mlp.0": "linear_fc1", "mlp.2": "linear_fc2"}
LARGEST = 4096  # side in pixels of the largest square picture that the published processor gives


class Qwen3VL(Layout):
    NAME = "Qwen3-VL (model_type 'qwen3_vl')"
    MODEL_TYPES = ("qwen3_vl",)
    ARCHITECTURE = "Qwen3VLForConditionalGeneration"
    DEFAULTS = TOP | {"tie_word_embeddings": False, "vision_config": VISION}
    NATIVE = True
    LANGUAGE_TYPE: ClassVar[str] = "qwen3_vl_text"

    def rules(self, config: Config) -> list[NameRule]:
        visual = "model.visual."
        return [
            *(rename(f"encoder.blocks.*.mlp.fc{n}.*", f"{visual}blocks.*.mlp.linear_fc{n}.*") for n in (1, 2)),
            rename("encoder.**", f"{visual}**"),
            *(rename(f"middleware.main.{ours}.*", f"{visual}merger.{theirs}.*") for ours, theirs in MERGER.items()),
            *(rename(f"middleware.deep.*.{ours}.*", f"{visual}deepstack_merger_list.*.{t}.*") for ours, t in MERGER.items()),
            rename("decoder.lm.model.**", "model.language_model.**"),
            rename("decoder.lm.lm_head.**", "lm_head.**"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        text, vision, top = config.get("text_config", {}), VISION | config.get("vision_config", {}), TOP | config
        check_only(text, ONLY_TEXT, "text_config")
        check_only(text.get("rope_parameters") or text.get("rope_scaling") or {}, ONLY_ROPE, "text_config.rope_parameters")
        sizes = tower_sizes(vision)
        sizes["image_size"] = LARGEST // sizes["patch_size"] * sizes["patch_size"]
        rows, side = vision["num_position_embeddings"], math.isqrt(vision["num_position_embeddings"])
        if side**2 != rows:
            raise ValueError(f"vision_config.num_position_embeddings={rows} is not supported; it must be a square")
        tower = {"dim": vision["hidden_size"], "mlp_dim": vision["intermediate_size"], "positions": side, "patch_bias": True}
        encoder = Qwen2ViT(**sizes, **tower)
        make = partial(MRopeCausalLM, merge_size=encoder.merge_size, steps_apart=True)
        decoder = language_model(text | {"model_type": self.LANGUAGE_TYPE}, tied="lm_head.weight" not in shapes, make=make)
        merger = DeepStackMerger(
            encoder_dim=encoder.dim,
            decoder_dim=decoder.dim,
            deep_layers=[block + 1 for block in vision["deepstack_visual_indexes"]],
            factor=encoder.merge_size,
        )
        tokens = {name: top[name] for name in ("image_token_id", "video_token_id")}
        return chat_model(encoder, merger, decoder, **tokens)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, merger, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, Qwen2ViT) and isinstance(merger, DeepStackMerger) and isinstance(decoder, MRopeCausalLM)):
            return None
        if model.image_token_id is None or decoder.lm.config.model_type != self.LANGUAGE_TYPE or not decoder.steps_apart:
            return None
        if not _fits(encoder, merger):
            return None
        fields = {"image_token_id": model.image_token_id, "tie_word_embeddings": decoder.tied}
        if model.video_token_id is not None:
            fields["video_token_id"] = model.video_token_id
        vision = {
            "hidden_size": encoder.dim,
            "intermediate_size": encoder.mlp_dim,
            "out_hidden_size": decoder.dim,
            "num_position_embeddings": (encoder.positions or 0) ** 2,
            "deepstack_visual_indexes": [number - 1 for number in encoder.layer_numbers(merger.layers[1:])],
        }
        return {**fields, "vision_config": tower_config(encoder) | vision, "text_config": {"vocab_size": decoder.vocab_size}}

    def new_config(self, model: VLM, fields: Config) -> Config:
        fields["vision_config"] = {"model_type": self.MODEL_TYPES[0], **fields["vision_config"]}
        fields["text_config"] = language_config(model.decoder) | fields["text_config"]
        return super().new_config(model, fields)


def _fits(encoder: Qwen2ViT, merger: DeepStackMerger) -> bool:
    """Whether the layout can hold what it has no fields for."""
    tower = encoder.positions is not None and encoder.patch_embed.proj.bias is not None and encoder.norm == "layer_norm"
    norms = (encoder.blocks[0].norm1, *(one.ln_q for one in (merger.main, *merger.deep) if isinstance(one, PatchMerger)))
    first, *deep = encoder.layer_numbers(merger.layers)
    order = deep == sorted({*deep}) and 0 not in deep and merger.into == tuple(range(len(deep)))
    whole = first == encoder.depth and merger.factor == encoder.merge_size
    return tower and not encoder.window and not encoder.gated and {norm.eps for norm in norms} == {1e-6} and order and whole


LAYOUT = Qwen3VL()
