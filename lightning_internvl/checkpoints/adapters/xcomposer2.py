"""InternLM-XComposer2 as released: a CLIP tower with a resized position table, `vision_proj`, and
InternLM2 with Partial LoRA (`modeling_internlm_xcomposer2.py`, `build_mlp.py`)."""

from __future__ import annotations

import dataclasses
import functools

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.clip import VISION, clip_tower, clip_tower_config, vision_rules
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import fused_rows, internlm2_config, language_model, language_rules
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.plora import PartialLoRACausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.model.vlm import VLM

IMAGE = -200  # stands for one visual token; no word
TOWER = "vit.vision_tower.vision_model."
# The released config says nothing of the tower (CLIP ViT-L/14-336) and the ranks; both are written
# in its code.
CLIP: Config = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
TOP: Config = {"img_size": 490, "lora_r": 256, "lora_alpha": 256, "clip_vision_config": VISION | CLIP}
ONLY: Config = {"vision_proj": "mlp2x_gelu", "hidden_act": "silu"}


class XComposer2(Layout):
    NAME = "InternLM-XComposer2 as released (model_type 'internlmxcomposer2')"
    MODEL_TYPES = ("internlmxcomposer2",)
    ARCHITECTURE = "InternLMXComposer2ForCausalLM"
    DEFAULTS = TOP

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """Some releases say model_type 'internlm'."""
        named = any("XComposer2" in name for name in config.get("architectures") or [])
        return named or super().recognises(config, shapes)

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *vision_rules(TOWER),
            rename("middleware.mlp1.**", "vision_proj.**"),
            *_update_rules(config),
            *language_rules(_internlm2(config), prefix=""),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        check_only(config, ONLY, "config.json")
        top, vision = TOP | config, CLIP | config.get("clip_vision_config", {})
        encoder = clip_tower(vision | {"image_size": top["img_size"]}, post_norm="unused")
        make = functools.partial(PartialLoRACausalLM, rank=top["lora_r"], alpha=top["lora_alpha"])
        decoder = language_model(_internlm2(config), tied="output.weight" not in shapes, make=make)
        connector = MLPConnector(encoder_dim=encoder.dim, decoder_dim=decoder.dim)
        return chat_model(encoder, connector, decoder, image_token_id=IMAGE)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, connector, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, CLIPViT) and isinstance(connector, MLPConnector)):
            return None
        if not isinstance(decoder, PartialLoRACausalLM) or decoder.lm.config.model_type != "llama":
            return None
        last = connector.layers[0] in (-1, encoder.depth)
        if not last or connector.depth != 2 or connector.keep_special:
            return None
        if (vision := clip_tower_config(encoder)) is None:
            return None
        return {
            "img_size": vision.pop("image_size"),
            "lora_r": decoder.rank,
            "lora_alpha": decoder.alpha,
            "clip_vision_config": vision,
            "vocab_size": decoder.vocab_size,
        }

    def new_config(self, model: VLM, fields: Config) -> Config:
        return super().new_config(model, internlm2_config(model.decoder) | fields)


def _update_rules(config: Config) -> list[NameRule]:
    ours, theirs = "decoder.lm.model.layers.*", "model.layers.*"
    attention, mlp = f"{ours}.self_attn.plora", f"{ours}.mlp.plora"
    heads = config["num_attention_heads"]
    # The rows of B lie in the fused order of `wqkv`, as those of its weight do.
    groups = config.get("num_key_value_heads") or heads
    fused = fused_rows(ours, f"{theirs}.attention.wqkv.Plora_B.weight", "", heads, groups)
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


LAYOUT = XComposer2()
