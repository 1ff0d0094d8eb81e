"""InternVL 1.5 and later as transformers' `InternVLForConditionalGeneration` reads it."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.intern_vit import (
    NATIVE_DEFAULTS,
    check_only,
    native_rules,
    native_tower,
    native_tower_config,
)
from lightning_internvl.checkpoints.families.language_model import language_config, language_model, language_rules
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.pixel_shuffle import PixelShuffleMLP
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "InternVL of transformers (model_type 'internvl' with a text_config)"
NATIVE = True
SINGLE_FILE = False

TOP: Config = {"downsample_ratio": 0.5, "vision_feature_layer": -1, "image_token_id": 151667}
ONLY: Config = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}
PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout; the first InternVL has the same model_type."""
    return config.get("model_type") == "internvl" and "text_config" in config


def canonical(name: str) -> str | None:
    """Releases of the library differ in where they put the parts."""
    for old, new in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", "")):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def rules(config: Config) -> list[NameRule]:
    """Tower, projector and language model."""
    return [
        *native_rules("vision_tower."),
        *(rename(f"middleware.mlp1.{ours}.*", f"multi_modal_projector.{name}.*") for ours, name in PROJECTOR.items()),
        *language_rules({}),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    top = TOP | config
    check_only(config, ONLY, "config.json")
    encoder = native_tower(config.get("vision_config", {}))
    decoder = language_model(config["text_config"], tied="language_model.lm_head.weight" not in shapes)
    connector = PixelShuffleMLP(
        encoder_dim=encoder.dim,
        decoder_dim=decoder.dim,
        patch_layer=top["vision_feature_layer"],
        factor=round(1 / top["downsample_ratio"]),
    )
    return VLM(encoder, connector, decoder, objectives={"next_token": NextToken()}, image_token_id=top["image_token_id"])


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, connector, decoder = model.encoder, model.middleware, model.decoder
    if not (isinstance(encoder, InternViT) and isinstance(connector, PixelShuffleMLP) and isinstance(decoder, HFCausalLM)):
        return None
    vision = native_tower_config(encoder)
    if vision is None or connector.version != "v2" or model.image_token_id is None:
        return None
    made = {
        "image_token_id": model.image_token_id,
        "image_seq_length": connector.tokens_out(encoder.num_tokens()),
        "downsample_ratio": 1 / connector.factor,
        "vision_feature_layer": connector.patch_layer,
        "vision_config": vision,
        "text_config": {"vocab_size": decoder.vocab_size},
    }
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP | {"vision_config": NATIVE_DEFAULTS}, made)
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "tie_word_embeddings": decoder.tied,
        **made,
        "text_config": language_config(decoder),
    }
