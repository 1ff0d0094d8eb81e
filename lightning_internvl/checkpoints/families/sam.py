"""SAM's image encoder in configs and weight files of transformers and of its authors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lightning_internvl.checkpoints.families.config_fields import check_only, square_side
from lightning_internvl.checkpoints.name_rules import Config, NameRule, rename
from lightning_internvl.encoders.sam_vit import SamViT

# What transformers fills in where a config is silent.
DEFAULTS: Config = {
    "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 1024, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
    "qkv_bias": True, "mlp_ratio": 4.0, "use_abs_pos": True, "use_rel_pos": True, "window_size": 14,
    "global_attn_indexes": [2, 5, 8, 11], "mlp_dim": None,
}  # fmt: skip
ONLY: Config = {"attention_dropout": 0.0, "num_channels": 3}
NECK = {"0": "conv1", "1": "layer_norm1", "2": "conv2", "3": "layer_norm2"}


def native_rules(ours: str, prefix: str) -> list[NameRule]:
    """The tower below `prefix` in transformers' DeepSeek-VL: three modules side by side."""
    high = f"{prefix}high_res_vision"
    tower = f"{high}_model.vision_encoder."
    return [
        *(rename(f"{ours}neck.{i}.*", f"{tower}neck.{name}.*") for i, name in NECK.items()),
        *(rename(f"{ours}neck_hd.{i}.*", f"{high}_neck.{name}.*") for i, name in NECK.items()),
        *(rename(f"{ours}downsamples.{i}.weight", f"{high}_proj.conv{i + 1}.weight") for i in range(2)),
        rename(f"{ours}hd_alpha_downsamples", f"{high}_alpha"),
        rename(f"{ours}pos_embed", f"{tower}pos_embed"),
        rename(f"{ours}patch_embed.*", f"{tower}patch_embed.projection.*"),
        *(rename(f"{ours}blocks.*.norm{i}.*", f"{tower}layers.*.layer_norm{i}.*") for i in (1, 2)),
        *(rename(f"{ours}blocks.*.mlp.fc{i}.*", f"{tower}layers.*.mlp.lin{i}.*") for i in (1, 2)),
        rename(f"{ours}blocks.*.attn.**", f"{tower}layers.*.attn.**"),
    ]


def release_rules(ours: str, prefix: str) -> list[NameRule]:
    """The tower below `prefix` under its authors' names, which are ours but for two."""
    return [
        rename(f"{ours}patch_embed.*", f"{prefix}patch_embed.proj.*"),
        *(rename(f"{ours}blocks.*.mlp.fc{i}.*", f"{prefix}blocks.*.mlp.lin{i}.*") for i in (1, 2)),
        rename(f"{ours}**", f"{prefix}**"),
    ]


def moved(rules: Iterable[NameRule], old: str, new: str) -> list[NameRule]:
    """Rules for the same part in another place of the model."""
    names = [tuple(new + name.removeprefix(old) for name in rule.ours) for rule in rules]
    return [dataclasses.replace(rule, ours=own) for rule, own in zip(rules, names, strict=True)]


def sam_tower(config: Config, out_grid: int) -> SamViT:
    """The tower of a `high_res_vision_config`.

    Raises:
        ValueError: for a setting that the tower does not have.
    """
    check_only(config, ONLY, "high_res_vision_config")
    sam = DEFAULTS | config
    return SamViT(
        image_size=square_side(sam, "image_size"),
        patch_size=square_side(sam, "patch_size"),
        dim=sam["hidden_size"],
        depth=sam["num_hidden_layers"],
        heads=sam["num_attention_heads"],
        mlp_dim=sam["mlp_dim"] or int(sam["hidden_size"] * sam["mlp_ratio"]),
        window=sam["window_size"],
        global_layers=sam["global_attn_indexes"],
        neck_dim=sam["output_channels"],
        out_grid=out_grid,
        act=sam["hidden_act"],
        norm_eps=sam["layer_norm_eps"],
        qkv_bias=sam["qkv_bias"],
        positions=sam["use_abs_pos"],
        relative_positions=sam["use_rel_pos"],
    )


def sam_tower_config(encoder: SamViT) -> Config:
    """The `high_res_vision_config` of a tower."""
    block = encoder.blocks[0]
    return {
        "model_type": "sam_vision_model",
        "hidden_size": block.attn.proj.in_features,
        "output_channels": encoder.dim // 4,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.heads,
        "image_size": encoder.image_size,
        "patch_size": encoder.patch_size,
        "hidden_act": block.mlp.act,
        "layer_norm_eps": block.norm1.eps,
        "qkv_bias": block.attn.qkv.bias is not None,
        "mlp_dim": block.mlp.fc1.out_features,
        "use_abs_pos": encoder.pos_embed is not None,
        "use_rel_pos": block.attn.relative,
        "window_size": encoder.window,
        "global_attn_indexes": list(encoder.global_layers),
    }
