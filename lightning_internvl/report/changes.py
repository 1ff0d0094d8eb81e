"""Answers and captions about the same picture that differ between runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

from lightning_internvl.report.film import plain_words, verdict
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import StageFiles
from lightning_internvl.report.sections import section

MOST = 60  # of a stage; the page stays small
CAPTION = "caption"
SURE = re.compile(r" \(\d+%\)$")


class Asked(NamedTuple):
    """What was asked about a picture."""

    png: str
    question: str
    truth: str


class Said(NamedTuple):
    """What a run answered."""

    text: str
    right: bool

    @property
    def bare(self) -> str:
        """The answer without how sure it is: "yes" of "yes (72%)"."""
        return SURE.sub("", self.text)


def changes(stages: Mapping[str, Mapping[str, StageFiles]], pictures: Pictures) -> str:
    """For each stage, by name and then by run, what its last samples and its cases answer
    differently in the runs."""
    parts = []
    for name, runs in stages.items():
        of = {letter: dict(_said(stage)) for letter, stage in runs.items()}
        both = [asked for asked in dict.fromkeys(asked for said in of.values() for asked in said) if _several(asked, of)]
        differ = [asked for asked in both if len({said[asked].bare for said in of.values() if asked in said}) > 1]
        if both:
            counts = f"{len(differ)} of {len(both)} differ" + (f"; the first {MOST} are shown" if len(differ) > MOST else "")
            items = "".join(_item(asked, of, pictures) for asked in differ[:MOST])
            parts.append(f'<h3>{escape(name)}</h3><p>{counts}</p><ol class="cases">{items}</ol>')
    lead = "What the runs say of the same pictures at the end of a stage, where they do not say the same."
    return section("changes", "Answers and captions that changed", lead, "".join(parts))


def _several(asked: Asked, of: Mapping[str, Mapping[Asked, Said]]) -> bool:
    return sum(asked in said for said in of.values()) > 1


def _said(stage: StageFiles) -> Iterator[tuple[Asked, Said]]:
    for case in stage.cases:
        asked = Asked(*(str(case.get(name, "")) for name in ("png", "question", "truth")))
        yield asked, Said(str(case.get("answer", "")), bool(case.get("right")))
    if not stage.samples:
        return
    last = stage.samples[-1]
    images = [str(png) for png in last.get("images") or []]
    for png, truth, caption in zip(images, last.get("captions_true") or [], last.get("captions") or [], strict=False):
        right = plain_words(str(caption)) == plain_words(str(truth))
        yield Asked(png, CAPTION, str(truth)), Said(str(caption), right)
    for png, answers in zip(images, last.get("answers") or [], strict=False):
        for answer in answers or []:
            asked = Asked(png, str(answer.get("question", "")), str(answer.get("truth", "")))
            yield asked, Said(str(answer.get("answer", "")), bool(answer.get("correct")))


def _item(asked: Asked, of: Mapping[str, Mapping[Asked, Said]], pictures: Pictures) -> str:
    rows = "".join(
        f"<dt>{letter} {verdict(said[asked].right)}</dt><dd>{escape(said[asked].text) or '(nothing)'}</dd>"
        for letter, said in of.items()
        if asked in said
    )
    told = f"<dt>question</dt><dd>{escape(asked.question)}</dd><dt>truth</dt><dd>{escape(asked.truth)}</dd>"
    return f"<li class=changed>{pictures.use(asked.png, asked.question)}<dl>{told}{rows}</dl></li>"
