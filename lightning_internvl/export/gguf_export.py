"""A finished run as GGUF files: the folder that transformers reads is written and checked first,
beside the files, and removed."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from lightning_internvl.export.gguf_files import write_gguf
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.export.write import export
from lightning_internvl.files import DRAFT, remove_drafts
from lightning_internvl.inference.load_run import LoadedRun


def export_gguf(opened: LoadedRun, to: Path, options: ExportOptions) -> ExportReport:
    """Write FILE.gguf and mmproj-FILE.gguf beside it.

    Raises:
        ValueError: as `export`; for a model that llama.cpp does not have, with what it has; if a
            tensor is read back otherwise.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(to)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}.", suffix=DRAFT, dir=to.parent) as place:
        folder = Path(place) / to.stem
        report = export(opened, folder, dataclasses.replace(options, gguf=True))
        files, notes = write_gguf(folder, to, options)
    return dataclasses.replace(report, files=files, notes=[*report.notes, *notes])
