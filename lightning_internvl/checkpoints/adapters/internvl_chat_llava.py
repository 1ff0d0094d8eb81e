"""InternVL-Chat 1.0 in the layout of LLaVA's code: QLLaMA and two MLPs, or patches and one MLP
(`internvl_chat_llava`)."""

from __future__ import annotations

import re
from typing import ClassVar

from lightning_internvl.checkpoints.adapters.internvl_14b import LLAMA, TOP, qllama_config, qllama_of
from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.intern_vit import DEFAULTS, config_from_shapes, release_rules, tower, tower_config
from lightning_internvl.checkpoints.families.language_model import language_model
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.middleware.connector import MLPConnector
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.placeholders import ImagePlaceholders
from lightning_internvl.model.vlm import VLM

TOWER = "model.vision_tower.vision_tower."
# Fields of LLaVA that are not the language model's.
_LLAVA = re.compile(
    r"mm_.*|vision_.*|.*image.*|tune_mm.*|use_mm.*|freeze_mm.*|tokenizer_.*|truncated_.*|run_.*|"
    r"architectures|model_type|text_config"
)


class InternVLChatLlava(Layout):
    NAME = "InternVL-Chat 1.0 (LLaVA code with InternViT: mm_projector_type 'two_mlp' or 'mlp2x_gelu')"
    MODEL_TYPES = ("llava_llama", "llava")
    ARCHITECTURE = "LlavaLlamaForCausalLM"
    LANGUAGE = "text_config"
    DEFAULTS: ClassVar[Config] = {"vision_tower": {**TOP, "vision_config": DEFAULTS, "qllama_config": LLAMA}}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """LLaVA's own models have a name for a tower, these its config."""
        tower = config.get("vision_tower", {})
        inner = (f"{TOWER}embeddings.class_embedding", f"{TOWER}vision_model.embeddings.position_embedding")
        known = "vision_config" in tower or any(name in shapes for name in inner)
        return super().recognises(config, shapes) and known

    def completed(self, config: Config, files: WeightFiles) -> Config:
        """Its own code writes the name of a tower; the files hold the tower, which tells its sizes."""
        if "vision_config" in config.get("vision_tower", {}):
            return config
        prefix = f"{TOWER}vision_model." if f"{TOWER}query_tokens" in files.shapes else TOWER
        shapes = {name.removeprefix(prefix): shape for name, shape in files.shapes.items() if name.startswith(prefix)}
        return config | {"vision_tower": {"vision_config": config_from_shapes(shapes), "qllama_config": {}}}

    def rules(self, config: Config) -> list[NameRule]:
        if config["mm_projector_type"] == "two_mlp":
            parts = [
                rename("middleware.qllama.**", f"{TOWER}qllama.**"),
                rename("middleware.query_tokens", f"{TOWER}query_tokens"),
                *release_rules(f"{TOWER}vision_model."),
                rename("middleware.*.**", "model.mm_projector.*.**"),
            ]
        else:
            parts = [*release_rules(TOWER), rename("middleware.mlp1.**", "model.mm_projector.**")]
        return [*parts, rename("decoder.lm.**", "**")]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        parts, kind = config["vision_tower"], config.get("mm_projector_type")
        if kind not in ("two_mlp", "mlp2x_gelu"):
            setting = f"mm_projector_type={kind!r}"
            raise ValueError(f"{setting} is not known with InternViT; valid choices: two_mlp, mlp2x_gelu")
        if config.get("mm_vision_select_feature", "patch") != "patch":
            raise ValueError(
                f"mm_vision_select_feature={config['mm_vision_select_feature']!r} is not supported; it must be 'patch'"
            )
        encoder = tower(parts["vision_config"])
        decoder = language_model(llava_text_config(config), tied="lm_head.weight" not in shapes)
        layer = config.get("mm_vision_select_layer", -4)
        if kind == "two_mlp":
            llama = LLAMA | parts["qllama_config"]
            chat = {"embed_dim": None, "decoder_dim": decoder.dim, "patches": True, "patch_layer": layer}
            middleware: QLLaMA | MLPConnector = qllama_of(TOP | parts, encoder.dim, llama, **chat)
        else:
            width = decoder.dim
            middleware = MLPConnector(encoder_dim=encoder.dim, decoder_dim=width, patch_layer=layer)
        placeholders = ImagePlaceholders(config.get("image_token_index", -200), keep_padding=True)
        return chat_model(encoder, middleware, decoder, image_placeholders=placeholders)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, middleware, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, InternViT) and isinstance(decoder, HFCausalLM)):
            return None
        vision = tower_config(encoder)
        if vision is None or decoder.lm.config.model_type != "llama":
            return None
        parts: Config = {"vision_config": vision}
        if isinstance(middleware, MLPConnector):
            kind, layer = "mlp2x_gelu", middleware.layers[0]
        elif isinstance(middleware, QLLaMA) and middleware.patches and middleware.clip_projector is None:
            kind, layer = "two_mlp", middleware.layers[-1]
            parts["num_query_token"] = middleware.num_queries
            parts["qllama_config"] = qllama_config(middleware)
            parts["cross_attention_frequency"] = middleware.cross_every
        else:
            return None
        return {"mm_projector_type": kind, "mm_vision_select_layer": layer, "vision_tower": parts}

    def new_config(self, model: VLM, fields: Config) -> Config:
        return super().new_config(model, {"mm_vision_select_feature": "patch", **fields})


def llava_text_config(config: Config) -> Config:
    """The language model's config, whose fields may stand among those of LLaVA."""
    flat = {key: value for key, value in config.items() if not _LLAVA.fullmatch(key)}
    return {"model_type": "llama"} | config.get("text_config", flat)


LAYOUT = InternVLChatLlava()
