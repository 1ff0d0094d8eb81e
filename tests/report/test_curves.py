"""What is drawn of a run's history: the charts, their chance levels, and where a stage's line stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_runs import dump, fake_run

from lightning_internvl.report.compare import write_comparison
from lightning_internvl.report.curves import curves
from lightning_internvl.report.read import TRACKED_CHANCE, read_run

RECALLS = {"c_image_to_text_r1": 0.02, "c_image_to_text_r5": 0.1, "zero_shot_top1": 0.25}


def tracked(folder: Path) -> Path:
    """A run of two stages of which the first was measured at steps 0 and 60, by chance as `RECALLS` says."""
    run = fake_run(folder, {"contrastive": ["itc"], "generative": ["itc", "itm"]})
    stage = run / "stages" / "contrastive"
    rows = [{"step": step, **{f"val/{name}": 0.5 + step / 200 for name in RECALLS}} for step in (0, 60)]
    with (stage / "history.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    dump(stage / TRACKED_CHANCE, RECALLS)
    return run


def panels(html: str) -> dict[str, str]:
    """The charts by title."""
    found = re.findall(r'<figure class="panel">.*?</figure>', html, re.DOTALL)
    return {re.search(r"<b>(.*?)</b>", one)[1]: one for one in found}


def values(panel: str) -> list[dict[str, Any]]:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', panel)[1])


def levels(panel: str) -> list[tuple[str, list[float]]]:
    """Each chance level: its colour, and the shares of the width and height at which it begins and ends."""
    paths = re.findall(r'<path class="level (\S+)" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', panel)
    return [(colour, [float(number) for number in numbers]) for colour, *numbers in paths]


def test_recalls_share_a_chart_in_which_each_has_its_colour_and_its_chance(tmp_path: Path) -> None:
    shown = panels(curves(read_run(tracked(tmp_path / "run"))))
    panel = shown["captions found (mode C), held-out"]
    assert [(one["label"], one["colour"], one["chance"]) for one in values(panel)] == [
        ("R@1", "c-0", [0.02, None]),
        ("R@5", "c-1", [0.1, None]),
    ]
    # from 0 to 1, over the first of two stages of the same length
    assert levels(panel) == [("c-0", [0, 98, 500, 98]), ("c-1", [0, 90, 500, 90])]
    assert "dashed: chance" in panel
    one = shown["zero-shot naming, held-out"]
    assert levels(one) == [("c-0", [0, 75, 500, 75])]
    assert '<ul class="legend"><li class="level">' in one  # a single line needs no name of its own


def test_without_a_known_chance_none_is_drawn(tmp_path: Path) -> None:
    run = tracked(tmp_path / "run")
    (run / "stages" / "contrastive" / TRACKED_CHANCE).unlink()
    html = curves(read_run(run))
    assert 'class="level' not in html
    assert "captions found (mode C), held-out" in panels(html)


def test_a_line_stands_at_the_place_of_its_stage(tmp_path: Path) -> None:
    """The sum of the objectives is not drawn where there is one alone, which must not move it to another stage."""
    shown = values(panels(curves(read_run(tracked(tmp_path / "run"))))["Loss, nats"])
    total = next(one for one in shown if one["label"] == "sum of the objectives")
    steps = [line[0] for line in total["lines"]]
    assert steps[0] == []
    assert min(steps[1]) > 60


def test_speed_is_no_metric_though_it_be_below_one(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    path = run / "stages" / "contrastive" / "history.jsonl"
    path.write_text(
        path.read_text() + json.dumps({"step": 60, "throughput/model_tflops_per_s": 0.1, "train/accuracy": 0.5}) + "\n"
    )
    shown = panels(curves(read_run(run)))
    assert {"TFLOP/s of the model", "Metrics while training, 0 to 1"} <= shown.keys()
    assert [one["label"] for one in values(shown["Metrics while training, 0 to 1"])] == ["answers, accuracy"]


@pytest.mark.parametrize("known", [0, 1])
def test_runs_side_by_side_have_one_chance(tmp_path: Path, known: int) -> None:
    runs = [tracked(tmp_path / name) for name in ("one", "two")]
    (runs[1 - known] / "stages" / "contrastive" / TRACKED_CHANCE).unlink()
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    panel = panels(page)["captions found, R@5 (mode C), held-out"]
    assert levels(panel) == [("c-total", [0, 87.5, 500, 87.5])]  # an eighth of an axis that ends at 0.8
    assert "dashed: chance" in panel
