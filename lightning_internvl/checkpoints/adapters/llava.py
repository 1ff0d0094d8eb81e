"""LLaVA v1 and v1.5 in the layout of its own code: a CLIP tower, a linear or MLP projector, LLaMA at the top (`llava_llama`)."""

from __future__ import annotations

import re

from torch import nn

from lightning_internvl.checkpoints.adapters import Config, Shapes, internvl_chat_llava, updated
from lightning_internvl.checkpoints.families.clip import VISION, clip_tower, clip_tower_config, vision_rules
from lightning_internvl.checkpoints.families.intern_vit import check_only
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.connector import LinearConnector, MLPConnector
from lightning_internvl.model.placeholders import ImagePlaceholders
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "LLaVA v1 and v1.5 (LLaVA code with a CLIP tower: mm_projector_type 'linear' or 'mlp2x_gelu')"
NATIVE = SINGLE_FILE = False

TOWER = "model.vision_tower.vision_tower.vision_model."
HEAD_DIM = 64  # of every tower that OpenAI released
TOP: Config = {
    "mm_projector_type": "linear", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_token_index": -200,
}  # fmt: skip
ONLY: Config = {"mm_patch_merge_type": "flat"}
KINDS = {"patch": False, "cls_patch": True}  # whether the CLS token goes to the decoder too
PUBLISHED = {224: "openai/clip-vit-large-patch14", 336: "openai/clip-vit-large-patch14-336"}
# Fields of LLaVA that are not the language model's.
_LLAVA = re.compile(
    r"mm_.*|vision_.*|.*image.*|tune_mm.*|use_mm.*|freeze_mm.*|tokenizer_.*|truncated_.*|architectures|model_type|text_config"
)


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a config is of LLaVA's code with a tower of CLIP; that of transformers has no fields `mm_*`."""
    known = config.get("model_type") in ("llava", "llava_llama") and any(key.startswith("mm_") for key in config)
    return known and not internvl_chat_llava.recognises(config, shapes)


def canonical(name: str) -> str | None:
    """Tables that older releases stored are no weights."""
    return None if name.endswith((".rotary_emb.inv_freq", ".position_ids")) else name


def rules(config: Config) -> list[NameRule]:
    """The tower, the projector, LLaMA."""
    linear = (TOP | config)["mm_projector_type"] == "linear"
    ours = "middleware.proj.*" if linear else "middleware.mlp1.*.*"
    theirs = "model.mm_projector.*" if linear else "model.mm_projector.*.*"
    return [*vision_rules(TOWER), rename(ours, theirs), rename("decoder.lm.**", "**")]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a projector or another setting that the parts do not have, or files without the tower.
    """
    top = TOP | config
    check_only(config, ONLY, "config.json")
    if str(top.get("image_aspect_ratio")).startswith("anyres"):
        raise ValueError("image_aspect_ratio='anyres' (LLaVA 1.6) is not supported; it must be 'square' or 'pad'")
    encoder = clip_tower(_vision_config(config, shapes), post_norm="unused")
    decoder = language_model(_text_config(config), tied="lm_head.weight" not in shapes)
    kind, feature = top["mm_projector_type"], top["mm_vision_select_feature"]
    if feature not in KINDS:
        raise ValueError(f"mm_vision_select_feature={feature!r} is not known; valid choices: {', '.join(KINDS)}")
    reads = {"patch_layer": top["mm_vision_select_layer"], "keep_special": KINDS[feature]}
    dims = {"encoder_dim": encoder.dim, "decoder_dim": decoder.dim}
    if kind == "linear":
        connector: nn.Module = LinearConnector(**dims, **reads)
    elif match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        connector = MLPConnector(**dims, **reads, depth=int(match[1]))
    else:
        raise ValueError(f"mm_projector_type={kind!r} is not known; valid choices: linear, mlp2x_gelu and other depths")
    placeholders = ImagePlaceholders(
        top["image_token_index"],
        side=top.get("tokenizer_padding_side") or "right",
        max_length=top.get("tokenizer_model_max_length"),
    )
    return VLM(encoder, connector, decoder, objectives={"next_token": NextToken()}, image_placeholders=placeholders)


def _vision_config(config: Config, shapes: Shapes) -> Config:
    """The tower's settings: in the config, else in the shapes, which tell all but the heads."""
    if "vision_config" in config:
        return config["vision_config"]
    if (patches := shapes.get(f"{TOWER}embeddings.patch_embedding.weight")) is None:
        tower = config.get("mm_vision_tower")
        raise ValueError(f"the files hold no tower ({TOWER}*); put the weights of mm_vision_tower={tower!r} beside them")
    dim, _, patch, _ = patches
    blocks = {name.split(".")[6] for name in shapes if name.startswith(f"{TOWER}encoder.layers.")}
    return {
        "hidden_size": dim,
        "patch_size": patch,
        "image_size": patch * round((shapes[f"{TOWER}embeddings.position_embedding.weight"][0] - 1) ** 0.5),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, dim // HEAD_DIM),
        "intermediate_size": shapes[f"{TOWER}encoder.layers.0.mlp.fc1.weight"][0],
    }


def _text_config(config: Config) -> Config:
    flat = {key: value for key, value in config.items() if not _LLAVA.fullmatch(key)}
    return {"model_type": "llama"} | config.get("text_config", flat)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, connector, decoder = model.encoder, model.middleware, model.decoder
    towers = isinstance(encoder, CLIPViT) and (vision := clip_tower_config(encoder)) is not None
    if not towers or not isinstance(connector, LinearConnector | MLPConnector) or not isinstance(decoder, HFCausalLM):
        return None
    if len(connector.layers) != 1 or decoder.lm.config.model_type != "llama" or not _biased(connector):
        return None
    made = {
        "mm_projector_type": "linear" if isinstance(connector, LinearConnector) else f"mlp{connector.depth}x_gelu",
        "mm_vision_select_layer": connector.layers[0],
        "mm_vision_select_feature": "cls_patch" if connector.keep_special else "patch",
    }
    loaded = model.config or {}
    if recognises(loaded, {}):
        own = {"vision_config": vision} if "vision_config" in loaded or encoder.image_size not in PUBLISHED else {}
        own |= {"text_config": {"vocab_size": decoder.vocab_size}} if "text_config" in loaded else {}
        defaults = TOP | {"vision_config": VISION | {"model_type": "clip_vision_model"}}
        return updated(loaded, defaults, made | own)
    return {
        **language_config(decoder),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": PUBLISHED.get(encoder.image_size) if encoder.dim == 1024 else None,
        "mm_hidden_size": encoder.dim,
        "vision_config": vision,
        **made,
    }


def _biased(connector: LinearConnector | MLPConnector) -> bool:
    return isinstance(connector, LinearConnector) or connector.mlp1[0].bias is not None
