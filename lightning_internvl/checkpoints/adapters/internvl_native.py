"""InternVL 1.5 and later as transformers' `InternVLForConditionalGeneration` reads it."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model, with_old_prefix
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.intern_vit import (
    NATIVE_DEFAULTS,
    NATIVE_ONLY,
    native_rules,
    native_tower,
    native_tower_config,
)
from lightning_internvl.checkpoints.families.language_model import language_model, language_rules
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.messages import check_number
from lightning_internvl.middleware.pixel_shuffle import PixelShuffleMLP
from lightning_internvl.model.vlm import VLM

TOP: Config = {"downsample_ratio": 0.5, "vision_feature_layer": -1, "image_token_id": 151667}
ONLY: Config = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


class InternVLNative(Layout):
    NAME = "InternVL of transformers (model_type 'internvl' with a text_config)"
    NATIVE = True
    MODEL_TYPES = ("internvl",)
    ARCHITECTURE = "InternVLForConditionalGeneration"
    DEFAULTS = TOP | {"vision_config": NATIVE_DEFAULTS}
    LANGUAGE = "text_config"

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """The first InternVL has the same model_type."""
        return super().recognises(config, shapes) and "text_config" in config

    def canonical(self, name: str) -> str | None:
        return super().canonical(with_old_prefix(name))

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *native_rules("vision_tower."),
            *(rename(f"middleware.mlp1.{ours}.*", f"multi_modal_projector.{name}.*") for ours, name in PROJECTOR.items()),
            *language_rules(config["text_config"]),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top = TOP | config
        check_only(config, ONLY, "config.json")
        check_number("vision_feature_layer", top["vision_feature_layer"], whole=True)
        encoder = native_tower(config.get("vision_config", {}))
        tied = "language_model.lm_head.weight" not in shapes
        decoder = language_model(config["text_config"], tied=tied)
        connector = PixelShuffleMLP(
            encoder_dim=encoder.dim,
            decoder_dim=decoder.dim,
            patch_layer=top["vision_feature_layer"],
            factor=round(1 / top["downsample_ratio"]),
        )
        return chat_model(encoder, connector, decoder, image_token_id=top["image_token_id"])

    def fields_of(self, model: VLM) -> Config | None:
        encoder, connector, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, InternViT) and isinstance(connector, PixelShuffleMLP)):
            return None
        if not isinstance(decoder, HFCausalLM) or model.image_token_id is None:
            return None
        vision = native_tower_config(encoder)
        if vision is None or connector.version != "v2":
            return None
        return {
            "image_token_id": model.image_token_id,
            "image_seq_length": connector.tokens_out(encoder.num_tokens()),
            "downsample_ratio": 1 / connector.factor,
            "vision_feature_layer": connector.patch_layer,
            "vision_config": vision,
            "text_config": {"vocab_size": decoder.vocab_size},
        }

    def new_config(self, model: VLM, fields: Config) -> Config:
        # llama.cpp and vLLM choose by the classes of both parts and read these fields without defaults
        tower = {"architectures": ["InternVisionModel"], **NATIVE_ONLY, **fields["vision_config"]}
        tied = {"tie_word_embeddings": model.decoder.tied}
        return super().new_config(model, {**tied, **ONLY, **fields, "vision_config": tower})


LAYOUT = InternVLNative()
