"""Brings the report up to date when a stage has ended."""

from __future__ import annotations

import lightning as L

from lightning_internvl.report import write_report
from lightning_internvl.stages import Stage


class Report(L.Callback):
    """Writes `report.html` from the files of the run folder."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        if trainer.is_global_zero:
            write_report(pl_module.run_dir)
