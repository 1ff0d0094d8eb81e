"""LLaVA 1.5 as transformers' `LlavaForConditionalGeneration` reads it: CLIP or SigLIP, two layers, any language model."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.clip import (
    SIGLIP_VISION,
    VISION,
    clip_tower,
    clip_tower_config,
    siglip_tower,
    siglip_tower_config,
    vision_rules,
)
from lightning_internvl.checkpoints.families.intern_vit import check_only
from lightning_internvl.checkpoints.families.language_model import language_config, language_model, language_rules
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "LLaVA of transformers (model_type 'llava' with a vision_config)"
NATIVE = True
SINGLE_FILE = False

TOP: Config = {
    "image_token_index": 32000, "image_seq_length": 576, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "multimodal_projector_bias": True,
}  # fmt: skip
ONLY: Config = {"projector_hidden_act": "gelu"}
# The tower where a config leaves it out whole.
LARGE: Config = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
    "patch_size": 14,
}  # fmt: skip
STRATEGIES = {"default": False, "full": True}  # whether the first token goes to the decoder too


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout; LLaVA's own code has fields `mm_*`."""
    return config.get("model_type") == "llava" and not any(key.startswith("mm_") for key in config)


def canonical(name: str) -> str | None:
    """Releases of the library differ in where they put the parts."""
    if name.endswith(".position_ids"):
        return None
    for old, new in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", "")):
        if name.startswith(old):
            name = new + name[len(old) :]
            break
    return name.replace("vision_tower.vision_model.", "vision_tower.", 1)


def rules(config: Config) -> list[NameRule]:
    """Tower, projector and language model."""
    projector = {"0": "linear_1", "2": "linear_2"}
    return [
        *vision_rules("vision_tower."),
        *(rename(f"middleware.mlp1.{ours}.*", f"multi_modal_projector.{name}.*") for ours, name in projector.items()),
        *language_rules({}),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    top = TOP | {"image_token_index": config.get("image_token_id", TOP["image_token_index"])} | config
    check_only(config, ONLY, "config.json")
    strategy = top["vision_feature_select_strategy"]
    if strategy not in STRATEGIES:
        raise ValueError(f"vision_feature_select_strategy={strategy!r} is not known; valid choices: {', '.join(STRATEGIES)}")
    encoder = _tower(config.get("vision_config") or LARGE)
    text = {"model_type": "llama"} | (config.get("text_config") or {})
    decoder = language_model(text, tied="language_model.lm_head.weight" not in shapes)
    connector = MLPConnector(
        encoder_dim=encoder.dim,
        decoder_dim=decoder.dim,
        patch_layer=top["vision_feature_layer"],
        keep_special=STRATEGIES[strategy],
        bias=top["multimodal_projector_bias"],
    )
    return VLM(encoder, connector, decoder, objectives={"next_token": NextToken()}, image_token_id=top["image_token_index"])


def _tower(vision: Config) -> CLIPViT:
    kind = vision.get("model_type", "clip_vision_model")
    if kind == "clip_vision_model":
        return clip_tower(vision, post_norm="unused")
    if kind == "siglip_vision_model":
        return siglip_tower(vision, head="unused", post_norm="unused")
    raise ValueError(f"vision_config.model_type={kind!r} is not supported; valid choices: clip_vision_model, siglip_vision_model")


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, connector, decoder = model.encoder, model.middleware, model.decoder
    if not (isinstance(encoder, CLIPViT) and isinstance(connector, MLPConnector) and isinstance(decoder, HFCausalLM)):
        return None
    vision = siglip_tower_config(encoder) if isinstance(encoder, SiglipViT) else clip_tower_config(encoder)
    # One placeholder for a picture (LLaVA's own layout) is no token of the library.
    if vision is None or connector.depth != 2 or model.image_placeholders is not None or model.image_token_id is None:
        return None
    if not _reads_as_there(encoder, connector):
        return None
    made = {
        "image_token_index": model.image_token_id,
        "image_seq_length": connector.tokens_out(encoder.num_tokens()),
        "vision_feature_layer": connector.layers[0] if len(connector.layers) == 1 else list(connector.layers),
        "vision_feature_select_strategy": "full" if connector.skipped == 0 else "default",
        "multimodal_projector_bias": connector.mlp1[0].bias is not None,
        "vision_config": vision,
        "text_config": {"vocab_size": decoder.vocab_size},
    }
    loaded = model.config or {}
    if recognises(loaded, {}):
        kind = SIGLIP_VISION if isinstance(encoder, SiglipViT) else VISION
        known = made | ({} if "image_token_index" in loaded else {"image_token_id": made["image_token_index"]})
        return updated(loaded, TOP | {"vision_config": kind | {"model_type": vision["model_type"]}}, known)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": decoder.tied,
        **made,
        "text_config": language_config(decoder),
    }


def _reads_as_there(encoder: CLIPViT, connector: MLPConnector) -> bool:
    """Whether the library, which knows no norm behind the last block and no pooled vector there, hands on the same tokens."""
    last = any(layer in (-1, encoder.depth) for layer in connector.layers)
    if not last or encoder.post_norm == "unused":
        return connector.skipped <= 1
    return encoder.post_norm == "cls" and connector.skipped == 1
