"""InstructBLIP as transformers' `InstructBlipForConditionalGeneration` reads it: the Q-Former reads the instruction too."""

from __future__ import annotations

from lightning_internvl.checkpoints.adapters import Config, Shapes, blip2_hf as blip2, updated
from lightning_internvl.checkpoints.families.language_model import language_rules
from lightning_internvl.checkpoints.families.qformer import QFORMER, VISION, hf_qformer_rules, hf_tower_rules
from lightning_internvl.checkpoints.name_rules import NameRule, rename
from lightning_internvl.model.vlm import VLM

NAME = "InstructBLIP of transformers (InstructBlipForConditionalGeneration)"
NATIVE = True
SINGLE_FILE = False

canonical = blip2.canonical


def recognises(config: Config, shapes: Shapes) -> bool:
    """Whether a config is of this layout."""
    return config.get("model_type") == "instructblip"


def rules(config: Config) -> list[NameRule]:
    """Tower, Q-Former with its text embeddings inside, projection, language model."""
    return [
        *hf_tower_rules(),
        *hf_qformer_rules("qformer.embeddings", "qformer.embeddings.layernorm"),
        rename("middleware.proj.*", "language_projection.*"),
        *language_rules({}),
    ]


def build(config: Config, shapes: Shapes) -> VLM:
    """The model of a config.

    Raises:
        ValueError: for a setting that the parts do not have.
    """
    return blip2.model_of(config, shapes, text="read", instructed=True)


def config_of(model: VLM) -> Config | None:
    """The config that the model was loaded with, brought up to date, else one made from its parts."""
    made = blip2.made_of(model, "instructblip")
    if made is None or not model.middleware.instructed or model.middleware.text != "read":
        return None
    loaded = model.config or {}
    if recognises(loaded, {}):
        return updated(loaded, blip2.TOP | {"vision_config": VISION, "qformer_config": QFORMER}, made)
    return blip2.complete(model, made, "InstructBlipForConditionalGeneration", "instructblip", "instructblip")
