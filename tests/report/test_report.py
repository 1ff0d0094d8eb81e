"""The report of made-up run folders: whole, half-written, hostile and large ones."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_runs import ALL_SECTIONS, HOSTILE, MOST, STAGES, STEPS, Page, dump, encode, fake_run, json_in, read
from PIL import Image

from lightning_internvl.report import write_report


def curve_data(page: Page) -> list[dict[str, Any]]:
    """The series of the first chart."""
    return next(found for found in json_in(page) if isinstance(found, list))


def test_whole_run_has_every_section_in_order(tmp_path: Path) -> None:
    page, html = read(fake_run(tmp_path))
    assert page.sections == ALL_SECTIONS
    assert [attrs["href"] for attrs in page.all("a")] == [f"#{name}" for name in ALL_SECTIONS]
    assert "Alignment report" in page.text
    assert len(page.all("li", class_="done")) == 3
    assert "60 steps · 2.0 min" in page.text
    assert len(page.all("div", class_="tile")) == 6
    assert "chance 0.002" in page.text
    assert len(html.encode()) < MOST


def test_every_stage_border_stands_at_its_step(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    for index, name in enumerate(STAGES):
        borders = page.all("line", class_="border", data_stage=name)
        assert {attrs["x1"] for attrs in borders} == {f"{100 * index / 3:.3f}%"}
        # Loss, shares, and the learning rate.
        assert len(borders) == 3


def test_each_objective_has_its_own_colour_and_name(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    for objective in ("itc", "itm", "itg", "next-token"):
        assert page.all("li", class_=f"c-{objective}")
        assert page.all("path", class_=f"c-{objective}")
    # Raw and smooth, the learning rate in three stages, and the sum where there is more than one objective.
    assert len(page.all("path", class_="c-total")) == 2 * 3 + 2


def test_hover_data_follows_the_stages(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    series = curve_data(page)
    itm = next(one for one in series if one["label"] == "itm")
    assert [len(steps) for steps, _ in itm["lines"]] == [0, 60, 0]
    assert itm["lines"][1][0][0] == 61
    described = json.loads(next(attrs["data-axis"] for attrs in page.all("div") if "data-axis" in attrs) or "")
    assert described == {
        "total": 180,
        "stages": [["contrastive", 0, 60], ["generative", 60, 120], ["supervised", 120, 180]],
    }


def test_bands_show_changes_within_a_stage(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    shares = [attrs["data-trained"] for attrs in page.all("g")]
    assert shares == ["0.000", "0.250"] * 3 + ["1.000"] * 6
    assert "812 k parameters" in page.text


def test_pictures_are_held_once(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    images = page.all("image")
    assert len(images) == 5
    assert all((attrs["href"] or "").startswith("data:image/png;base64,") for attrs in images)
    heat_map, near, frames = 4, 9 * 4 * 4, 9 * 4
    assert len(page.all("use")) == heat_map + near + frames


def test_nothing_is_requested_from_anywhere(tmp_path: Path) -> None:
    page, html = read(fake_run(tmp_path))
    for _, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert re.match(r"$|#|data:", attrs.get(name) or ""), attrs
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style
    assert set(re.findall(r"url\((.*?)\)", style)) == {"#hatch"}
    assert not [tag for tag, _ in page.tags if tag in ("iframe", "object", "embed", "base", "form")]
    script = next(text for kind, text in page.scripts if kind is None)
    assert not re.search(r"fetch|XMLHttpRequest|innerHTML|import\(|//[a-z]", script)


def test_policy_allows_only_the_pages_own_script(tmp_path: Path) -> None:
    page, _ = read(fake_run(tmp_path))
    script = next(text for kind, text in page.scripts if kind is None)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain, _ = read(fake_run(tmp_path / "plain"))
    stages = {f"stage {HOSTILE.replace('/', '|')}": ["itc"], **STAGES}
    page, html = read(fake_run(tmp_path / "hostile", stages, text=HOSTILE))
    assert [kind for kind, _ in page.scripts].count(None) == 1
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"wbr"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "<img" not in html
    assert "<script>alert" not in html
    assert HOSTILE in "".join(page.text)


def test_tiles_show_each_kind_of_metric_before_a_second_of_one(tmp_path: Path) -> None:
    names = ["c_image_to_text_r1", "c_text_to_image_r1", "c_image_to_text_r10", "itm_accuracy", "caption_cider", "loss"]
    dump(tmp_path / "metrics.json", {"generative": {**dict.fromkeys(names, 0.5), "c_image_to_text_r1_chance": 0.1}})
    page, _ = read(tmp_path)
    tiles = ["captions found, R@1 (mode C)", "itm accuracy", "captions, CIDEr", "pictures found, R@1 (mode C)"]
    assert [text for text in page.text if text in tiles][:4] == tiles
    assert len(page.all("div", class_="tile")) == 4


def test_empty_folder_gives_a_page_without_sections(tmp_path: Path) -> None:
    page, _ = read(tmp_path)
    assert page.sections == []
    assert tmp_path.name in page.text


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("config.yaml", {"config"}),
        ("metrics.json", {"metrics"}),
        ("timing.json", {"timing"}),
        ("stages", {"film", "curves", "freezing"}),
    ],
)
def test_missing_files_are_absent_sections(tmp_path: Path, missing: str, gone: set[str]) -> None:
    target = fake_run(tmp_path) / missing
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    page, _ = read(tmp_path)
    assert page.sections == [name for name in ALL_SECTIONS if name not in gone]


@pytest.mark.parametrize("missing", ["history.jsonl", "freezing.json", "samples"])
def test_one_stage_of_unknown_name_without_one_of_its_files(tmp_path: Path, missing: str) -> None:
    run = fake_run(tmp_path, {"distillation": ["teacher_loss"]})
    target = run / "stages" / "distillation" / missing
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    page, _ = read(run)
    gone = {"freezing.json": ["freezing"], "samples": ["film"]}.get(missing, [])
    assert page.sections == [name for name in ALL_SECTIONS if name not in gone]
    assert "distillation" in page.text


def test_killed_run_says_where_it_stopped(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    (run / "metrics.json").unlink()
    dump(run / "timing.json", {"contrastive": {"train_seconds": 90, "steps": STEPS}})
    shutil.rmtree(run / "stages" / "supervised")
    history = run / "stages" / "generative" / "history.jsonl"
    lines = history.read_text().splitlines()[:25]
    history.write_text("\n".join(lines)[:-9])
    shutil.rmtree(run / "stages" / "generative" / "samples")
    page, _ = read(run)
    assert [len(page.all("li", class_=state)) for state in ("done", "stopped", "planned")] == [1, 1, 1]
    assert "unfinished, step 24 · 36 s" in page.text
    assert "not started" in page.text
    assert not page.all("div", class_="note")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    damaged = ["metrics.json", "stages/generative/freezing.json", "stages/supervised/samples/step-000030.json"]
    for name in damaged:
        text = (run / name).read_text()
        (run / name).write_text(text[: len(text) // 2])
    (run / "config.yaml").write_text("a: [")
    page, _ = read(run)
    assert page.all("div", class_="note")
    for name in [*damaged, "config.yaml"]:
        assert name in page.text


@pytest.mark.parametrize("seed", range(8))
def test_files_cut_anywhere_never_crash(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    run = fake_run(tmp_path)
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        if chance.random() < 0.4:
            data = path.read_bytes()
            path.write_bytes(data[: chance.randrange(len(data))])
    page, _ = read(run)
    assert "Alignment report" in page.text


def test_resumed_history_and_values_that_are_not_finite(tmp_path: Path) -> None:
    run = fake_run(tmp_path, {"contrastive": ["itc"]})
    rows = [{"step": 1, "train/itc": 3.0}, {"step": 2, "train/itc": float("nan")}, {"step": 3, "train/itc": None}]
    again = [{"step": 2, "train/itc": 2.0}, {"step": 3, "train/itc": 1.0, "train/margin": float("inf")}]
    path = run / "stages" / "contrastive" / "history.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows + again))
    dump(run / "metrics.json", {"contrastive": {"R@1": float("nan"), "R@1_chance": 0.0}})
    page, _ = read(run)
    series = curve_data(page)
    assert [one["lines"] for one in series] == [[[[1, 2, 3], [3.0, 2.0, 1.0]]]]
    assert "nan" in page.text


def test_unreadable_picture_is_a_blank(tmp_path: Path) -> None:
    run = fake_run(tmp_path, {"supervised": ["next_token"]})
    for path in (run / "stages" / "supervised" / "samples").iterdir():
        content = json.loads(path.read_text())
        content["images"][0] = 'x" onload="alert(1)'
        content["images"][1] = base64.b64encode(b"no picture").decode()
        dump(path, content)
    page, _ = read(run)
    assert len(page.all("image")) == 2
    assert len(page.all("rect", class_="missing")) == 3 * 2


def test_large_run_stays_small(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    noise = [encode(Image.effect_noise((220, 220), 90).convert("RGB")) for _ in range(62)]
    words = {"captions_true": ["a long caption " * 9] * 12, "captions": ["other words " * 12] * 12}
    for name in STAGES:
        folder = run / "stages" / name
        row = {"seconds": 1.0, **{f"train/x{i}": 0.123456 for i in range(12)}}
        lines = (json.dumps({"step": step, **row}) for step in range(0, 40_000, 20))
        (folder / "history.jsonl").write_text("\n".join(lines))
        for step in range(0, 40_000, 1_000):
            near = {
                "among": 64, "ranks": [7] * 12, "ranked": [[(step // 1000 + i, 0.5) for i in range(4)]] * 12,
                "pictures": {str(place): one for place, one in enumerate(noise)},
            }  # fmt: skip
            matrix = [[(i * j + step) % 97 / 97 for j in range(12)] for i in range(12)]
            content = {"step": step, "images": noise[:2] * 6, "similarity": matrix, "neighbours": near, **words}
            dump(folder / "samples" / f"step-{step:06d}.json", content)
    page, html = read(run)
    assert len(html.encode()) < MOST
    assert len(page.all("div", class_="frame")) == 48 * 12


def test_rewriting_leaves_one_file(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    before = {path.name for path in run.iterdir()}
    _, first = read(run)
    _, second = read(run)
    assert first == second
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        write_report(tmp_path / "nowhere")
