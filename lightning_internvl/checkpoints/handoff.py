"""Hand-off: the weights with which one stage ends are those with which the next one starts.

A folder holds one safetensors file a part and `manifest.json` (stage, step, configuration of the parts, hash and origin of each
file). It is written beside its place and renamed when whole, so a folder that exists is a stage that finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_internvl.compose import compose_model, trusted_build
from lightning_internvl.freezing import FreezePlan, matches
from lightning_internvl.model import PARTS, VLM

FORMAT = 1
MANIFEST = "manifest.json"


def save(model: VLM, folder: Path, *, stage: str, step: int, config: Mapping[str, Any], plan: FreezePlan) -> None:
    """Write the hand-off folder of a finished stage, all or nothing."""
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    parts: dict[str, Any] = {}
    for part in PARTS:
        tensors = {n: t.detach().cpu().contiguous() for n, t in own_tensors(model).items() if n.startswith(f"{part}.")}
        if not tensors:
            continue
        save_file(tensors, draft / f"{part}.safetensors", metadata={"format": "pt"})
        parts[part] = {
            "parameters": sum(t.numel() for t in tensors.values()),
            "sha256": _hash(draft / f"{part}.safetensors"),
            "origin": "trained" if any(plan.ever_trains(n) for n in tensors) else "inherited",
        }
    manifest = {"format": FORMAT, "stage": stage, "step": step, "parts": parts, "config": config}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def own_tensors(model: VLM) -> dict[str, Tensor]:
    """The model's tensors by name; those that share memory (tied embeddings) once, under their first name."""
    first: dict[int, str] = {}
    state = model.state_dict()
    return {n: t for n, t in state.items() if t.numel() == 0 or first.setdefault(t.data_ptr(), n) == n}


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a hand-off folder and its manifest.

    Raises:
        ValueError: if the manifest or a file is missing, damaged, or not the one that the manifest describes.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no hand-off folder: it holds no {MANIFEST}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    tensors: dict[str, Tensor] = {}
    for part, entry in manifest["parts"].items():
        file = folder / f"{part}.safetensors"
        if not file.exists():
            raise ValueError(f"{file} is missing, although {MANIFEST} names it")
        if _hash(file) != entry["sha256"]:
            raise ValueError(f"{file} is damaged: its contents are not those that {MANIFEST} describes; take another hand-off")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return tensors, manifest


def load_model(folder: str | Path) -> VLM:
    """The model of a hand-off folder, built from the configuration in its manifest (parts of this package only)."""
    tensors, manifest = read(Path(folder))
    model, _ = compose_model(manifest["config"], trusted_build)
    LoadReport.of(model, tensors, source=str(folder), new=(), dropped=()).load(model, tensors)
    return model.eval()


@dataclass
class LoadReport:
    """What a stage takes over: names loaded, new (fresh weights) and dropped (in the source, not in this model)."""

    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: VLM, tensors: Mapping[str, Tensor], *, source: str, new: Iterable[str], dropped: Iterable[str]) -> LoadReport:
        """Compare a source with a model.

        Raises:
            ValueError: for a tensor of another shape, or a name that is missing or left over and not declared so by the stage.
        """
        wanted, new, dropped = own_tensors(model), list(new), list(dropped)
        shapes = [
            f"{n}: {tuple(tensors[n].shape)} in the source, {tuple(t.shape)} in the model"
            for n, t in wanted.items()
            if n in tensors and tensors[n].shape != t.shape
        ]
        if shapes:
            raise ValueError(f"{source} has tensors of another shape:\n" + _some(shapes))
        report = cls(
            source, [n for n in wanted if n in tensors], [n for n in wanted if n not in tensors], [n for n in tensors if n not in wanted]
        )
        missing = [n for n in report.new if not any(matches(n, p) for p in new)]
        if missing:
            raise ValueError(f"{source} lacks names that the stage does not list under `new`:\n{_some(missing)}")
        left = [n for n in report.dropped if not any(matches(n, p) for p in dropped)]
        if left:
            raise ValueError(f"{source} holds names that the model lacks and the stage does not list under `dropped`:\n{_some(left)}")
        return report

    def load(self, model: VLM, tensors: Mapping[str, Tensor]) -> None:
        """Copy the loaded names into the model."""
        own = own_tensors(model)
        with torch.no_grad():
            for name in self.loaded:
                own[name].copy_(tensors[name])

    def counts(self) -> dict[str, dict[str, int]]:
        """Tensors loaded, new and dropped by group (a part and the module right below it)."""
        groups: dict[str, dict[str, int]] = {}
        for kind in ("loaded", "new", "dropped"):
            for name in getattr(self, kind):
                row = groups.setdefault(".".join(name.split(".")[:2]), {"loaded": 0, "new": 0, "dropped": 0})
                row[kind] += 1
        return groups


def _some(lines: list[str], limit: int = 20) -> str:
    rest = f"\n  ... and {len(lines) - limit} more" if len(lines) > limit else ""
    return "\n".join(f"  {line}" for line in lines[:limit]) + rest


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
