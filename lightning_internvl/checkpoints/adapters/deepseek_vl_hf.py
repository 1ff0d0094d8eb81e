"""DeepSeek-VL as transformers reads it: `DeepseekVLForConditionalGeneration` (SigLIP alone, 1.3B)
and `DeepseekVLHybridForConditionalGeneration` (SigLIP and SAM, 7B)."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.clip import SIGLIP_VISION, siglip_tower, siglip_tower_config, vision_rules
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.families.sam import DEFAULTS as SAM, moved, native_rules, sam_tower, sam_tower_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.hybrid import HybridEncoder
from lightning_internvl.encoders.sam_vit import SamViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.hybrid_mlp import HybridMLP
from lightning_internvl.model.vlm import VLM

ARCHITECTURES = {
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "deepseek_vl_hybrid": "DeepseekVLHybridForConditionalGeneration",
}
TOP: Config = {"image_token_id": 100015}


class DeepseekVLHF(Layout):
    NAME = "DeepSeek-VL of transformers (model_type 'deepseek_vl' or 'deepseek_vl_hybrid')"
    NATIVE = True
    MODEL_TYPES = tuple(ARCHITECTURES)
    DEFAULTS = TOP | {"vision_config": SIGLIP_VISION, "high_res_vision_config": SAM}

    def canonical(self, name: str) -> str | None:
        """Older releases of the library put SigLIP one level deeper."""
        return super().canonical(name.replace("model.vision_model.vision_model.", "model.vision_model."))

    def published(self, name: str) -> str:
        return name.replace("model.vision_model.", "model.vision_model.vision_model.", 1)

    def rules(self, config: Config) -> list[NameRule]:
        siglip = vision_rules("model.vision_model.")
        if config["model_type"] == "deepseek_vl":
            aligner = [rename(f"middleware.mlp1.{2 * i}.*", f"model.aligner.linear{i + 1}.*") for i in range(2)]
        else:
            siglip = [*moved(siglip, "encoder.", "encoder.low."), *native_rules("encoder.high.", "model.")]
            names = {"low_up_proj": "vision_proj", "high_up_proj": "high_res_vision_proj", "proj": "proj"}
            aligner = [rename(f"middleware.{ours}.*", f"model.aligner.{theirs}.*") for ours, theirs in names.items()]
        return [
            *siglip,
            *aligner,
            rename("decoder.lm.model.**", "model.language_model.**"),
            rename("decoder.lm.lm_head.weight", "lm_head.weight"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        vision = config.get("vision_config") or {}
        check_only(vision, {"model_type": "siglip_vision_model"}, "vision_config")
        text = {"model_type": "llama"} | (config.get("text_config") or {})
        decoder = language_model(text, tied="lm_head.weight" not in shapes)
        siglip = siglip_tower(vision, head="unused")
        image = (TOP | config)["image_token_id"]
        if config["model_type"] == "deepseek_vl":
            connector = MLPConnector(encoder_dim=siglip.dim, decoder_dim=decoder.dim, special_tokens=0)
            return chat_model(siglip, connector, decoder, image_token_id=image)
        high = config.get("high_res_vision_config") or {}
        check_only(high, {"model_type": "sam_vision_model"}, "high_res_vision_config")
        sam = sam_tower(high, siglip.image_size // siglip.patch_size)
        hybrid = HybridEncoder(low=siglip, high=sam)
        middleware = HybridMLP(encoder_dims=hybrid.dims, decoder_dim=decoder.dim)
        return chat_model(hybrid, middleware, decoder, image_token_id=image)

    def fields_of(self, model: VLM) -> Config | None:
        vision, decoder = vision_configs(model), model.decoder
        if vision is None or type(decoder) is not HFCausalLM or model.image_token_id is None:
            return None
        kind = "deepseek_vl_hybrid" if "high_res_vision_config" in vision else "deepseek_vl"
        vocabulary = {"vocab_size": decoder.vocab_size}
        image = model.image_token_id
        return {"model_type": kind, "image_token_id": image, **vision, "text_config": vocabulary}

    def is_config_of(self, loaded: Config, fields: Config) -> bool:
        return loaded.get("model_type") == fields["model_type"]

    def new_config(self, model: VLM, fields: Config) -> Config:
        classes = [ARCHITECTURES[fields["model_type"]]]
        text = {"tie_word_embeddings": model.decoder.tied, "text_config": language_config(model.decoder)}
        del fields["text_config"]
        return {"architectures": classes, **fields, **text}


def vision_configs(model: VLM) -> Config | None:
    """The configs of the towers of either variant, None for other parts."""
    encoder, connector = model.encoder, model.middleware
    low = encoder.low if isinstance(encoder, HybridEncoder) else encoder
    if not isinstance(low, SiglipViT) or low.post_norm != "all" or low.special_tokens:
        return None
    if connector is None or connector.layers != (-1,):
        return None
    if isinstance(encoder, HybridEncoder):
        if not (isinstance(encoder.high, SamViT) and isinstance(connector, HybridMLP)):
            return None
        return {"vision_config": siglip_tower_config(low), "high_res_vision_config": sam_tower_config(encoder.high)}
    plain = isinstance(connector, MLPConnector) and connector.depth == 2 and connector.mlp1[0].bias is not None
    return {"vision_config": siglip_tower_config(low)} if plain and connector.skipped == 0 else None


LAYOUT = DeepseekVLHF()
