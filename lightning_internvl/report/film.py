"""The alignment film: fixed pictures followed through all stages, a frame for each sample time.

Without JavaScript the last frame shows.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterator
from html import escape
from typing import Any

from lightning_internvl.report.charts import script_json, thin
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles, StageFiles
from lightning_internvl.report.sections import section
from lightning_internvl.report.similarity import closest, heat_map, matrix_of, strengths, summary

MAX_TIMES = 48  # over all stages
DIGITS = string.digits + string.ascii_lowercase  # from dark to lit
LATE = 0.8  # of the axis, behind which a name stands before its mark
COARSE = 8  # parts along a side below which they are drawn with their edges
SEEN = {
    "similarity": "lit is what the similarity to the true caption hangs on",
    "caption": "lit is what the probability of the true caption hangs on",
    "answer": "lit is what the probability of the true answer hangs on",
}
LOOK = '<label class="look"><input type="checkbox" checked> where it looks <small></small></label>'
Time = tuple[StageFiles, dict[str, Any]]


def film(run: RunFiles, pictures: Pictures) -> str:
    """The section: controls with the time axis, the similarity matrix, a card for each picture."""
    times = list(_times(run))
    if not times:
        return ""
    texts = [_time_text(*time) for time in times]
    matrix, changes = _matrix(times, pictures)
    seen = [_seen(sample) for _, sample in times]
    told = script_json({"texts": texts, "seen": seen, "matrix": changes})
    lead = (
        "The same pictures, never trained on, at several moments of every stage. Play it, drag the slider, or press space "
        "and the arrow keys. Words that the true caption does not hold are marked."
    )
    body = (
        f'<div class="film" tabindex="-1"><div class="scrub">{_controls(times)}'
        f'<p id="time" role="status">{escape(texts[-1])}</p>{LOOK if any(seen) else ""}</div>'
        f'<div class="scene">{matrix}<div class="cards">{"".join(_cards(times, pictures))}</div></div>'
        f'<script type="application/json">{told}</script></div>'
    )
    return section("film", "The alignment film", lead, body)


def _times(run: RunFiles) -> Iterator[Time]:
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
        same = sum(plain_words(str(caption)) == plain_words(str(truth)) for caption, truth in captions)
        counts.append(f"{same} of {len(captions)} captions word for word")
    matrix = matrix_of(sample)
    if matrix and not captions:
        right = sum(closest(row) == index for index, row in enumerate(matrix))
        counts.append(f"right caption closest for {right} of {len(matrix)}")
    return " · ".join([_moment(stage, sample), *counts])


def _moment(stage: StageFiles, sample: dict[str, Any]) -> str:
    return f"{stage.name}, step {sample['step']:,}"


def _controls(times: list[Time]) -> str:
    """Buttons, slider, and under it a mark for each time, with the name where a stage begins."""
    last, before, marks = len(times) - 1, None, []
    for time, (stage, _) in enumerate(times):
        share = time / max(1, last)
        kind = "" if stage is before else ' class="first late"' if share > LATE else ' class="first"'
        name = "" if stage is before else f"<b>{escape(stage.name)}</b>"
        marks.append(f'<i{kind} style="left:{100 * share:.2f}%">{name}</i>')
        before = stage
    return (
        '<div class="controls"><button type="button" data-play aria-label="Play">▶</button>'
        '<button type="button" data-move="-1" aria-label="Earlier">‹</button>'
        '<button type="button" data-move="1" aria-label="Later">›</button><div class="track">'
        f'<input type="range" min="0" max="{last}" value="{last}" step="1" aria-label="Sample time">'
        f'<div class="marks" aria-hidden="true">{"".join(marks)}</div></div></div>'
    )


def _seen(sample: dict[str, Any]) -> str:
    """What the light on the pictures of a time means; nothing where there is none."""
    found = sample.get("relevance")
    found = found if isinstance(found, dict) else {}
    return SEEN.get(str(found.get("of")), "") if any(_letters(sample, index) for index in range(len(sample["images"]))) else ""


def _matrix(times: list[Time], pictures: Pictures) -> tuple[str, dict[str, Any] | None]:
    """The heat map as it is at the end, and what of it changes: for each time the place in
    `values` (percent of the scale) and `closest`, and the text. A time without a matrix of these
    pictures shows the one before."""
    found = [(time, matrix, sample) for time, (_, sample) in enumerate(times) if (matrix := matrix_of(sample))]
    if not found:
        return "", None
    _, final, end = found[-1]
    same = [
        (time, matrix)
        for time, matrix, sample in found
        if (len(matrix), len(matrix[0]), sample.get("captions_true")) == (len(final), len(final[0]), end.get("captions_true"))
    ]
    everything = [value for _, matrix in same for row in matrix for value in row]
    low, high = min(everything), max(everything)
    at = [max((place for place, (measured, _) in enumerate(same) if measured <= time), default=0) for time in range(len(times))]
    texts = [f"{_moment(*times[same[place][0]])}: {summary(same[place][1])}" for place in at]
    changes = {
        "values": [strengths(matrix, low, high) for _, matrix in same],
        "closest": [[closest(row) for row in matrix] for _, matrix in same],
        "at": at,
        "texts": texts,
    }
    caption = f"<b>Similarity of pictures and captions</b><span>{escape(texts[-1])}</span>"
    scale = f'<p class="scale"><span>{low:.2f}</span><i></i><span>{high:.2f}</span> cosine similarity</p>'
    about = "Rows are pictures, columns captions; the right pairs are outlined, and a dot marks the caption closest to a picture."
    heat = heat_map(final, end["images"], (low, high), pictures)
    return f'<figure class="matrix"><figcaption>{caption}</figcaption>{heat}{scale}<p>{about}</p></figure>', changes


def _cards(times: list[Time], pictures: Pictures) -> Iterator[str]:
    last, before = len(times) - 1, [_neighbours_before(times, time) for time in range(len(times))]
    for index in range(max(len(sample["images"]) for _, sample in times)):
        frames = [_frame(sample, before[time], index, time, time == last, pictures) for time, (_, sample) in enumerate(times)]
        yield f'<article class="card">{"".join(frames)}</article>'


def _neighbours_before(times: list[Time], time: int) -> Any:
    """The last neighbours that were found of the same captions."""
    captions = times[time][1].get("captions_true")
    earlier = (
        sample["neighbours"]
        for _, sample in times[:time][::-1]
        if sample.get("captions_true") == captions and "neighbours" in sample
    )
    return next(earlier, None)


def _frame(sample: dict[str, Any], before: Any, index: int, time: int, shown: bool, pictures: Pictures) -> str:
    """A picture at one time; `before` are the neighbours of the time before that had some."""
    images, truths = sample["images"], sample.get("captions_true") or []
    if index >= len(images):
        return ""
    truth = str(truths[index]) if index < len(truths) else ""
    parts = [f'<p class="truth"><small>caption {index + 1}, the true one</small>{escape(truth)}</p>'] if truth else []
    said = sample.get("captions") or []
    matrix = matrix_of(sample)
    if index < len(said):
        parts.append(f'<p class="said"><small>generated</small>{_marked(str(said[index]), truth)}</p>')
    elif index < len(matrix) and len(truths) == len(matrix[index]):
        best = closest(matrix[index])
        mark = verdict(best == index)
        parts.append(f'<p class="said"><small>closest caption {mark}</small>{_marked(str(truths[best]), truth)}</p>')
    answers = sample.get("answers") or []
    asked = answers[index] if index < len(answers) else []
    below = f'<ul class="answers">{"".join(map(_answer, asked))}</ul>' if asked else ""
    below += _nearest(sample.get("neighbours"), index, pictures) or _nearest(before, index, pictures, " past")
    picture = pictures.use(images[index], truth or f"picture {index + 1}")
    picture = f'<div class="seen">{picture}{_veil(sample, index, pictures)}</div>'
    hidden = "" if shown else " hidden"
    return f'<div class="frame" data-time="{time}"{hidden}>{picture}<div>{"".join(parts)}</div>{below}</div>'


def _veil(sample: dict[str, Any], index: int, pictures: Pictures) -> str:
    """What dims a picture but for what a score hangs on."""
    letters = _letters(sample, index)
    if not letters:
        return ""
    side = math.isqrt(len(letters))
    kind = "veil coarse" if side < COARSE else "veil"
    place = pictures.place(sample["images"][index])
    given = f'width="{side}" height="{side}" data-seen="{letters}" style="{place}"'
    return f'<canvas class="{kind}" {given} aria-hidden="true"></canvas>'


def _letters(sample: dict[str, Any], index: int) -> str:
    """How much a score hangs on each part of a picture, a digit each, row by row; nothing where that
    is not known."""
    try:
        grid = sample["relevance"]["grids"][index]
        levels = [int(value) * 36 // 100 for row in grid for value in row]
        square = len(grid) > 1 and all(len(row) == len(grid) for row in grid)
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):  # of a time or a run without it
        return ""
    return "".join(DIGITS[level] for level in levels) if square and min(levels) >= 0 and max(levels) < len(DIGITS) else ""


def _nearest(found: Any, index: int, pictures: Pictures, past: str = "") -> str:
    """The pictures nearest to the caption of a card, its own among them marked."""
    try:
        row, rank, among = found["ranked"][index], int(found["ranks"][index]), int(found["among"])
        shown = [(int(place), float(score), found["pictures"].get(str(place))) for place, score in row]
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):  # of a time or a run without them
        return ""
    items = []
    for number, (place, score, png) in enumerate(shown, start=1):
        own = place == index
        text = f"rank {number}, similarity {score:.2f}{', the right one' if own else ''}"
        items.append(f"<li{' class=right' if own else ''}>{pictures.use(png, text)}</li>")
    told = f"<small>nearest of {among} pictures {verdict(rank == 1)} own at rank {rank}</small>"
    return f'<div class="near{past}">{told}<ol>{"".join(items)}</ol></div>'


def _marked(said: str, truth: str) -> str:
    """`said` with the words marked that `truth`, if any, does not hold."""
    right = set(plain_words(truth))
    words = []
    for word in said.split():
        wrong = right and not right.issuperset(plain_words(word))
        words.append(f"<mark>{escape(word)}</mark>" if wrong else escape(word))
    return " ".join(words) or "<i>nothing</i>"


def plain_words(text: str) -> list[str]:
    """Words to compare: lower case, without punctuation."""
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def verdict(right: bool) -> str:
    """A mark for right or wrong."""
    return '<b class="yes" title="right">✓</b>' if right else '<b class="no" title="wrong">✗</b>'


def _answer(answer: dict[str, Any]) -> str:
    question, said = escape(str(answer.get("question", ""))), escape(str(answer.get("answer", "")))
    right = bool(answer.get("correct"))
    truth = "" if right else f' <span class="instead">right: {escape(str(answer.get("truth", "")))}</span>'
    given = f'<span class="answer">{verdict(right)} {said or "<i>nothing</i>"}</span>'
    return f"<li>{question} {given}{truth}</li>"
