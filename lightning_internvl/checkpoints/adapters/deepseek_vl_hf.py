"""DeepSeek-VL as transformers reads it: `DeepseekVLForConditionalGeneration` (SigLIP alone, 1.3B) and
`DeepseekVLHybridForConditionalGeneration` (SigLIP and SAM, 7B)."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.clip import SIGLIP_VISION, siglip_tower, siglip_tower_config, vision_rules
from lightning_internvl.checkpoints.families.intern_vit import check_only
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.families.sam import DEFAULTS as SAM, moved, native_rules, sam_tower, sam_tower_config
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.hybrid import HybridEncoder
from lightning_internvl.encoders.sam_vit import SamViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.hybrid_mlp import HybridMLP
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "DeepSeek-VL of transformers (model_type 'deepseek_vl' or 'deepseek_vl_hybrid')"
NATIVE = True
SINGLE_FILE = False

ARCHITECTURES = {
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "deepseek_vl_hybrid": "DeepseekVLHybridForConditionalGeneration",
}
TOP: Config = {"image_token_id": 100015}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") in ARCHITECTURES


def canonical(name: str) -> str | None:
    """Older releases of the library put SigLIP one level deeper, and stored position ids."""
    return None if name.endswith("position_ids") else name.replace("model.vision_model.vision_model.", "model.vision_model.")


def rules(config: Config) -> list[NameRule]:
    """SigLIP, SAM in three places, the aligner, the language model."""
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


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    vision = config.get("vision_config") or {}
    check_only(vision, {"model_type": "siglip_vision_model"}, "vision_config")
    decoder = language_model({"model_type": "llama"} | (config.get("text_config") or {}), tied="lm_head.weight" not in shapes)
    siglip = siglip_tower(vision, head="unused")
    if config["model_type"] == "deepseek_vl":
        parts = (siglip, MLPConnector(encoder_dim=siglip.dim, decoder_dim=decoder.dim, special_tokens=0))
    else:
        high = config.get("high_res_vision_config") or {}
        check_only(high, {"model_type": "sam_vision_model"}, "high_res_vision_config")
        hybrid = HybridEncoder(low=siglip, high=sam_tower(high, siglip.image_size // siglip.patch_size))
        parts = (hybrid, HybridMLP(encoder_dims=hybrid.dims, decoder_dim=decoder.dim))
    image = (TOP | config)["image_token_id"]
    return VLM(*parts, decoder, objectives={"next_token": NextToken()}, image_token_id=image)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    vision, decoder = vision_configs(model), model.decoder
    if vision is None or type(decoder) is not HFCausalLM or model.image_token_id is None:
        return None
    kind = "deepseek_vl_hybrid" if "high_res_vision_config" in vision else "deepseek_vl"
    made = {"model_type": kind, "image_token_id": model.image_token_id, **vision}
    loaded = model.config or {}
    if loaded.get("model_type") == kind:
        defaults = TOP | {"vision_config": SIGLIP_VISION, "high_res_vision_config": SAM}
        return updated(loaded, defaults, made | {"text_config": {"vocab_size": decoder.vocab_size}})
    return {
        "architectures": [ARCHITECTURES[kind]],
        **made,
        "tie_word_embeddings": decoder.tied,
        "text_config": language_config(decoder),
    }


def vision_configs(model: VLM) -> Config | None:
    """The configs of the towers of either variant, None for other parts."""
    encoder, connector = model.encoder, model.middleware
    low = encoder.low if isinstance(encoder, HybridEncoder) else encoder
    siglip = isinstance(low, SiglipViT) and low.post_norm == "all" and not low.special_tokens
    if not siglip or connector is None or connector.layers != (-1,):
        return None
    if isinstance(encoder, HybridEncoder):
        if not (isinstance(encoder.high, SamViT) and isinstance(connector, HybridMLP)):
            return None
        return {"vision_config": siglip_tower_config(low), "high_res_vision_config": sam_tower_config(encoder.high)}
    plain = isinstance(connector, MLPConnector) and connector.depth == 2 and connector.mlp1[0].bias is not None
    return {"vision_config": siglip_tower_config(low)} if plain and connector.skipped == 0 else None
