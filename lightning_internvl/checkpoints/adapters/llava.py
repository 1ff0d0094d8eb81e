"""LLaVA v1 and v1.5 in the layout of its own code: a CLIP tower, a linear or MLP projector, LLaMA
at the top (`llava_llama`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

from lightning_internvl.checkpoints.adapters import internvl_chat_llava
from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.companion import Companion
from lightning_internvl.checkpoints.families.clip import VISION, clip_tower, clip_tower_config, tower_names, vision_rules
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import language_config, language_model
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.hub import NOTES
from lightning_internvl.messages import check_choice
from lightning_internvl.middleware.connector import LinearConnector, MLPConnector
from lightning_internvl.model.placeholders import ImagePlaceholders
from lightning_internvl.model.vlm import VLM

TOWER = "model.vision_tower.vision_tower.vision_model."
BLOCKS, LANGUAGE = "model.layers.", ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
BASE = "_name_or_path"  # where LLaVA's pretraining says which language model it started from
HEAD_DIM = 64  # of every tower that OpenAI released
TOP: Config = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_token_index": -200,
}
ONLY: Config = {"mm_patch_merge_type": "flat"}
KINDS = {"patch": False, "cls_patch": True}  # whether the CLS token goes to the decoder too
PUBLISHED = {224: "openai/clip-vit-large-patch14", 336: "openai/clip-vit-large-patch14-336"}


class Llava(Layout):
    NAME = "LLaVA v1 and v1.5 (LLaVA code with a CLIP tower: mm_projector_type 'linear' or 'mlp2x_gelu')"
    MODEL_TYPES = ("llava_llama", "llava")
    ARCHITECTURE = "LlavaLlamaForCausalLM"
    DEFAULTS = TOP | {"vision_config": VISION | {"model_type": "clip_vision_model"}}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """The layout of transformers has no fields `mm_*`; InternVL-Chat 1.0 has another tower."""
        known = super().recognises(config, shapes) and any(key.startswith("mm_") for key in config)
        return known and not internvl_chat_llava.LAYOUT.recognises(config, shapes)

    def companions(self, config: Config, shapes: Shapes) -> list[Companion]:
        """As released the files hold no tower: LLaVA takes it from where its config says. Its
        pretraining writes the projector alone, whose config is the base's."""
        found = []
        if not any(there.startswith(TOWER) for there in shapes):
            name, names = config.get("mm_vision_tower"), partial(tower_names, TOWER)
            found.append(Companion("encoder", name, "mm_vision_tower", f"holds no tower ({TOWER}*)", names, _with_tower))
        if shapes and all(there.startswith("model.mm_projector.") for there in shapes):
            lacks = f"holds LLaVA's projector alone, no language model ({BLOCKS}*)"
            found.append(Companion("decoder", config.get(BASE), BASE, lacks, _language_names, _with_language))
        return found

    def rules(self, config: Config) -> list[NameRule]:
        linear = (TOP | config)["mm_projector_type"] == "linear"
        ours = "middleware.proj.*" if linear else "middleware.mlp1.*.*"
        theirs = "model.mm_projector.*" if linear else "model.mm_projector.*.*"
        return [*vision_rules(TOWER), rename(ours, theirs), rename("decoder.lm.**", "**")]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        top = TOP | config
        check_only(config, ONLY, "config.json")
        if str(top.get("image_aspect_ratio")).startswith("anyres"):
            fault = "image_aspect_ratio='anyres' (LLaVA 1.6) is not supported"
            raise ValueError(f"{fault}; it must be 'square' or 'pad'")
        kind, feature = top["mm_projector_type"], top["mm_vision_select_feature"]
        check_choice("mm_vision_select_feature", feature, KINDS)
        layers = re.fullmatch(r"mlp(\d+)x_gelu", kind)
        if kind != "linear" and not layers:
            choices = "linear, mlp2x_gelu and other depths"
            raise ValueError(f"mm_projector_type={kind!r} is not known; valid choices: {choices}")
        encoder = clip_tower(_vision_config(config, shapes), post_norm="unused")
        text = internvl_chat_llava.llava_text_config(config)
        decoder = language_model(text, tied="lm_head.weight" not in shapes)
        options: dict[str, Any] = {"encoder_dim": encoder.dim, "decoder_dim": decoder.dim}
        options |= {"patch_layer": top["mm_vision_select_layer"], "keep_special": KINDS[feature]}
        connector = MLPConnector(**options, depth=int(layers[1])) if layers else LinearConnector(**options)
        placeholders = ImagePlaceholders(
            top["image_token_index"],
            side=top.get("tokenizer_padding_side") or "right",
            max_length=top.get("tokenizer_model_max_length"),
        )
        return chat_model(encoder, connector, decoder, image_placeholders=placeholders)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, connector, decoder = model.encoder, model.middleware, model.decoder
        if not isinstance(encoder, CLIPViT) or (vision := clip_tower_config(encoder)) is None:
            return None
        if not isinstance(connector, LinearConnector | MLPConnector) or len(connector.layers) != 1:
            return None
        if not isinstance(decoder, HFCausalLM) or decoder.lm.config.model_type != "llama":
            return None
        if isinstance(connector, LinearConnector):
            kind = "linear"
        elif connector.mlp1[0].bias is None:
            return None
        else:
            kind = f"mlp{connector.depth}x_gelu"
        return {
            "vision_config": vision,
            "mm_projector_type": kind,
            "mm_vision_select_layer": connector.layers[0],
            "mm_vision_select_feature": "cls_patch" if connector.keep_special else "patch",
            "text_config": {"vocab_size": decoder.vocab_size},
        }

    def update(self, loaded: Config, fields: Config) -> Config:
        vision, text = fields.pop("vision_config"), fields.pop("text_config")
        if "vision_config" in loaded or vision["image_size"] not in PUBLISHED:
            fields["vision_config"] = vision
        if "text_config" in loaded:
            fields["text_config"] = text
        return super().update(loaded, fields)

    def new_config(self, model: VLM, fields: Config) -> Config:
        del fields["text_config"]  # of a new config its fields stand at the top
        encoder = model.encoder
        tower = {
            "mm_vision_tower": PUBLISHED.get(encoder.image_size) if encoder.dim == 1024 else None,
            "mm_hidden_size": encoder.dim,
        }
        head = super().new_config(model, tower | fields)
        return language_config(model.decoder) | head


def _language_names(there: Iterable[str]) -> dict[str, str]:
    names = [name for name in there if name.startswith(LANGUAGE) and LAYOUT.canonical(name)]
    return {name: name for name in names} if any(name.startswith(BLOCKS) for name in names) else {}


def _with_language(config: Config, theirs: Config, files: WeightFiles) -> Config:
    return {key: value for key, value in theirs.items() if key not in NOTES} | config


def _with_tower(config: Config, theirs: Config, files: WeightFiles) -> Config:
    vision = theirs.get("vision_config") or theirs
    return config | ({"vision_config": vision} if vision else {})


def _vision_config(config: Config, shapes: Shapes) -> Config:
    """The tower's settings: in the config, else in the shapes, which tell all but the heads."""
    if config.get("vision_config"):
        return config["vision_config"]
    patches = shapes[f"{TOWER}embeddings.patch_embedding.weight"]
    dim, _, patch, _ = patches
    if dim % HEAD_DIM:
        advice = "write its vision_config (config.json of CLIP) into config.json"
        raise ValueError(f"the files do not tell the heads of a tower of width {dim}; {advice}")
    blocks = {name.split(".")[6] for name in shapes if name.startswith(f"{TOWER}encoder.layers.")}
    return {
        "hidden_size": dim,
        "patch_size": patch,
        "image_size": patch * round((shapes[f"{TOWER}embeddings.position_embedding.weight"][0] - 1) ** 0.5),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": dim // HEAD_DIM,
        "intermediate_size": shapes[f"{TOWER}encoder.layers.0.mlp.fc1.weight"][0],
    }


LAYOUT = Llava()
