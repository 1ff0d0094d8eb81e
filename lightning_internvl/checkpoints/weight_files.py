"""Weight files of a folder in the Hugging Face layout, read and written one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_internvl.checkpoints.odd_files import AGAIN, check_pointer, damaged, type_name, what_instead
from lightning_internvl.checkpoints.torchscript import is_torchscript, read_torchscript
from lightning_internvl.distributed.checkpoint_writing import save
from lightning_internvl.files import atomic_file
from lightning_internvl.layers.config_values import SECTIONS, check_values
from lightning_internvl.messages import first_of

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
Shape = tuple[int, ...]
# keys under which trainers have put a whole state dict
WRAPPERS = ("module", "model", "state_dict", "model_state_dict")
# what wraps a model in training and stays in the names of its tensors
PREFIXES = ("module.", "_orig_mod.")
# pickles that stand without a config: of LAVIS, MiniGPT-4 and the first InternVL, of OpenFlamingo
BARE = ("*.pth", "checkpoint*.pt")
PROJECTOR = "mm_projector.bin"  # all that LLaVA's pretraining writes
KINDS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
SAME = 0.75  # of their names two sets of files share that hold one model; tied tables may differ
OPEN_CLIP = "open_clip_config.json"
OPEN_CLIP_KEY = "open_clip"  # under which a config has what that file says
SINGLES = (
    (INDEX, SINGLE),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ("open_clip_model.safetensors.index.json", "open_clip_model.safetensors"),
    ("open_clip_pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
)


class WeightFiles:
    """The tensors of a folder or of one file. Safetensors are preferred; pickles are read with
    `weights_only=True`.

    Attributes:
        files: that hold them.
        rivals: further files that a loader would take and that hold other tensors, a list a set.
        shapes: every tensor's name and shape; names without what all begin with because the model
            was wrapped in training.
        types: of the tensors, as safetensors names them.
        notes: words and numbers that stand in a pickle beside its state dict.

    Raises:
        ValueError: for a folder without weights, a shard that is missing or damaged, or a name that
            two shards hold.
    """

    def __init__(self, place: Path | list[Path]) -> None:
        files = [place] if isinstance(place, Path) and place.is_file() else place
        self.files, self.rivals = (files, []) if isinstance(files, list) else _weight_files(files)
        self.shapes: dict[str, Shape] = {}
        self.types: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        for file in self.files:
            shapes, types = _shapes(file, self.notes)
            if twice := sorted(shapes.keys() & self.shapes.keys()):
                raise ValueError(f"{file.name} repeats tensors of another file beside it: {first_of(twice, 20)}")
            self.shapes |= shapes
            self.types |= types
        self._prefix = ""
        while inner := next((p for p in PREFIXES if self.shapes and all(n.startswith(p) for n in self.shapes)), ""):
            self._prefix += inner
            self.shapes = {name.removeprefix(inner): shape for name, shape in self.shapes.items()}
            self.types = {name.removeprefix(inner): kind for name, kind in self.types.items()}

    def tensors(
        self,
        device: torch.device,
        dtype: torch.dtype | None = None,
        only: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one after another, on `device`; each owns its memory.

        Args:
            dtype: type of floating-point tensors; None keeps that of the file.
            only: names of those that are wanted; None wants all.
        """

        def own(tensor: Tensor) -> Tensor:
            # One copy out of the mapped file, straight into the type and the place that are wanted.
            return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)

        for file in self.files:
            for there, read in _entries(file):
                name = there.removeprefix(self._prefix)
                if only is None or name in only:
                    yield name, own(read())


def _entries(file: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names of a file's tensors, and what reads each."""
    if file.suffix != ".safetensors":
        for name, tensor in _read_pickle(file)[0].items():
            yield name, partial(torch.Tensor.detach, tensor)
        return
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            yield name, partial(opened.get_tensor, name)


def _weight_files(folder: Path) -> tuple[list[Path], list[list[Path]]]:
    """The files of a folder's weights, and those of further sets under names that are read too and
    that hold other tensors."""
    present = [(index, single) for index, single in SINGLES if (folder / index).is_file() or (folder / single).is_file()]
    if present:
        first = _set_of(folder, *present[0])
        rivals = [found for one in present[1:] if (found := _rival(folder, one, first))]
        return first, rivals
    if pickles := bare_files(folder):
        return pickles, []
    if (folder / PROJECTOR).is_file():
        return [folder / PROJECTOR], []
    if other := what_instead(folder):
        raise ValueError(f"{folder} holds {other}")
    expected = f"{INDEX}, {SINGLE}, pytorch_model.bin.index.json, pytorch_model.bin, {' or '.join(BARE)}"
    raise ValueError(f"{folder} holds no weights: expected {expected}")


def bare_files(folder: Path) -> list[Path]:
    """Pickles that need no config beside them, of the first kind that there is."""
    return next((found for kind in BARE if (found := sorted(folder.glob(kind)))), [])


def _set_of(folder: Path, index: str, single: str) -> list[Path]:
    return _files_of_index(folder / index) if (folder / index).is_file() else [folder / single]


def _rival(folder: Path, names: tuple[str, str], first: list[Path]) -> list[Path]:
    """The files of a further set, where it can be read and holds other tensors than the first."""
    try:
        files = _set_of(folder, *names)
        here, there = (set[str]().union(*(_shapes(file, {})[0] for file in one)) for one in (files, first))
    except ValueError:
        return []  # a download of one set leaves the index or pointers of the other
    return files if len(here & there) < SAME * len(here | there) else []


def spare_files(place: Path, taken: Collection[Path]) -> list[WeightFiles]:
    """The files of weights in a checkpoint's folder that are none of those `taken`, each alone; what
    is no state dict, as a trainer's own files, is left out."""
    folder, found = place if place.is_dir() else place.parent, []
    for file in sorted(file for kind in KINDS for file in folder.glob(kind) if file not in taken):
        with contextlib.suppress(ValueError):
            found.append(WeightFiles([file]))
    return found


def read_config(place: Path) -> dict[str, Any]:
    """`config.json` of a folder, or beside a file; where that is missing what `open_clip_config.json`
    says, under the key `open_clip`; empty for a bare file.

    Raises:
        ValueError: if a folder has none, if it is no JSON object, or for a value that no field of
            its name can have.
    """
    path, config = _read_config(place)
    if path is not None:
        check_values(config, f"{path}", ": ")
    return _without_open_sections(config)


def _without_open_sections(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose sections of null are left out, at any depth: they are those of its defaults."""
    kept = {name: value for name, value in config.items() if value is not None or name not in SECTIONS or "rope" in name}
    return {name: _without_open_sections(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _read_config(place: Path) -> tuple[Path | None, dict[str, Any]]:
    path = (place if place.is_dir() else place.parent) / "config.json"
    if not path.is_file() and (open_clip := path.with_name(OPEN_CLIP)).is_file():
        return open_clip, {OPEN_CLIP_KEY: _json_object(open_clip)}
    if not path.is_file() and (projector := path.with_name(PROJECTOR)).is_file():
        lacks = "is all that LLaVA's pretraining has trained, and lacks the config.json that it wrote beside it"
        raise ValueError(f"{projector} {lacks}; put that there (decoder.pretrained= then says where the language model lies)")
    if not path.is_file():
        if place.is_file() or bare_files(place):
            return None, {}
        if found := what_instead(place):
            raise ValueError(f"{place} holds {found}")
        files = "config.json (an official layout) nor manifest.json (a hand-off)"
        raise ValueError(f"{place} holds neither {files}")
    return path, _json_object(path)


def _json_object(path: Path) -> dict[str, Any]:
    check_pointer(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(found).__name__}")
    return found


def _files_of_index(index: Path) -> list[Path]:
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or any(not isinstance(x, str) for x in weight_map.values()):
        raise ValueError(f"{index} is damaged: it maps no tensors to files")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not beside it: {first_of(missing, 20)}; {AGAIN}")
    return [index.parent / name for name in names]


def _shapes(file: Path, notes: dict[str, Any]) -> tuple[dict[str, Shape], dict[str, str]]:
    check_pointer(file)
    if file.suffix != ".safetensors":
        tensors, beside = _read_pickle(file)
        notes |= beside
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return shapes, {name: type_name(tensor.dtype) for name, tensor in tensors.items()}
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            slices = {name: opened.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            return shapes, {name: part.get_dtype() for name, part in slices.items()}
    except SafetensorError as error:
        raise damaged(file, error) from error


def _read_pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that is not safetensors, and words and numbers beside them."""
    if is_torchscript(file):
        return read_torchscript(file), {}
    notes: dict[str, Any] = {}
    try:
        # Only the zip format of PyTorch can be mapped into memory instead of being read whole.
        mapped = zipfile.is_zipfile(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        advice = "save its weights as safetensors"
        raise ValueError(f"{file} is refused: it holds more than tensors{what}, or is no PyTorch file; {advice}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise damaged(file, error) from error
    if isinstance(loaded, dict):
        wrapped = [loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if wrapped:
            notes = {key: value for key, value in loaded.items() if isinstance(value, str | int | float)}
            loaded = wrapped[0]
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} should map names to tensors, but holds a {type(loaded).__name__}")
    if odd := [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{file} should map names to tensors; no tensor: {first_of(odd, 20)}")
    return loaded, notes


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one .pth file, complete or not at all.

    Raises:
        ValueError: if something stands at `path`.
    """
    if path.exists():
        raise ValueError(f"{path} exists; nothing was written")
    with atomic_file(path) as draft:
        save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, draft)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or numbered shards and their index if one file cannot hold all."""
    # The library counts and groups storages; of tensors that share one, each is written whole here.
    sizes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
