"""Weight files of a folder in the Hugging Face layout, read and written one tensor at a time."""

from __future__ import annotations

import json
import pickle
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
Shape = tuple[int, ...]


class WeightFiles:
    """The tensors of a folder. Safetensors are preferred; pickles are read with `weights_only=True`.

    Attributes:
        shapes: every tensor's name and shape.

    Raises:
        ValueError: for a folder without weights, a shard that is not there, or a name that two shards hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self.shapes: dict[str, Shape] = {}
        for file in self.files:
            shapes = _shapes(file)
            if twice := sorted(shapes.keys() & self.shapes.keys()):
                raise ValueError(f"{file.name} repeats tensors of another file in {folder}: {listed(twice)}")
            self.shapes |= shapes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one after another; each owns its memory, so the file may go away afterwards."""
        for file in self.files:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dict
                        yield name, opened.get_tensor(name).clone()
            else:
                for name, tensor in _unpickled(file).items():
                    yield name, tensor.clone()


def _weight_files(folder: Path) -> list[Path]:
    for index, single in ((INDEX, SINGLE), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        if (folder / index).is_file():
            return _indexed(folder / index)
        if (folder / single).is_file():
            return [folder / single]
    if pickles := sorted(folder.glob("*.pth")):
        return pickles
    expected = f"{INDEX}, {SINGLE}, pytorch_model.bin.index.json, pytorch_model.bin or *.pth"
    raise ValueError(f"{folder} holds no weights: expected {expected}")


def _indexed(index: Path) -> list[Path]:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not beside it: {listed(missing)}")
    return [index.parent / name for name in names]


def _shapes(file: Path) -> dict[str, Shape]:
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in _unpickled(file).items()}
    with safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - not a dict


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # Only the zip format of PyTorch can be mapped into memory instead of being read whole.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is refused: it holds more than tensors, or is no PyTorch file ({error})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} should map names to tensors, but holds a {type(loaded).__name__}")
    if odd := [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{file} should map names to tensors; no tensor: {listed(odd)}")
    return loaded


def listed(items: Iterable[str], limit: int = 20) -> str:
    """At most `limit` items in one line, and how many there are."""
    items = list(items)
    more = f", ... ({len(items)} in all)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that appears at `path` complete or not at all.

    Raises:
        ValueError: if something other than an empty folder stands at `path`.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; nothing was written")
    # A sibling, because a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        write(partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or numbered shards and their index if there are more bytes than fit into one file."""
    shards = _shards(tensors, max_shard_bytes)
    weight_map: dict[str, Any] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: tensors[n].detach().cpu().contiguous() for n in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
