"""Hand-off: the weights with which one stage ends are those with which the next one starts.

A folder holds one safetensors file a part and `manifest.json` (stage, step, configuration of the
parts, hash and origin of each file). It is written beside its place and renamed when whole, so a
folder that exists is a stage that finished.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_internvl.config.part_values import manifest_faults
from lightning_internvl.config.trust import FETCHING, foreign_targets, trusting, without_notes
from lightning_internvl.distributed.collectives import full_tensor
from lightning_internvl.files import atomic_folder, sha256_of
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import first_of
from lightning_internvl.model.compose import check_trusted
from lightning_internvl.model.vlm import PARTS, VLM
from lightning_internvl.stages.base import BaseWeights
from lightning_internvl.stages.freezing import FreezePlan

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZERS = "tokenizers"
SAVED = "lightning_internvl.data.tokenizer.saved_tokenizer"


def save(
    model: VLM,
    folder: Path,
    *,
    stage: str,
    step: int,
    config: Mapping[str, Any],
    plan: FreezePlan,
    tokenizers: Mapping[str, Any] | None = None,
    base: BaseWeights | None = None,
) -> None:
    """Write the hand-off folder of a finished stage, all or nothing; an older one is replaced.

    Args:
        config: of the parts; what it reads elsewhere (a language model, tokenizers) is put into the
            folder instead.
        base: what is not written again but read there: the folder of a stage with adapters is
            small.
    """
    parts: dict[str, Any] = {}
    trained: list[str] = []
    with atomic_folder(folder, replace=True) as draft:
        for part, own in saved_tensors(model, base).items():
            names = [name for name in own if plan.ever_trains(name)]
            trained += names
            if not own:
                continue
            tensors = {name: full_tensor(tensor).cpu().contiguous() for name, tensor in own.items()}
            file = draft / f"{part}.safetensors"
            save_file(tensors, file, metadata={"format": "pt"})
            parts[part] = {
                "parameters": sum(tensor.numel() for tensor in tensors.values()),
                "sha256": sha256_of(file),
                "origin": "trained" if names else "inherited",
            }
        manifest: dict[str, Any] = {"format": FORMAT, "stage": stage, "step": step}
        manifest |= {"parts": parts, "trained": trained}
        manifest["config"] = manifest_config(model, config, tokenizers or ())
        for part, tokenizer in (tokenizers or {}).items():
            if manifest["config"][part].get("tokenizer") == {"_target_": SAVED}:
                tokenizer.save_pretrained(draft / TOKENIZERS / part)
        if base:
            manifest["base"] = _base_entry(base, folder)
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (draft / MANIFEST).write_text(text, encoding="utf-8")


def gather_for_save(model: VLM, base: BaseWeights | None) -> None:
    """What the other processes do while the first one saves weights that are divided among all:
    each tensor is gathered, one at a time, in the order in which it is written."""
    for tensors in saved_tensors(model, base).values():
        for tensor in tensors.values():
            full_tensor(tensor)


def saved_tensors(model: VLM, base: BaseWeights | None) -> dict[str, dict[str, Tensor]]:
    """The tensors that are saved, by part and name, in the order in which they are."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in own_tensors(model, without=base.names if base else ()).items():
        parts[name.partition(".")[0]][name] = tensor
    return parts


def restore(model: VLM, folder: Path) -> None:
    """Put the weights that a stage has saved itself back into its model. Where they are divided
    among processes, all of them take part."""
    own = own_tensors(model)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            here = own[name]
            tensor = tensor.to(here.device, here.dtype)
            if isinstance(here, DTensor):
                tensor = distribute_tensor(tensor, here.device_mesh, here.placements)
            here.copy_(tensor)


def manifest_config(
    model: VLM,
    config: Mapping[str, Any],
    tokenizers: Iterable[str] = ("middleware", "decoder"),
) -> dict[str, Any]:
    """The configuration of the parts in a manifest, which names nothing that is read elsewhere.

    Args:
        tokenizers: the parts whose tokenizers are kept in the folder, where they were read
            elsewhere.

    Raises:
        ValueError: if a reader would refuse it although all that `config` names is trusted.
    """
    known = copy.deepcopy(dict(config))
    for part in ("encoder", "middleware", "decoder"):
        own = known.get(part) or {}
        if read := [key for key in FETCHING if own.get(key)]:
            # All their weights are in the folder.
            unset = {} if _is_foreign(own) else dict.fromkeys(read)
            known[part] = own | unset | getattr(getattr(model, part), "without_source", {})
        if part in tokenizers and {"pretrained", "folder"} & set(own.get("tokenizer") or {}):
            known[part]["tokenizer"] = {"_target_": SAVED}
    known = without_notes(known)
    with trusting(foreign_targets(config)):
        check_trusted(known)
    return known


def _is_foreign(part: Mapping[str, Any]) -> bool:
    """Whether a part is one of the user's own, whose settings have meanings of their own."""
    return bool(foreign_targets({"_target_": part.get("_target_")}))


def _base_entry(base: BaseWeights, folder: Path) -> dict[str, Any]:
    """A base in a manifest; a folder also as seen from the hand-off: both may move together."""
    place, entry = Path(base.place), {"place": base.place}
    if place.exists():
        entry["place"] = str(place.resolve())
        entry["beside"] = os.path.relpath(place.resolve(), folder.resolve())
    parts = {part: dict(one) | {"place": _resolved(one["place"])} for part, one in base.parts.items()}
    return {**entry, "fingerprint": base.fingerprint, **({"parts": parts} if parts else {}), "names": sorted(base.names)}


def _resolved(place: str) -> str:
    return str(Path(place).resolve()) if Path(place).exists() else place


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a hand-off folder; raises ValueError if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is no hand-off folder: it holds no {MANIFEST}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of format {FORMAT}, which this version reads")
    parts, config = manifest.get("parts"), manifest.get("config")
    entries = parts.values() if isinstance(parts, dict) and set(parts) <= set(PARTS) else [None]
    hashed = all(isinstance(entry, dict) and "sha256" in entry for entry in entries)
    if not isinstance(config, dict) or not hashed:
        needs = f"`config`, and `parts` with a sha256 for some of {', '.join(PARTS)}"
        raise ValueError(f"{path} is damaged: it needs {needs}")
    if faults := list(manifest_faults(manifest)):
        raise ValueError(f"{path} is damaged: {first_of(faults)}")
    return manifest
