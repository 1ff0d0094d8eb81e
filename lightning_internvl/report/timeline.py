"""The probe pictures followed through all stages: one card each, one frame per sample time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any

from lightning_internvl.report.charts import thin
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles, StageFiles
from lightning_internvl.report.sections import section
from lightning_internvl.report.similarity import closest, matrix_of

MAX_TIMES = 48  # over all stages


def over_time(run: RunFiles, pictures: Pictures) -> str:
    """One card per probe picture, a frame per sample time; without JavaScript the last."""
    times = list(_times(run))
    if not times:
        return ""
    last = len(times) - 1
    cards = []
    for index in range(max(len(sample["images"]) for _, sample in times)):
        frames = [_frame(sample, index, time, time == last, pictures) for time, (_, sample) in enumerate(times)]
        cards.append(f'<article class="card">{"".join(frames)}</article>')
    now = f'<p id="time" role="status">{escape(_time_text(*times[-1]))}</p>'
    lead = (
        "The same pictures, asked again and again while the model learns. Words that the true caption does not hold are marked."
    )
    body = f'<div class="scrub">{_scrub(times)}{now}</div><div class="cards">{"".join(cards)}</div>'
    return section("over-time", "Captions and answers over time", lead, body)


def _times(run: RunFiles) -> Iterator[tuple[StageFiles, dict[str, Any]]]:
    of_stages = [
        (stage, [sample for sample in stage.samples if isinstance(sample.get("images"), list) and sample["images"]])
        for stage in run.stages
    ]
    sampled = [(stage, samples) for stage, samples in of_stages if samples]
    for stage, samples in sampled:
        for sample in thin(samples, max(2, MAX_TIMES // len(sampled))):
            yield stage, sample


def _time_text(stage: StageFiles, sample: dict[str, Any]) -> str:
    counts = []
    answers = [answer for of_picture in sample.get("answers") or [] for answer in of_picture or []]
    if answers:
        counts.append(f"{sum(bool(answer.get('correct')) for answer in answers)} of {len(answers)} answers right")
    captions = list(zip(sample.get("captions") or [], sample.get("captions_true") or [], strict=False))
    if captions:
        same = sum(_words(str(caption)) == _words(str(truth)) for caption, truth in captions)
        counts.append(f"{same} of {len(captions)} captions word for word")
    matrix = matrix_of(sample)
    if matrix and not captions:
        right = sum(closest(row) == index for index, row in enumerate(matrix))
        counts.append(f"right caption closest for {right} of {len(matrix)}")
    return " · ".join([stage.name, f"step {sample['step']:,}", *counts])


def _scrub(times: list[tuple[StageFiles, dict[str, Any]]]) -> str:
    last = len(times) - 1
    texts = "".join(f"<li>{escape(_time_text(stage, sample))}</li>" for stage, sample in times)
    names = list(dict.fromkeys(stage.name for stage, _ in times))
    spans = [(name, sum(stage.name == name for stage, _ in times)) for name in names]
    strip = "".join(f'<span style="flex-grow:{count}" title="{escape(name)}">{escape(name)}</span>' for name, count in spans)
    return (
        '<div class="controls"><button type="button" data-move="-1" aria-label="Earlier">‹</button>'
        '<button type="button" data-play aria-label="Play">▶</button>'
        '<button type="button" data-move="1" aria-label="Later">›</button><div class="track">'
        f'<input type="range" min="0" max="{last}" value="{last}" step="1" aria-label="Sample time">'
        f'<div class="strip">{strip}</div></div></div><ol id="times" hidden>{texts}</ol>'
    )


def _frame(sample: dict[str, Any], index: int, time: int, shown: bool, pictures: Pictures) -> str:
    images, truths = sample["images"], sample.get("captions_true") or []
    if index >= len(images):
        return ""
    truth = str(truths[index]) if index < len(truths) else ""
    parts = [f'<p class="truth"><small>true caption</small>{escape(truth)}</p>'] if truth else []
    said = sample.get("captions") or []
    matrix = matrix_of(sample)
    if index < len(said):
        parts.append(f'<p class="said"><small>generated</small>{_marked(str(said[index]), truth)}</p>')
    elif index < len(matrix) and len(truths) == len(matrix[index]):
        best = closest(matrix[index])
        mark = _verdict(best == index)
        parts.append(f'<p class="said"><small>closest caption {mark}</small>{_marked(str(truths[best]), truth)}</p>')
    answers = sample.get("answers") or []
    asked = answers[index] if index < len(answers) else []
    asked_html = f'<ul class="answers">{"".join(map(_answer, asked))}</ul>' if asked else ""
    picture = pictures.use(images[index], truth or f"picture {index + 1}")
    hidden = "" if shown else " hidden"
    return f'<div class="frame" data-time="{time}"{hidden}>{picture}<div>{"".join(parts)}</div>{asked_html}</div>'


def _marked(said: str, truth: str) -> str:
    """`said` with the words marked that `truth`, if any, does not hold."""
    right = set(_words(truth))
    words = []
    for word in said.split():
        wrong = right and not right.issuperset(_words(word))
        words.append(f"<mark>{escape(word)}</mark>" if wrong else escape(word))
    return " ".join(words) or "<i>nothing</i>"


def _words(text: str) -> list[str]:
    """Words to compare: lower case, without punctuation."""
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def _verdict(right: bool) -> str:
    return '<b class="yes" title="right">✓</b>' if right else '<b class="no" title="wrong">✗</b>'


def _answer(answer: dict[str, Any]) -> str:
    question, said = escape(str(answer.get("question", ""))), escape(str(answer.get("answer", "")))
    right = bool(answer.get("correct"))
    truth = "" if right else f' <span class="instead">right: {escape(str(answer.get("truth", "")))}</span>'
    given = f'<span class="answer">{_verdict(right)} {said or "<i>nothing</i>"}</span>'
    return f"<li>{question} {given}{truth}</li>"
