"""A filter from beginning to end, in one process or several: score, decide, write.

Processes meet in the filter's folder alone. Process r of R takes the shards r, r + R, ...; the
first one decides and sums up.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lightning_internvl.choices import Config
from lightning_internvl.config.filter_checks import ORDER, SCRIPTS, SIMILARITY, TOP_SHARE
from lightning_internvl.config.filter_settings import shard_list
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.console import console
from lightning_internvl.distributed import collectives as distributed
from lightning_internvl.files import DRAFT, read_json, write_json, write_text
from lightning_internvl.filtering.decide import BAD, KEPT, Columns, decide
from lightning_internvl.filtering.job import FilterJob
from lightning_internvl.filtering.measures import INSTALL
from lightning_internvl.filtering.scores import UNUSABLE
from lightning_internvl.filtering.write import new_shard, sum_counts
from lightning_internvl.launch import started_from_outside, started_processes
from lightning_internvl.training.out_of_memory import out_of_memory_cause

DECISION, SUMMARY = "decision.json", "summary.json"
EVERY = 10.0  # seconds between two lines of progress
LOOK = 0.2  # seconds between two looks at what other processes have done


def is_finished(folder: Path) -> bool:
    """Whether a filter has done all its work."""
    return (folder / SUMMARY).exists()


def settings_after(run: RunSettings, folder: Path) -> RunSettings:
    """The run after a finished filter, where stages read what it has kept."""
    return run.after_filter(folder, read_json(folder / SUMMARY)["kept_by_source"])


def run_filter(job: FilterJob, run_dir: Path) -> None:
    """Do what is left of a filter's work.

    Raises:
        ValueError: if too many pairs cannot be used, or none is kept.
    """
    console.rule(f"[bold]{job.name}")
    begun, (rank, world) = time.monotonic(), rank_and_world_size()
    count = len(job.shards())
    own = range(rank, count, world)
    scored = 0
    if not (job.folder / DECISION).exists():
        scored = _score(job, own, rank)
        if rank == 0:
            _wait(lambda: not job.unscored(range(count)))
            _decide(job, count)
    seconds = time.monotonic() - begun
    _wait((job.folder / DECISION).exists)
    pace = _Pace("written", len(own))
    if job.settings.engine == "ray":
        from lightning_internvl.filtering.ray_engine import write_all

        write_all(job, job.unwritten(own))
    elif left := job.unwritten(own):
        for number in job.write(left):
            pace.report(number // world + 1)
    if rank == 0:
        _wait(lambda: not job.unwritten(range(count)))
        _sum_up(job, run_dir, count, scored, seconds, time.monotonic() - begun)
    _wait((job.folder / SUMMARY).exists)


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process, and how many there are; also before they have met."""
    if distributed.world_size() > 1 or not started_from_outside():
        return distributed.rank(), distributed.world_size()
    rank = next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID") if name in os.environ), 0)
    return rank, started_processes()


def _score(job: FilterJob, own: Sequence[int], rank: int) -> int:
    """Score a process's shards; returns the number of pairs that were."""
    pace, total = _Pace("scored", len(own)), 0
    if job.settings.scores_from:
        job.take_scores(own)
    elif job.settings.engine == "ray":
        from lightning_internvl.filtering.ray_engine import score_all

        total = score_all(job, job.unscored(own))
    ledger = job.ledger(rank)
    try:
        for done, pairs in enumerate(job.score(own, ledger), start=1):
            total += pairs
            pace.report(done, total)
    except Exception as error:
        if out_of_memory_cause(error) is None:
            raise
        smaller = f"stages.{job.name}.batch_size={max(1, job.settings.batch_size // 2)}"
        raise ValueError(f"out of memory: {job.name} with batch_size={job.settings.batch_size}; {smaller} takes less") from error
    if summary := ledger.summary():
        console.print(summary, soft_wrap=True)
    return total


def _decide(job: FilterJob, count: int) -> None:
    rules = job.settings.rules
    columns = Columns.join(job.columns, count)
    threshold = decide(columns, rules)
    reasons = np.zeros(256, dtype=np.int64)
    for piece in columns.pieces():
        reasons += np.bincount(columns.column("reason")[piece], minlength=256)
    dropped = {rule: int(reasons[1 + at]) for at, rule in enumerate(ORDER) if reasons[1 + at]}
    if not reasons[KEPT]:
        reasons_given = [f"{rule} drops {n}{_limits(rules, rule)}" for rule, n in dropped.items()]
        why = ", ".join(reasons_given) or "there is none"
        bad = f"; {reasons[BAD]} cannot be used (see {job.folder / 'skipped.jsonl'})" if reasons[BAD] else ""
        raise ValueError(
            f"stages.{job.name}: none of {len(columns)} pairs is kept: {why}{bad}. The scores of "
            f"all pairs are in {job.folder / 'scores'}; widen stages.{job.name}.rules"
        )
    _warn_of_much(job, {rule: n for rule, n in dropped.items() if rule != TOP_SHARE}, len(columns))
    _check_sources(job, columns)
    write_json(job.folder / DECISION, {"similarity_from": threshold, "kept": int(reasons[KEPT])})


def _warn_of_much(job: FilterJob, dropped: dict[str, int], pairs: int) -> None:
    """Say which rules drop more than half of all pairs together; the top share is asked for."""
    if sum(dropped.values()) <= pairs / 2:
        return
    largest_first = sorted(dropped.items(), key=lambda one: -one[1])
    each = "; ".join(f"{rule} {n:,}{_limits(job.settings.rules, rule)}" for rule, n in largest_first)
    lost = f"{sum(dropped.values()):,} of {pairs:,} pairs are dropped"
    console.print(f"warning: {lost}: {each}. stages.{job.name}.rules.NAME=null leaves a rule out", style="yellow", soft_wrap=True)


def _check_sources(job: FilterJob, columns: Columns) -> None:
    """Raises ValueError for a source of which nothing is kept, whatever its weight."""
    shards, kept = job.shards(), Counter[str]()
    for shard in range(len(shards)):
        kept[shards.source(shard)] += columns.reasons(shard).count(KEPT)
    if empty := [name for name, number in kept.items() if not number]:
        advice = f"leave it out, or widen stages.{job.name}.rules"
        raise ValueError(f"stages.{job.name}: no pair of data.sources.{empty[0]} is kept; {advice}")


def _limits(rules: Config, rule: str) -> str:
    """The limits of a rule, as a message tells them."""
    limits = rules.get(SIMILARITY if rule == TOP_SHARE else rule) or {}
    given = ", ".join(f"{field}: {value}" for field, value in limits.items() if value is not None)
    return f" ({given})" if given else ""


def _sum_up(job: FilterJob, run_dir: Path, count: int, scored: int, scoring: float, seconds: float) -> None:
    """Write the list of new shards, the summary, and what a run tells of all its stages."""
    total, decision = sum_counts(job.folder, count), read_json(job.folder / DECISION)
    shards, names = job.shards(), defaultdict[str, list[str]](list)
    for number in range(count):
        if (path := new_shard(job.folder, number)).exists():
            names[shards.source(number)].append(f"{path.relative_to(job.folder)}\n")
    for source, lines in names.items():
        write_text(shard_list(job.folder, source), "".join(lines))
    shutil.rmtree(job.columns, ignore_errors=True)
    for left in job.folder.rglob(f".*{DRAFT}"):  # of a process that was killed
        left.unlink()
    metrics = {"pairs": total["pairs"], "kept": total["kept"], "kept_share": total["kept"] / total["pairs"]}
    file = run_dir / "metrics.json"
    write_json(file, read_json(file, {}) | {job.name: metrics})
    timing = read_json(run_dir / "timing.json", {})
    before = timing.get(job.name, {}).get("eval_seconds", 0.0)
    timing[job.name] = {"eval_seconds": round(before + seconds, 2)}
    if scored:
        timing[job.name]["pairs_per_second"] = round(scored / scoring, 1)
        console.print(f"{scored:,} pairs scored in {scoring:.1f} s, {scored / scoring:,.0f} pairs/s in this process")
    write_json(run_dir / "timing.json", timing)
    write_json(
        job.folder / SUMMARY,
        {"shards": count, "new_shards": sum(map(len, names.values())), **decision, **total, "rules": job.settings.rules},
    )
    console.print(_table(total, job))
    scripts = [name for name in total["languages"] if name in SCRIPTS]
    if scripts and job.settings.shares_by_language:
        remedy = "say them in data.sources.NAME.language or the records, or have them guessed"
        told = f"captions in {', '.join(scripts)} share a rule, whatever their languages, which nobody says; {remedy}: {INSTALL}"
        console.print(told, soft_wrap=True)
    from lightning_internvl.report import write_report

    write_report(run_dir)


def _table(total: dict[str, Any], job: FilterJob) -> Table:
    table = Table(header_style="bold")
    table.add_column("")
    table.add_column("pairs", justify="right")
    table.add_column("share", justify="right")
    rows = {
        "seen": total["pairs"],
        **{f"dropped: {rule}{_limits(job.settings.rules, rule)}": n for rule, n in total["dropped"].items()},
    }
    rows |= {f"{UNUSABLE}: {kind}": number for kind, number in total[UNUSABLE].items()} | {"kept": total["kept"]}
    for name, number in rows.items():
        table.add_row(name, f"{number:,}", f"{number / max(total['pairs'], 1):.2%}")
    if len(total["languages"]) > 1:
        table.add_section()
        for language, counts in total["languages"].items():
            table.add_row(f"kept of {language:.40}", f"{counts['kept']:,}", f"{counts['kept'] / counts['pairs']:.2%}")
    return table


def _wait(done: Callable[[], bool]) -> None:
    """Wait for what another process does; one that fails ends all others (see `launch`)."""
    while not done():
        time.sleep(LOOK)


class _Pace:
    """A line of progress now and then."""

    def __init__(self, what: str, shards: int) -> None:
        self.what, self.shards = what, shards
        self.begun = self.last = time.monotonic()

    def report(self, done: int, pairs: int = 0) -> None:
        """Say how many shards are done, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self.last < EVERY:
            return
        self.last = now
        speed = f", {pairs / (now - self.begun):,.0f} pairs/s" if pairs else ""
        console.print(f"{done} of {self.shards} shards {self.what}{speed}", soft_wrap=True)
