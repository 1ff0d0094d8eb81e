"""Every stage of a published recipe fits the devices that it names, with its published batch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from test_plan import composed

from lightning_internvl.cli import CONF
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.targets import build
from lightning_internvl.plan.memory import GIB
from lightning_internvl.plan.search import ROOM
from lightning_internvl.plan.stage_plan import StagePlan, stage_plans

CAPACITY = 80  # GiB of one device
OWN = {"finetune", "transplant", "scenes_smollm2"}  # recipes that have no published counterpart


class Published(NamedTuple):
    """Devices, samples of a step by stage, and where they are from."""

    devices: tuple[int, ...]
    batches: tuple[int, ...]
    source: str


PUBLISHED = {
    "blip2": Published((16, 16), (1680, 1920), "BLIP-2, section 3.4 (ViT-g; OPT)"),
    "clip_rn50": Published((256,), (32_768,), "CLIP, section 2.5; devices as of clip"),
    "clip": Published((256, 256), (32_768, 32_768), "CLIP, section 2.5, table 18"),
    "deepseek_vl": Published((128,) * 3, (256, 2304, 256), "DeepSeek-VL, hyperparameters, 7B"),
    "deepseek_vl_1b": Published((128,) * 3, (256, 1024, 256), "the same table, 1.3B"),
    "flamingo": Published((128,), (1152,), "OpenFlamingo-9B as reported"),
    "instructblip": Published((16,), (128,), "InstructBLIP, section 2.6 (7B)"),
    "internvl": Published(
        (640, 640, 160, 8, 8),
        (163_840, 163_840, 20_480, 256, 128),
        "InternVL, section 4.1; chat: LLaVA 1.5, table of hyperparameters",
    ),
    "internvl_1_5": Published((256, 256), (2048, 1024), "scripts released with InternVL 1.5"),
    "internvl_2_5": Published((512,) * 3, (512, 1024, 512), "scripts released with InternVL 2.5"),
    "internvl_3": Published((128,) * 2, (512, 512), "not published: a choice of the recipe"),
    "internvl_3_5": Published((128,) * 3, (256, 512, 512), "scripts released with InternVL 3.5; devices are not published"),
    "internvl_chat": Published((8, 8), (256, 128), "LLaVA 1.5, table of hyperparameters"),
    "internvl_retrieval": Published((32,), (1024,), "InternVL, appendix, retrieval"),
    "llava": Published((8, 8), (256, 128), "LLaVA 1.5, table of hyperparameters"),
    "llava_next": Published((32, 32), (256, 128), "LLaVA-NeXT, report of January 2024"),
    "llava_onevision": Published((128,) * 4, (512, 512, 256, 256), "LLaVA-OneVision, table 1; released scripts for devices"),
    "minigpt4": Published((4, 4), (256, 48), "MiniGPT-4, section 3; released script"),
    "qwen2_vl": Published((8,) * 3, (256, 256, 128), "not published: a choice of the recipe"),
    "qwen3_vl": Published((8,) * 4, (256, 256, 128, 128), "not published: a choice of the recipe"),
    "qwen2_5_vl": Published((8,) * 4, (256, 256, 128, 128), "not published: a choice of the recipe"),
    "qwen_vl": Published((128,) * 3, (30_720, 4096, 128), "Qwen-VL, appendix, hyperparameters"),
    "xcomposer": Published((128,) * 3, (2048, 256, 256), "InternLM-XComposer, from memory"),
    "xcomposer2": Published((128, 128), (4096, 2048), "InternLM-XComposer2, from memory"),
}  # fmt: skip


def samples_of(plan: StagePlan) -> int:
    ranks = plan.setup.devices // plan.setup.tensor_parallel_size
    return plan.batch * plan.accumulate * ranks


def test_the_table_names_every_published_recipe() -> None:
    names = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    assert {name for name in names if not name.endswith("_toy")} - OWN == set(PUBLISHED)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_stages_fit_as_they_are(recipe: str) -> None:
    config = composed(f"experiment={recipe}", f"device_memory={CAPACITY}")
    plans = list(stage_plans(RunSettings.of(config).trained, build))
    assert tuple(plan.setup.devices for plan in plans) == PUBLISHED[recipe].devices
    assert tuple(map(samples_of, plans)) == PUBLISHED[recipe].batches
    needed = {plan.name: plan.memory().total / GIB for plan in plans}
    assert {name: size for name, size in needed.items() if size > ROOM * CAPACITY} == {}
