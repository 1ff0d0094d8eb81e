"""`export.py`: open the run, write the folder, say what was checked."""

from __future__ import annotations

import torch

from lightning_internvl.console import console
from lightning_internvl.export.layout_choice import TEXTS
from lightning_internvl.export.proof import verify
from lightning_internvl.export.report import ExportOptions, ExportReport
from lightning_internvl.export.settings import ExportSettings
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_run import open_run
from lightning_internvl.layers.attention import choose_backend
from lightning_internvl.training.assembly import Build


def run_export(settings: ExportSettings, build: Build) -> ExportReport:
    """Export a run and print each check.

    Raises:
        ValueError: as `open_run` and `export`.
    """
    choose_backend("auto", "cpu", torch.float32)  # where and how it is read back and compared
    opened = open_run(settings.run, build)
    options = ExportOptions(
        layout=settings.layout,
        dtype=settings.dtype,
        max_shard_bytes=settings.max_shard_bytes,
        licence=settings.licence,
        licence_link=settings.licence_link,
        transformers4=settings.transformers4,
        readers=settings.readers,
    )
    if settings.adapter:
        from lightning_internvl.export.adapter import export_adapter

        report = export_adapter(opened, settings.to, options)
    elif settings.layout == TEXTS:
        from lightning_internvl.export.sentence_transformers import export_texts

        report = export_texts(opened, settings.to, options)
    elif settings.gguf:
        from lightning_internvl.export.gguf_export import export_gguf

        report = export_gguf(opened, settings.to, options)
    else:
        report = export(opened, settings.to, options)
    for line in lines_of(report, options):
        console.print(line, soft_wrap=True)
    console.print(f"{'exported':12} {settings.to}", soft_wrap=True)
    return report


def run_verify(settings: ExportSettings) -> None:
    """Check a folder that was exported, and print what is as it says.

    Raises:
        ValueError: as `verify`.
    """
    choose_backend("auto", "cpu", torch.float32)
    assert settings.verify is not None
    for line in verify(settings.verify, settings.base):
        console.print(line, soft_wrap=True)
    console.print(f"{'verified':12} {settings.verify}", soft_wrap=True)


def lines_of(report: ExportReport, options: ExportOptions) -> list[str]:
    """What was checked, one line each."""
    prompts = [f"{'logits':12} {name}: {value:.1e} of the largest" for name, value in report.logits.items()]
    skipped = [f"{'':12} {name}: this class takes no text without a picture" for name in report.skipped]
    weights = f"{'tensors':12} {report.tensors} found with their values, {report.trained} of them trained"
    if report.adapters:
        weights = f"{'adapters':12} on {report.adapters} layers, and {report.trained} tensors that were trained whole"
    lines = [
        f"{'layout':12} {report.layout}, {options.dtype}",
        f"{'read by':12} {report.loader}",
        weights,
        *prompts,
        *skipped,
    ]
    if report.writes:
        lines.append(f"{'greedy ids':12} equal for {len(report.logits)} prompts")
    if report.elsewhere:
        lines.append(f"{'also read by':12} {report.elsewhere}")
    if options.dtype != "float32":
        lines.append(f"{options.dtype:12} logits within {report.rounding:.1e} of those of the trained weights")
    lines += [f"{'processor':12} {report.processor}", *(f"{'gguf':12} {line}" for line in report.files)]
    lines += [f"{'rules':12} {line}" for line in report.rules]
    return [*lines, *(f"{'note':12} {note}" for note in report.notes)]
