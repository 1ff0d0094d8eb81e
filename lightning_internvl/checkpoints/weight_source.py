"""Where weights come from: a run, a hand-off folder, an official checkpoint, or a hub id."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_internvl.checkpoints.handoff import MANIFEST, read_manifest
from lightning_internvl.checkpoints.load_report import lines_of_names
from lightning_internvl.checkpoints.official import official_model
from lightning_internvl.config.consent import giving_parts
from lightning_internvl.config.trust import check_base
from lightning_internvl.files import RUN_CONFIG, content_of, parsed_yaml, sha256_of
from lightning_internvl.hub import local_folder
from lightning_internvl.layers import peft
from lightning_internvl.layers.state_dict import own_tensors

SAMPLES, SAMPLE_BYTES = 64, 16384  # of a weight file, for its fingerprint


class SourceWeights(NamedTuple):
    """Tensors under our names, and the settings of the adapters among them by part."""

    tensors: Mapping[str, Tensor]
    peft: Mapping[str, Any]

    def for_model(self, settings: Mapping[str, Any] | None) -> Mapping[str, Tensor]:
        """The tensors for a model with these adapters; other updates join their weights."""
        return peft.merged_tensors(self.tensors, peft.differing(self.peft, settings))


def read_weights(place: str | Path, device: torch.device | str = "cpu") -> SourceWeights:
    """What a run (its last hand-off), a hand-off folder, or an official checkpoint holds.

    Args:
        device: where it is put; on the meta device it has no values.

    Raises:
        ValueError: if there is nothing to read, or it is damaged.
    """
    if is_run_or_handoff(folder := Path(place)):
        tensors, manifest = read_handoff(handoff_of(folder))
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return SourceWeights(tensors, manifest["config"].get("peft") or {})
    model = official_model(local_folder(place), None, torch.device(device))
    return SourceWeights(own_tensors(model), {})


def is_run_or_handoff(folder: Path) -> bool:
    """Whether a folder is a run or a hand-off."""
    return (folder / MANIFEST).exists() or (folder / RUN_CONFIG).exists()


def handoff_of(place: Path) -> Path:
    """A hand-off folder, or the last one of a run; raises ValueError as `handoffs_of`."""
    return handoffs_of(place)[-1]


def handoffs_of(place: Path) -> list[Path]:
    """A hand-off folder itself, or those of the finished stages of a run, in their order.

    Raises:
        ValueError: if this is neither, or no stage has finished.
    """
    if (place / MANIFEST).is_file():
        return [place]
    if not (place / RUN_CONFIG).is_file():
        raise ValueError(f"{place} is neither a run ({RUN_CONFIG}) nor a hand-off folder ({MANIFEST})")
    pipeline = parsed_yaml((place / RUN_CONFIG).read_text(encoding="utf-8"))["pipeline"]
    finished = [stage for stage in pipeline if (place / "handoff" / stage / MANIFEST).is_file()]
    if not finished:
        raise ValueError(f"{place}: no stage of this run has finished; use resume={place} to go on with it")
    return [place / "handoff" / stage for stage in finished]


def fingerprint(place: str | Path) -> str:
    """What tells one set of weights from another: a hand-off's manifest, which holds their hashes;
    of other weight files their sizes and samples of their bytes, which takes no time however large
    they are; a hub id itself."""
    folder, digest = Path(place), hashlib.sha256()
    if is_run_or_handoff(folder):
        return hashlib.sha256((handoff_of(folder) / MANIFEST).read_bytes()).hexdigest()
    if not folder.exists():
        return f"id:{place}"
    files = [folder]
    if folder.is_dir():
        files = sorted(file for kind in ("*.safetensors", "*.bin", "*.pth") for file in folder.glob(kind))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for i in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * i // max(1, SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def state_of_weights(place: str | Path | None, most: float = math.inf) -> Any:
    """What changes when a byte of weights does, or of what is read with them: of a hand-off the hashes
    in its manifest, to which it is held when it is read, with its adapters' settings and its base;
    of other places all that their files hold. Plain values.

    Raises:
        ValueError: as `read_manifest` and `local_folder`; `UnknownState` where more than `most` bytes
            of another place would be read.
    """
    if place is None:
        return None
    if not is_run_or_handoff(Path(place)):
        return content_of(local_folder(place), most)
    manifest = read_manifest(folder := handoff_of(Path(place)))
    found: dict[str, Any] = {part: entry["sha256"] for part, entry in manifest["parts"].items()}
    found |= {kind: manifest["config"].get(kind) for kind in ("peft", "quantization") if manifest["config"].get(kind)}
    if base := manifest.get("base"):
        parts = {part: state_of_weights(entry["place"], most) for part, entry in (base.get("parts") or {}).items()}
        found["base"] = [state_of_weights(_base_place(base, folder), most), base["names"], parts]
    return found


def check_whole(folder: Path) -> None:
    """Check that a hand-off folder holds what its manifest says, and its base too; no tensor is
    loaded.

    Raises:
        ValueError: as `read_handoff`.
    """
    manifest = read_manifest(folder)
    for part, entry in manifest["parts"].items():
        _check_file(folder / f"{part}.safetensors", entry)
    if "base" in manifest:
        _checked_base(manifest, folder)


def _check_file(file: Path, entry: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is missing, although {MANIFEST} names it")
    if sha256_of(file) != entry["sha256"]:
        fault = f"its contents are not those that {MANIFEST} describes"
        raise ValueError(f"{file} is damaged: {fault}; take another hand-off")


def _base_place(base: Mapping[str, Any], folder: Path) -> str:
    """Where the base of a hand-off lies: beside it, if both have moved together."""
    beside = folder / base["beside"] if "beside" in base else None
    return str(beside.resolve()) if beside is not None and beside.exists() else base["place"]


def _checked_base(manifest: Mapping[str, Any], folder: Path) -> str:
    """The place of the base of a hand-off.

    Raises:
        ValueError: if it has gone or is another one by now, or parts that it names are.
    """
    check_base(manifest, folder)
    base = manifest["base"]
    place = _base_place(base, folder)
    if "beside" in base and not Path(place).exists():
        gone = f"holds adapters only, and their base {place} has gone"
        raise ValueError(f"{folder} {gone}; put it back, or move both together")
    if fingerprint(place) != base["fingerprint"]:
        other = f"adapters for another base than what {place} holds now"
        raise ValueError(f"{folder} holds {other}; they cannot be put together")
    for part, entry in (base.get("parts") or {}).items():
        if fingerprint(entry["place"]) != entry["fingerprint"]:
            fault = f"{entry['place']}, the {part} of the base of {folder}, has gone or holds other weights now"
            raise ValueError(f"{fault}; put it back")
    return place


def _from_base(manifest: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors that a hand-off leaves at its base; raises ValueError for those of `_checked_base`,
    and if it lacks one of them."""
    place, base = _checked_base(manifest, folder), manifest["base"]
    with giving_parts({part: entry["place"] for part, entry in (base.get("parts") or {}).items()}):
        tensors = read_weights(place).for_model(manifest["config"].get("peft"))
    if lost := [name for name in base["names"] if name not in tensors]:
        raise ValueError(f"{place}, the base of {folder}, lacks {lines_of_names(lost)}")
    return {name: tensors[name] for name in base["names"]}


def read_handoff(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a hand-off folder, with those of its base, and its manifest.

    Raises:
        ValueError: if the manifest, a file or the base is missing, damaged, or not the one
            described.
    """
    manifest = read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    for part, entry in manifest["parts"].items():
        file = folder / f"{part}.safetensors"
        _check_file(file, entry)
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if "base" in manifest:
        tensors |= _from_base(manifest, folder)
    return tensors, manifest
