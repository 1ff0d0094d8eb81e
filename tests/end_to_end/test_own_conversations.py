"""Somebody's own JSONL of drawn pictures: trained on with bad samples among it, resumed, and measured on what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import TINY, read_json, same_weights, train, train_apart

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
WORDS = tuple(word for word in TINY if not word.startswith(("debug", "data.", "stages")))
STAGE = (
    "pipeline=[supervised]", "stages.supervised.new=[encoder,middleware,decoder]", "stages.supervised.batch_size=4",
    "callbacks.checkpoint.every_n_steps=1",
)  # fmt: skip


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Forty pictures of one colour with a question about it, and three captions; five of the records are of no use."""
    lines = []
    for number in range(40):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        Image.new("RGB", (20 + number, 40), colour).save(tmp_path / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
        lines.append({"id": f"n{number}", "image": f"{number}.png", "conversations": said})
    lines += [{"image": f"{number}.png", "caption": f"picture {number}"} for number in range(3)]
    lines[4]["image"] = "none.png"
    lines[9]["conversations"][1]["value"] = " "
    lines[16]["conversations"][0]["from"] = "robot"
    lines[23]["conversations"][0]["value"] = "<image><image>"
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"image": \n')
    return path


def command(path: Path, run: Path, *more: str) -> list[str]:
    return [*WORDS, *STAGE, "data=conversations", f"data.path={path}", f"paths.run={run}", *more]


@pytest.mark.parametrize("precision", [(), ("trainer.precision=bf16-mixed", "strategy=fsdp2")], ids=" ".join)
def test_three_steps(drawn: Path, tmp_path: Path, precision: tuple[str, ...]) -> None:
    steps = ("stages.supervised.max_steps=3", "data.max_bad_fraction=0.5", "data.validation=0.3", "trainer.accelerator=cpu")
    run = train_apart if "strategy=fsdp2" in precision else train
    outcome = run(*command(drawn, tmp_path / "run", *steps, *precision))
    assert outcome.code == 0, outcome.err
    metrics = read_json(tmp_path / "run" / "metrics.json")["supervised"]
    assert np.isfinite(metrics["validation_loss"])
    assert metrics["validation_samples"] >= 6
    assert 0 <= metrics["validation_exact_match"] <= 1


def test_bad_samples_are_skipped_alike_with_workers_and_after_a_kill(drawn: Path, tmp_path: Path) -> None:
    steps = ("stages.supervised.max_steps=12", "data.max_bad_fraction=0.5", "data.num_workers=0")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    outcome = train(*command(drawn, whole, *steps))
    assert outcome.code == 0, outcome.err
    rows = (whole / "stages" / "supervised" / "skipped.jsonl").read_text()
    kinds = {row["kind"] for row in map(json.loads, rows.splitlines())}
    assert kinds == {"missing image", "empty answer", "unknown role", "placeholders", "broken line"}
    assert "data.jsonl:5 (id n4)" in rows
    assert f"{len(rows.splitlines())} of " in outcome.out

    assert train(*command(drawn, parts, *steps[1:], "stages.supervised.max_steps=12", "data.num_workers=1")).code == 0
    assert (parts / "stages" / "supervised" / "skipped.jsonl").read_text() == rows
    assert same_weights(whole, parts, "supervised")


def test_too_many_stop_the_run_and_mending_them_lets_it_go_on(drawn: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = train(*command(drawn, run, "stages.supervised.max_steps=30", "data.max_bad_fraction=0.02", "data.num_workers=0"))
    assert outcome.code == 2
    assert "samples cannot be used (" in outcome.err
    assert "more than data.max_bad_fraction=0.02" in outcome.err
    good = [line for number, line in enumerate(drawn.read_text().splitlines()[:43]) if number not in (4, 9, 16, 23)]
    drawn.write_text("\n".join([*good, *good[:5]]))
    assert train(f"resume={run}").code == 0
    assert read_json(run / "handoff" / "supervised" / "manifest.json")["step"] == 30
