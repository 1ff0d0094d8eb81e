"""A model that answers by itself on two processes, whole on both or divided between them: answers and weights as on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pair import BARE, run_alone, run_pair
from runs import losses, weights

STEPS = 3
# A rule that answers of fresh weights meet as often as not, and an end that some of them find.
FORM = "{_target_: lightning_internvl.stages.rewards.answer_format, _partial_: true, pattern: '[^n]*'}"
REWARD = (
    "pipeline=[reward]", "stages.reward.new=[encoder,middleware,decoder,objectives]", f"max_steps={STEPS}",
    "stages.reward.module.answers=4", "stages.reward.module.answer_tokens=5", f"+stages.reward.module.rewards.form={FORM}",
    "stages.reward.optimizer.lr=1e-3", "stages.reward.scheduler.warmup_steps=0", "callbacks.samples=null",
    "stages.reward.evaluation={answers: null, captions: null}", "data.num_workers=0", "trainer.log_every_n_steps=1",
)  # fmt: skip


def answers(folder: Path) -> list[dict[str, Any]]:
    """Of all processes, by step and sample."""
    files = (folder / "stages/reward").glob("rollouts*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["step"], int(row["key"].rpartition("/")[2])))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_alone(*BARE, *REWARD, "stages.reward.batch_size=4", f"paths.run={tmp_path / 'one'}")
    each = (*BARE, *REWARD, "stages.reward.batch_size=2", "trainer.devices=2")
    kinds = {"ddp": ("strategy=ddp",), "fsdp2": ("strategy=fsdp2",)}
    run_pair(tmp_path, [{"train": [*each, *words, f"paths.run={tmp_path / kind}"]} for kind, words in kinds.items()])
    ours = weights(tmp_path / "one", "reward")
    for kind in kinds:
        assert answers(tmp_path / kind) == answers(tmp_path / "one")
        assert (tmp_path / kind / "stages/reward/rollouts.1.jsonl").exists()
        for one, two in zip(*(losses(tmp_path / run, "reward") for run in ("one", kind)), strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
        theirs = weights(tmp_path / kind, "reward")
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
