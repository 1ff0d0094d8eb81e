"""Qwen3-VL with a mixture of experts, as released and as transformers' class of the same name reads
it. Released files hold the experts' matrices turned; transformers 5 saves a fresh model as it has them
and tells the two by their shapes, as is done here. What is written is turned, which all readers know.

Letters: E experts, I width inside one, H width of the model.
"""

from __future__ import annotations

import re

from torch import Tensor
from transformers import AutoConfig

from lightning_internvl.checkpoints.adapters.qwen3_vl import Qwen3VL
from lightning_internvl.checkpoints.name_rules import Config, NameRule
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.layers.hf_config import make_config
from lightning_internvl.model.vlm import VLM

STRAIGHT = "experts_are_straight"  # of a config while its model is in use: its files hold them as transformers has them
SIZES = ("hidden_size", "moe_intermediate_size")


class Qwen3VLMoe(Qwen3VL):
    NAME = "Qwen3-VL with a mixture of experts (model_type 'qwen3_vl_moe')"
    MODEL_TYPES = ("qwen3_vl_moe",)
    ARCHITECTURE = "Qwen3VLMoeForConditionalGeneration"
    LANGUAGE_TYPE = "qwen3_vl_moe_text"

    def completed(self, config: Config, files: WeightFiles) -> Config:
        for kind, shape in self._uneven(config).items():
            pattern = rf"model\.language_model\.layers\.\d+\.mlp\.experts\.{kind}_proj"
            if shape in [tuple(size)[1:] for name, size in files.shapes.items() if re.fullmatch(pattern, name)]:
                return config | {STRAIGHT: True}
        return config

    def rules(self, config: Config) -> list[NameRule]:
        turned = () if config.get(STRAIGHT) else self._uneven(config)
        return [*(_turned(f"layers.*.mlp.experts.{kind}_proj") for kind in turned), *super().rules(config)]

    def config_of(self, model: VLM) -> Config | None:
        config = super().config_of(model)
        return config and {name: value for name, value in config.items() if name != STRAIGHT}

    def _uneven(self, config: Config) -> dict[str, tuple[int, int]]:
        """The experts' matrices whose shape tells which way they lie, with the straight one."""
        sizes = {name: config["text_config"][name] for name in SIZES if name in config["text_config"]}
        text = make_config(AutoConfig, {"model_type": self.LANGUAGE_TYPE, **sizes}, "text_config")
        width, inside = text.hidden_size, text.moe_intermediate_size
        shapes = {"gate_up": (2 * inside, width), "down": (width, inside)}
        return {kind: (rows, columns) for kind, (rows, columns) in shapes.items() if rows != columns}


def _turned(name: str) -> NameRule:
    return NameRule((f"decoder.lm.model.{name}",), (f"model.language_model.{name}",), _turn, _turn)


def _turn(rows: Tensor) -> tuple[Tensor]:
    """(E, 2 I, H) to (E, H, 2 I), (E, H, I) to (E, I, H), and back."""
    return (rows.transpose(1, 2).contiguous(),)


LAYOUT = Qwen3VLMoe()
