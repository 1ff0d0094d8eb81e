"""A plan counts what works in chunks as it runs: what is held of one chunk, not of all."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from runs import TINY, train
from test_plan import composed

from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.plan.stage_plan import StagePlan, stage_plan

ITC = "stages.contrastive.objectives.itc.chunk"
NEXT = "+stages.supervised.objectives.next_token.chunk"


def planned(stage: str, *settings: str) -> StagePlan:
    return stage_plan(stage_settings(composed(*TINY, f"stages.{stage}.batch_size=32", *settings), stage), build)


@pytest.mark.parametrize(("stage", "loss", "setting"), [("contrastive", "itc", ITC), ("supervised", "next_token", NEXT)])
def test_logits_are_those_of_a_chunk(stage: str, loss: str, setting: str) -> None:
    plan = planned(stage, f"{setting}=8")
    judged, batch = plan.measured.judged[f"objectives.{loss}"](32), plan.batch
    whole, some, large = (
        replace(plan, measured=replace(plan.measured, chunks=chunks)).memory()
        for chunks in ({}, plan.measured.chunks, {f"objectives.{loss}": 10**6})
    )
    rows = 2 * sum(curve(batch) for curve in plan.measured.rows.values())  # they are there whatever the chunk
    logits = sum(whole.parts["logits"].values()) - rows
    assert judged >= batch
    assert logits > 0
    assert sum(some.parts["logits"].values()) == pytest.approx(rows + logits * 8 / judged)
    assert some.parts["activations"] == whole.parts["activations"]
    assert large.parts == whole.parts


def test_cached_embeddings_need_the_activations_of_a_chunk() -> None:
    plan = planned("contrastive", "stages.contrastive.module.cached_chunk=4")
    some, whole = (replace(plan, measured=replace(plan.measured, cached=n)).memory() for n in (plan.measured.cached, None))
    small = plan.memory(4)
    for part in ("encoder", "middleware"):
        assert some.parts["activations"][part] == small.parts["activations"][part] < whole.parts["activations"][part] / 4
    assert some.parts["logits"] == whole.parts["logits"]


def test_packed_data_is_counted_in_rows(tmp_path: Path) -> None:
    outcome = train(*TINY, "plan=true", "pipeline=[supervised]", f"paths.run={tmp_path}/run", "data.packing=true")
    assert outcome.code == 0, outcome.err
    assert "4 rows a device" in re.sub(r"\s+", " ", outcome.out)
