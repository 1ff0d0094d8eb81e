"""Everything that is logged, one JSON object a line."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_internvl.files import append_text, whole_lines, write_text


class HistoryLogger(Logger):
    """Writes `history.jsonl`; the report and any other tool read it.

    Args:
        path: the file.
        start_step: lines of this step and later ones are dropped first, so that a resumed run
            writes no step twice.
    """

    def __init__(self, path: str, start_step: int = 0) -> None:
        super().__init__()
        self.path, self.start_step, self.begun = Path(path), start_step, 0.0
        self.earlier_seconds = 0.0

    name = "history"
    version = ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file, ready to be appended to."""
        if not self.begun:
            self.begun = time.monotonic()
            kept = [line for line in whole_lines(self.path) if json.loads(line)["step"] < self.start_step]
            self.earlier_seconds = json.loads(kept[-1])["seconds"] if kept else 0.0
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        return self.path

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        path = self.experiment
        seconds = round(self.earlier_seconds + time.monotonic() - self.begun, 3)
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        append_text(path, json.dumps({"step": step, "seconds": seconds, **values}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The resolved configuration is a file of its own in the run folder."""
