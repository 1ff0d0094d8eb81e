"""Checkpoints, read without running anything that stands in them.

PyTorch describes the tensors of divided weights, a folder, in a pickle, `.metadata`, and its own reader calls
whatever that names. Here it may name what describes tensors, and nothing else; entries that are
pickles themselves are refused with it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lightning_internvl.files import from_aside

META = "meta.pt"  # in the folder of a checkpoint: all that is no tensor
_OF_TENSORS = ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
_PATHS = ("pathlib", "pathlib._local")  # by the version of Python that wrote it
KNOWN = {
    *((metadata.__name__, name) for name in (*_OF_TENSORS, "MetadataIndex", "StorageMeta")),
    (metadata.__name__, "_MEM_FORMAT_ENCODING"),
    (filesystem.__name__, "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in _PATHS for name in ("PosixPath", "WindowsPath")),
}


def checkpoint_step(path: Path) -> int | None:
    """The step of a stage's checkpoint, a file or a folder; None without one."""
    from_aside(path)
    return read_checkpoint(path)["global_step"] if path.exists() else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint but for what a folder holds of tensors; those of a file are read when they are
    used.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        file = path / META if path.is_dir() else path
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found["global_step"]  # is in all
        return found
    except Exception as error:
        fault = f"{path} is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{fault}; delete it to start the stage again") from error


class TensorReader(FileSystemReader):
    """PyTorch's reader of tensors.

    Raises:
        ValueError: for a description that names anything but tensors.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                found = _Unpickler(stream).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{file} is refused: {error}") from error
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or (module, name) in KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
