"""Checkpoint folders in the layouts of published systems, at toy size with random weights: config, weights, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_internvl.checkpoints.adapters import deepseek_vl
from lightning_internvl.checkpoints.families.language_model import language_config
from lightning_internvl.cli import CONF
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.data.processors.pixels import IMAGENET_MEAN, IMAGENET_STD
from lightning_internvl.inference.collators import View, make_view
from lightning_internvl.model.compose import compose_model
from lightning_internvl.model.vlm import VLM

IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
SQUASHED = IMAGENET | {"image_processor_type": "BlipImageProcessor"}
GRIDS = {"image_grid_pinpoints": [[48 * rows, 48 * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]}
# A layout, and what follows it in brackets; the recipe with its overrides; what stands in preprocessor_config.json.
LAYOUTS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "internvl_native": ("internvl_1_5_toy", [], IMAGENET | {"max_patches": 4}),
    "internvl_chat": ("internvl_1_5_toy", [], {}),
    "internvl_chat_llava": ("internvl_chat_toy", [], {}),
    "llava": ("llava_toy", [], {}),
    "llava_native": ("llava_toy", [], {}),
    "llava_next": ("llava_next_toy", [], {"image_processor_type": "LlavaNextImageProcessor", **GRIDS}),
    "llava_onevision": ("llava_onevision_toy", [], {"image_processor_type": "LlavaOnevisionImageProcessor"}),
    "qwen2_vl": ("qwen2_vl_toy", [], {"min_pixels": 2304, "max_pixels": 96 * 96}),
    "qwen3_vl": ("qwen3_vl_toy", [], {"min_pixels": 2304, "max_pixels": 96 * 96}),
    "qwen2_5_vl": ("qwen2_5_vl_toy", [], {"min_pixels": 2304, "max_pixels": 96 * 96}),
    "qwen_vl": ("qwen_vl_toy", [], IMAGENET),
    "blip2_hf": ("blip2_toy", [], SQUASHED),
    "blip2_hf (T5)": ("blip2_toy", ["decoder=t5_toy", "data.chats_collate.template=blip2_t5"], SQUASHED),
    "instructblip_hf": ("instructblip_toy", [], SQUASHED),
    "deepseek_vl": ("deepseek_vl_toy", ["encoder.low.heads=16"], {}),
    "deepseek_vl_hf": ("deepseek_vl_toy", [], {"resample": 2}),
    "minigpt4": ("minigpt4_toy", [], IMAGENET),
    "xcomposer1": ("xcomposer_toy", ["stages.instruct.peft.decoder=null"], {}),
    "xcomposer2": ("xcomposer2_toy", [], IMAGENET),
    "open_flamingo": ("flamingo_toy", [], IMAGENET),
}  # fmt: skip

NO_WORD = ("internvl_chat_llava", "llava", "minigpt4", "xcomposer1", "xcomposer2")  # their id of a visual token is none of a word


def fresh(recipe: str, overrides: list[str]) -> tuple[View, dict[str, Any]]:
    """The last stage of a recipe with random weights, and its tokenizers."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=[f"experiment={recipe}", "paths.root=.", *overrides])
    config = OmegaConf.to_container(composed, resolve=True)
    settings = stage_settings(config, config["pipeline"][-1])
    model, tokenizers = compose_model(settings.parts.config, build)
    return make_view(settings, model.eval(), tokenizers, build), tokenizers


def publish(case: str, folder: Path) -> View:
    """Write the folder of a case of `LAYOUTS`; returns the model in it and how its recipe reads."""
    recipe, overrides, fields = LAYOUTS[case]
    view, tokenizers = fresh(recipe, overrides)
    layout = case.partition(" ")[0]
    if layout == "deepseek_vl":
        view.model.config = _deepseek(view.model)
    view.model.save_pretrained(folder, layout=layout)
    view.chats.tokenizer.save_pretrained(folder)
    if layout in NO_WORD:
        for file in folder.glob("tokenizer*.json"):
            file.write_text(file.read_text().replace("<IMG_CONTEXT>", "<unused>"))
    if "middleware" in tokenizers:
        tokenizers["middleware"].save_pretrained(folder / "qformer_tokenizer")
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return view


def _deepseek(model: VLM) -> dict[str, Any]:
    """The released config, which names its towers and not their sizes."""
    params = {"concat_type": "tuple", "high_res_cfg": deepseek_vl.HIGH, "low_res_cfg": deepseek_vl.LOW}
    kind = {"projector_type": "low_high_hybrid_split_mlp_gelu", "depth": 2}
    return {
        "model_type": "multi_modality",
        "image_token_id": model.image_token_id,
        "vision_config": {"cls": deepseek_vl.HYBRID, "params": params},
        "aligner_config": {"params": kind},
        "language_config": language_config(model.decoder),
    }
