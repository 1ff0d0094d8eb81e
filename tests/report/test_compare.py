"""Runs side by side, and the command that writes the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_runs import MOST, STAGES, Page, dump, fake_run, picture

from lightning_internvl.report.__main__ import main
from lightning_internvl.report.compare import write_comparison

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs: the second has other settings, no generative stage, a better metric and other answers."""
    one, two = fake_run(tmp_path / "one"), fake_run(tmp_path / "two", {k: v for k, v in STAGES.items() if k != "generative"})
    for run, rate in ((one, 0.001), (two, 0.01)):
        text = (run / "config.yaml").read_text()
        more = f"optimizer: {{lr: {rate}, betas: [0.9, 0.95]}}\npaths: {{run: {run}}}\nhub: {{token: {SECRET}{rate}}}\n"
        (run / "config.yaml").write_text(text + more + ("extra: null\n" if run is two else ""))
    metrics = json.loads((two / "metrics.json").read_text())
    metrics["contrastive"]["R@1"] = 0.56
    dump(two / "metrics.json", metrics)
    for run, sure in ((one, 72), (two, 98)):  # the same judgement is no change
        case = {"png": picture("red"), "question": "Does this belong?", "answer": f"yes ({sure}%)", "truth": "yes", "right": True}
        dump(run / "stages" / "supervised" / "cases.json", [case])
    path = two / "stages" / "supervised" / "samples" / "step-000060.json"
    found = json.loads(path.read_text())
    found["answers"][1][0] |= {"answer": "green", "correct": True}
    found["captions"][0] = "no ball at all"
    dump(path, found)
    return [one, two]


def compared(runs: list[Path], tmp_path: Path) -> tuple[Page, str]:
    html = write_comparison(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    return Page(html), html


def test_settings_that_differ_are_shown_and_no_others(runs: list[Path], tmp_path: Path) -> None:
    _, html = compared(runs, tmp_path)
    table = html[html.index('<section id="settings">') : html.index('<section id="metrics">')]
    assert table.count("<tr><th") == 1 + 3
    assert '<th scope="row">optimizer.<wbr>lr</th><td>0.001</td><td>0.01</td>' in table
    assert '<th scope="row">extra</th><td><span class="why">not set</span></td><td>null</td>' in table
    assert '<th scope="row">pipeline</th>' in table
    assert SECRET not in html


def test_metrics_stand_beside_each_other_with_their_difference(runs: list[Path], tmp_path: Path) -> None:
    _, html = compared(runs, tmp_path)
    assert '<th scope="row" title="R@1">R@1</th><td>0.46</td><td>0.56</td><td>0.002</td><td>+0.1</td>' in html
    assert '<th scope="row" title="R@1">R@1</th><td>0.46</td><td></td><td>0.002</td><td></td>' in html  # generative


def test_curves_of_a_stage_begin_at_one_place(runs: list[Path], tmp_path: Path) -> None:
    page, _ = compared(runs, tmp_path)
    described = json.loads(next(attrs["data-axis"] for attrs in page.all("div") if "data-axis" in attrs) or "")
    assert described["stages"] == [["contrastive", 0, 60], ["generative", 60, 120], ["supervised", 120, 180]]
    charts = [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
    lines = {one["label"]: one["lines"] for one in charts[0]}  # of the learning rate, which all stages have
    assert [len(steps) for steps, _ in lines["A"]] == [60, 60, 60]
    assert [len(steps) for steps, _ in lines["B"]] == [60, 0, 60]
    assert lines["A"][2][0][0] == lines["B"][2][0][0] == 121


def test_answers_that_changed_are_shown_and_no_others(runs: list[Path], tmp_path: Path) -> None:
    page, html = compared(runs, tmp_path)
    changed = html[html.index('<section id="changes">') : html.index('<section id="timing">')]
    assert "2 of 9 differ" in changed
    assert changed.count("<li class=changed>") == 2
    assert changed.count("<dt>question</dt>") == 2
    assert "<dd>no ball at all</dd>" in changed
    assert "<dd>green</dd>" in changed
    assert len(page.all("image")) == 2


def test_the_page_asks_nobody_and_stays_small(runs: list[Path], tmp_path: Path) -> None:
    page, html = compared(runs, tmp_path)
    assert all((attrs.get("href") or "#").startswith(("#", "data:")) for _, attrs in page.tags)
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert len(html.encode()) < MOST


def test_one_run_gets_its_report_again(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs[0])])
    assert capsys.readouterr().out == f"report       {runs[0] / 'report.html'}\n"
    assert "Alignment report" in (runs[0] / "report.html").read_text()
    main([str(runs[0]), "--to", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_text() == (runs[0] / "report.html").read_text()


def test_several_runs_get_one_page(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["one", "two"])
    assert "Runs side by side" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["one", "one"], "one is given twice"),
        (["one", "./one"], "is given twice"),
        (["one", "nowhere"], "nowhere is no folder; give that of a run"),
        (["empty"], "empty is no run: it holds no config.yaml"),
        (["one", "one/config.yaml"], "one/config.yaml is no folder"),
        ([f"run{place}" for place in range(9)], "9 runs: a page lays 2 to 8 side by side"),
    ],
)
def test_bad_input_is_named(
    given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_run(tmp_path / "one", {"contrastive": ["itc"]})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
