"""Qwen2-VL as released, and as transformers' class of the same names reads it."""

from __future__ import annotations

import inspect

from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

from lightning_internvl.checkpoints.adapters.layout import Layout, chat_model
from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.families.language_model import language_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.decoders.mrope import MRopeCausalLM
from lightning_internvl.encoders.qwen2_vit import Qwen2ViT
from lightning_internvl.middleware.patch_merger import PatchMerger
from lightning_internvl.model.vlm import VLM

TOP: Config = {
    "image_token_id": 151655, "video_token_id": 151656,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip
# The original files write the width of the language model into `hidden_size` and leave the rest to
# these.
VISION: Config = {
    "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_act": "quick_gelu",
    "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    "rope_parameters": {"rope_theta": 10000.0},
}  # fmt: skip
TEXT: Config = {"vocab_size": 152064, "rope_parameters": {"rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}}
ONLY_TEXT: Config = {"use_sliding_window": False, "attention_dropout": 0.0}
# Fields of the language model, which the release writes at the top beside those of the whole model.
_TEXT = {*inspect.signature(Qwen2VLTextConfig.__init__).parameters, "rope_parameters", "rope_scaling", "rope_theta"}
_NOTES = {"self", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "model_type"}


class Qwen2VL(Layout):
    NAME = "Qwen2-VL (model_type 'qwen2_vl')"
    MODEL_TYPES = ("qwen2_vl",)
    ARCHITECTURE = "Qwen2VLForConditionalGeneration"
    DEFAULTS = TOP | {"tie_word_embeddings": False, "vision_config": VISION, "text_config": TEXT, **TEXT}
    NATIVE = True

    def canonical(self, name: str) -> str | None:
        """Newer releases of the library have the parts below `model.`."""
        for new, old in (("model.visual.", "visual."), ("model.language_model.", "model.")):
            if name.startswith(new):
                return super().canonical(old + name[len(new) :])
        return super().canonical(name)

    def rules(self, config: Config) -> list[NameRule]:
        return [
            rename("encoder.**", "visual.**"),
            rename("middleware.**", "visual.merger.**"),
            rename("decoder.lm.**", "**"),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        text, vision = text_config(config), VISION | config.get("vision_config", {})
        top = TOP | config
        check_only(text, ONLY_TEXT, "text_config")
        encoder = _tower(vision)
        tied = "lm_head.weight" not in shapes
        text = text | {"tie_word_embeddings": tied}
        decoder = MRopeCausalLM(config=text, merge_size=encoder.merge_size)
        merger = PatchMerger(encoder_dim=encoder.dim, decoder_dim=decoder.dim, factor=encoder.merge_size)
        tokens = {name: top[name] for name in ("image_token_id", "video_token_id")}
        return chat_model(encoder, merger, decoder, **tokens)

    def fields_of(self, model: VLM) -> Config | None:
        encoder, merger, decoder = model.encoder, model.middleware, model.decoder
        if not (isinstance(encoder, Qwen2ViT) and isinstance(merger, PatchMerger)):
            return None
        if not isinstance(decoder, MRopeCausalLM) or model.image_token_id is None:
            return None
        if not _fits(encoder, merger) or merger.factor != encoder.merge_size:
            return None
        fields = {"image_token_id": model.image_token_id, "tie_word_embeddings": decoder.tied}
        if model.video_token_id is not None:
            fields["video_token_id"] = model.video_token_id
        vocabulary = {"vocab_size": decoder.vocab_size}
        vision = tower_config(encoder, decoder.dim)
        return {**fields, "vision_config": vision, "text_config": vocabulary}

    def update(self, loaded: Config, fields: Config) -> Config:
        if not loaded.get("text_config"):  # the release has these fields at the top
            fields |= fields.pop("text_config")
        return super().update(loaded, fields)

    def new_config(self, model: VLM, fields: Config) -> Config:
        fields["vision_config"] = {"model_type": "qwen2_vl_vision", **fields["vision_config"]}
        # llama.cpp knows its language model by the class of the whole
        classes = {"architectures": [self.ARCHITECTURE]}
        fields["text_config"] = language_config(model.decoder) | classes | fields["text_config"]
        return super().new_config(model, fields)


def text_config(config: Config) -> Config:
    """The language model's part of a config, which the release has at the top."""
    fields = config.get("text_config") or config
    return {key: value for key, value in fields.items() if key in _TEXT - _NOTES} | {"model_type": "qwen2_vl_text"}


def _tower(vision: Config) -> Qwen2ViT:
    rope = VISION["rope_parameters"] | (vision["rope_parameters"] or {})
    check_only(rope, {"rope_type": "axial"}, "vision_config.rope_parameters")
    patch, frames = (_one(vision, field) for field in ("patch_size", "temporal_patch_size"))
    return Qwen2ViT(
        # 16,384 tokens, the most that the published processor gives
        image_size=3584 // patch * patch,
        patch_size=patch,
        frames=frames,
        dim=vision["embed_dim"],
        depth=vision["depth"],
        heads=vision["num_heads"],
        mlp_dim=int(vision["embed_dim"] * vision["mlp_ratio"]),
        merge_size=vision["spatial_merge_size"],
        theta=rope["rope_theta"],
        activation=vision["hidden_act"],
        channels=vision["in_channels"],
    )


def _one(vision: Config, field: str) -> int:
    values = vision[field] if isinstance(vision[field], list) else [vision[field]]
    if len(set(values)) != 1:
        raise ValueError(f"vision_config.{field}={values} is not supported; all must be equal")
    return values[0]


def _fits(encoder: Qwen2ViT, merger: PatchMerger) -> bool:
    """Whether the layout can hold the numbers that it has no fields for."""
    mlp_dim = encoder.blocks[0].mlp.fc1.out_features
    eps = {encoder.blocks[0].norm1.eps, merger.ln_q.eps}
    return mlp_dim % encoder.dim == 0 and eps == {1e-6} and merger.layers in ((-1,), (encoder.depth,))


def tower_config(encoder: Qwen2ViT, decoder_dim: int) -> Config:
    """The `vision_config` of a tower."""
    block = encoder.blocks[0]
    return {
        "depth": encoder.depth,
        "embed_dim": encoder.dim,
        "hidden_size": decoder_dim,
        "num_heads": encoder.heads,
        "mlp_ratio": block.mlp.fc1.out_features // encoder.dim,
        "hidden_act": encoder.activation,
        "patch_size": encoder.patch_size,
        "temporal_patch_size": encoder.frames,
        "spatial_merge_size": encoder.merge_size,
        "in_channels": encoder.patch_embed.proj.in_channels,
        "rope_parameters": {"rope_theta": encoder.theta},
    }


LAYOUT = Qwen2VL()
