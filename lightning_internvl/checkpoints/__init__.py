"""Weights on disk: hand-offs between stages, and the layouts of the original libraries."""

from __future__ import annotations

from pathlib import Path

from lightning_internvl.model.vlm import VLM


def _write(model: VLM, path: str | Path, *, layout: str | None = None) -> None:
    from lightning_internvl.checkpoints.pretrained import save_pretrained  # imports this package

    save_pretrained(model, path, layout=layout)


VLM.writer = _write
