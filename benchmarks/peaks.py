"""The most memory that a piece of work takes beside what was there before it, and what a forward pass leaves alive."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 2**20
MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Alive(TorchDispatchMode):
    """Notes the storages that are made, to count the bytes of those that something still holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:  # of which some operations give views
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        """Bytes of the storages that were made and are still there."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def peak(make: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu") -> float:
    """MiB of `make(*arguments)()` at its peak, less what stood when `make` was through.

    On a CPU the resident memory of a process of its own (Linux with glibc), in which nothing that was freed can be used again.
    """
    if device == "cuda":
        return _on_gpu(make(*arguments))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_on_cpu, (make, *arguments))


def _on_gpu(work: Callable[[], Any]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def _on_cpu(make: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_THRESHOLD, 2**16)  # what is freed goes back at once, and is not there for the next one
    work = make(*arguments)
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    work()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
