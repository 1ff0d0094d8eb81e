"""A decoder with experts whose use is balanced, divided block by block among two processes: the same as on one, whole
or in 4 bits with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import BARE, QLORA, QUIET, STEPS, WHOLE_BATCH, run_alone, run_pair
from runs import losses, weights

EXPERTS = (
    "pipeline=[supervised]", "stages.supervised.new=[encoder,middleware,decoder]", "decoder=qwen3_moe_toy",
    "stages.supervised.module.router_balance=0.5", "decoder.config.num_hidden_layers=2", "decoder.config.head_dim=8",
    "decoder.config.moe_intermediate_size=16",
)  # fmt: skip
PACKED = (*EXPERTS, *QLORA, "decoder.config.moe_intermediate_size=64")


@pytest.mark.parametrize("settings", [EXPERTS, PACKED], ids=["whole", "qlora"])
def test_two_processes_equal_one(tmp_path: Path, settings: tuple[str, ...]) -> None:
    bare = tuple(word for word in BARE if not word.startswith("decoder.config.num_hidden_layers"))
    run_alone(*bare, *WHOLE_BATCH, *QUIET, *settings, f"paths.run={tmp_path / 'one'}")
    shared = ("trainer.devices=2", "strategy=fsdp2", "activation_checkpointing=full")
    run_pair(tmp_path, [{"train": [*bare, *QUIET, *settings, *shared, f"paths.run={tmp_path / 'two'}"]}])
    first, second = (losses(tmp_path / run, "supervised") for run in ("one", "two"))
    assert len(first) == len(second) == STEPS
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
        assert 2 <= one["train/router"] < 4
    ours, theirs = (weights(tmp_path / run, "supervised") for run in ("one", "two"))
    assert sum("experts" in name for name in ours) == 2 * 2 * (3 if settings is PACKED else 1)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
