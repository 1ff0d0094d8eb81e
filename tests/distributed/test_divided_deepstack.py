"""Features behind blocks of a decoder that is divided among two processes: the same as on one, with videos and texts alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair import QUIET, STEPS, run_alone, run_pair
from runs import losses, weights

SMALL = (
    "experiment=qwen3_vl_toy", "debug=fast", "pipeline=[long]", "stages.long.new=[encoder,middleware,decoder]",
    "stages.long.datasets.chats.weights={questions:0.5,videos:0.5}", f"max_steps={STEPS}", "logger=[history]",
    "trainer.accelerator=cpu", "callbacks.report=null", "callbacks.progress=null", "stages.long.scheduler.warmup_steps=0",
    "optimizer.eps=1.0e-5", "encoder.dim=32", "encoder.mlp_dim=32", "encoder.depth=2", "encoder.heads=2",
    "decoder.config.hidden_size=32", "decoder.config.intermediate_size=32", "decoder.config.num_hidden_layers=2",
    "decoder.config.num_attention_heads=2", "decoder.config.num_key_value_heads=2", *QUIET,
)  # fmt: skip


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_alone(*SMALL, "stages.long.batch_size=8", f"paths.run={tmp_path / 'one'}")
    shared = ("trainer.devices=2", "strategy=fsdp2", "activation_checkpointing=full", "stages.long.batch_size=4")
    run_pair(tmp_path, [{"train": [*SMALL, *shared, f"paths.run={tmp_path / 'two'}"]}])
    first, second = (losses(tmp_path / run, "long") for run in ("one", "two"))
    assert len(first) == len(second) == STEPS
    for one, two in zip(first, second, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    ours, theirs = (weights(tmp_path / run, "long") for run in ("one", "two"))
    assert sum("middleware.deep" in name for name in ours) == 2 * 6
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
