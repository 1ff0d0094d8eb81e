"""InternVL-Chat 1.0 in the layout of LLaVA's code: QLLaMA and two MLPs, or patches and one MLP (`internvl_chat_llava`)."""

from __future__ import annotations

import re

from torch import nn

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.adapters.internvl_14b import LLAMA, TOP, qllama_config, qllama_of
from lightning_internvl.checkpoints.families.intern_vit import DEFAULTS, release_rules, tower, tower_config
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.placeholders import ImagePlaceholders
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "InternVL-Chat 1.0 (LLaVA code with InternViT: mm_projector_type 'two_mlp' or 'mlp2x_gelu')"
NATIVE = SINGLE_FILE = False

TOWER = "model.vision_tower.vision_tower."
# Fields of LLaVA that are not the language model's.
_LLAVA = re.compile(r"mm_.*|vision_.*|.*image.*|tune_mm.*|use_mm.*|tokenizer_.*|architectures|model_type|run_.*|text_config")


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a config is of LLaVA's code with a tower of InternVL."""
    return config.get("model_type") in ("llava", "llava_llama") and "vision_config" in config.get("vision_tower", {})


def canonical(name: str) -> str | None:
    """Rotary tables that older releases stored are no weights."""
    return None if name.endswith(".rotary_emb.inv_freq") else name


def rules(config: Config) -> list[NameRule]:
    """The tower with QLLaMA beside it, or alone; the projector; LLaMA at the top."""
    if config["mm_projector_type"] == "two_mlp":
        parts = [*release_rules(f"{TOWER}vision_model."), rename("middleware.*.**", "model.mm_projector.*.**")]
        inside = [rename("middleware.qllama.**", f"{TOWER}qllama.**"), rename("middleware.query_tokens", f"{TOWER}query_tokens")]
        parts = [*inside, *parts]
    else:
        parts = [*release_rules(TOWER), rename("middleware.mlp1.**", "model.mm_projector.**")]
    return [*parts, rename("decoder.lm.**", "**")]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a projector that the layout does not have, or a setting that the parts do not have.
    """
    parts, kind = config["vision_tower"], config.get("mm_projector_type")
    if kind not in ("two_mlp", "mlp2x_gelu"):
        raise ValueError(f"mm_projector_type={kind!r} is not known with InternViT; valid choices: two_mlp, mlp2x_gelu")
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise ValueError(f"mm_vision_select_feature={config['mm_vision_select_feature']!r} is not supported; it must be 'patch'")
    encoder = tower(parts["vision_config"])
    decoder = language_model(_text_config(config), tied="lm_head.weight" not in shapes)
    layer = config.get("mm_vision_select_layer", -4)
    if kind == "two_mlp":
        llama = LLAMA | parts["qllama_config"]
        chat = {"embed_dim": None, "decoder_dim": decoder.dim, "patches": True, "patch_layer": layer}
        middleware: nn.Module = qllama_of(TOP | parts, encoder.dim, llama, **chat)
    else:
        middleware = MLPConnector(encoder_dim=encoder.dim, decoder_dim=decoder.dim, patch_layer=layer)
    placeholders = ImagePlaceholders(config.get("image_token_index", -200), keep_padding=True)
    return VLM(encoder, middleware, decoder, objectives={"next_token": NextToken()}, image_placeholders=placeholders)


def _text_config(config: Config) -> Config:
    flat = {key: value for key, value in config.items() if not _LLAVA.fullmatch(key)}
    return {"model_type": "llama"} | config.get("text_config", flat)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, middleware, decoder = model.encoder, model.middleware, model.decoder
    if not (isinstance(encoder, InternViT) and isinstance(decoder, HFCausalLM)) or decoder.lm.config.model_type != "llama":
        return None
    if (vision := tower_config(encoder)) is None:
        return None
    parts: Config = {"vision_config": vision}
    if isinstance(middleware, QLLaMA) and middleware.patches and middleware.clip_projector is None:
        kind, layer = "two_mlp", middleware.layers[-1]
        parts |= {"num_query_token": middleware.num_queries, "qllama_config": qllama_config(middleware)}
        parts |= {"cross_attention_frequency": middleware.cross_every}
    elif isinstance(middleware, MLPConnector):
        kind, layer = "mlp2x_gelu", middleware.layers[0]
    else:
        return None
    made = {"mm_projector_type": kind, "mm_vision_select_layer": layer, "vision_tower": parts}
    loaded = model.config or {}
    if recognises(loaded, {}):
        defaults = {"vision_tower": {**TOP, "vision_config": DEFAULTS, "qllama_config": LLAMA}}
        return updated(loaded, defaults, made)
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_select_feature": "patch",
        **made,
        "text_config": language_config(decoder),
    }
