"""What is divided among processes as one unit: each block of a part, and nothing that must stay whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, TINY
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lightning_internvl.cli  # noqa: F401  # for its resolvers
from lightning_internvl import pipeline
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.distributed.fsdp2 import check_weights, prefetch, units_of
from lightning_internvl.launch import leave_processes
from lightning_internvl.model.compose import compose_model
from lightning_internvl.plan.memory import Setup, device_memory, fixed_memory
from lightning_internvl.plan.meter import ACTIVATIONS, COPIES, LOGITS
from lightning_internvl.stages import Stage
from lightning_internvl.training.assembly import build_stage

ADAPTERS = tuple(f"peft/part@peft.{part}=lora" for part in ("encoder", "middleware"))


def composed(*words: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(words)), resolve=True)


def stage_of(name: str, *settings: str) -> Stage:
    """A stage on the meta device."""
    own = stage_settings(composed(*TINY, *settings), name)
    with torch.device("meta"):
        return build_stage(own, compose_model(own.parts.config, build)[0], Path(), build)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("contrastive", ()), ("supervised", ("peft=lora", *ADAPTERS))],  # cross-attention waits for the next stage; adapters
    ids=["contrastive", "adapters"],
)
def test_units_are_the_blocks_whatever_trains_in_them(name: str, settings: tuple[str, ...]) -> None:
    stage = stage_of(name, *settings)
    parts = [part for part in (stage.model.encoder, stage.model.middleware, stage.model.decoder) if part is not None]
    blocks = [block for part in parts for block in part.sharding_units()]
    assert [unit for part in stage.model.children() for unit in units_of(part)] == blocks
    trains = [
        {stage.plan.ever_trains(n) for n, p in stage.model.named_parameters() if p in set(block.parameters())} for block in blocks
    ]
    assert {True, False} in trains


def test_a_llama_of_32_layers_with_adapters_is_32_units() -> None:
    adapters = ("peft=lora", "peft.decoder.targets=blocks")
    stage = stage_of("supervised", *adapters, "decoder.config.num_hidden_layers=32")
    updates = [name for name, _ in stage.model.decoder.named_parameters() if ".lora_" in name]
    assert (len(updates), len(units_of(stage.model.decoder))) == (2 * 7 * 32, 32)


def test_each_unit_asks_for_the_next_ones_weights() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        units = [fully_shard(nn.Linear(2, 2), mesh=mesh) for _ in range(3)]
        prefetch(units)
        states = [unit._get_fsdp_state() for unit in units]
        assert [state._states_to_forward_prefetch for state in states] == [[states[1]], [states[2]], []]
    finally:
        leave_processes()


def test_a_parameter_without_a_dimension_is_named() -> None:
    stage = stage_of("contrastive")
    stage.model.objectives["itc"].logit_scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"shape \(1,\).*strategy=ddp: \['objectives.itc.logit_scale'\]"):
        check_weights(stage)


def test_a_block_whose_trained_weights_have_several_types_is_named() -> None:
    stage = stage_of("contrastive")
    norm = next(module for module in stage.model.encoder.sharding_units()[0].modules() if isinstance(module, nn.Linear))
    norm.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"several types in one block: encoder.*float32.*bfloat16.*strategy=ddp"):
        check_weights(stage)


def test_weights_that_stand_in_several_blocks_or_outside_of_them_are_named() -> None:
    for other in ("outside", "block"):
        stage = stage_of("contrastive")
        first, second = stage.model.middleware.sharding_units()[:2]
        layers = [next(module for module in block.modules() if isinstance(module, nn.Linear)) for block in (first, second)]
        if other == "outside":
            stage.model.middleware.register_parameter("tied", layers[0].weight)
        else:
            layers[1].weight = layers[0].weight
        with pytest.raises(ValueError, match=r"that a block shares with another one, or with .*: \['middleware\.[^,]*'\]"):
            check_weights(stage)


def test_a_plan_divides_weights_in_four_bits_and_leaves_those_in_eight_whole() -> None:
    setup = Setup("fsdp2", 4, sharded=True, bucketed=False, capacity=0)
    nothing: Any = SimpleNamespace(kept={ACTIVATIONS: {}, LOGITS: {}, COPIES: {}}, inputs=lambda batch: 0)
    sizes = ("decoder.config.hidden_size=64", "decoder.config.intermediate_size=64")
    found = {}
    for method in ("none", "nf4", "int8"):
        fixed = fixed_memory(stage_of("supervised", "peft=lora", f"quantization={method}", *sizes), "32-true")
        held = device_memory(fixed, nothing, setup, 1).parts["weights"]["decoder"]
        found[method] = held / fixed.weights["decoder"], fixed.gathered
    assert [share for share, _ in found.values()] == [0.25, 0.25, 1.0]
    assert found["nf4"][1] < found["none"][1]


def test_what_cannot_be_divided_is_told_before_the_first_stage_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the stages are put together without memory for their weights."""
    seen = list[str]()
    monkeypatch.setattr(pipeline, "check_weights", lambda stage: seen.append(stage.name))
    for strategy in ("auto", "fsdp2"):
        config = composed(*TINY, f"strategy={strategy}", "trainer.accelerator=cpu")
        pipeline.rehearse([stage_settings(config, "contrastive")], Path("run"), build, fresh=True)
    assert seen == ["contrastive"]
