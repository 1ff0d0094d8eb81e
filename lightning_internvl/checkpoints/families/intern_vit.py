"""The tower in `config.json`: of InternVL's own releases, and as transformers writes it."""

from __future__ import annotations

import re

from lightning_internvl.checkpoints.families.config_fields import block_sizes, check_only, square_side, tower_sizes
from lightning_internvl.checkpoints.name_rules import Config, NameRule, joined_rows, rename
from lightning_internvl.encoders.intern_vit import InternViT
from lightning_internvl.layers.basic import RMSNorm

HEAD_DIM = 128  # of the 6B tower and of LLaMA, where a bare file does not tell

# Names in the releases of 2023, and in those with a config.json.
FIRST_NAMES = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.**", "embeddings.patch_embedding.**"),
    ("blocks.*.ls1.gamma", "encoder.layers.*.ls1"),
    ("blocks.*.ls2.gamma", "encoder.layers.*.ls2"),
    ("blocks.**", "encoder.layers.**"),
)
# What a config of a release may leave out, and the fields of which the tower knows one value only.
DEFAULTS: Config = {
    "hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25,
    "intermediate_size": 12800, "image_size": 224, "patch_size": 14, "qk_normalization": True,
    "qkv_bias": False, "norm_type": "rms_norm", "layer_norm_eps": 1e-6, "drop_path_rate": 0.0,
    "initializer_factor": 0.1,
}  # fmt: skip
ONLY: Config = {"hidden_act": "gelu", "dropout": 0.0, "attention_dropout": 0.0, "num_channels": 3}
NATIVE_DEFAULTS: Config = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "image_size": [448, 448], "patch_size": [14, 14],
    "use_qk_norm": False, "attention_bias": False, "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6, "layer_scale_init_value": 0.1, "use_mean_pooling": True,
}  # fmt: skip
NATIVE_ONLY: Config = {
    "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_dropout": 0.0, "projection_dropout": 0.0, "num_channels": 3,
    "use_mask_token": False, "use_absolute_position_embeddings": True,
}  # fmt: skip
NATIVE_QK_EPS = 1e-6  # transformers does not read it from the config


def release_rules(prefix: str) -> list[NameRule]:
    """The tower below `prefix` in InternVL's releases with a config.json: our names."""
    return [rename("encoder.**", f"{prefix}**")]


def first_rules() -> list[NameRule]:
    """The tower in the layout of the bare .pth files."""
    return [rename(f"encoder.{ours}", official) for official, ours in FIRST_NAMES]


def tower(config: Config, image_size: int | None = None) -> InternViT:
    """The tower of a release's `vision_config`."""
    check_only(config, ONLY, "vision_config")
    vision = DEFAULTS | config
    return InternViT(
        image_size=image_size or square_side(vision, "image_size"),
        patch_size=square_side(vision, "patch_size"),
        **block_sizes(vision),
        qk_norm=vision["qk_normalization"],
        qkv_bias=vision["qkv_bias"],
        norm=vision["norm_type"],
        layer_scale=vision["initializer_factor"],
        drop_path=vision["drop_path_rate"],
    )


def tower_config(encoder: InternViT) -> Config | None:
    """The `vision_config` of a tower in InternVL's releases; None if they cannot hold it."""
    attention, block = encoder.encoder.layers[0].attn, encoder.encoder.layers[0]
    with_norm = isinstance(attention.q_norm, RMSNorm)
    if encoder.has_final_norm or (with_norm and attention.q_norm.eps != block.norm1.eps):
        return None
    return {
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": attention.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "qk_normalization": with_norm,
        "qkv_bias": attention.qkv.bias is not None,
        "norm_type": "rms_norm" if isinstance(block.norm1, RMSNorm) else "layer_norm",
        "layer_norm_eps": block.norm1.eps,
        "drop_path_rate": encoder.encoder.layers[-1].drop_path.rate,
    }


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> Config:
    """The `vision_config` of a bare file: all sizes but the number of heads stand in the shapes
    (names of the release)."""
    dim, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return {
        "hidden_size": dim,
        "patch_size": patch,
        "image_size": patch * round((shapes["embeddings.position_embedding"][1] - 1) ** 0.5),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, dim // HEAD_DIM),
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "qk_normalization": "encoder.layers.0.attn.q_norm.weight" in shapes,
        "qkv_bias": "encoder.layers.0.attn.qkv.bias" in shapes,
        "norm_type": "layer_norm" if "encoder.layers.0.norm1.bias" in shapes else "rms_norm",
    }


# --- transformers ---------------------------------------------------------------------------------


def native_rules(prefix: str) -> list[NameRule]:
    """The tower below `prefix` in the layout of transformers."""
    ours, theirs = "encoder.encoder.layers.*", f"{prefix}encoder.layer.*"
    rows = [f"{theirs}.attention.{x}_proj" for x in "qkv"]
    return [
        rename("encoder.embeddings.class_embedding", f"{prefix}embeddings.cls_token"),
        rename("encoder.embeddings.position_embedding", f"{prefix}embeddings.position_embeddings"),
        rename("encoder.embeddings.patch_embedding.*", f"{prefix}embeddings.patch_embeddings.projection.*"),
        joined_rows(f"{ours}.attn.qkv.weight", *(f"{row}.weight" for row in rows)),
        joined_rows(f"{ours}.attn.qkv.bias", *(f"{row}.bias" for row in rows)),
        rename(f"{ours}.attn.proj.*", f"{theirs}.attention.projection_layer.*"),
        rename(f"{ours}.attn.q_norm.weight", f"{theirs}.attention.q_norm.weight"),
        rename(f"{ours}.attn.k_norm.weight", f"{theirs}.attention.k_norm.weight"),
        rename(f"{ours}.norm1.*", f"{theirs}.layernorm_before.*"),
        rename(f"{ours}.norm2.*", f"{theirs}.layernorm_after.*"),
        rename(f"{ours}.ls1", f"{theirs}.lambda_1"),
        rename(f"{ours}.ls2", f"{theirs}.lambda_2"),
        rename(f"{ours}.mlp.**", f"{theirs}.mlp.**"),
        rename("encoder.layernorm.*", f"{prefix}layernorm.*"),
    ]


def native_tower(config: Config) -> InternViT:
    """The tower of a `vision_config` of transformers."""
    check_only(config, NATIVE_ONLY, "vision_config")
    vision = NATIVE_DEFAULTS | config
    return InternViT(
        **tower_sizes(vision),
        qk_norm=vision["use_qk_norm"],
        qkv_bias=vision["attention_bias"],
        norm=vision["norm_type"],
        qk_norm_eps=NATIVE_QK_EPS,
        final_norm=not vision["use_mean_pooling"],
        layer_scale=vision["layer_scale_init_value"],
    )


def native_tower_config(encoder: InternViT) -> Config | None:
    """The `vision_config` of a tower as transformers has it, None if it cannot hold it."""
    attention, block = encoder.encoder.layers[0].attn, encoder.encoder.layers[0]
    with_norm = isinstance(attention.q_norm, RMSNorm)
    if with_norm and attention.q_norm.eps != NATIVE_QK_EPS:
        return None
    return {
        "model_type": "internvl_vision",
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": attention.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "image_size": [encoder.image_size] * 2,
        "patch_size": [encoder.patch_size] * 2,
        "use_qk_norm": with_norm,
        "attention_bias": attention.qkv.bias is not None,
        "norm_type": "rms_norm" if isinstance(block.norm1, RMSNorm) else "layer_norm",
        "layer_norm_eps": block.norm1.eps,
        "use_mean_pooling": not encoder.has_final_norm,
    }
