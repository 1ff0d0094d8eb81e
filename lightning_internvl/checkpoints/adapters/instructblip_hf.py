"""InstructBLIP as transformers' `InstructBlipForConditionalGeneration` reads it: the Q-Former reads
the instruction too."""

from __future__ import annotations

from typing import ClassVar

from lightning_internvl.checkpoints.adapters.blip2_hf import Blip2
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.families.language_model import language_rules
from lightning_internvl.checkpoints.families.qformer import hf_qformer_rules, hf_tower_rules
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, rename
from lightning_internvl.model.vlm import VLM


class InstructBlip(Blip2):
    NAME = "InstructBLIP of transformers (InstructBlipForConditionalGeneration)"
    MODEL_TYPES = ("instructblip",)
    ARCHITECTURE = "InstructBlipForConditionalGeneration"
    FAMILY = "instructblip"
    QFORMER_INPUTS: ClassVar[Config] = {"text": "read", "instructed": True}

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        return Layout.recognises(self, config, shapes)

    def rules(self, config: Config) -> list[NameRule]:
        return [
            *hf_tower_rules(),
            *hf_qformer_rules("qformer.embeddings", "qformer.embeddings.layernorm"),
            rename("middleware.proj.*", "language_projection.*"),
            *language_rules({}),
        ]

    def build(self, config: Config, shapes: Shapes) -> VLM:
        return self.model(config, shapes)

    def fields_of(self, model: VLM) -> Config | None:
        fields = self.family_fields(model)
        if fields is None or not model.middleware.instructed or model.middleware.text != "read":
            return None
        return fields


LAYOUT = InstructBlip()
