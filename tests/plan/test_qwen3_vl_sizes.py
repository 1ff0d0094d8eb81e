"""Parameters of Qwen3-VL as its recipe builds it, beside those of the released settings and transformers' classes."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_plan import composed
from transformers import AutoConfig

from lightning_internvl.checkpoints.adapters import all_layouts
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.plan.meter import parts_of
from lightning_internvl.plan.stage_plan import stage_plan

SMALL = ["encoder=qwen3_vit_300m", "middleware.deep_layers=[6,12,18]"]
# Millions of numbers, counted from the released settings; the model cards were not looked up
SIZES = {
    "2B": (2_128, [*SMALL, "decoder=qwen3_vl_2b"]),
    "4B": (4_438, [*SMALL, "decoder=qwen3_vl_4b"]),
    "8B": (8_767, []),
    "32B": (33_357, ["decoder=qwen3_vl_32b"]),
    "30B-A3B": (31_071, ["decoder=qwen3_vl_30b_a3b"]),
    "235B-A22B": (235_670, ["decoder=qwen3_vl_235b_a22b"]),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_the_released_settings(name: str) -> None:
    millions, overrides = SIZES[name]
    settings = stage_settings(composed("experiment=qwen3_vl", *overrides), "sft")
    model = stage_plan(settings, build).stage.model
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in parts_of(model).items()}
    assert sum(count.values()) / 1e6 == pytest.approx(millions, rel=5e-3)
    layout = all_layouts()["qwen3_vl_moe" if "A" in name else "qwen3_vl"]
    model.image_token_id, model.video_token_id = 151655, 151656
    config = layout.config_of(model)
    assert config is not None
    with torch.device("meta"):
        stock = getattr(transformers, layout.ARCHITECTURE)(AutoConfig.for_model(**config))
    assert sum(p.numel() for p in stock.parameters()) == sum(count.values())
