"""The film at the top of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import ALL_SECTIONS, Page, dump, fake_run, json_in, read


def film_data(page: Page) -> dict[str, Any]:
    """What changes in the film from frame to frame."""
    return next(found for found in json_in(page) if isinstance(found, dict))


def test_the_film_has_a_frame_for_each_picture_and_time_and_shows_the_last(tmp_path: Path) -> None:
    page, html = read(fake_run(tmp_path))
    frames = page.all("div", class_="frame")
    assert len(frames) == 9 * 4
    assert [attrs["data-time"] for attrs in frames if "hidden" not in attrs] == ["8"] * 4
    assert "<mark>two</mark> <mark>red</mark> <mark>balls</mark> on a grey field" in html
    assert page.all("input", type="range", max="8", value="8")
    last = "supervised, step 60 · 1 of 4 answers right · 2 of 4 captions word for word"
    assert last in page.text
    texts = film_data(page)["texts"]
    assert texts[0] == "contrastive, step 0 · right caption closest for 0 of 4"
    assert texts[8] == last


def test_the_film_has_one_axis_with_marks_where_stages_begin(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    marks = [attrs for attrs in page.all("i") if "left:" in (attrs.get("style") or "")]
    assert [attrs["style"] for attrs in marks] == [f"left:{100 * time / 8:.2f}%" for time in range(9)]
    assert [place for place, attrs in enumerate(marks) if attrs.get("class") == "first"] == [0, 3, 6]


def test_the_matrix_of_the_film_sharpens_and_stays_where_none_is_measured(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    assert len(page.all("svg", class_="heat")) == 1
    assert len(page.all("rect", class_="right")) == 4
    matrix = film_data(page)["matrix"]
    assert [values[:2] for values in matrix["values"]] == [[0, 10], [50, 10], [100, 10]] * 2
    assert matrix["closest"][2] == [0, 1, 2, 3]
    assert matrix["at"] == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert matrix["texts"][8].startswith("generative, step 60: right caption closest for 4 of 4 (by chance 1)")
    cells = [attrs["style"] for attrs in page.all("rect", class_="cell")]
    assert cells[:2] == ["fill-opacity:1.0", "fill-opacity:0.136"]


def test_the_nearest_pictures_of_each_caption_are_shown_with_the_right_one(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    assert len(page.all("div", class_="near")) == 9 * 4
    assert len(page.all("div", class_="past")) == 3 * 4  # where none are found the last ones stay
    assert len(page.all("li", class_="right")) == 9 * 3  # that of the first card is not among them
    text = "".join(page.text)
    assert text.count("nearest of 64 pictures ✗ own at rank 9") == 9
    assert "✓ own" not in text


@pytest.mark.parametrize("broken", [None, 3, [], {}, {"among": 2, "ranks": [1], "ranked": [[[0]]], "pictures": {}}])
def test_neighbours_that_are_none_are_left_out(tmp_path: Path, broken: Any) -> None:
    run = fake_run(tmp_path, {"contrastive": ["itc"]})
    for path in (run / "stages" / "contrastive" / "samples").iterdir():
        dump(path, json.loads(path.read_text()) | {"neighbours": broken})
    page, _ = read(run)
    assert page.sections == ALL_SECTIONS
    assert not page.all("div", class_="near")
