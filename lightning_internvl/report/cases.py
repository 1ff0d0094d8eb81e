"""Right and wrong answers about held-out pictures that a stage's evaluation kept."""

from __future__ import annotations

from html import escape
from typing import Any

from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles
from lightning_internvl.report.sections import section


def cases(run: RunFiles, pictures: Pictures) -> str:
    """The cases of each stage that kept some, wrong ones first."""
    parts = [f"<h3>{escape(stage.name)}</h3>{case_lists(stage.cases, pictures)}" for stage in run.stages if stage.cases]
    return section("cases", "Right and wrong", "Questions about held-out pictures.", "".join(parts))


def case_lists(found: list[dict[str, Any]], pictures: Pictures) -> str:
    """Wrong and right cases: {"png", "question", "answer", "truth", "right"}."""
    lists = []
    for title, right in (("Wrong", False), ("Right", True)):
        shown = [_case(case, pictures) for case in found if bool(case.get("right")) == right]
        lists += [f'<h4>{title}</h4><ol class="cases">{"".join(shown)}</ol>'] if shown else []
    return "".join(lists)


def _case(case: dict[str, Any], pictures: Pictures) -> str:
    texts = {name: str(case.get(name, "")) for name in ("question", "answer", "truth")}
    told = "".join(f"<dt>{name}</dt><dd>{escape(text) or '(nothing)'}</dd>" for name, text in texts.items())
    kind = " class=right" if case.get("right") else ""
    return f"<li{kind}>{pictures.use(case.get('png'), texts['question'])}<dl>{told}</dl></li>"
