"""Reading a run folder that may be half-written: missing is empty, damaged is listed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_internvl.files import parsed_yaml

TRACKED_CHANCE = "tracked_chance.json"  # in a stage's folder: chance levels by metric
USUAL_ORDER = ("contrastive", "generative", "supervised")


@dataclass(frozen=True)
class StageFiles:
    """One stage of a run. `start` counts the optimizer steps of the stages before it; all other
    steps are its own. A filter has a `summary` and no steps. `chance` is that of what is measured
    while it trains."""

    name: str
    start: int = 0
    steps: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    freezing: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    finished: bool = False
    summary: dict[str, Any] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    chance: dict[str, float] = field(default_factory=dict)
    taken_from: str = ""  # the run that has trained it

    @property
    def seconds(self) -> float:
        """Training and evaluation seconds; of an unfinished stage the last ones logged."""
        if self.timing:
            return self.timing.get("train_seconds", 0.0) + self.timing.get("eval_seconds", 0.0)
        return max((row.get("seconds", 0.0) for row in self.history), default=0.0)

    @property
    def last_rows(self) -> list[dict[str, Any]]:
        """The freezing rows in force at the end of the stage."""
        return self.freezing[-1]["rows"] if self.freezing else []


@dataclass(frozen=True)
class RunFiles:
    """All that a report shows. `damaged` names the files that exist and could not be read."""

    folder: str
    recipe: str
    stages: list[StageFiles]
    config_text: str
    config: dict[str, Any]
    damaged: list[str]

    @property
    def total_steps(self) -> int:
        return max((stage.start + stage.steps for stage in self.stages), default=0)


class _Reader:
    """Reads JSON below a run folder and remembers which files were damaged."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.damaged: list[str] = []

    def report(self, path: Path) -> None:
        self.damaged.append(str(path.relative_to(self.run_dir)))

    def json(self, path: Path, kind: type) -> Any:
        """The value in `path`, of type `kind`; empty if the file is missing or damaged."""
        if not path.is_file():
            return kind()
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            value = None
        if not isinstance(value, kind):
            self.report(path)
            return kind()
        return value

    def history(self, path: Path) -> list[dict[str, float]]:
        """Rows by step, the last one written for each: a resumed stage writes some steps again."""
        rows: dict[int, dict[str, float]] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            try:
                row = numbers(json.loads(line))
            except json.JSONDecodeError:
                # A kill in the middle of a write leaves its mark on the last line, and only there.
                if line is not lines[-1]:
                    self.report(path)
                continue
            if math.isfinite(row.get("step", math.nan)):
                step = int(row["step"])
                rows[step] = {**rows.get(step, {}), **row, "step": step}
        return [rows[step] for step in sorted(rows)]

    def config(self, path: Path) -> tuple[str, dict[str, Any]]:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        try:
            config = parsed_yaml(text)
        except yaml.YAMLError:
            self.report(path)
            config = {}
        return text, config if isinstance(config, dict) else {}

    def stage(self, name: str, start: int, metrics: dict[str, Any], timing: dict[str, Any], taken: Any = None) -> StageFiles:
        """What is on file of one stage; `start` is its first step on the axis of the whole run, `taken`
        the run that has trained it."""
        folder = self.run_dir / "stages" / name
        history = self.history(folder / "history.jsonl")
        freezing = [entry for entry in self.json(folder / "freezing.json", list) if _is_freezing(entry)]
        files = sorted((folder / "samples").glob("*.json"))
        samples = [sample for file in files if isinstance((sample := self.json(file, dict)).get("step"), int)]
        timing = numbers(timing)
        seen = [row["step"] for row in (*history, *samples, *freezing)] + [timing.get("steps", 0)]
        return StageFiles(
            name=name,
            start=start,
            steps=int(max(seen)),
            history=history,
            freezing=sorted(freezing, key=lambda entry: entry["step"]),
            samples=sorted(samples, key=lambda sample: sample["step"]),
            metrics=numbers(metrics),
            timing=timing,
            cases=[case for case in self.json(folder / "cases.json", list) if isinstance(case, dict)],
            chance=numbers(self.json(folder / TRACKED_CHANCE, dict)),
            summary=self.json(self.run_dir / name / "summary.json", dict),
            taken_from=taken if isinstance(taken, str) else "",
            finished=bool(timing) or (self.run_dir / "handoff" / name / "manifest.json").is_file(),
        )


def numbers(values: Any) -> dict[str, float]:
    """The numeric entries of a mapping; none of anything else."""
    if not isinstance(values, dict):
        return {}
    return {str(key): value for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def _is_freezing(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("rows"), list)):
        return False
    return all(isinstance(row, dict) for row in entry["rows"])


def _name(config: dict[str, Any], default: str) -> str:
    for key in ("recipe", "experiment", "name"):
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("name")
        if isinstance(value, str) and value:
            return value
    return default


def _stage_names(config: dict[str, Any], *found: list[str]) -> list[str]:
    """Every stage named anywhere, in the order of the pipeline, then of the files, each once."""
    pipeline = config.get("pipeline")
    planned = [str(name) for name in pipeline] if isinstance(pipeline, list) else []
    names = [name for names in found for name in names]
    usual = [name for name in USUAL_ORDER if name in names]
    return list(dict.fromkeys([*planned, *usual, *names]))


def read_run(run_dir: Path) -> RunFiles:
    """Read what there is of a run.

    Raises:
        NotADirectoryError: `run_dir` is no folder.
    """
    if not run_dir.is_dir():
        raise NotADirectoryError(f"No run folder at {run_dir}.")
    reader = _Reader(run_dir)
    config_text, config = reader.config(run_dir / "config.yaml")
    metrics = reader.json(run_dir / "metrics.json", dict)
    timing = reader.json(run_dir / "timing.json", dict)
    taken = reader.json(run_dir / "reused.json", dict)
    folders = sorted(path.name for path in (run_dir / "stages").glob("*") if path.is_dir())
    stages: list[StageFiles] = []
    for name in _stage_names(config, list(timing), list(metrics), folders):
        start = stages[-1].start + stages[-1].steps if stages else 0
        stages.append(reader.stage(name, start, metrics.get(name), timing.get(name), taken.get(name)))
    folder = run_dir.resolve().name
    return RunFiles(folder, _name(config, folder), stages, config_text, config, list(dict.fromkeys(reader.damaged)))
