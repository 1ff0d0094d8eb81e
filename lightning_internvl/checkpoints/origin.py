"""Where weights come from: a run, a hand-off folder, an official checkpoint, or a hub id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from lightning_internvl import peft
from lightning_internvl.checkpoints import handoff
from lightning_internvl.checkpoints.files import own_tensors
from lightning_internvl.files import RUN_CONFIG

SAMPLES, SAMPLE_BYTES = 64, 16384  # of a weight file, for its fingerprint


class Origin(NamedTuple):
    """Tensors under our names, and the settings of the adapters among them by part."""

    tensors: Mapping[str, Tensor]
    peft: Mapping[str, Any]

    def for_model(self, settings: Mapping[str, Any] | None) -> Mapping[str, Tensor]:
        """The tensors for a model with these adapters: updates of others are added to their weights."""
        return peft.merged_tensors(self.tensors, peft.differing(self.peft, settings))


def read_origin(place: str | Path, device: torch.device | str = "cpu") -> Origin:
    """What a run (its last hand-off), a hand-off folder, or an official checkpoint holds; on the meta device without values.

    Raises:
        ValueError: if there is nothing to read, or it is damaged.
    """
    if is_ours(folder := Path(place)):
        tensors, manifest = handoff.read(handoff_of(folder))
        return Origin({name: tensor.to(device) for name, tensor in tensors.items()}, manifest["config"].get("peft") or {})
    from lightning_internvl.checkpoints.pretrained import load_pretrained

    return Origin(own_tensors(load_pretrained(place, device=device)), {})


def is_ours(folder: Path) -> bool:
    """Whether a folder is a run or a hand-off."""
    return (folder / handoff.MANIFEST).exists() or (folder / RUN_CONFIG).exists()


def handoff_of(place: Path) -> Path:
    """A hand-off folder itself, or that of the last finished stage of a run; raises ValueError as `handoffs_of`."""
    return handoffs_of(place)[-1]


def handoffs_of(place: Path) -> list[Path]:
    """A hand-off folder itself, or those of the finished stages of a run, in their order.

    Raises:
        ValueError: if this is neither, or no stage has finished.
    """
    if (place / handoff.MANIFEST).is_file():
        return [place]
    if not (place / RUN_CONFIG).is_file():
        raise ValueError(f"{place} is neither a run ({RUN_CONFIG}) nor a hand-off folder ({handoff.MANIFEST})")
    pipeline = yaml.safe_load((place / RUN_CONFIG).read_text(encoding="utf-8"))["pipeline"]
    finished = [stage for stage in pipeline if (place / "handoff" / stage / handoff.MANIFEST).is_file()]
    if not finished:
        raise ValueError(f"{place}: no stage of this run has finished; use resume={place} to go on with it")
    return [place / "handoff" / stage for stage in finished]


def fingerprint(place: str | Path) -> str:
    """What tells one set of weights from another: a hand-off's manifest, which holds their hashes; of other weight files their
    sizes and samples of their bytes, which takes no time however large they are; a hub id itself."""
    folder, digest = Path(place), hashlib.sha256()
    if is_ours(folder):
        return hashlib.sha256((handoff_of(folder) / handoff.MANIFEST).read_bytes()).hexdigest()
    if not folder.exists():
        return f"id:{place}"
    kinds = ("*.safetensors", "*.bin", "*.pth")
    for file in [folder] if folder.is_file() else sorted(f for kind in kinds for f in folder.glob(kind)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * i // max(1, SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
