"""CLIP's state dict under the names of OpenAI and open_clip: OpenAI's own files (`ViT-L-14.pt`,
TorchScript programs whose tensors are read without running them), `open_clip_pytorch_model.bin`,
`open_clip_model.safetensors`, folders with `open_clip_config.json`, and training checkpoints of
open_clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_internvl.checkpoints.adapters.clip import clip_parts
from lightning_internvl.checkpoints.adapters.layout import BESIDE, BareFileLayout
from lightning_internvl.checkpoints.families.clip import (
    OLD_EOS,
    add_first_dimension,
    clip_text,
    clip_tower,
    clip_tower_config,
    transposed,
)
from lightning_internvl.checkpoints.families.open_clip import (
    HEAD_DIM,
    NOTES,
    completed,
    tower_settings,
    tower_sizes,
    vision_settings,
)
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename, scalar, stacked_rows
from lightning_internvl.checkpoints.weight_files import OPEN_CLIP, WeightFiles
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC

BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class CLIPOpenAI(BareFileLayout):
    NAME = f"CLIP of OpenAI and open_clip (`visual.transformer.*`; heads and activation {BESIDE} or {OPEN_CLIP})"
    BUFFERS: ClassVar[tuple[str, ...]] = (*NOTES, "attn_mask")

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """CLIP's models with a ResNet have other names, and so have text towers of BERT."""
        names = {self.canonical(name) for name in shapes}
        return {"visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight", "token_embedding.weight"} <= names

    def canonical(self, name: str) -> str | None:
        """Some models of open_clip have the text tower in a module of its own."""
        return super().canonical(name.removeprefix("text."))

    def completed(self, config: Config, files: WeightFiles) -> Config:
        return completed(config, files)

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *self.tower_rules(),
            rename("middleware.text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
            rename("middleware.text_model.embeddings.position_embedding.weight", "positional_embedding"),
            rename("middleware.text_model.final_layer_norm.*", "ln_final.*"),
            *_block_rules("middleware.text_model.encoder.layers.*", "transformer.resblocks.*"),
            transposed("middleware.text_projection.weight", "text_projection"),
            scalar("objectives.itc.logit_scale", "logit_scale"),
        ]

    def tower_rules(self) -> list[NameRule]:
        """The tower of pictures, with its projection."""
        embeddings = "encoder.embeddings"
        return [
            add_first_dimension(f"{embeddings}.class_embedding", "visual.class_embedding", 2),
            add_first_dimension(f"{embeddings}.position_embedding", "visual.positional_embedding"),
            rename(f"{embeddings}.patch_embedding.weight", "visual.conv1.weight"),
            rename("encoder.pre_layrnorm.*", "visual.ln_pre.*"),
            rename("encoder.post_layernorm.*", "visual.ln_post.*"),
            *_block_rules("encoder.encoder.layers.*", "visual.transformer.resblocks.*"),
            transposed("middleware.visual_projection.weight", "visual.proj"),
        ]

    def tower(self, config: Config, shapes: Shapes) -> tuple[Any, Config]:
        """The tower of pictures, and what `CLIPText` has to know of it."""
        return clip_tower(vision_settings(config, shapes)), {}

    def side(self, found: dict[str, Tensor]) -> int:
        """The side in pixels of the pictures that the positions are for."""
        patches = found["visual.positional_embedding"].shape[0] - 1
        return found["visual.conv1.weight"].shape[-1] * math.isqrt(patches)

    def build(self, config: Config, shapes: Shapes) -> VLM:
        """Shapes tell the sizes; heads and activation stand in the config."""
        said_text = tower_settings(config, shapes)[1]
        text = tower_sizes(shapes, "transformer") | {
            "vocab_size": shapes["token_embedding.weight"][0],
            "max_position_embeddings": shapes["positional_embedding"][0],
            **said_text,
            "eos_token_id": OLD_EOS,
        }
        encoder, projection = self.tower(config, shapes)
        middleware = clip_text(text, encoder.dim, shapes["text_projection"][1], **projection)
        return VLM(encoder, middleware, objectives={"itc": ITC()})

    def official_tensors(self, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With what OpenAI's own files say beside their weights, by which they are known."""
        found = super().official_tensors(config, tensors)
        sizes = (self.side(found), found["positional_embedding"].shape[0], found["token_embedding.weight"].shape[0])
        return found | {name: torch.tensor(size) for name, size in zip(NOTES, sizes, strict=True)}

    def holds(self, model: VLM) -> bool:
        """Heads, activation and end token (the largest id) must be OpenAI's."""
        parts = clip_parts(model)
        if parts is None or clip_tower_config(parts[0]) is None:
            return False
        encoder, middleware = parts
        return _usual(encoder.encoder.layers[0], encoder.dim) and reads_as_openai(middleware)


def reads_as_openai(middleware: CLIPText) -> bool:
    """Whether heads, activation and end token of the text tower are those that its tensors stand for."""
    text = middleware.text_model
    largest = text.embeddings.token_embedding.num_embeddings - 1
    ends = middleware.pooling == "argmax" or (middleware.pooling == "eos" and middleware.eos_token_id == largest)
    return middleware.causal and ends and _usual(text.encoder.layers[0], middleware.dim)


def _usual(block: nn.Module, width: int) -> bool:
    heads = block.self_attn.heads == max(1, width // HEAD_DIM)
    return heads and block.mlp.act == "quick_gelu" and block.layer_norm1.eps == 1e-5


def _block_rules(ours: str, theirs: str) -> list[NameRule]:
    rules = [rename(f"{ours}.{own}.*", f"{theirs}.{name}.*") for own, name in BLOCK.items()]
    for leaf in ("bias", "weight"):
        parts = (f"{ours}.self_attn.{x}_proj.{leaf}" for x in "qkv")
        rules.insert(0, stacked_rows(parts, f"{theirs}.attn.in_proj_{leaf}"))
    return rules


LAYOUT = CLIPOpenAI()
