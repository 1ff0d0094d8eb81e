"""The page of `chat.py ui=web`, served by the command and used in a headless browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_toys import chat_settings, talker
from headless import chromium, without_chromium
from PIL import Image
from runs import ROOT, tiny_run

from lightning_internvl.chat.loading import Loaded
from lightning_internvl.chat.session import Sampling, Session

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -r requirements-chat.txt")
web = pytest.importorskip("lightning_internvl.chat.web")
driver = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright: pip install playwright")
pytestmark = without_chromium
LIMIT = 40_000  # ms for anything on a slow machine


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page over a tiny untrained run."""
    run = tiny_run(tmp_path_factory.mktemp("run") / "tiny", "decoder.config.initializer_range=0.5")
    options = [f"run={run}", "ui=web", "port=0", "max_upload_mb=1", "max_new_tokens=20", "found=4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "chat.py"), *options], stdout=subprocess.PIPE, text=True, env=environment
    ) as served:
        line = next(line for line in served.stdout if "Ctrl-C ends" in line)
        yield next(word for word in line.split() if word.startswith("http"))
        served.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A fresh visit; no request leaves this machine."""
    page, elsewhere = browser.new_page(), []
    page.set_default_timeout(LIMIT)
    local = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else elsewhere.append(request.url))
    page.goto(address)
    page.wait_for_selector("#box textarea")
    page.wait_for_selector("#chat .example")
    yield page
    page.close()
    assert elsewhere == []


def picture(path: Path, *size: int) -> Path:
    Image.new("RGB", size or (40, 30), "red").save(path)
    return path


def upload(page: Any, *files: Path) -> None:
    """Choose files, once more where the page was just drawing its box anew and the first choice went to the old one."""
    shown = f"document.querySelectorAll('#box .thumbnail-item, #box .thumbnail-image').length >= {len(files)}"
    page.set_input_files("#box input[type=file]", [str(file) for file in files])
    try:
        page.wait_for_function(shown, timeout=LIMIT / 2)
    except driver.TimeoutError:
        page.set_input_files("#box input[type=file]", [str(file) for file in files])
        page.wait_for_function(shown)


def ask(page: Any, question: str, *files: Path) -> None:
    if files:
        upload(page, *files)
    page.fill("#box textarea", question)
    page.click("#box .submit-button")


def idle(page: Any) -> None:
    """Wait until an answer is whole."""
    page.wait_for_selector("#chat .bot.message")
    page.wait_for_selector("#box .submit-button")


def answer(page: Any) -> str:
    return page.locator("#chat .bot.message").last.inner_text()


def test_a_conversation_about_several_pictures(page: Any, tmp_path: Path) -> None:
    ask(page, "what are they?", picture(tmp_path / "one.png"), picture(tmp_path / "two.jpg"))
    idle(page)
    assert page.locator("#chat .user img").count() == 2
    assert page.locator("#chat .user").last.inner_text().strip().endswith("what are they?")
    assert answer(page)
    ask(page, "and now?")
    page.wait_for_function("document.querySelectorAll('#chat .bot.message').length >= 2")
    idle(page)
    page.click("#new")
    page.wait_for_selector("#chat .example")  # as in the beginning
    page.wait_for_function("document.querySelectorAll('#chat .bot.message').length == 0")


class Gate:
    """Lets a model write so many tokens and then waits to be opened, however fast the machine is."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.written, self.opened = tokens, 0, threading.Event()

    def __call__(self, *ignored: Any) -> None:
        if self.written >= self.tokens:
            assert self.opened.wait(LIMIT / 1000)
        self.written += 1


def test_an_answer_streams_and_can_be_stopped(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    model, chats = talker(context=4096)
    gate, talks = Gate(8), []
    model.decoder.lm.register_forward_pre_hook(gate)

    def begin() -> Session:
        talks.append(Session(model, chats))
        return talks[-1]

    settings = chat_settings(max_upload_mb=1)
    made = web.make_page(Loaded("a toy", begin, None), settings, Sampling(max_new_tokens=60), tmp_path)
    visit = browser.new_page()
    visit.set_default_timeout(LIMIT)
    try:
        visit.goto(web.launch(made, settings))
        visit.wait_for_selector("#box textarea")
        ask(visit, "say something long")
        visit.wait_for_function("document.querySelector('#chat .bot.message')?.innerText.trim()")  # while it is written
        visit.click("#box .stop-button")
        told, deadline = False, time.monotonic() + LIMIT / 1000
        while not told and time.monotonic() < deadline:
            told = any(talk._stop_flag and talk._stop_flag.stop for talk in talks)
            visit.wait_for_timeout(20)
        assert told
        gate.opened.set()
        idle(visit)
        stopped = gate.written
        assert stopped <= gate.tokens + 1
        assert answer(visit)
        ask(visit, "say something long")
        visit.wait_for_function("document.querySelectorAll('#chat .bot.message').length >= 2")
        idle(visit)
        assert gate.written > 2 * stopped  # the next one is written beyond that place
    finally:
        gate.opened.set()
        visit.close()
        made.close()


def test_an_example_is_asked(page: Any) -> None:
    page.locator("#chat .example").first.click()
    idle(page)
    assert page.locator("#chat .user img").count() == 1
    assert "what is in the" in page.locator("#chat .user").last.inner_text()


@pytest.mark.parametrize("fault", ["no picture", "too many pixels"])
def test_a_faulty_picture_is_told_and_the_page_goes_on(fault: str, page: Any, tmp_path: Path) -> None:
    file = tmp_path / "wrong.png"
    if fault == "no picture":
        file.write_text("not a picture at all")
    else:
        Image.fromarray(np.zeros((10_000, 20_000), dtype=bool)).save(file, optimize=True)
    ask(page, "what is it?", file)
    toast = page.wait_for_selector(".toast-body")
    assert "wrong.png" in toast.inner_text()
    assert ("cannot be read" if fault == "no picture" else "200000000 pixels") in toast.inner_text()
    assert "/tmp" not in toast.inner_text()
    page.wait_for_function("document.querySelector('#box textarea').value === 'what is it?'")  # to be asked about another one
    page.wait_for_selector("#box .submit-button")
    page.wait_for_timeout(1000)  # the end of an answer sets the box once more
    ask(page, "what is it?", picture(tmp_path / "right.png"))
    idle(page)
    assert answer(page)
    assert page.locator("#chat .user img").count() == 1


def test_uploads_are_limited_in_size_and_kind(page: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    page.set_input_files("#box input[type=file]", str(tmp_path / "large.png"))
    toast = page.wait_for_selector(".toast-body")
    assert "size" in toast.inner_text().lower()
    (tmp_path / "notes.txt").write_text("text")
    page.set_input_files("#box input[type=file]", str(tmp_path / "notes.txt"))
    time.sleep(1)
    assert page.locator("#box .thumbnail-item").count() == 0
    ask(page, "are you there?")
    idle(page)


def test_words_find_pictures(page: Any) -> None:
    page.click("button[role=tab]:has-text('Find pictures')")
    page.wait_for_selector("#found img")
    page.fill("#search textarea, #search input", "two cats on a red background")
    page.click("#search button:has-text('Find')")
    page.wait_for_function(r"(document.querySelector('#found').innerText.match(/-?\d\.\d\d/g) || []).length === 4")
    scores = [float(text) for text in re.findall(r"-?\d\.\d\d", page.locator("#found").inner_text())]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
