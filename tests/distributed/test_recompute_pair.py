"""Blocks that are computed again, and compiled, on two processes equal plain ones on one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import BARE, WHOLE_BATCH, run_alone, run_pair
from test_two_processes import assert_close

# Adapters on the tower, so that a block holds weights that train and others that do not.
STAGE = ("pipeline=[contrastive]", "peft=lora", "peft/part@peft.encoder=lora", "peft.encoder.rank=2")
WAYS = {
    "fsdp2_full": ("strategy=fsdp2", "activation_checkpointing=full", "compile=aot_eager"),
    "fsdp2_selective": ("strategy=fsdp2", "activation_checkpointing=selective"),
    "ddp_selective": ("strategy=ddp", "activation_checkpointing=selective", "compile=eager"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recompute")
    run_alone(*BARE, *WHOLE_BATCH, *STAGE, f"paths.run={folder / 'one'}")
    ways = {name: (*BARE, *STAGE, *way, "trainer.devices=2", f"paths.run={folder / name}") for name, way in WAYS.items()}
    run_pair(folder, [{"train": list(way)} for way in ways.values()])
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_weights_are_those_of_one_plain_process(way: str, runs: Path) -> None:
    assert_close(runs / "one", runs / way, "contrastive")
