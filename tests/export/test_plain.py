"""Merged equals adapter, for every toy system and method, with adapters on all parts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_toys import composed, draw
from torch import nn

from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.export import check
from lightning_internvl.export.plain import make_plain
from lightning_internvl.inference.collators import View, make_view
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.layers import peft
from lightning_internvl.layers.quantization import dequantized_weight, quantized_layers
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.model.compose import compose_model

RECIPES = (
    "internvl_toy", "internvl_chat_toy", "internvl_1_5_toy", "internvl_2_5_toy", "internvl_3_toy", "internvl_3_5_toy",
    "internvl_retrieval_toy", "llava_toy", "llava_next_toy", "llava_onevision_toy", "blip2_toy",
    "instructblip_toy", "minigpt4_toy", "qwen_vl_toy", "qwen2_vl_toy", "qwen2_5_vl_toy", "qwen3_vl_toy",
    "deepseek_vl_toy", "xcomposer_toy",
    "xcomposer2_toy", "flamingo_toy", "clip_toy", "clip_rn50_toy",
)  # fmt: skip
WITHOUT_DECODER = ("internvl_retrieval_toy", "clip_toy", "clip_rn50_toy")
ADAPTERS = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": peft.BLOCKS}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merged_equals_adapter(recipe: str, method: str) -> None:
    parts = ("encoder", "middleware") if recipe in WITHOUT_DECODER else ("encoder", "middleware", "decoder")
    if (recipe, method) == ("xcomposer2_toy", "dora"):
        parts = ("encoder", "middleware")  # DoRA rescales what a layer gives, and with it the Partial LoRA that is added inside
    view = adapted_view(recipe, dict.fromkeys(parts, ADAPTERS | {"method": method}))
    model, prompts, greedy = view.model, check.sample_prompts(view)[:1], check.greedy_options(view)
    before = [check.model_outputs(model, prompt, greedy) for prompt in prompts]
    names = {name for name in own_tensors(model) if not peft.is_update(name)}
    assert {name.partition(".")[0] for name, _ in peft.adapted_layers(model)} == set(parts)
    make_plain(model)
    assert not peft.adapted_layers(model)
    assert set(own_tensors(model)) == names
    check.check_outputs(prompts, before, [check.model_outputs(model, prompt, greedy) for prompt in prompts])  # within 1e-4


def adapted_view(recipe: str, adapters: dict[str, Any]) -> View:
    """The last stage of a recipe with these adapters by part, all weights drawn anew."""
    config = composed(recipe)
    settings = stage_settings(config, config["pipeline"][-1])
    model, tokenizers = compose_model(settings.parts.config | {"peft": adapters}, build)
    draw(model)
    return make_view(settings, model.eval(), tokenizers, build)


@pytest.mark.parametrize("quantization", ["nf4", "int8", "bf16"])
def test_quantized_weights_become_plain(make_run: Callable[..., Path], quantization: str) -> None:
    opened = open_run(make_run("llava_toy", "peft=lora", f"quantization={quantization}"), build)
    model = opened.view.model
    assert quantized_layers(model)
    shapes = {name: tensor.shape for name, tensor in own_tensors(model).items() if not peft.is_update(name)}
    make_plain(model)
    assert not quantized_layers(model)
    assert {name: tensor.shape for name, tensor in own_tensors(model).items()} == shapes
    assert model.decoder.lm.get_output_embeddings().weight is model.decoder.lm.get_input_embeddings().weight


def test_plain_layers_need_no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # an import would raise
    layer = nn.Linear(4, 3)
    assert dequantized_weight(layer).equal(layer.weight)


def test_bitsandbytes_does_not_ask_for_kernels_that_nothing_uses() -> None:
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
