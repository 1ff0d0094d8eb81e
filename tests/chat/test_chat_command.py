"""`chat.py` as a command: one answer, and faults that are found before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image
from runs import ROOT, Outcome, call, tiny_run

from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.chat.settings import PASSWORD
from lightning_internvl.config.targets import build
from lightning_internvl.files import runs_here
from lightning_internvl.inference.load_run import open_run


def chat(*arguments: str, typed: str = "") -> Outcome:
    """`python chat.py ARGUMENTS`."""
    return call("chat.py", *arguments, typed=typed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_one_answer_alone_on_the_output(run: Path, image: Path) -> None:
    outcome = chat(f"run={run}", "question=what colour is it?", f"image={image}", "max_new_tokens=6")
    view = open_run(run, build).view
    session = Session(view.model, view.chats)
    session.show(image)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == list(session.ask("what colour is it?", Sampling(max_new_tokens=6)))[-1]


def test_stages_of_both_kinds_serve_a_run(run: Path, image: Path) -> None:
    outcome = chat(f"run={run}", f"gallery={image.parent}", "max_new_tokens=4", typed=f"/find red\n/image {image}\nwhat?\n")
    assert outcome.code == 0, outcome.err
    assert "stage supervised: ask about a picture" in outcome.out
    assert str(image) in outcome.out
    found = chat(f"run={run}/handoff/contrastive", f"gallery={image.parent}", "question=red")
    assert found.out.split()[1] == str(image)
    captions = chat(f"run={run}/handoff/generative", "question=zh", f"image={image}", "max_new_tokens=4")
    assert captions.code == 0, captions.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to talk to; give run=FOLDER"),
        (["run={tmp}", "model={tmp}"], "exclude each other; leave one out"),
        (["run={tmp}/nowhere"], "there is no such folder (runs here: "),
        (["run={tmp}"], "is neither a run (config.yaml) nor a hand-off folder (manifest.json)"),
        (["run={unfinished}"], "no stage of this run has finished; use resume={unfinished}"),
        (["model={unfinished}"], "is a run of this project; give run={unfinished}"),
        (["model={tmp}/nowhere"], "neither an existing folder nor an id"),
        (["model={tmp}", "template=nonsense"], "template='nonsense' is not known; valid choices: "),
        (["model={tmp}", "pictures=crop"], "pictures='crop' is not known"),
        (["run={run}", "template=vicuna", "system=x"], "template, system: a run knows how it reads; only with model="),
        (["run={run}", "image={tmp}/no.png", "question=a"], "image={tmp}/no.png does not exist"),
        (["run={run}", "image={notes}", "question=a"], "notes.png cannot be read"),
        (["run={run}", "image={notes}"], 'image= needs question="..."'),
        (["run={run}", "gallery={tmp}/nowhere"], "gallery={tmp}/nowhere is no folder"),
        (["run={run}/handoff/contrastive"], "it looks for pictures: give gallery=FOLDER"),
        (["run={run}/handoff/contrastive", "question=a", "image={notes}"], "it looks for pictures: give gallery=FOLDER"),
        (["run={run}", "question=a", "gallery={tmp}", "image={notes}"], "exclude each other: question= is about a picture"),
        (["run={run}/handoff/supervised", "gallery={tmp}"], "does not compare pictures and texts"),
        (["run={run}", "ui=wbe"], "ui='wbe' is not known; did you mean 'web'?"),
        (["run={run}", "ui=web", "question=a"], "leave it out with ui=web"),
        (["run={run}", "ui=api", "question=a"], "leave it out with ui=api"),
        (["run={run}", "ui=api", "gallery={tmp}"], "compare what /v1/embeddings gives"),
        (["run={run}", "password=sesame"], "leave it out, or give ui=web or ui=api"),
        (["run={run}", "ui=web", "password="], "the password (password=, or the variable INTERNVL_CHAT_PASSWORD) must be a text"),
        (["run={run}", "max_share=2"], "max_share=2 must be a number above 0"),
        (["run={run}", "max_parallel=0"], "max_parallel=0 must be a whole number from 1 on"),
        (["run={run}", "temperature=hot"], "temperature='hot' must be a number"),
        (["run={run}", "top_p=0", "question=a"], "top_p=0 must be above 0"),
        (["run={run}", "beams=0"], "beams=0 must be a whole number from 1 on"),
        (["run={run}", "device=gpu"], "device='gpu' is not known; valid choices: auto, cpu"),
        (["run={run}", "dtype=int8"], "dtype='int8' is not known"),
        (["run={run}", "tempreture=1"], "there is no setting 'tempreture'; did you mean 'temperature'?"),
    ],
)
def test_faults(arguments: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(PASSWORD, "")
    monkeypatch.delenv(PASSWORD)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    places = {"tmp": tmp_path, "run": run, "unfinished": tmp_path / "unfinished", "notes": tmp_path / "more" / "notes.png"}
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "more").mkdir()
    places["notes"].write_text("no picture")
    outcome = chat(*(argument.format(**places) for argument in arguments))
    assert outcome.code == 2
    assert message.format(**places) in outcome.err


def test_runs_of_any_depth_are_listed_the_newest_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for time, name in enumerate(("z", "toy/2026", "a")):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "config.yaml").touch()
        os.utime(tmp_path / "outputs" / name / "config.yaml", (time, time))
    monkeypatch.chdir(tmp_path)
    assert runs_here() == "runs here: outputs/z, outputs/toy/2026, outputs/a"
    assert runs_here(1) == "runs here: outputs/a"


def test_a_missing_package_comes_with_the_line_that_installs_it(run: Path) -> None:
    with patch("importlib.util.find_spec", return_value=None):
        outcome = chat(f"run={run}", "ui=web")
    assert "ui=web needs Gradio, which is not installed: pip install -r requirements-chat.txt" in outcome.err
    pinned = (ROOT / "requirements-chat.txt").read_text().split()
    assert any(word.startswith("gradio==") for word in pinned)
