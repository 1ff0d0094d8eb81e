"""Qwen2-VL as released, and as transformers' class of the same names reads it."""

from __future__ import annotations

import inspect
from typing import ClassVar

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import language_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.mrope import MRopeCausalLM
from lightning_internvl.encoders.qwen2_vit import Qwen2ViT
from lightning_internvl.middleware.patch_merger import PatchMerger
from lightning_internvl.model.vlm import VLM

TOP: Config = {
    "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip
ROPE: Config = {"rope_theta": 10000.0}
PATCHES: Config = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}
# The original files write the width of the language model into `hidden_size` and leave the rest to
# these.
VISION: Config = {
    "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_act": "quick_gelu", **PATCHES,
    "rope_parameters": ROPE,
}  # fmt: skip
TEXT: Config = {"vocab_size": 152064, "rope_parameters": {"rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}}
ONLY_TEXT: Config = {"use_sliding_window": False, "attention_dropout": 0.0}
# Fields of the language model, which the release writes at the top beside those of the whole model.
_TEXT = {*inspect.signature(Qwen2VLTextConfig.__init__).parameters, "rope_parameters", "rope_scaling", "rope_theta"}
_NOTES = {"self", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "model_type"}


class Qwen2VL(Layout):
    NAME = "Qwen2-VL (model_type 'qwen2_vl')"
    MODEL_TYPES = ("qwen2_vl",)
    ARCHITECTURE = "Qwen2VLForConditionalGeneration"
    DEFAULTS = TOP | {"tie_word_embeddings": False, "vision_config": VISION, "text_config": TEXT, **TEXT}
    NATIVE = True
    VISION: ClassVar[Config] = VISION

    def canonical(self, name: str) -> str | None:
        """Newer releases of the library have the parts below `model.`."""
        for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith(new):
                return super().canonical(old + name[len(new) :])
        return super().canonical(name)

    def rules(self, config: Config) -> list[NameRule]:
        return [
            rename("encoder.**", "visual.**"),
            rename("middleware.**", "visual.merger.**"),
            rename("decoder.lm.**", "**"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        text, vision = text_config(config), self.VISION | config.get("vision_config", {})
        top = TOP | config
        check_only(text, ONLY_TEXT, "text_config")
        encoder = Qwen2ViT(**tower_sizes(vision), **self.tower(vision))
        text = text | {"tie_word_embeddings": "lm_head.weight" not in shapes}
        decoder = MRopeCausalLM(config=text, merge_size=encoder.merge_size, tokens_per_second=vision.get("tokens_per_second"))
        merger = PatchMerger(encoder_dim=encoder.dim, decoder_dim=decoder.dim, factor=encoder.merge_size, norm=encoder.norm)
        tokens = {name: top[name] for name in ("image_token_id", "video_token_id")}
        return chat_model(encoder, merger, decoder, **tokens)

    def tower(self, vision: Config) -> Config:
        """Settings of the encoder that only this system's tower has, of a `vision_config`."""
        width = vision["embed_dim"]
        return {"dim": width, "mlp_dim": int(width * vision["mlp_ratio"])}

    def fields_of(self, model: VLM) -> Config | None:
        encoder, merger, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, Qwen2ViT) and isinstance(merger, PatchMerger)):
            return None
        if not isinstance(decoder, MRopeCausalLM) or model.image_token_id is None:
            return None
        if not _fits(encoder, merger) or (own := self.tower_fields(encoder, decoder)) is None:
            return None
        fields = {"image_token_id": model.image_token_id, "tie_word_embeddings": decoder.tied}
        if model.video_token_id is not None:
            fields["video_token_id"] = model.video_token_id
        vocabulary = {"vocab_size": decoder.vocab_size}
        return {**fields, "vision_config": tower_config(encoder) | own, "text_config": vocabulary}

    def tower_fields(self, encoder: Qwen2ViT, decoder: MRopeCausalLM) -> Config | None:
        """What `tower` reads, and what else only this system's `vision_config` has; None if it
        cannot hold the parts."""
        if encoder.window or encoder.gated or encoder.norm != "layer_norm" or encoder.mlp_dim % encoder.dim:
            return None
        if decoder.tokens_per_second is not None:
            return None
        return {"embed_dim": encoder.dim, "hidden_size": decoder.dim, "mlp_ratio": encoder.mlp_dim // encoder.dim}

    def update(self, loaded: Config, fields: Config) -> Config:
        if not loaded.get("text_config"):  # the release has these fields at the top
            fields |= fields.pop("text_config")
        return super().update(loaded, fields)

    def new_config(self, model: VLM, fields: Config) -> Config:
        kind = self.MODEL_TYPES[0]
        fields["vision_config"] = {"model_type": f"{kind}_vision", **fields["vision_config"]}
        # llama.cpp knows its language model by the class of the whole
        named = {"architectures": [self.ARCHITECTURE], "model_type": f"{kind}_text"}
        fields["text_config"] = language_config(model.decoder) | named | fields["text_config"]
        return super().new_config(model, fields)


def text_config(config: Config) -> Config:
    """The language model's part of a config, which the release has at the top."""
    fields = config.get("text_config") or config
    return {key: value for key, value in fields.items() if key in _TEXT - _NOTES} | {"model_type": "qwen2_vl_text"}


def tower_sizes(vision: Config) -> Config:
    """Settings of the encoder that both systems' `vision_config` have, under the same names."""
    rope = ROPE | (vision["rope_parameters"] or {})
    check_only(rope, {"rope_type": "axial"}, "vision_config.rope_parameters")
    patch, frames = (_one(vision, field) for field in ("patch_size", "temporal_patch_size"))
    return {
        "image_size": 3584 // patch * patch,  # 16,384 tokens, the most that the published processor gives
        "patch_size": patch,
        "frames": frames,
        "depth": vision["depth"],
        "heads": vision["num_heads"],
        "merge_size": vision["spatial_merge_size"],
        "theta": rope["rope_theta"],
        "activation": vision["hidden_act"],
        "channels": vision["in_channels"],
    }


def _one(vision: Config, field: str) -> int:
    values = vision[field] if isinstance(vision[field], list) else [vision[field]]
    if len(set(values)) != 1:
        raise ValueError(f"vision_config.{field}={values} is not supported; all must be equal")
    return values[0]


def _fits(encoder: Qwen2ViT, merger: PatchMerger) -> bool:
    """Whether the layouts can hold the numbers that they have no fields for."""
    norms = encoder.norm == merger.norm and {encoder.blocks[0].norm1.eps, merger.ln_q.eps} == {1e-6}
    return norms and merger.factor == encoder.merge_size and merger.layers in ((-1,), (encoder.depth,))


def tower_config(encoder: Qwen2ViT) -> Config:
    """What `tower_sizes` reads."""
    return {
        "depth": encoder.depth,
        "num_heads": encoder.heads,
        "hidden_act": encoder.activation,
        "patch_size": encoder.patch_size,
        "temporal_patch_size": encoder.frames,
        "spatial_merge_size": encoder.merge_size,
        "in_channels": encoder.patch_embed.proj.in_channels,
        "rope_parameters": {"rope_theta": encoder.theta},
    }


LAYOUT = Qwen2VL()
