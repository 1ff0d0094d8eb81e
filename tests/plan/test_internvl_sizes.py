"""Parameters of InternVL 2.5, 3 and 3.5 as their recipes build them, beside the published counts."""

from __future__ import annotations

import pytest
from test_plan import composed

from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.plan.meter import parts_of
from lightning_internvl.plan.stage_plan import stage_plan

SIX = "encoder=internvit_6b_45"
# Billions as published: InternVL 3, table 1 (2.5 has the same towers; its sizes as its model cards say them); the page of 3.5
SIZES = {
    "internvl_2_5 1B": (0.94, ["decoder=qwen2_5_0_5b"]),
    "internvl_2_5 2B": (2.21, ["decoder=internlm2_5_1_8b"]),
    "internvl_2_5 4B": (3.71, ["decoder=qwen2_5_3b"]),
    "internvl_2_5 8B": (8.08, []),
    "internvl_2_5 26B": (25.51, [SIX, "decoder=internlm2_20b"]),
    "internvl_2_5 38B": (38.39, [SIX, "decoder=qwen2_5_32b"]),
    "internvl_2_5 78B": (78.41, [SIX, "decoder=qwen2_5_72b"]),
    "internvl_3 1B": (0.94, ["decoder=qwen2_5_0_5b"]),
    "internvl_3 2B": (2.09, ["decoder=qwen2_5_1_5b"]),
    "internvl_3 8B": (7.94, []),
    "internvl_3 9B": (9.14, ["decoder=internlm3_8b"]),
    "internvl_3 14B": (15.1, ["decoder=qwen2_5_14b"]),
    "internvl_3 38B": (38.4, [SIX, "decoder=qwen2_5_32b"]),
    "internvl_3 78B": (78.4, [SIX, "decoder=qwen2_5_72b"]),
    "internvl_3_5 1B": (1.06, ["decoder=qwen3_0_6b"]),
    "internvl_3_5 2B": (2.35, ["decoder=qwen3_1_7b"]),
    "internvl_3_5 4B": (4.73, ["decoder=qwen3_4b"]),
    "internvl_3_5 8B": (8.53, []),
    "internvl_3_5 14B": (15.12, ["decoder=qwen3_14b"]),
    "internvl_3_5 20B": (21.23, ["decoder=gpt_oss_20b", "data.chats_collate.template=internvl3_5_gpt_oss"]),
    "internvl_3_5 30B": (30.85, ["decoder=qwen3_30b_a3b"]),
    "internvl_3_5 38B": (38.4, [SIX, "decoder=qwen3_32b"]),
    "internvl_3_5 241B": (240.7, [SIX, "decoder=qwen3_235b_a22b"]),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones(name: str) -> None:
    billions, overrides = SIZES[name]
    settings = stage_settings(composed(f"experiment={name.split()[0]}", *overrides), "sft")
    parts = parts_of(stage_plan(settings, build).stage.model)
    count = {part: sum(p.numel() for p in module.parameters()) / 1e9 for part, module in parts.items()}
    assert sum(count.values()) == pytest.approx(billions, rel=5e-3)
    assert count["encoder"] == pytest.approx(5.537 if SIX in overrides else 0.304, rel=1e-3)
