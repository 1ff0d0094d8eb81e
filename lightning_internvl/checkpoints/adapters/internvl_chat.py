"""InternVL-Chat V1-1 to 1.5 and later, as released: `vision_model`, `mlp1`, `language_model` (`modeling_internvl_chat.py`)."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.intern_vit import DEFAULTS, release_rules, tower, tower_config
from lightning_internvl.checkpoints.families.language_model import language_config, language_model, language_rules
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.pixel_shuffle import PixelShuffleMLP
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "InternVL-Chat as released (model_type 'internvl_chat')"
NATIVE = SINGLE_FILE = False

TOP: Config = {"select_layer": -1, "downsample_ratio": 0.5, "ps_version": "v1", "use_backbone_lora": 0, "use_llm_lora": 0}
HEADS = ("language_model.lm_head.weight", "language_model.output.weight")


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout."""
    return config.get("model_type") == "internvl_chat"


def canonical(name: str) -> str | None:
    """Rotary tables that older releases stored are no weights."""
    return None if name.endswith(".rotary_emb.inv_freq") else name


def rules(config: Config) -> list[NameRule]:
    """Tower and MLP have our names; the language model those of its own layout."""
    return [
        *release_rules("vision_model."),
        rename("middleware.mlp1.**", "mlp1.**"),
        *language_rules(config["llm_config"]),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for LoRA weights that were not merged, or a setting that the parts do not have.
    """
    top = TOP | config
    if top["use_backbone_lora"] or top["use_llm_lora"] or any(".lora_" in name for name in shapes):
        raise ValueError("this InternVL-Chat checkpoint holds LoRA weights, which must be merged and use_*_lora set to 0 first")
    encoder = tower(config["vision_config"])
    decoder = language_model(config["llm_config"], tied=not any(name in shapes for name in HEADS))
    connector = PixelShuffleMLP(
        encoder_dim=encoder.dim,
        decoder_dim=decoder.dim,
        patch_layer=top["select_layer"],
        factor=round(1 / top["downsample_ratio"]),
        version=top["ps_version"],
    )
    return VLM(encoder, connector, decoder, objectives={"next_token": NextToken()}, image_token_id=config.get("image_token_id"))


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, connector, decoder = model.encoder, model.middleware, model.decoder
    if not (isinstance(encoder, InternViT) and isinstance(connector, PixelShuffleMLP) and isinstance(decoder, HFCausalLM)):
        return None
    if (vision := tower_config(encoder)) is None:
        return None
    made = {
        "select_layer": connector.patch_layer,
        "downsample_ratio": 1 / connector.factor,
        "ps_version": connector.version,
        "vision_config": vision,
        "llm_config": {"vocab_size": decoder.vocab_size},
    }
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP | {"vision_config": DEFAULTS}, made)
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        **made,
        "llm_config": {"architectures": [type(decoder.lm).__name__], **language_config(decoder)},
    } | ({} if model.image_token_id is None else {"image_token_id": model.image_token_id})
