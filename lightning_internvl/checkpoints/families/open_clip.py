"""Heads and activation of a CLIP under OpenAI's names, which its tensors do not tell: from
`open_clip_config.json`, from a `config.json` of transformers, or from what wrote the file."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_internvl.checkpoints.families.config_fields import check_only
from lightning_internvl.checkpoints.name_rules import Config, Shapes
from lightning_internvl.checkpoints.weight_files import OPEN_CLIP, OPEN_CLIP_KEY, WeightFiles
from lightning_internvl.console import console

HEAD_DIM = 64  # of all that OpenAI released, and where open_clip is not told another
TEXT_HEADS = 8  # likewise
WIDE_HEADS = {1280: 80, 1408: 88, 1664: 104}  # widths of heads of open_clip's H, g and bigG towers
# tables that OpenAI's own files hold beside the weights
NOTES = ("input_resolution", "context_length", "vocab_size")
VISION_ONLY: Config = {
    "timm_model_name": None, "no_ln_pre": False, "attentional_pool": False, "pool_type": "tok", "final_ln_after_pool": False,
    "global_average_pool": False,
}  # fmt: skip
TEXT_ONLY: Config = {"hf_model_name": None, "no_causal_mask": False, "embed_cls": False, "pool_type": "argmax"}


def completed(config: Config, files: WeightFiles) -> Config:
    """The configuration of a file: what stands beside it, else what the file tells of its maker:
    OpenAI, or open_clip's trainer, of which its defaults are taken and told."""
    if config:
        return config
    if files.shapes.keys() >= set(NOTES):
        return {OPEN_CLIP_KEY: {"model_cfg": _written(True, HEAD_DIM, files.shapes["ln_final.weight"][0] // HEAD_DIM)}}
    if not {"epoch", "name"} <= files.notes.keys():
        return {}
    said = f"{files.notes['name']}\n{_settings_of_run(files.files[0])}".lower()
    quick = "quickgelu" in said or "force_quick_gelu: true" in said
    width = WIDE_HEADS.get(_width(files.shapes), HEAD_DIM)
    heads = max(1, files.shapes["ln_final.weight"][0] // HEAD_DIM)
    text = f"{'quick GELU' if quick else 'GELU'} and heads of {width}; {OPEN_CLIP} beside it decides otherwise"
    console.print(f"{files.files[0]} is a training checkpoint of open_clip: read with {text}", soft_wrap=True)
    return {OPEN_CLIP_KEY: {"model_cfg": _written(quick, width, heads)}}


def tower_settings(config: Config, shapes: Shapes) -> tuple[Config, Config]:
    """What a completed config says of heads, activation and norms of both towers, as fields of
    `vision_config` and `text_config`.

    Raises:
        ValueError: for a setting that the towers do not have; without a config.
    """
    width = _width(shapes)
    if not config:
        known = WIDE_HEADS.get(width, HEAD_DIM)
        example = f'{{"model_cfg": {{"quick_gelu": true, "vision_cfg": {{"head_width": {known}}}, "text_cfg": {{"heads": 8}}}}}}'
        raise ValueError(
            "a bare state dict of CLIP does not tell its activation (OpenAI: quick GELU; most of open_clip: GELU) and "
            f"heads; put the {OPEN_CLIP} or config.json of the model beside it, or write one: {example}"
        )
    if OPEN_CLIP_KEY not in config:
        return config.get("vision_config") or {}, config.get("text_config") or {}
    model = config[OPEN_CLIP_KEY].get("model_cfg") or {}
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    check_only(vision, VISION_ONLY, f"{OPEN_CLIP}: vision_cfg")
    check_only(text, TEXT_ONLY, f"{OPEN_CLIP}: text_cfg")
    heads = {"num_attention_heads": max(1, width // (vision.get("head_width") or HEAD_DIM))}
    quick = bool(model.get("quick_gelu"))
    return heads | _common(vision, quick), {"num_attention_heads": text.get("heads") or TEXT_HEADS} | _common(text, quick)


def vision_settings(config: Config, shapes: Shapes) -> Config:
    """The `vision_config` of a tower under these names, whose config is completed."""
    _, _, patch, _ = shapes["visual.conv1.weight"]
    grid = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
    sizes = {**tower_sizes(shapes, "visual.transformer"), "patch_size": patch, "image_size": patch * grid}
    return sizes | tower_settings(config, shapes)[0]


def tower_sizes(shapes: Shapes, tower: str) -> Config:
    """Width, depth and, as OpenAI has them, heads of a tower, from its shapes."""
    blocks = f"{tower}.resblocks."
    hidden, width = shapes[f"{blocks}0.mlp.c_fc.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": sum(n.startswith(blocks) and n.endswith("ln_1.weight") for n in shapes),
        "num_attention_heads": max(1, width // HEAD_DIM),
    }


def _width(shapes: Shapes) -> int:
    """Of the tower of pictures; a ResNet has no heads that a config would tell."""
    return shapes.get("visual.ln_post.weight", (HEAD_DIM,))[0]


def _common(section: Config, quick: bool) -> Config:
    tanh = (section.get("act_kwargs") or {}).get("approximate") == "tanh"
    eps = (section.get("norm_kwargs") or {}).get("eps", 1e-5)
    return {"hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu", "layer_norm_eps": eps}


def _written(quick: bool, head_width: int, text_heads: int) -> Config:
    return {"quick_gelu": quick, "vision_cfg": {"head_width": head_width}, "text_cfg": {"heads": max(1, text_heads)}}


def _settings_of_run(checkpoint: Path) -> str:
    """What the trainer has written beside its folder of checkpoints."""
    settings = checkpoint.resolve().parent.parent / "params.txt"
    return settings.read_text(encoding="utf-8", errors="replace") if settings.is_file() else ""
