"""What a finished stage leaves beside its weights, so that other runs may take it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_internvl.choices import SWEEP, Config
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.config.sweep import JOBS
from lightning_internvl.data.bad_samples import TOO_SLOW
from lightning_internvl.files import content_of, read_json, write_json
from lightning_internvl.launch import is_helper
from lightning_internvl.messages import hidden
from lightning_internvl.model.compose import Build
from lightning_internvl.reuse.key import Pieces, made_of

FORMAT = 1
KEY = "stage_key.json"
ROWS = ("metrics.json", "timing.json")  # of a run, with an entry for each stage
UNKNOWN = "unknown"  # in place of pieces: why they cannot be told


@contextmanager
def keyed(settings: StageSettings, config: Config, run_dir: Path, source: str | Path | None, build: Build) -> Iterator[None]:
    """Note what the stage that trains inside is made of: at its start in the folder of its report,
    and at its end with its weights, if it is still the same. So a stage that has gone on with other
    code, data or hardware is never taken for one that has trained with these alone.
    """
    if is_helper():
        yield
        return
    begun = run_dir / "stages" / settings.name / KEY
    asked = place_to_look(config, run_dir) is not None
    if not (run_dir / "checkpoints" / settings.name / "last.ckpt").exists():
        write_json(begun, pieces_of(settings, config, source, build, asked=asked))
    yield
    pieces = pieces_of(settings, config, source, build, asked=asked)
    if UNKNOWN not in pieces and read_json(begun) == pieces and not _is_slow(begun.parent):
        handoff = run_dir / "handoff" / settings.name
        rows = {name: read_json(run_dir / name, {}).get(settings.name) for name in ROWS}
        write_json(handoff / KEY, {"format": FORMAT, "made_of": pieces, "rows": rows, "beside": state_beside(handoff)})


def pieces_of(settings: StageSettings, config: Config, source: str | Path | None, build: Build, *, asked: bool = True) -> Pieces:
    """What a stage is made of, or why that cannot be told; what is wrong with it, it says itself when
    it is built."""
    try:
        return made_of(settings, config, source, build, asked=asked)
    except (ValueError, OSError) as error:
        return {UNKNOWN: hidden(str(error))}


def place_to_look(config: Config, run_dir: Path) -> Path | None:
    """The folder below which runs are looked for; None for nowhere."""
    reuse = config.get("reuse")  # runs from before it have none
    if reuse == SWEEP:
        return next((folder for folder in run_dir.absolute().parents[:3] if (folder / JOBS).is_dir()), None)
    return Path(config["paths"]["root"] if reuse is True else reuse) if reuse else None


def state_beside(handoff: Path) -> dict[str, str]:
    """The contents of a hand-off's files, but for weights, which its manifest has."""
    files = [file for file in sorted(handoff.rglob("*")) if file.is_file() and file.suffix != ".safetensors"]
    return {str(file.relative_to(handoff)): content_of(file) for file in files if file.name != KEY}


def read_key(file: Path) -> dict[str, Any] | None:
    """What a finished stage has left; None where that is damaged or of another version."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(found, dict) and found.get("format") == FORMAT
    whole = known and all(isinstance(found.get(name), dict) for name in ("made_of", "rows", "beside"))
    return found if whole else None


def _is_slow(folder: Path) -> bool:
    """Whether a sample was left out that another machine, or another hour, would have read in time."""
    lines = (line for file in folder.glob("skipped*.jsonl") for line in file.read_text(encoding="utf-8").splitlines())
    return any(json.loads(line).get("kind") == TOO_SLOW for line in lines)
