"""Resume is exact: whatever moment a run is stopped at, its weights and measures are those of a run that was not."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started
from runs import (
    STAGES,
    TINY,
    Crash,
    every_checkpoint,
    losses,
    once,
    read_json,
    same_weights,
    stopped_before,
    tiny_run,
    train,
    weights,
)
from torch import Tensor

import callbacks
from lightning_internvl.stages import ContrastiveStage

# Long enough for a kill to fall into every stage, with a checkpoint every few steps.
LONGER = ("callbacks.checkpoint.every_n_steps=2", *(f"stages.{stage}.max_steps=16" for stage in STAGES))
SCHEDULE = "stages.contrastive.module.train=[middleware,objectives,{name: encoder, from_step: 2}]"
CHANGES = ("pipeline=[contrastive]", "callbacks.checkpoint.every_n_steps=1", SCHEDULE)


def killed(run: Path, stage: str, delay: float, *arguments: str) -> None:
    """Start a process, kill it `delay` seconds after the stage has written its first checkpoint, or while it writes another one.
    What it leaves of that one is there either way."""
    process, last = Started("train.py", *once(*arguments)), run / "checkpoints" / stage / "last.ckpt"
    while not last.exists():
        assert not process.ended(), process.err
        time.sleep(0.002)
    begun, draft = time.monotonic(), last.with_name(".last.ckpt.draft")
    while time.monotonic() - begun < delay and not draft.exists():
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"{stage} was over before the kill"
    draft.write_bytes(last.read_bytes()[:1000])


def test_killed_in_every_stage_and_resumed_equals_never_killed(tmp_path: Path) -> None:
    whole, run = tiny_run(tmp_path / "whole", *LONGER), tmp_path / "run"
    delays = {stage: random.uniform(0.0, 0.1) for stage in STAGES}
    for stage in STAGES:
        start = [f"resume={run}"] if run.exists() else [*TINY, *LONGER, f"paths.run={run}"]
        killed(run, stage, delays[stage], *start)
    assert_other_weights_are_refused(run, "supervised", run / "handoff" / "words" / "manifest.json")
    outcome = train(f"resume={run}")
    assert outcome.code == 0, (delays, outcome.err)
    assert outcome.out.count("finished earlier") >= 2
    for stage in STAGES:
        assert same_weights(whole, run, stage), (stage, delays)
        rows, all_rows = losses(run, stage), losses(whole, stage)
        assert rows == [row for row in all_rows if row in rows], (stage, delays)
        assert len(rows) >= len(all_rows) - 1, (stage, delays)  # a kill between a checkpoint and its log line loses the line
    assert (whole / "metrics.json").read_bytes() == (run / "metrics.json").read_bytes(), delays
    assert (run / "report.html").exists()
    assert not list(run.rglob("*.draft"))


def assert_other_weights_are_refused(run: Path, stage: str, manifest: Path) -> None:
    """A checkpoint leaves out what is frozen and was handed over, and goes on from no other weights."""
    held = torch.load(run / "checkpoints" / stage / "last.ckpt", weights_only=True)["state_dict"]
    before = {f"model.{name}" for name in weights(run, manifest.parent.name)}
    assert any(name.startswith("model.encoder.") for name in before)
    assert not any(name.startswith("model.encoder.") for name in held), "the encoder is frozen"
    text = manifest.read_text()
    manifest.write_text(text + " ")
    outcome = train(f"resume={run}")
    assert outcome.code == 2
    assert "last.ckpt leaves out frozen weights of its start" in outcome.err
    manifest.write_text(text)


@pytest.mark.parametrize("callback", ["Evaluation", "Report", "HandOff"])
def test_stopped_after_the_last_step_and_resumed(callback: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise Crash

    run, whole = tmp_path / "run", tiny_run(tmp_path / "whole", "pipeline=[contrastive]")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(callbacks, callback), "on_fit_end", crash)
        with pytest.raises(Crash):
            tiny_run(run, "pipeline=[contrastive]")
    assert not (run / "handoff" / "contrastive").exists()
    assert train(f"resume={run}").code == 0
    assert same_weights(whole, run, "contrastive")
    assert losses(whole, "contrastive") == losses(run, "contrastive")
    assert (whole / "metrics.json").read_bytes() == (run / "metrics.json").read_bytes()
    assert (run / "report.html").exists()


# --- a change of what trains, within a stage ------------------------------------------------------------------------


def checkpoint(run: Path, step: int | None = None) -> dict[str, Any]:
    name = "last.ckpt" if step is None else f"step-{step}.ckpt"
    return torch.load(run / "checkpoints" / "contrastive" / name, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in which the encoder joins at step 2; all its checkpoints are kept."""
    with every_checkpoint():
        return tiny_run(tmp_path_factory.mktemp("change") / "whole", *CHANGES)


def encoder(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state["state_dict"].items() if name.startswith("model.encoder.")}


def test_the_encoder_joins_at_its_step_and_the_optimizer_has_held_it_from_the_start(whole: Path) -> None:
    states = [checkpoint(whole, step) for step in (1, 2, 3, 4)]
    before, still, joined, last = map(encoder, states)
    assert all(tensor.equal(still[name]) for name, tensor in before.items())
    assert any(not tensor.equal(joined[name]) for name, tensor in before.items())
    assert any(not tensor.equal(last[name]) for name, tensor in joined.items())
    adam = [state["optimizer_states"][0] for state in states]
    held = [sum(len(group["params"]) for group in state["param_groups"]) for state in adam]
    assert len(set(held)) == 1
    # Moments begin with a parameter's first step; those of the encoder are two steps younger.
    counts = [sorted(int(moments["step"]) for moments in state["state"].values()) for state in adam]
    assert [set(ages) for ages in counts] == [{1}, {2}, {1, 3}, {2, 4}]
    assert len(counts[1]) < len(counts[2]) == len(counts[3]) <= held[0]


@pytest.mark.parametrize("step", [1, 2, 3], ids=["before", "at", "after"])
def test_stopped_around_the_change_and_resumed(step: int, whole: Path, tmp_path: Path) -> None:
    with stopped_before(step, ContrastiveStage):
        tiny_run(tmp_path / "run", *CHANGES)
    outcome = train(f"resume={tmp_path}/run")
    assert outcome.code == 0
    assert f"contrastive: goes on from step {step}" in outcome.out
    assert same_weights(whole, tmp_path / "run", "contrastive")
    assert losses(whole, "contrastive") == losses(tmp_path / "run", "contrastive")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(checkpoint(whole)[key], checkpoint(tmp_path / "run")[key], key)
    tables = [read_json(run / "stages" / "contrastive" / "freezing.json") for run in (whole, tmp_path / "run")]
    assert [entry["step"] for entry in tables[0]] == [0, 2]
    assert [entry for entry in tables[1] if entry["step"] in (0, 2)] == tables[0]


def assert_same(one: Any, two: Any, where: str) -> None:
    """Equal to the last bit, at any depth."""
    if isinstance(one, Tensor):
        assert one.equal(two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == two, where
