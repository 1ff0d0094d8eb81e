"""`data.validate=true`: what is wrong with the files of all stages, what they hold, and a preview;
nothing is trained."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lightning_internvl.choices import Config
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.console import console
from lightning_internvl.data.templates import load_template
from lightning_internvl.files import append_text, json_text
from lightning_internvl.inference.collators import View, make_view
from lightning_internvl.messages import hidden
from lightning_internvl.model.compose import Build, compose_model
from lightning_internvl.validate.check_files import CheckedSource, FileCheck, Statistics, describe_fault
from lightning_internvl.validate.preview import write_preview

DATASETS = "lightning_internvl.data.files.datasets"
PAIRS, CHATS = f"{DATASETS}.PairsFile", f"{DATASETS}.ChatsFile"
SHOWN = 20  # faults that are printed; the file holds all


def run_validation(config: Config, folder: Path, build: Build) -> bool:
    """Check the records that the stages of the pipeline read, and tell what was found.

    Args:
        folder: gets `faults.jsonl`, where there are any, and `preview.html`.

    Returns:
        whether the share of bad records is within `data.max_bad_fraction`, and that of records with
        something unread within `data.max_unread_fraction`

    Raises:
        ValueError: if no stage reads files, or one of them is not there.
    """
    stages = RunSettings.of(config).trained
    sources = checked_sources(stages)
    views = _views(stages, build)
    check = _make_check(stages, views)
    begun, bad = time.monotonic(), 0
    kinds: Counter[str] = Counter()
    shown: list[str] = []
    path = folder / "faults.jsonl"
    for fault in check.faults(sources):
        kinds[fault.kind] += 1
        bad += fault.bad
        if fault.bad and len(shown) < SHOWN:
            shown.append(describe_fault(fault))
        if kinds.total() == 1:
            path.unlink(missing_ok=True)
        append_text(path, json_text(hidden(fault.__dict__)) + "\n")
    found, limit = check.statistics, stages[0].data.max_bad_fraction
    for line in shown:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if kinds.total() > len(shown):
        console.print(f"... and {kinds.total() - len(shown)} more faults and notes in {path}", soft_wrap=True)
    console.print(_table(found, kinds))
    share = bad / max(found.records, 1)
    seconds = time.monotonic() - begun
    read = f"{found.records} records read in {seconds:.1f} s; {bad} bad ({share:.2%})"
    console.print(f"{read}; data.max_bad_fraction={limit}")
    incomplete = found.unread.fault(stages[0].data.max_unread_fraction)
    if incomplete:
        console.print(incomplete, soft_wrap=True, markup=False, highlight=False)
    for stage in stages:
        _preview(stage, views[stage.name], folder, build)
    return found.records > 0 and share <= limit and incomplete is None


def checked_sources(stages: Sequence[StageSettings]) -> list[CheckedSource]:
    """What the stages read, each once. Raises ValueError if there is nothing to check."""
    found: dict[str, CheckedSource] = {}
    for stage in stages:
        for node in _readers(getattr(stage.data, stage.reads)):
            validation = node.get("validation")
            paths = [node.get("path"), validation if isinstance(validation, str) else None]
            for path in filter(None, paths):
                before = found.get(str(path))
                found[str(path)] = CheckedSource(
                    path,
                    image_root=node.get("image_root"),
                    caption_request=node.get("caption_request") or "",
                    pairs=node["_target_"] == PAIRS or (before is not None and before.pairs),
                    chats=node["_target_"] == CHATS or (before is not None and before.chats),
                    stages=(*(before.stages or () if before else ()), stage.name),
                )
    if not found:
        raise ValueError("data.validate=true: no stage of the pipeline reads a file; give data=conversations data.path=FILE")
    return list(found.values())


def _readers(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every dataset of files in a dataset's configuration, be it one or a mixture."""
    if isinstance(node, Mapping):
        if node.get("_target_") in (PAIRS, CHATS):
            yield node
        for child in node.values():
            yield from _readers(child)


def _views(stages: Sequence[StageSettings], build: Build) -> dict[str, View | str]:
    """How each stage prepares its data, by its name; or why that cannot be known here."""
    found: dict[str, View | str] = {}
    for stage in stages:
        try:
            with torch.device("meta"):
                model, tokenizers = compose_model(stage.parts.config, build)
                found[stage.name] = make_view(stage, model, tokenizers, build)
        except (OSError, TypeError) as error:  # a tokenizer that must be downloaded, say
            found[stage.name] = str(error)
    return found


def _make_check(stages: Sequence[StageSettings], views: Mapping[str, View | str]) -> FileCheck:
    """The check with the collators of all stages; without one only the order of turns is known."""
    collators: dict[str, dict[str, Any]] = {"chats": {}, "pairs": {}}
    template = None
    for stage in stages:
        view = views[stage.name]
        if isinstance(view, str):
            reason = f"{stage.name}: only its records are checked, and not their lengths: {view}"
            console.print(reason, soft_wrap=True, markup=False, highlight=False)
            if stage.reads == "chats":
                options = {**stage.data.chats_collate, **stage.collate}
                template = load_template(options["template"], options.get("system"))
        elif stage.reads in collators:
            collators[stage.reads][stage.name] = view.training
    return FileCheck(**collators, template=template)


def _preview(stage: StageSettings, view: View | str, folder: Path, build: Build) -> None:
    path = folder / f"preview-{stage.name}.html"
    try:
        if isinstance(view, str):
            raise ValueError(view)
        write_preview(stage, view, path, build)
    except ValueError as error:
        console.print(f"{stage.name}: no preview: {error}", soft_wrap=True, markup=False)
    else:
        console.print(f"{stage.name}: some samples as the model sees them: {path}", soft_wrap=True)


def _table(found: Statistics, kinds: Counter[str]) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for kind, count in kinds.most_common():
        table.add_row(kind, f"{count:,}")
    if kinds:
        table.add_section()
    table.add_row("records", f"{found.records:,}")
    table.add_row("not read", found.unread.described() or "nothing")
    for title, counted in (
        ("formats", found.formats.most_common()),
        ("roles", found.roles.most_common()),
        ("questions a record", sorted(found.turns.items())[:12]),
        ("images a record", sorted(found.images.items())[:12]),
    ):
        table.add_row(title, ", ".join(f"{name}: {count:,}" for name, count in counted))
    table.add_row("videos", f"{found.videos:,}")
    if found.sizes:
        sizes = sorted(found.sizes, key=lambda size: size[0] * size[1])
        low, middle, high = (f"{w} x {h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
        looked_at = f"({len(sizes):,} looked at)"
        table.add_row("picture sizes", f"{low} to {high} px, median {middle} {looked_at}")
    tokens = f"tokens (of {len(found.tokens):,} records)"
    for title, lengths in (("characters", found.characters), (tokens, found.tokens)):
        if lengths:
            table.add_row(title, histogram(lengths))
    return table


def histogram(lengths: Sequence[int], width: int = 20) -> str:
    """Counts by powers of two as bars, one line each."""
    counts = Counter(max(0, math.ceil(math.log2(max(length, 1)))) for length in lengths)
    most = max(counts.values())
    rows = []
    for n in range(min(counts), max(counts) + 1):
        bar = "█" * math.ceil(width * counts[n] / most)
        rows.append(f"up to {2**n:>7,}  {bar:<{width}} {counts[n]:,}")
    return "\n".join(rows)
