"""Runs with packed rows: stopped and resumed they end with the same bits, they are counted right, and wrong words are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Started
from runs import TINY, losses, once, read_json, same_weights, stopped_before, tiny_run, train, train_apart
from torch import Tensor

from lightning_internvl.stages import SupervisedStage

NEW = "stages.supervised.new=[encoder,middleware,decoder,objectives]"
SHORT = ("pipeline=[supervised]", NEW, "max_steps=6", "callbacks.checkpoint.every_n_steps=1")
PACKED = (*SHORT, "stages.supervised.batch_size=2", "data.packing_tokens=300", "data.packing_window=4")


def stop_at_its_fourth_step() -> None:
    """Ends the first of two processes; the second one, which it starts, is ended by the trainer."""
    step = SupervisedStage.training_step

    def crashing(self: SupervisedStage, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 3:
            raise RuntimeError("stopped here")
        return step(self, batch, batch_idx)

    SupervisedStage.training_step = crashing


@pytest.mark.parametrize(
    "packing", [("data.packing=true", "data.num_workers=1"), ("data.packing=bucketed", "++trainer.accumulate_grad_batches=2")]
)
def test_stopped_and_resumed_equals_never_stopped(packing: tuple[str, ...], tmp_path: Path) -> None:
    whole = tiny_run(tmp_path / "whole", *PACKED, *packing, "data.num_workers=0")
    with stopped_before(3, SupervisedStage):
        tiny_run(tmp_path / "run", *PACKED, *packing)
    outcome = train(f"resume={tmp_path}/run")
    assert outcome.code == 0, outcome.err
    assert "supervised: goes on from step 3" in outcome.out
    assert same_weights(whole, tmp_path / "run", "supervised")
    assert losses(whole, "supervised") == losses(tmp_path / "run", "supervised")


def test_two_processes_stopped_and_resumed(tmp_path: Path) -> None:
    """The checkpoint holds the position of each."""
    fewer = [f"~callbacks.{name}" for name in ("samples", "evaluation", "report", "validation")]
    devices = ("strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    two = once(*TINY[:-1], *PACKED, *fewer, *devices, "data.packing=true")
    whole, run = tmp_path / "whole", tmp_path / "run"

    done = train_apart(*two, f"paths.run={whole}")
    assert done.code == 0, done.err
    crashing = Started("train.py", *two, f"paths.run={run}", before=stop_at_its_fourth_step)
    assert crashing.wait() != 0
    assert "stopped here" in crashing.err
    positions = torch.load(run / "checkpoints/supervised/last.ckpt", weights_only=True)["StageData"]["positions"]
    assert [bool(position["waiting"]) for position in positions] == [True, True]
    assert not set(positions[0]["waiting"]) & set(positions[1]["waiting"])
    done = train_apart(f"resume={run}")
    assert done.code == 0, done.err
    assert "supervised: goes on from step 3" in done.out
    assert same_weights(whole, run, "supervised")
    assert losses(whole, "supervised") == losses(run, "supervised")


def test_samples_tokens_and_padding_of_packed_rows_are_counted(tmp_path: Path) -> None:
    counted = ("++callbacks.throughput.skip_steps=0", "callbacks.throughput.every_n_steps=1")
    timing = {}
    for kind in ("true", "null"):
        run = tiny_run(tmp_path / kind, *PACKED, f"data.packing={kind}", *counted)
        timing[kind] = read_json(run / "timing.json")["supervised"]
    rates = (
        timing["true"]["samples_per_s"] / timing["true"]["tokens_per_s"],
        (timing["null"]["samples_per_s"] / timing["null"]["tokens_per_s"]),
    )
    assert rates[0] == pytest.approx(rates[1], rel=0.25)  # a sample has as many tokens, packed or not
    assert timing["true"]["padding_share"] < 0.1 < 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.packing=foo",
            r"data\.packing='foo' is not known; valid choices: null, true \(the same as packed\), packed, bucketed",
        ),
        ("data.packing_tokens=0", r"data\.packing_tokens=0 must be a whole number above 0"),
        ("data.packing_tiles=many", r"data\.packing_tiles='many' must be a whole number above 0"),
        ("data.packing_window=0.5", r"data\.packing_window=0\.5 must be a whole number above 0"),
        ("+stages.supervised.datasets.packing=foo", r"stages\.supervised: data\.packing='foo' is not known"),
        ("data.packing_tokens=20", r"stages\.supervised: data\.packing_tokens=20 is less than the \d+ tokens"),
        (
            "decoder=t5_toy",
            r"stages\.supervised: data\.packing=packed: decoder HFSeq2SeqLM does not keep the samples of a row apart",
        ),
    ],
)
def test_wrong_words_are_answered_before_anything_trains(override: str, said: str, tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith("decoder.")] if override.startswith("decoder=") else TINY
    outcome = train(*words, *SHORT, "data.packing=true", f"paths.run={tmp_path}/run", override)
    assert outcome.code == 2
    assert re.search(said, outcome.err), outcome.err
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_full_rows(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [train(*TINY, *SHORT, "plan=true", *more) for more in ((), ("data.packing=true", "data.packing_tokens=484"))]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[1].err
    assert outcomes[0].out != outcomes[1].out
