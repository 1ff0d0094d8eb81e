"""The towers of CLIP and SigLIP in configs and weight files of transformers and OpenAI."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_internvl.checkpoints.families.config_fields import block_sizes, check_only, tower_sizes
from lightning_internvl.checkpoints.name_rules import Config, NameRule, rename
from lightning_internvl.encoders.clip_vit import CLIPViT
from lightning_internvl.encoders.siglip_vit import SiglipViT
from lightning_internvl.middleware.clip_text import CLIPText

# What transformers fills in where a config is silent.
VISION: Config = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
    "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
TEXT: Config = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "eos_token_id": 49407,
}  # fmt: skip
SIGLIP_VISION = VISION | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}
SIGLIP_TEXT: Config = {
    **{key: VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "vocab_size": 32000, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
TOWER_PARTS = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
ONLY: Config = {"attention_dropout": 0.0, "num_channels": 3}
# first configs said 2 and meant the largest id of the row; transformers still reads it so
OLD_EOS = 2


def add_first_dimension(ours: str, official: str, count: int = 1) -> NameRule:
    """A table that has `count` dimensions of one more here than there."""

    def read(x: Tensor) -> tuple[Tensor, ...]:
        return (x.reshape((1,) * count + tuple(x.shape)),)

    return NameRule((ours,), (official,), read, write=lambda x: (x.reshape(x.shape[count:]),))


def transposed(ours: str, official: str) -> NameRule:
    """A matrix that is multiplied from the other side there."""

    def turned(x: Tensor) -> tuple[Tensor]:
        return (x.T.contiguous(),)

    return NameRule((ours,), (official,), read=turned, write=turned)


def vision_rules(prefix: str) -> list[NameRule]:
    """A tower of CLIP or SigLIP below `prefix`, as transformers names it."""
    ours, theirs = "encoder.embeddings", f"{prefix}embeddings"
    return [
        add_first_dimension(f"{ours}.class_embedding", f"{theirs}.class_embedding", 2),
        add_first_dimension(f"{ours}.position_embedding", f"{theirs}.position_embedding.weight"),
        rename(f"{ours}.patch_embedding.*", f"{theirs}.patch_embedding.*"),
        *(rename(f"encoder.{name}.**", f"{prefix}{name}.**") for name in ("pre_layrnorm", "encoder", "post_layernorm", "head")),
    ]


def tower_names(prefix: str, there: Iterable[str]) -> dict[str, str]:
    """Of a whole CLIP, a tower alone, or one below `prefix`, the tower's names, with that below
    `prefix`; empty for what holds none under transformers' names."""
    found: dict[str, str] = {}
    for name in there:
        bare = name.removeprefix(prefix).removeprefix("vision_model.")
        if bare.startswith(TOWER_PARTS) and not bare.endswith(".position_ids"):
            found[name] = prefix + bare
    return found if f"{prefix}pre_layrnorm.weight" in found.values() else {}


def clip_tower(config: Config, *, post_norm: str = "cls") -> CLIPViT:
    """The tower of a `vision_config` of CLIP.

    Raises:
        ValueError: for a setting that the tower does not have.
    """
    check_only(config, ONLY, "vision_config")
    return CLIPViT(**_sizes(VISION | config), post_norm=post_norm)


def siglip_tower(config: Config, *, head: str = "first", post_norm: str = "all") -> SiglipViT:
    """The tower of a `vision_config` of SigLIP; `head` says what a pooling head is for, where the
    config has one.

    Raises:
        ValueError: for a setting that the tower does not have.
    """
    check_only(config, ONLY, "vision_config")
    vision = SIGLIP_VISION | config
    head = head if vision["vision_use_head"] else "none"
    return SiglipViT(**_sizes(vision), head=head, post_norm=post_norm)


def _sizes(vision: Config) -> Config:
    return {**tower_sizes(vision), "act": vision["hidden_act"]}


def clip_tower_config(encoder: CLIPViT) -> Config | None:
    """The `vision_config` of a tower of CLIP, None if it is none."""
    embeddings = encoder.embeddings
    parts = embeddings.class_embedding is not None and embeddings.patch_embedding.bias is None
    fits = parts and encoder.post_norm != "all" and len(list(encoder.pre_layrnorm.parameters())) == 2
    return {"model_type": "clip_vision_model", **_vision_config(encoder)} if fits else None


def siglip_tower_config(encoder: SiglipViT) -> Config:
    """The `vision_config` of a tower of SigLIP."""
    return {
        "model_type": "siglip_vision_model",
        **_vision_config(encoder),
        "vision_use_head": encoder.head is not None,
    }


def _vision_config(encoder: CLIPViT) -> Config:
    sizes = {"image_size": encoder.image_size, "patch_size": encoder.patch_size, "num_channels": 3}
    return _block_config(encoder.encoder.layers[0], encoder.depth) | sizes


def _block_config(block: nn.Module, depth: int) -> Config:
    return {
        "hidden_size": block.self_attn.q_proj.in_features,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": depth,
        "num_attention_heads": block.self_attn.heads,
        "hidden_act": block.mlp.act,
        "layer_norm_eps": block.layer_norm1.eps,
    }


def text_settings(text: Config) -> Config:
    """The arguments of `CLIPText` that both text towers have in a `text_config`."""
    check_only(text, {"attention_dropout": 0.0}, "text_config")
    return {
        "vocab_size": text["vocab_size"],
        "positions": text["max_position_embeddings"],
        **block_sizes(text),
        "act": text["hidden_act"],
    }


def clip_text(config: Config, encoder_dim: int, embed_dim: int, **options: Any) -> CLIPText:
    """The text tower of a `text_config` of CLIP, with both projections; `options` go to `CLIPText`."""
    text = TEXT | config
    old = text["eos_token_id"] == OLD_EOS
    pooling = {"pooling": "argmax"} if old else {"pooling": "eos", "eos_token_id": text["eos_token_id"]}
    return CLIPText(encoder_dim=encoder_dim, embed_dim=embed_dim, **text_settings(text), **pooling, **options)


def text_config(middleware: CLIPText) -> Config:
    """The fields that both text towers have in a `text_config`."""
    tower = middleware.text_model
    tables = tower.embeddings.token_embedding.num_embeddings, tower.embeddings.position_embedding.num_embeddings
    made = _block_config(tower.encoder.layers[0], len(tower.encoder.layers))
    return made | dict(zip(("vocab_size", "max_position_embeddings"), tables, strict=True))
