"""The contrastive losses of CLIP and SigLIP on several processes: value and gradients on each, before any averaging."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from contrast_process import work
from golden import Fixture
from processes import together
from torch import Tensor

SYSTEM = "losses of open_clip (ITC and SigLIP over several processes)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return fixture.config.get("model_type") == "clip_loss"


def run(fixture: Fixture) -> dict[str, Tensor]:
    names = sorted({name.split(".")[1] for name in fixture.outputs})
    worlds = fixture.config["worlds"]
    with tempfile.TemporaryDirectory() as folder:
        together(work, str(fixture.folder), folder, worlds, names, count=max(worlds))
        return {name: t for world in worlds for name, t in _joined(Path(folder), world).items()}


def _joined(folder: Path, world: int) -> dict[str, Tensor]:
    """What the ranks found, one after the other."""
    ranks = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return {name: torch.cat([found[name] for found in ranks]) for name in ranks[0]}
