"""The sections at the end of the page: metrics, time, freezing, and the resolved configuration."""

from __future__ import annotations

from html import escape

from lightning_internvl.report.metrics_table import format_number, times_chance, with_chance
from lightning_internvl.report.read import RunFiles
from lightning_internvl.report.sections import html_table, metric_bar, metric_cell, row_group, section, tops

TIMING = {
    "train_seconds": ("training, minutes", 1 / 60, ".2f"),
    "eval_seconds": ("evaluation, minutes", 1 / 60, ".2f"),
    "steps": ("optimizer steps", 1, ",.0f"),
    "samples_per_s": ("samples per second", 1, ",.1f"),
    "pairs_per_second": ("pairs scored per second", 1, ",.0f"),
    "tokens_per_s": ("tokens per second", 1, ",.0f"),
    "padding_share": ("padding, % of tokens", 100, ".1f"),
    "peak_memory_gib": ("peak memory, GiB", 1, ".2f"),
}


def metrics(run: RunFiles) -> str:
    """Every metric of every stage beside its chance level."""
    ends = tops(run)
    bodies = []
    for stage in run.stages:
        rows = "".join(
            f"<tr>{metric_cell(name)}<td>{format_number(value)}</td>"
            f"<td>{'' if chance is None else format_number(chance)}</td><td>{times_chance(value, chance)}</td>"
            f'<td class="wide">{metric_bar(name, value, chance, ends)}</td></tr>'
            for name, value, chance in with_chance(stage.metrics)
        )
        if rows:
            bodies.append(row_group(stage.name, 5, [rows]))
    table = html_table(["metric", "value", "chance", "× chance", ""], bodies) if bodies else ""
    return section("metrics", "All metrics", "The notch in a bar is the chance level.", table)


def timing_title(key: str) -> str:
    """What is called so in timing.json, with its unit."""
    return TIMING[key][0] if key in TIMING else key


def timing_text(key: str, value: float | None) -> str:
    """A value of timing.json in that unit; empty for None."""
    _, factor, decimals = TIMING.get(key, (key, 1, ".4g"))
    return "" if value is None else format(value * factor, decimals)


def timing(run: RunFiles) -> str:
    """What each stage took."""
    timed = [stage for stage in run.stages if stage.timing]
    keys = dict.fromkeys([*TIMING, *(key for stage in timed for key in stage.timing)])
    rows = []
    for key in keys:
        texts = [timing_text(key, stage.timing.get(key)) for stage in timed]
        if any(texts):
            cells = "".join(f"<td>{text}</td>" for text in texts)
            rows.append(f'<tr><th scope="row">{escape(timing_title(key))}</th>{cells}</tr>')
    table = html_table(["", *(stage.name for stage in timed)], [f"<tbody>{''.join(rows)}</tbody>"]) if rows else ""
    return section("timing", "Time", "Measured on the machine of this run.", table)


def freezing(run: RunFiles) -> str:
    """What trained when and why."""
    bodies = []
    for stage in run.stages:
        for entry in stage.freezing:
            rows = "".join(
                f'<tr><th scope="row">{escape(str(row.get("group")))}</th><td>{row.get("trained") or 0:,}</td>'
                f'<td>{row.get("frozen") or 0:,}</td><td class="why">{escape(str(row.get("why") or ""))}</td></tr>'
                for row in entry["rows"]
            )
            bodies.append(row_group(f"{stage.name}, from step {entry['step']:,}", 4, [rows]))
    table = html_table(["group", "trained", "frozen", "why"], bodies) if bodies else ""
    return section("freezing", "Freezing", "Parameters that each stage trained, and why the others rest.", table)


def configuration(run: RunFiles) -> str:
    """The resolved configuration, folded."""
    text = f"<details><summary>Resolved configuration</summary><pre>{escape(run.config_text)}</pre></details>"
    return section("config", "Configuration", "Everything that defines this run.", text) if run.config_text else ""
