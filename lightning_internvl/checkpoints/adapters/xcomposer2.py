"""InternLM-XComposer2 as released: a CLIP tower with a resized position table, `vision_proj`, and InternLM2 with Partial LoRA
(`modeling_internlm_xcomposer2.py`, `build_mlp.py`)."""

from __future__ import annotations

import dataclasses
import functools

from lightning_internvl.checkpoints.adapters import Config, Shapes, updated
from lightning_internvl.checkpoints.families.clip import VISION, clip_tower, clip_tower_config, vision_rules
from lightning_internvl.checkpoints.families.intern_vit import check_only
from lightning_internvl.checkpoints.families.language_model import fused_rows, internlm2_config, language_model, language_rules
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.decoders.plora import PartialLoRACausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken

NAME = "InternLM-XComposer2 as released (model_type 'internlmxcomposer2')"
NATIVE = SINGLE_FILE = False

IMAGE = -200  # stands for one visual token; no word
TOWER = "vit.vision_tower.vision_model."
# The released config says nothing of the tower (CLIP ViT-L/14-336) and the ranks; both are written in its code.
CLIP: Config = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
TOP: Config = {"img_size": 490, "lora_r": 256, "lora_alpha": 256, "clip_vision_config": VISION | CLIP}
ONLY: Config = {"vision_proj": "mlp2x_gelu", "hidden_act": "silu"}


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a `config.json` is of this layout; some releases say model_type 'internlm'."""
    named = any("XComposer2" in name for name in config.get("architectures") or [])
    return config.get("model_type") == "internlmxcomposer2" or named


def canonical(name: str) -> str | None:
    """Buffers that older releases stored are no weights."""
    return None if name.endswith((".rotary_emb.inv_freq", ".position_ids")) else name


def rules(config: Config) -> list[NameRule]:
    """Tower, projector, language model and its updates."""
    return [
        *vision_rules(TOWER),
        rename("middleware.mlp1.**", "vision_proj.**"),
        *_update_rules(config),
        *language_rules(_internlm2(config), prefix=""),
    ]


def _update_rules(config: Config) -> list[NameRule]:
    ours, theirs = "decoder.lm.model.layers.*", "model.layers.*"
    attention, mlp = f"{ours}.self_attn.plora", f"{ours}.mlp.plora"
    heads = config["num_attention_heads"]
    # The rows of B lie in the fused order of `wqkv`, as those of its weight do.
    fused = fused_rows(ours, f"{theirs}.attention.wqkv.Plora_B.weight", "", heads, config.get("num_key_value_heads") or heads)
    rules = [
        rename(f"{attention}.qkv.a", f"{theirs}.attention.wqkv.Plora_A.weight"),
        dataclasses.replace(fused, ours=tuple(f"{attention}.qkv.b.{x}_proj" for x in "qkv")),
        rename(f"{attention}.out.a", f"{theirs}.attention.wo.Plora_A.weight"),
        rename(f"{attention}.out.b.o_proj", f"{theirs}.attention.wo.Plora_B.weight"),
    ]
    for name, key in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        rules.append(rename(f"{mlp}.{key}.a", f"{theirs}.feed_forward.{name}.Plora_A.weight"))
        rules.append(rename(f"{mlp}.{key}.b.{key}_proj", f"{theirs}.feed_forward.{name}.Plora_B.weight"))
    return rules


def _internlm2(config: Config) -> Config:
    return {**config, "model_type": "internlm2"}


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    check_only(config, ONLY, "config.json")
    top, vision = TOP | config, CLIP | config.get("clip_vision_config", {})
    encoder = clip_tower(vision | {"image_size": top["img_size"]}, post_norm="unused")
    make = functools.partial(PartialLoRACausalLM, rank=top["lora_r"], alpha=top["lora_alpha"])
    decoder = language_model(_internlm2(config), tied="output.weight" not in shapes, make=make)
    connector = MLPConnector(encoder_dim=encoder.dim, decoder_dim=decoder.dim)
    return VLM(encoder, connector, decoder, objectives={"next_token": NextToken()}, image_token_id=IMAGE)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    encoder, connector, decoder = model.encoder, model.middleware, model.decoder
    if not (isinstance(encoder, CLIPViT) and isinstance(connector, MLPConnector) and isinstance(decoder, PartialLoRACausalLM)):
        return None
    plain = connector.layers[0] in (-1, encoder.depth) and connector.depth == 2 and not connector.keep_special
    if not plain or decoder.lm.config.model_type != "llama":
        return None
    if (vision := clip_tower_config(encoder)) is None:
        return None
    made = {
        "img_size": encoder.image_size,
        "lora_r": decoder.rank,
        "lora_alpha": decoder.alpha,
        "clip_vision_config": {key: value for key, value in vision.items() if key != "image_size"},
        "vocab_size": decoder.vocab_size,
    }
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, TOP, made)
    return {
        "architectures": ["InternLMXComposer2ForCausalLM"],
        "model_type": "internlmxcomposer2",
        **internlm2_config(decoder),
        **made,
    }
