"""What filters have seen, kept and dropped by rule, and histograms of the scores."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from lightning_internvl.report.charts import bar
from lightning_internvl.report.metric_words import words
from lightning_internvl.report.metrics_table import format_number
from lightning_internvl.report.pictures import Pictures
from lightning_internvl.report.read import RunFiles, StageFiles, numbers
from lightning_internvl.report.sections import section

SIMILARITY = "similarity"  # the axes of other scores are logarithmic
APART = 12  # percent of a chart's width between two numbers under it
HEIGHT = 150
LONGEST = 200  # characters of a text
LEGEND = '<ul class="legend"><li class="c-trained"><i></i>kept</li><li class="c-frozen"><i></i>dropped</li></ul>'


def filters(run: RunFiles, pictures: Pictures) -> str:
    """The section of all filters of a run."""
    lead = "What the stages behind read. A pair is counted under the first rule that dropped it."
    return section("filter", "Pairs kept", lead, "".join(_filter(stage, pictures) for stage in run.stages if stage.summary))


def _filter(stage: StageFiles, pictures: Pictures) -> str:
    histograms = stage.summary.get("histograms")
    rows = histograms.items() if isinstance(histograms, dict) else ()
    charts = "".join(_histogram(str(name), columns, stage.summary) for name, columns in rows)
    scores = f'<h3>Scores of {escape(stage.name)}</h3><div class="small">{charts}</div>' if charts else ""
    return f"<h3>{escape(stage.name)}</h3>{_counts(stage.summary)}{_languages(stage)}{_shown(stage, pictures)}{scores}"


def _counts(found: dict[str, Any]) -> str:
    seen, dropped, unusable = (numbers(one) for one in (found, found.get("dropped"), found.get("unusable")))
    total = seen.get("pairs", 0)
    rows = {"seen": total, **{f"dropped: {words(rule)}": number for rule, number in dropped.items()}}
    rows |= {f"unusable: {kind}": number for kind, number in unusable.items()} | {"kept": seen.get("kept", 0)}
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{number:,.0f}</td><td>{100 * number / max(total, 1):.1f} %</td>'
        f'<td class="wide">{bar(number, None, total)}</td></tr>'
        for name, number in rows.items()
    )
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def _languages(stage: StageFiles) -> str:
    """What became of the pairs of each language; nothing where there is one."""
    given = stage.summary.get("languages")
    found = {str(name): numbers(counts) for name, counts in given.items()} if isinstance(given, dict) else {}
    if len(found) < 2:
        return ""
    rules = sorted({rule for counts in found.values() for rule in counts} - {"pairs", "kept"})
    head = "".join(f'<th scope="col">{escape(words(name))}</th>' for name in ("language", "seen", "kept", *rules))
    rows = ""
    for name, counts in found.items():
        total = counts.get("pairs", 0)
        shares = [f"{100 * counts.get(rule, 0) / max(total, 1):.1f} %" for rule in ("kept", *rules)]
        cells = "".join(f"<td>{share}</td>" for share in shares)
        rows += f'<tr><th scope="row">{escape(name[:40])}</th><td>{total:,.0f}</td>{cells}</tr>'
    lead = "By what captions are written in: as their records say, as was guessed, or else their script."
    title = f"<h3>Languages of {escape(stage.name)}</h3><p>{lead}</p>"
    return f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _shown(stage: StageFiles, pictures: Pictures) -> str:
    """Some kept and dropped pairs."""
    given = stage.summary.get("shown")
    pairs = [pair for pair in given if isinstance(pair, dict)] if isinstance(given, list) else []
    lists = ""
    for title, kept in (("Kept", True), ("Dropped", False)):
        shown = [_pair(pair, pictures) for pair in pairs if (pair.get("rule") == "kept") == kept]
        lists += f'<h4>{title}</h4><ol class="cases">{"".join(shown)}</ol>' if shown else ""
    return f"<h3>Pairs of {escape(stage.name)}</h3>{lists}" if lists else ""


def _pair(pair: dict[str, Any], pictures: Pictures) -> str:
    caption, similarity, rule = (pair.get(name) for name in ("caption", "similarity", "rule"))
    told = {"caption": str(caption), "language": str(pair.get("language"))}
    told |= {"similarity": format_number(similarity)} if isinstance(similarity, int | float) else {}
    told |= {} if rule == "kept" else {"dropped by": words(str(rule))}
    cells = "".join(f"<dt>{name}</dt><dd>{escape(text[:LONGEST])}</dd>" for name, text in told.items())
    kind = " class=right" if rule == "kept" else ""
    return f"<li{kind}>{pictures.use(pair.get('png'), str(caption)[:LONGEST])}<dl>{cells}</dl></li>"


def _histogram(name: str, rows: Any, found: dict[str, Any]) -> str:
    """Columns as high as what was seen, filled as high as what was kept."""
    columns = [row for row in rows if _is_column(row)] if isinstance(rows, list) else []
    if not columns:
        return ""
    low, high = _place(name, columns[0][0]), _place(name, columns[-1][1])
    tallest = max(column[2] for column in columns)

    def percent(value: float) -> float:
        return 100 * (_place(name, value) - low) / max(high - low, 1e-9)

    parts = [f'<line class="grid" x1="0" x2="100%" y1="{HEIGHT}" y2="{HEIGHT}"/>']
    for begin, end, seen, kept in columns:
        title = f"{format_number(begin)} to {format_number(end)}: {kept:,} of {seen:,} pairs kept"
        parts.append(f"<g><title>{title}</title>")
        for kind, number in (("frozen", seen), ("trained", kept)):
            tall = HEIGHT * number / max(tallest, 1)
            parts.append(
                f'<rect class="{kind}" x="{percent(begin):.2f}%" width="{percent(end) - percent(begin):.2f}%" '
                f'y="{HEIGHT - tall:.1f}" height="{tall:.1f}"/>'
            )
        parts.append("</g>")
    last = -math.inf
    for value in [*(column[0] for column in columns), columns[-1][1]]:
        if percent(value) - last >= APART:
            last = percent(value)
            parts.append(f'<text class="tick" x="{last:.2f}%" y="{HEIGHT + 18}">{format_number(value)}</text>')
    threshold = found.get("similarity_from") if name == SIMILARITY else None
    if isinstance(threshold, int | float):
        x = f"{min(max(percent(threshold), 0), 100):.2f}%"
        parts.append(f'<line class="border" x1="{x}" x2="{x}" y1="0" y2="{HEIGHT}"/>')
    label = f"{words(name)}: pairs seen and kept"
    return (
        f'<figure class="panel"><figcaption><b>{escape(words(name))}</b>{LEGEND}</figcaption><svg class="band" role="img" '
        f'aria-label="{escape(label)}" height="{HEIGHT}">{"".join(parts)}</svg></figure>'
    )


def _is_column(row: Any) -> bool:
    """Whether a row of a file is what it should be."""
    return (
        isinstance(row, list)
        and len(row) == 4
        and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in row)
    )


def _place(name: str, value: float) -> float:
    return value if name == SIMILARITY else math.log2(max(value, 1e-9))
