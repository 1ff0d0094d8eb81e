"""InternVL-Chat V1-1 to 1.5 and later, as released: `vision_model`, `mlp1`, `language_model`
(`modeling_internvl_chat.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_internvl.checkpoints.adapters.layout import HOLDS_LORA, Layout, chat_model
from lightning_internvl.checkpoints.families.intern_vit import DEFAULTS, ONLY, release_rules, tower, tower_config
from lightning_internvl.checkpoints.families.language_model import (
    is_fused,
    language_config,
    language_model,
    language_rules,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.pixel_shuffle import PixelShuffleMLP
from lightning_internvl.model.vlm import VLM

TOP: Config = {
    "select_layer": -1, "downsample_ratio": 0.5, "ps_version": "v1",
    "use_backbone_lora": 0, "use_llm_lora": 0,
}  # fmt: skip
HEADS = ("language_model.lm_head.weight", "language_model.output.weight")


class InternVLChat(Layout):
    NAME = "InternVL-Chat as released (model_type 'internvl_chat')"
    MODEL_TYPES = ("internvl_chat",)
    ARCHITECTURE = "InternVLChatModel"
    DEFAULTS = TOP | {"vision_config": DEFAULTS}

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *release_rules("vision_model."),
            rename("middleware.mlp1.**", "mlp1.**"),
            *language_rules(config["llm_config"]),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top = TOP | config
        adapted = top["use_backbone_lora"] or top["use_llm_lora"]
        if adapted or any(".lora_" in name for name in shapes):
            raise ValueError(HOLDS_LORA.format("InternVL-Chat", "use_backbone_lora and use_llm_lora"))
        encoder = tower(config["vision_config"])
        decoder = language_model(config["llm_config"], tied=shapes.keys().isdisjoint(HEADS))
        connector = PixelShuffleMLP(
            encoder_dim=encoder.dim,
            decoder_dim=decoder.dim,
            patch_layer=top["select_layer"],
            factor=round(1 / top["downsample_ratio"]),
            version=top["ps_version"],
        )
        return chat_model(encoder, connector, decoder, image_token_id=config.get("image_token_id"))

    def fields_of(self, model: VLM) -> Config | None:
        encoder, connector, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, InternViT) and isinstance(connector, PixelShuffleMLP)):
            return None
        if not isinstance(decoder, HFCausalLM) or (vision := tower_config(encoder)) is None:
            return None
        return {
            "select_layer": connector.patch_layer,
            "downsample_ratio": 1 / connector.factor,
            "ps_version": connector.version,
            "vision_config": vision,
            "llm_config": {"vocab_size": decoder.vocab_size},
        }

    def new_config(self, model: VLM, fields: Config) -> Config:
        tower = {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", **ONLY}
        fields["vision_config"] = tower | fields["vision_config"]
        fields["llm_config"] = language_config(model.decoder)
        fields["tie_word_embeddings"] = model.decoder.tied
        if model.image_token_id is not None:
            fields["image_token_id"] = model.image_token_id
        return super().new_config(model, fields)

    def written_tensors(self, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With a tied table twice: the official class ties none, whatever the config says."""
        found, language = super().written_tensors(config, tensors), config["llm_config"]
        if language.get("tie_word_embeddings") and not is_fused(language):
            found.setdefault(HEADS[0], found["language_model.model.embed_tokens.weight"].clone())
        return found


LAYOUT = InternVLChat()
