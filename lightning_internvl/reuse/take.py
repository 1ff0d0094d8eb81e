"""Taking stages that other runs have finished: looking for them, comparing, copying.

Nothing that is taken is built or run: weights, plain values and pictures are copied, and read as
those of this run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_internvl.checkpoints.weight_source import check_whole
from lightning_internvl.choices import SWEEP
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.console import console
from lightning_internvl.files import DRAFT, RUN_CONFIG, atomic_folder, read_json, remove, write_json
from lightning_internvl.launch import is_helper
from lightning_internvl.model.compose import Build
from lightning_internvl.report import write_report
from lightning_internvl.reuse.keep import KEY, UNKNOWN, pieces_of, place_to_look, read_key, state_beside

NOTE = "reused.json"  # in a run's folder: where its stages were taken from; there once that is decided
BESIDE = ("stages", "best", "tensorboard", "csv")  # folders of a run with one for each stage
LOOK = 0.2  # seconds between two looks for what the first process has decided
SHOWN = 3  # pieces that differ
WIDTH = 60  # characters of a value that is shown


def take_finished(run: RunSettings, run_dir: Path, build: Build) -> None:
    """Take the first stages of a pipeline, as many as can be, from other runs (`reuse`): those that
    were made of the very same. A filter is never taken, nor what follows a stage that is not.

    The first process decides, once in a run's life and before anything trains; others wait for it.
    """
    root, note = place_to_look(run.config, run_dir), run_dir / NOTE
    if root is None:
        return
    if is_helper():
        while not note.exists():
            time.sleep(LOOK)
    if note.exists():
        return
    taken: dict[str, str] = {}
    source: str | Path | None = run.init_from
    for name, one in run.stages.items():
        handoff = run_dir / "handoff" / name
        if not handoff.exists():
            place = _take(one, run, run_dir, root, source, build) if isinstance(one, StageSettings) else None
            if place is None:
                break
            taken[name] = str(place)
        source = handoff
    write_json(note, taken)
    if taken and (run.config.get("callbacks") or {}).get("report"):
        write_report(run_dir)


def _take(
    settings: StageSettings, run: RunSettings, run_dir: Path, root: Path, source: str | Path | None, build: Build
) -> Path | None:
    """Take a stage from a run below `root`, and say so; the run, or None where there is none."""
    name, nearest = settings.name, None
    files = sorted(_key_files(root, name, run_dir), key=lambda file: file.stat().st_mtime, reverse=True)
    pieces = pieces_of(settings, run.config, source, build) if files else {}
    if UNKNOWN in pieces:
        _say(f"{name}: trains, for it cannot be compared with finished stages: {pieces[UNKNOWN]}")
        return None
    for file in files:
        if (key := read_key(file)) is None:
            continue
        place = file.parents[2]
        if other := differing(key["made_of"], pieces):
            nearest = min(filter(None, (nearest, (other, place))), key=lambda one: len(one[0]))
            continue
        try:
            _copy(name, key, place, run_dir)
        except (OSError, ValueError) as error:
            _say(f"{name}: not taken from {place}: {error}")
            continue
        _say(f"{name}: taken from {place}, which has trained it from the same start with the same settings, data and code")
        return place
    if nearest is not None:
        other, place = nearest
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        _say(f"{name}: trains, for the nearest finished one, in {place}, differs: {'; '.join(other[:SHOWN])}{more}")
    elif run.config["reuse"] != SWEEP:
        _say(f"{name}: trains, for no run in {root} has finished a stage of this name that can be compared")
    return None


def _say(line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)


def _key_files(root: Path, name: str, but: Path) -> Iterator[Path]:
    """What finished stages of a name have left, of all runs below a folder but one."""
    for place, folders, files in os.walk(root):
        folders[:] = [] if RUN_CONFIG in files else [folder for folder in folders if not folder.startswith(".")]
        key = Path(place, "handoff", name, KEY)
        if RUN_CONFIG in files and key.is_file() and Path(place).resolve() != but.resolve():
            yield key


def differing(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """How two stages differ, a phrase for each piece."""
    names = [name for name in dict.fromkeys((*there, *here)) if _text(there, name) != _text(here, name)]
    return [_told(name, _text(there, name), _text(here, name)) for name in names]


def _text(pieces: dict[str, Any], name: str) -> str:
    """A value as text, in which 1, 1.0 and true are three."""
    return json.dumps(pieces[name], sort_keys=True, ensure_ascii=False) if name in pieces else "not set"


def _told(name: str, there: str, here: str) -> str:
    if name.startswith(("the code", "the weights", "the files", "the content")):
        return f"{name} {'are' if name.startswith(('the weights', 'the files')) else 'is'} another"
    return f"{name} is {there:.{WIDTH}} there, {here:.{WIDTH}} here"


def _copy(name: str, key: dict[str, Any], place: Path, run_dir: Path) -> None:
    """Copy all that a run has of a stage. Its weights come last, because they mark it as finished.

    Raises:
        ValueError: if they are damaged, or their base is not the same here.
        OSError: if something has gone meanwhile, or cannot be written.
    """
    with atomic_folder(run_dir / "handoff" / name) as draft:
        _copy_folder(place / "handoff" / name, draft)
        if state_beside(draft) != key["beside"]:
            raise ValueError("its hand-off is damaged")
        check_whole(draft)
        for folder in BESIDE:
            remove(run_dir / folder / name)  # what an earlier process may have left
            if (own := place / folder / name).is_dir():
                _copy_folder(own, run_dir / folder / name)
        for file, row in key["rows"].items():
            if row is not None:
                write_json(run_dir / file, read_json(run_dir / file, {}) | {name: row})


def _copy_folder(source: Path, target: Path) -> None:
    left_out = shutil.ignore_patterns(f".*{DRAFT}")
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=left_out, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    """Weights are never written to where they stand, so two runs may have one copy of them."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return target
        except OSError:  # another disk, or one without links
            pass
    return shutil.copy2(source, target)
