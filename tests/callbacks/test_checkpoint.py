"""Checkpoints that are written beside training: when they are due, and that no later step reaches them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, train
from torch import Tensor

from callbacks import Checkpoint
from lightning_internvl.distributed import checkpoint_writing
from lightning_internvl.distributed.checkpoint_files import checkpoint_step
from lightning_internvl.distributed.checkpoint_writing import Writer, begin_write, snapshot
from lightning_internvl.stages import ContrastiveStage


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last one of a stage; what it costs is told once."""
    step, place = ContrastiveStage.training_step, checkpoint_writing.into_place
    third, found = threading.Event(), list[bool]()

    def noting(self: ContrastiveStage, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 2:
            third.set()
        return step(self, batch, batch_idx)

    def late(draft: Path, path: Path) -> None:
        found.append(third.wait(60))
        place(draft, path)

    monkeypatch.setattr(ContrastiveStage, "training_step", noting)
    monkeypatch.setattr(checkpoint_writing, "into_place", late)
    words = ("pipeline=[contrastive]", "callbacks.evaluation=null", "callbacks.samples=null")
    outcome = train(*TINY, *words, f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert found == [True, True]
    assert checkpoint_step(tmp_path / "run/checkpoints/contrastive/last.ckpt") == 4
    assert outcome.out.count("contrastive: a checkpoint takes") == 1


@pytest.mark.parametrize(
    ("given", "ago", "step", "due"),
    [
        ({"every_n_minutes": 2}, 121, 7, True),
        ({"every_n_minutes": 2}, 60, 7, False),
        ({"every_n_steps": 7}, 0, 7, True),
        ({"every_n_steps": 7}, 10_000, 8, False),
        ({"every_n_minutes": 2, "every_n_steps": 7}, 60, 14, True),
        ({"every_n_minutes": 2, "every_n_steps": 7}, 121, 8, True),
        ({}, 10_000, 7, False),
    ],
)
def test_when_one_is_due(given: dict[str, Any], ago: float, step: int, due: bool) -> None:
    checkpoint = Checkpoint(**given)
    checkpoint.last = time.monotonic() - ago
    assert checkpoint._is_due(step) is due


def test_a_copy_is_what_was_then_and_tied_tensors_stay_one() -> None:
    weight = torch.ones(2, 3)
    state = {"words": weight, "head": weight, "rows": weight[1:], "empty": [torch.zeros(0), torch.zeros(0)], "seen": [1]}
    taken = snapshot(state)
    weight.zero_()
    state["seen"].append(2)
    assert taken["words"] is taken["head"]
    assert taken["words"].equal(torch.ones(2, 3))
    assert taken["rows"].equal(torch.ones(1, 3))
    assert taken["seen"] == [1]
    assert [x.numel() for x in taken["empty"]] == [0, 0]


def test_a_failure_is_told_when_it_is_waited_for(tmp_path: Path) -> None:
    writer, path = Writer(), tmp_path / "last.ckpt"
    writer.begin(begin_write({"step": 1}, tmp_path / "draft"), tmp_path / "draft", path, moves=True)
    assert writer.wait()
    assert (torch.load(path), writer.size) == ({"step": 1}, path.stat().st_size)
    writer.begin(begin_write({"step": 2}, tmp_path / "none" / "draft"), tmp_path / "none" / "draft", path, moves=True)
    with pytest.raises(FileNotFoundError, match="none"):
        writer.wait()
    assert not writer.wait()
    assert torch.load(path) == {"step": 1}
