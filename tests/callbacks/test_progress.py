"""What a user sees while a stage trains: on a terminal a bar, elsewhere lines."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from runs import STAGES, TINY, train

from callbacks import Progress, progress


def seen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, left: str) -> str:
    """What four steps of a stage of four steps print, of a run that has `left`."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=80, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    asked: list[tuple[str, int]] = []

    def told(name: str, steps: int, pace: float) -> str:
        asked.append((name, steps))
        return left

    time_left = SimpleNamespace(place=lambda name: "2/3", told=told) if left else None
    callback = Progress(every_n_steps=2)
    callback.setup_stage(SimpleNamespace(time_left=time_left))
    trainer: Any = SimpleNamespace(global_step=0, is_global_zero=True, callback_metrics={"train/loss": 1.5})
    stage: Any = SimpleNamespace(name="generative", max_steps=4)
    callback.on_train_start(trainer, stage)
    for trainer.global_step in (1, 2, 3, 4):
        callback.on_train_batch_end(trainer, stage, None, None, trainer.global_step - 1)
    callback.on_train_end(trainer, stage)
    assert ("generative", 0) in asked or not left
    return written.getvalue()


def test_a_line_says_the_stage_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = seen(monkeypatch, terminal=False, left="about 3 min left in the run").splitlines()
    assert re.fullmatch(r"2/3 generative 4/4  loss 1\.500  \d+\.\d steps/s  about 3 min left in the run", line)


def test_a_stage_that_stands_alone_says_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = seen(monkeypatch, terminal=False, left="").splitlines()
    assert re.fullmatch(r"generative 4/4  loss 1\.500  \d+\.\d steps/s", line)


def test_a_bar_says_the_stage_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, below = seen(monkeypatch, terminal=True, left="about 3 min left in the run").rstrip("\n\x1b[?25h").splitlines()[-2:]
    assert "2/3 generative" in bar
    assert "4/4" in bar
    assert below.strip() == "about 3 min left in the run  loss 1.500"


def test_a_run_that_is_resumed_counts_all_of_its_stages(tmp_path: Path) -> None:
    told = (word for word in TINY if word != "callbacks.progress=null")
    whole = train(*told, f"paths.run={tmp_path}/run", "callbacks.report=null")
    lines = [line for line in whole.out.splitlines() if "steps/s" in line]
    assert [line.split()[:3] for line in lines] == [[f"{number}/4", name, "4/4"] for number, name in enumerate(STAGES, 1)]
    assert "of training left in the run" in lines[0]  # no evaluation is measured yet
    assert all(re.search(r"steps/s  about \d+ s left in the run$", line) for line in lines[1:])
    for kept in (tmp_path / "run" / "handoff" / "supervised", tmp_path / "run" / "checkpoints" / "supervised"):
        kept.rename(tmp_path / kept.parent.name)
    again = train(f"resume={tmp_path}/run")
    (line,) = [line for line in again.out.splitlines() if "steps/s" in line]
    assert line.startswith("4/4 supervised 4/4")
