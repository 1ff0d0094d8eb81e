"""The pages of runs in a headless browser: the film plays, every word can be read, nothing is asked of the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_runs import dump, fake_run
from headless import chromium, without_chromium
from runs import read_json

from lightning_internvl.report import write_report
from lightning_internvl.report.compare import write_comparison

pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright: pip install playwright")
pytestmark = without_chromium
WIDE, NARROW = 1280, 390
TIMES = 9  # three of each stage
READABLE = 4.5  # contrast of text (WCAG 2.2, 1.4.3)
# Words whose contrast with what is behind them is below a number, what is hidden and the film's other times among them.
PALE = """(least) => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const [r, g, b, alpha = 1] = numbers(getComputedStyle(node).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
  };
  const found = [];
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const element = words.currentNode.parentElement;
    if (!words.currentNode.data.trim() || !element.getClientRects().length || element.closest("script, style")) continue;
    const svg = element.closest("svg"), back = behind(svg ? svg.parentElement : element), style = getComputedStyle(element);
    let [r, g, b, alpha = 1] = numbers(svg ? style.fill : style.color);
    for (let node = element; node; node = node.parentElement) alpha *= getComputedStyle(node).opacity;
    const seen = light([r, g, b].map((value, place) => value * alpha + back[place] * (1 - alpha)));
    const [low, high] = [seen, light(back)].sort((one, two) => one - two);
    if ((high + 0.05) / (low + 0.05) < least) found.push(words.currentNode.data.trim());
  }
  return found;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run, and a page about two."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = fake_run(folder / "one"), fake_run(folder / "two", text="a very long name " * 9)
    grids = {"of": "caption", "grids": [[[0, 99], [50, 0]]] * 4}
    for path in (one / "stages" / "generative" / "samples").glob("*.json"):
        dump(path, {**read_json(path), "relevance": grids})
    return {"report": write_report(one), "comparison": write_comparison([one, two], folder / "comparison.html")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page; it may ask for nothing else, and write nothing to the console."""
    told: list[str] = []
    opened: list[Any] = []

    def go(name: str, width: int = WIDE, scheme: str = "light") -> Any:
        size = {"width": width, "height": 900}
        page = browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        opened.append(page)
        address = pages[name].as_uri()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith((address, "data:")) else told.append(request.url))
        page.goto(address)
        return page

    yield go
    for page in opened:
        page.close()
    assert told == []


def time_of(page: Any) -> int:
    """The moment that the film shows: the slider's, and that of the only frames that are seen."""
    at = int(page.locator(".film input[type=range]").input_value())
    frames = page.locator(".film .frame:not([hidden])").all()
    assert {int(frame.get_attribute("data-time")) for frame in frames} == {at}
    return at


def test_the_film_plays_from_its_beginning_to_its_end(visit: Any) -> None:
    page = visit("report")
    page.clock.install()
    button = page.locator("[data-play]")
    assert time_of(page) == TIMES - 1
    button.click()
    assert (time_of(page), button.get_attribute("aria-label")) == (0, "Pause")
    seen = []
    for _ in range(TIMES - 1):
        page.clock.run_for(1000)
        seen.append(page.locator("#time").inner_text().split(" · ")[0])
    assert seen[0] == "contrastive, step 30"
    assert seen[-1] == "supervised, step 60"
    assert (time_of(page), button.get_attribute("aria-label")) == (TIMES - 1, "Play")


def test_the_film_is_moved_with_keys(visit: Any) -> None:
    page = visit("report")
    page.clock.install()
    page.locator(".film").focus()
    for key, time in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", TIMES - 1)):
        page.keyboard.press(key)
        assert time_of(page) == time
    for key, passed, time in ((" ", 2000, 2), (" ", 2000, 2), (" ", 1000, 3), ("ArrowLeft", 3000, 2)):  # which stops it too
        page.keyboard.press(key)
        page.clock.run_for(passed)
        assert time_of(page) == time


def test_the_light_can_be_switched_off(visit: Any) -> None:
    page = visit("report")
    page.locator(".film").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")  # to the end of the stage before, which has some
    veil = page.locator(".frame:not([hidden]) .veil").first
    dark = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 2, 2).data].filter((_, place) => place % 4 === 3)"
    assert veil.evaluate(dark) == [205, 0, 100, 205]  # but where a score comes from
    page.locator(".look input").uncheck()
    assert veil.evaluate("canvas => getComputedStyle(canvas).opacity") == "0"


def test_a_chart_tells_its_values_to_the_keyboard(visit: Any) -> None:
    page = visit("report")
    chart = page.locator(".panel .plot").first
    chart.focus()
    page.keyboard.press("Home")
    tip = page.locator(".panel .tip").first
    assert tip.inner_text().startswith("contrastive · step 0")
    page.keyboard.press("Escape")
    assert tip.is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_every_word_can_be_read(visit: Any, name: str, width: int, scheme: str) -> None:
    page = visit(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(PALE, READABLE) == []
    if name == "report":  # and what of the film is of an earlier time
        page.locator(".film").focus()
        page.keyboard.press("Home")
        assert page.evaluate(PALE, READABLE) == []
