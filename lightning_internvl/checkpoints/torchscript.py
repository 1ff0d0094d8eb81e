"""The tensors of a TorchScript archive (`torch.jit.save`; OpenAI's CLIP files), read without running
the program in it.

Such a file is a zip: `code/` holds the program, which is not opened, `data.pkl` the modules with
their tensors, `data/` the bytes of these. The pickle may name the archive's own classes, which
become plain holders of attributes, and the few words that describe a tensor; all else is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

DATA = "/data.pkl"
PROGRAM = "/constants.pkl"  # no other file of PyTorch has it


class _Module:
    """A module of the program: what its pickle says of it, and nothing that runs."""

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


def _itself(values: Any, *_: Any) -> Any:
    return values


def is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith(PROGRAM) for name in archive.namelist())


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Tensors by their names in the program, in float32, in which OpenAI's loader runs them on a CPU
    (the files mix types).

    Raises:
        ValueError: for an archive that is damaged or holds more than modules and tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            data = next(name for name in archive.namelist() if name.endswith(DATA))
            with archive.open(data) as stream:
                root = _TensorUnpickler(stream, archive, data.removesuffix(DATA)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is refused: {error}") from error
    except (StopIteration, KeyError, EOFError, RuntimeError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged or no TorchScript archive of tensors: {error}") from error
    return {name: x.float() if x.is_floating_point() else x for name, x in _tensors("", root)}


def _tensors(prefix: str, node: Any) -> list[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        return [(prefix, node)]
    fields = node.fields.items() if isinstance(node, _Module) else ()
    return [found for key, value in fields for found in _tensors(f"{prefix}.{key}" if prefix else str(key), value)]


class _TensorUnpickler(pickle.Unpickler):
    """Makes modules, tensors and plain values; raises `UnpicklingError` for all else."""

    STORAGES: ClassVar[dict[str, torch.dtype]] = {
        "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
        "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
        "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    }  # fmt: skip
    VALUES = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")

    def __init__(self, stream: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream)
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few things that a pickle may name."""
        if module.split(".")[0] == "__torch__":
            return _Module
        known: dict[tuple[str, str], Callable[..., Any] | torch.dtype] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("collections", "OrderedDict"): OrderedDict,
            **{("torch", kind): dtype for kind, dtype in self.STORAGES.items()},
            **{("torch.jit._pickle", kind): _itself for kind in self.VALUES},
        }
        if (found := known.get((module, name))) is None:
            raise pickle.UnpicklingError(f"it holds more than modules and tensors ({module}.{name}), which is not opened")
        return found

    def persistent_load(self, pid: Any) -> Tensor:
        """The bytes of a storage as a flat tensor."""
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError(f"it describes a tensor in an unknown way ({pid!r})")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _rebuilt(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)
