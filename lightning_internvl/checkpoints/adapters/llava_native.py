"""LLaVA 1.5 as transformers' `LlavaForConditionalGeneration` reads it: CLIP or SigLIP, two layers,
any language model."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model, updated_config, with_old_prefix
from lightning_internvl.checkpoints.families.clip import (
    SIGLIP_VISION,
    VISION,
    clip_tower,
    clip_tower_config,
    siglip_tower,
    siglip_tower_config,
    vision_rules,
)
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import language_model, language_rules
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.messages import check_choice
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM

TOP: Config = {
    "image_token_index": 32000,
    "image_seq_length": 576,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
}
ONLY: Config = {"projector_hidden_act": "gelu"}
# The tower where a config leaves it out whole.
LARGE: Config = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip
STRATEGIES = {"default": False, "full": True}  # whether the first token goes to the decoder too


class LlavaNative(Layout):
    NAME = "LLaVA of transformers (model_type 'llava' with a vision_config)"
    NATIVE = True
    MODEL_TYPES = ("llava",)
    ARCHITECTURE = "LlavaForConditionalGeneration"
    LANGUAGE = "text_config"
    TOP: ClassVar[Config] = TOP
    TOWER: ClassVar[Config] = LARGE
    TEXT = "llama"

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """LLaVA's own code has fields `mm_*`."""
        other = any(key.startswith("mm_") for key in config)
        return super().recognises(config, shapes) and not other

    def canonical(self, name: str) -> str | None:
        name = with_old_prefix(name).replace("vision_tower.vision_model.", "vision_tower.", 1)
        return super().canonical(name)

    def published(self, name: str) -> str:
        """transformers 4, vLLM and llama.cpp know the tower one level deeper only."""
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)

    def rules(self, config: Config) -> list[NameRule]:
        projector = {"0": "linear_1", "2": "linear_2"}
        return [
            *vision_rules("vision_tower."),
            *(rename(f"middleware.mlp1.{ours}.*", f"multi_modal_projector.{name}.*") for ours, name in projector.items()),
            *language_rules(config.get("text_config") or {}),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top = self.TOP | config
        check_only(config, ONLY, "config.json")
        strategy = top["vision_feature_select_strategy"]
        check_choice("vision_feature_select_strategy", strategy, STRATEGIES)
        encoder = _tower(config.get("vision_config") or self.TOWER)
        text = {"model_type": self.TEXT} | (config.get("text_config") or {})
        decoder = language_model(text, tied="language_model.lm_head.weight" not in shapes)
        connector = self.connector(
            top,
            encoder.image_size,
            encoder_dim=encoder.dim,
            decoder_dim=decoder.dim,
            patch_layer=top["vision_feature_layer"],
            keep_special=STRATEGIES[strategy],
            bias=top["multimodal_projector_bias"],
        )
        return chat_model(encoder, connector, decoder, **self.tokens(top))

    def connector(self, top: Config, image_size: int, **options: Any) -> MLPConnector:
        """The connector of a config with its defaults filled in."""
        return MLPConnector(**options)

    def tokens(self, top: Config) -> Config:
        """The placeholders, by their arguments of `VLM`."""
        return {"image_token_id": top.get("image_token_id", top["image_token_index"])}

    def connector_fields(self, connector: MLPConnector, model: VLM) -> Config | None:
        """What `connector` and `tokens` read beyond the fields of LLaVA; None if the layout cannot
        hold them."""
        if model.video_token_id is not None or type(connector) is not MLPConnector:
            return None
        return {"image_seq_length": connector.tokens_out(model.encoder.num_tokens())}

    def fields_of(self, model: VLM) -> Config | None:
        encoder, connector, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, CLIPViT) and isinstance(connector, MLPConnector)):
            return None
        if not isinstance(decoder, HFCausalLM) or model.image_token_id is None:
            return None
        # One placeholder for a picture (LLaVA's own layout) is no token of the library.
        if model.image_placeholders is not None or connector.depth != 2:
            return None
        siglip = siglip_tower_config(encoder) if isinstance(encoder, SiglipViT) else None
        vision = siglip or clip_tower_config(encoder)
        if vision is None or not _reads_as_there(encoder, connector):
            return None
        if (own := self.connector_fields(connector, model)) is None:
            return None
        layers = connector.layers
        return {
            "image_token_index": model.image_token_id,
            **own,
            "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
            "vision_feature_select_strategy": "full" if connector.skipped == 0 else "default",
            "multimodal_projector_bias": connector.mlp1[0].bias is not None,
            "vision_config": vision,
            "text_config": {"vocab_size": decoder.vocab_size},
        }

    def update(self, loaded: Config, fields: Config) -> Config:
        kind = fields["vision_config"]["model_type"]
        tower = SIGLIP_VISION if kind == "siglip_vision_model" else VISION
        for token in ("image_token", "video_token"):
            if f"{token}_index" in fields.keys() - loaded.keys():  # as newer releases of the library write it
                fields[f"{token}_id"] = fields[f"{token}_index"]
        return updated_config(loaded, self.TOP | {"vision_config": tower | {"model_type": kind}}, fields)

    def new_config(self, model: VLM, fields: Config) -> Config:
        tied = {"projector_hidden_act": "gelu", "tie_word_embeddings": model.decoder.tied}
        return super().new_config(model, tied | fields)


def _tower(vision: Config) -> CLIPViT:
    kind = vision.get("model_type", "clip_vision_model")
    if kind == "clip_vision_model":
        return clip_tower(vision, post_norm="unused")
    if kind == "siglip_vision_model":
        return siglip_tower(vision, head="unused", post_norm="unused")
    choices = "clip_vision_model, siglip_vision_model"
    raise ValueError(f"vision_config.model_type={kind!r} is not supported; valid choices: {choices}")


def _reads_as_there(encoder: CLIPViT, connector: MLPConnector) -> bool:
    """Whether the library, which knows no norm behind the last block and no pooled vector there,
    hands on the same tokens."""
    last = any(layer in (-1, encoder.depth) for layer in connector.layers)
    if not last or encoder.post_norm == "unused":
        return connector.skipped <= 1
    return encoder.post_norm == "cls" and connector.skipped == 1


LAYOUT = LlavaNative()
