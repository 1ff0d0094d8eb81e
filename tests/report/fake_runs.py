"""Made-up runs and their pages."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lightning_internvl.report import write_report

STAGES = {"contrastive": ["itc"], "generative": ["itc", "itm", "itg"], "supervised": ["next_token"]}
STEPS = 60
MOST = 4_000_000  # bytes of a page
COLOURS = ["red", "green", "blue", "gold"]
CAPTIONS = [f"one {colour} ball on a grey field" for colour in COLOURS]
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def picture(colour: str, side: int = 48) -> str:
    image = Image.new("RGB", (side, side), "lightgrey")
    ImageDraw.Draw(image).ellipse((8, 8, side - 8, side - 8), fill=colour)
    return encode(image)


def encode(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return base64.b64encode(data.getvalue()).decode()


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def sample(stage: str, step: int, text: str) -> dict[str, Any]:
    images = [picture(colour) for colour in COLOURS]
    content: dict[str, Any] = {"stage": stage, "step": step, "images": images, "captions_true": CAPTIONS}
    if stage != "supervised":
        content["similarity"] = [[step / STEPS if i == j else 0.1 for j in range(4)] for i in range(4)]
    if stage != "contrastive":
        content["captions"] = [CAPTIONS[0], "two red balls on a grey field", CAPTIONS[2], text]
    if stage == "supervised":
        content["answers"] = [
            [{"question": f"Colour? {text}", "truth": c, "answer": "red", "correct": c == "red"}] for c in COLOURS
        ]
    if stage != "supervised":
        others = {str(place): one for place, one in enumerate([*images, picture("black")])}
        ranked = [[(4, 0.9), (1, 0.8), (2, 0.1), (3, 0.0)]] * 4
        content["neighbours"] = {"among": 64, "ranked": ranked, "ranks": [9, 2, 3, 4], "pictures": others}
    return content


def fake_run(run: Path, stages: dict[str, list[str]] = STAGES, text: str = "a tree") -> Path:
    """A finished run; `text` goes wherever words of a data set, a model or a user can."""
    run.mkdir(exist_ok=True)
    pipeline = "".join(f"- {json.dumps(name)}\n" for name in stages)
    (run / "config.yaml").write_text(f"recipe: {json.dumps(text)}\npipeline:\n{pipeline}url: https://example.org\n")
    metrics = {"R@1": 0.46, "R@1_chance": 0.002, f"accuracy {text}": 0.7, f"accuracy {text}_chance": 0.25, "loss": 1.5}
    dump(run / "metrics.json", dict.fromkeys(stages, metrics))
    timing = {"train_seconds": 90.0, "eval_seconds": 30.0, "steps": STEPS, "padding_share": 0.1, "odd": 2.0}
    dump(run / "timing.json", dict.fromkeys(stages, timing))
    for name, objectives in stages.items():
        folder = run / "stages" / name
        rows = []
        for step in range(1, STEPS + 1):
            losses = {f"train/{objective}": 3 / step + 0.1 for objective in objectives}
            row = {"step": step, "seconds": 1.5 * step, "lr": 1e-3, "train/loss": sum(losses.values()), **losses}
            rows.append(json.dumps(row | ({"val/itc": 1.0, f"val/{text}": 0.5} if step % 30 == 0 else {})))
        folder.mkdir(parents=True)
        (folder / "history.jsonl").write_text("\n".join(rows) + "\n")
        why = f"not listed {text}"
        early = [
            {"group": "encoder", "trained": 0, "frozen": 812345, "why": why},
            {"group": "middleware", "trained": 9, "frozen": 0},
        ]
        late = [{"group": "encoder", "trained": 203086, "frozen": 609259, "why": why}, early[1]]
        dump(folder / "freezing.json", [{"step": 0, "rows": early}, {"step": 20, "rows": late}])
        for step in (0, 30, STEPS):
            dump(folder / "samples" / f"step-{step:06d}.json", sample(name, step, text))
    return run


class Page(HTMLParser):
    """Every start tag with its attributes, all text, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self._open = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)
        else:
            self.text.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of a kind; `class_` and `data_x` as in HTML, a class being one of several."""
        names = {name: name.rstrip("_").replace("_", "-") for name in wanted}
        return [
            attrs
            for found, attrs in self.tags
            if found == tag and all(wanted[key] in (attrs.get(names[key]) or "").split(" ") for key in wanted)
        ]

    @property
    def sections(self) -> list[str | None]:
        return [attrs.get("id") for attrs in self.all("section")]


def read(run: Path) -> tuple[Page, str]:
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    return Page(html), html


ALL_SECTIONS = ["film", "stages", "curves", "metrics", "timing", "freezing", "config"]


def json_in(page: Page) -> list[Any]:
    return [json.loads(text) for kind, text in page.scripts if kind == "application/json"]
