"""Hand-off: the weights with which one stage ends are those with which the next one starts.

A folder holds one safetensors file a part and `manifest.json` (stage, step, configuration of the parts, hash and origin of each
file). It is written beside its place and renamed when whole, so a folder that exists is a stage that finished.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_internvl.checkpoints.files import own_tensors, write_folder
from lightning_internvl.compose import check_trusted, compose_model, trusted_build
from lightning_internvl.distributed import whole
from lightning_internvl.files import from_aside, into_place
from lightning_internvl.freezing import FreezePlan, matches
from lightning_internvl.layers import resize_positions
from lightning_internvl.model import PARTS, VLM
from lightning_internvl.peft import is_update, start_magnitudes
from lightning_internvl.quantization import quantize
from lightning_internvl.roles import all_names, model_roles
from lightning_internvl.trust import FETCHING, check_base, check_parts, packages_of, trusting, without_notes

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZERS = "tokenizers"
SAVED = "lightning_internvl.data.tokenizer.saved_tokenizer"


class Base(NamedTuple):
    """Where the weights lie that a stage with adapters took over and left as they were.

    Attributes:
        place: a run's hand-off, an official checkpoint, or a hub id.
        names: the tensors that are the same there.
    """

    place: str
    names: frozenset[str]


def save(
    model: VLM,
    folder: Path,
    *,
    stage: str,
    step: int,
    config: Mapping[str, Any],
    plan: FreezePlan,
    tokenizers: Mapping[str, Any] | None = None,
    base: Base | None = None,
) -> None:
    """Write the hand-off folder of a finished stage, all or nothing; an older one is replaced.

    Args:
        config: of the parts; what it reads elsewhere (a language model, tokenizers) is put into the folder instead.
        base: what is not written again but read there: the folder of a stage with adapters is small.
    """
    for pattern in (f".{folder.name}.*.partial", f"..{folder.name}.*.partial"):
        for left in folder.parent.glob(pattern):  # of a process that was killed
            shutil.rmtree(left)

    def write(draft: Path) -> None:
        parts: dict[str, Any] = {}
        own = written(model, base)
        for part, names in own.items():
            tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in names.items()}
            if tensors:
                save_file(tensors, draft / f"{part}.safetensors", metadata={"format": "pt"})
                parts[part] = {
                    "parameters": sum(t.numel() for t in tensors.values()),
                    "sha256": _hash(draft / f"{part}.safetensors"),
                    "origin": "trained" if any(plan.ever_trains(n) for n in tensors) else "inherited",
                }
        known = standalone(model, config, tokenizers or {}, draft)
        trained = [name for names in own.values() for name in names if plan.ever_trains(name)]
        manifest = {"format": FORMAT, "stage": stage, "step": step, "parts": parts, "trained": trained, "config": known}
        if base:
            manifest["base"] = _describe(base, folder)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")

    from_aside(folder)  # as far as a process came that was killed
    if not folder.exists():
        write_folder(folder, write)
        return
    draft = folder.with_name(f".{folder.name}.draft.partial")
    write_folder(draft, write)
    into_place(draft, folder)  # the older one stays until the new one is whole


def take_part(model: VLM, base: Base | None) -> None:
    """What the other processes do while the first one saves weights that are divided among all: each tensor is gathered, one at
    a time, in the order in which it is written."""
    for names in written(model, base).values():
        for tensor in names.values():
            whole(tensor)


def written(model: VLM, base: Base | None) -> dict[str, dict[str, Tensor]]:
    """The tensors that are saved, by part and name, in the order in which they are."""
    own = own_tensors(model, without=base.names if base else ())
    return {part: {name: tensor for name, tensor in own.items() if name.startswith(f"{part}.")} for part in PARTS}


def standalone(model: VLM, config: Mapping[str, Any], tokenizers: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration of the parts without anything that is read elsewhere; such tokenizers are saved into `folder`."""
    known = described(model, config, tokenizers)
    for part in tokenizers:
        if known[part].get("tokenizer") == {"_target_": SAVED}:
            tokenizers[part].save_pretrained(folder / TOKENIZERS / part)
    return known


def described(model: VLM, config: Mapping[str, Any], tokenizers: Iterable[str] = ("middleware", "decoder")) -> dict[str, Any]:
    """What a manifest says of the parts, which needs nothing from elsewhere, and which the reader of manifests takes.

    Args:
        tokenizers: the parts whose tokenizers are kept in the folder, where they were read elsewhere.

    Raises:
        ValueError: if a reader would refuse it, packages that `config` itself names being trusted.
    """
    known = copy.deepcopy(dict(config))
    for part in ("encoder", "middleware", "decoder"):
        own = known.get(part) or {}
        if read := [key for key in FETCHING if own.get(key)]:
            ours = {} if _is_foreign(own) else dict.fromkeys(read)  # all their weights are in the folder
            known[part] = {**own, **ours, **getattr(getattr(model, part), "without_source", {})}
        if part in tokenizers and {"pretrained", "folder"} & set(own.get("tokenizer") or {}):
            known[part]["tokenizer"] = {"_target_": SAVED}
    known = without_notes(known)
    with trusting(packages_of(config)):
        check_trusted(known)
    return known


def _is_foreign(part: Mapping[str, Any]) -> bool:
    """Whether a part is one of the user's own, whose settings have meanings of their own."""
    return bool(packages_of({"_target_": part.get("_target_")}))


def _describe(base: Base, folder: Path) -> dict[str, Any]:
    """A base in a manifest; a folder is named as seen from the hand-off too, so that both may move together."""
    from lightning_internvl.checkpoints.origin import fingerprint

    place = Path(base.place)
    beside = {"beside": os.path.relpath(place.resolve(), folder.resolve())} if place.exists() else {}
    known = {"place": str(place.resolve()) if place.exists() else base.place, **beside}
    return {**known, "fingerprint": fingerprint(base.place), "names": sorted(base.names)}


def _from_base(manifest: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """The tensors that a hand-off leaves at its base.

    Raises:
        ValueError: if the base has gone, is another one by now, or lacks one of them.
    """
    from lightning_internvl.checkpoints.origin import fingerprint, read_origin

    check_base(manifest, folder)
    base = manifest["base"]
    beside = folder / base["beside"] if "beside" in base else None
    place = str(beside.resolve()) if beside is not None and beside.exists() else base["place"]
    if beside is not None and not Path(place).exists():
        raise ValueError(f"{folder} holds adapters only, and their base {place} has gone; put it back, or move both together")
    if fingerprint(place) != base["fingerprint"]:
        raise ValueError(f"{folder} holds adapters for another base than what {place} holds now; they cannot be put together")
    tensors = read_origin(place).for_model(manifest["config"].get("peft"))
    if lost := [name for name in base["names"] if name not in tensors]:
        raise ValueError(f"{place}, the base of {folder}, lacks {_some(lost)}")
    return {name: tensors[name] for name in base["names"]}


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a hand-off folder, with those of its base, and its manifest.

    Raises:
        ValueError: if the manifest or a file is missing, damaged, or not the one that the manifest describes; if its base is.
    """
    manifest = read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    for part, entry in manifest["parts"].items():
        file = folder / f"{part}.safetensors"
        if not file.is_file():
            raise ValueError(f"{file} is missing, although {MANIFEST} names it")
        if _hash(file) != entry["sha256"]:
            raise ValueError(f"{file} is damaged: its contents are not those that {MANIFEST} describes; take another hand-off")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if "base" in manifest:
        tensors |= _from_base(manifest, folder)
    return tensors, manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a hand-off folder; raises ValueError if it is missing or damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is no hand-off folder: it holds no {MANIFEST}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of format {FORMAT}, which this version reads")
    parts, config = manifest.get("parts"), manifest.get("config")
    entries = parts.values() if isinstance(parts, dict) and set(parts) <= set(PARTS) else [None]
    if not isinstance(config, dict) or not all(isinstance(entry, dict) and "sha256" in entry for entry in entries):
        raise ValueError(f"{path} is damaged: it needs `config`, and `parts` with a sha256 for some of {', '.join(PARTS)}")
    return manifest


def trusted_config(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the model in a manifest, in which the tokenizers that the folder holds now have their places.

    Raises:
        ValueError: if it names other code or weights elsewhere.
    """
    config = without_notes(manifest["config"])
    check_parts(config, folder)
    check_trusted(config)
    for part in ("middleware", "decoder"):
        if (saved := folder / TOKENIZERS / part).is_dir():
            config[part]["tokenizer"]["folder"] = str(saved.resolve())
    return config


def load(folder: Path) -> tuple[VLM, dict[str, Any], dict[str, Any]]:
    """The model of a hand-off folder in evaluation mode, built from the configuration in its manifest (parts of this package
    only), the tokenizers of its parts, and the manifest.

    Raises:
        ValueError: as `read`; if the configuration names other code or weights elsewhere; if tensors do not fit the model.
    """
    tensors, manifest = read(folder)
    config = trusted_config(folder, manifest)
    model, tokenizers = compose_model(config, trusted_build)
    LoadReport.of(model, tensors, source=str(folder), new=(), dropped=()).load(model, tensors)
    quantize(model, config.get("quantization"), keep=manifest.get("trained", ()))
    return model.eval(), tokenizers, manifest


def load_model(folder: str | Path) -> VLM:
    """The model of a hand-off folder alone; see `load`."""
    return load(Path(folder))[0]


@dataclass
class LoadReport:
    """What a stage takes over: names loaded, new (fresh weights) and dropped (in the source, not in this model).

    Position tables of another size are loaded resized, which is how a stage changes the resolution.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: VLM, tensors: Mapping[str, Tensor], *, source: str, new: Iterable[str], dropped: Iterable[str]
    ) -> LoadReport:
        """Compare a source with a model; both may be on the meta device.

        Args:
            source: what the tensors are called in messages.
            new, dropped: patterns or roles of names that may be missing in the source, and of those that may be left over.

        Raises:
            ValueError: for a tensor of another shape, or a name that is missing or left over and not declared so.
        """
        roles = model_roles(model)
        wanted, new, dropped = own_tensors(model), all_names(new, roles, "new"), all_names(dropped, roles, "dropped")
        loaded = [name for name in wanted if name in tensors]
        misfits = [name for name in loaded if tensors[name].shape != wanted[name].shape]
        resized = [name for name in misfits if _is_table(name, tensors[name], wanted[name])]
        wrong = [f"{n}: {tuple(tensors[n].shape)}, {tuple(wanted[n].shape)}" for n in misfits if n not in resized]
        if wrong:
            more = f"\n  ... and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(f"{source} has tensors of another shape (there, in this model):{_some(wrong[:8])}{more}")
        new_names, left_names = [n for n in wanted if n not in tensors], [n for n in tensors if n not in wanted]
        report = cls(source, loaded, new_names, left_names, resized)
        if missing := [n for n in report.new if not (is_update(n) or any(matches(n, p) for p in new))]:
            raise ValueError(f"{source} lacks names that the stage does not list under `new`:{_some(missing)}")
        if left := [n for n in report.dropped if not any(matches(n, p) for p in dropped)]:
            raise ValueError(f"{source} has names that the model lacks and the stage does not list under `dropped`:{_some(left)}")
        return report

    def load(self, model: VLM, tensors: Mapping[str, Tensor]) -> None:
        """Copy the loaded names into the model."""
        own = own_tensors(model)
        with torch.no_grad():
            for name in self.loaded:
                tensor = tensors[name]
                if name in self.resized:
                    tensor = resize_positions(tensor, round((own[name].shape[1] - 1) ** 0.5))
                own[name].copy_(tensor)
        start_magnitudes(model, self.new)

    def counts(self) -> dict[str, dict[str, int]]:
        """Tensors loaded, new and dropped by group (a part and the module right below it)."""
        kinds = {kind: Counter(map(_group, getattr(self, kind))) for kind in ("loaded", "new", "dropped")}
        groups = dict.fromkeys(_group(name) for name in [*self.loaded, *self.new, *self.dropped])
        return {group: {kind: count[group] for kind, count in kinds.items()} for group in groups}


def _is_table(name: str, there: Tensor, here: Tensor) -> bool:
    """Whether a tensor is a learned position table (1, 1 + grid * grid, D) that can be resized to another grid."""
    tables = there.ndim == here.ndim == 3 and there.shape[::2] == here.shape[::2]
    return (
        name.endswith("position_embedding")
        and tables
        and all(round((t.shape[1] - 1) ** 0.5) ** 2 == t.shape[1] - 1 for t in (there, here))
    )


def _some(names: list[str], limit: int = 8) -> str:
    """Names one a line; of many, how many lie in each group."""
    if len(names) > limit:
        groups = Counter(_group(name) for name in names)
        names = [f"{group} ({count} {'name' if count == 1 else 'names'})" for group, count in groups.items()]
    return "".join(f"\n  {name}" for name in names)


def _group(name: str) -> str:
    """A part and the module right below it."""
    return ".".join(name.split(".")[:2])


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
