"""The alignment report: one self-contained HTML page made from the files of a run folder."""

from lightning_internvl.report.write import write_report

__all__ = ["write_report"]
