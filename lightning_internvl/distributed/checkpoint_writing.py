"""Checkpoints that are written while training goes on: a copy is taken on the host, and a thread
writes it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_internvl.files import into_place

Write = Callable[[], Any]  # writes the draft, and returns when it is whole


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A copy on the host that no later step changes; tensors that are one stay one."""
    copies: dict[Any, Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        key = value.data_ptr(), value.shape, value.stride(), value.dtype, value.numel() or id(value)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map(copied, state)


def save(value: Any, path: Path) -> None:
    """`torch.save` through a file of Python, whose errors say why (a full disk), as those of
    PyTorch's own do not.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # of the end of the archive, behind the reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def begin_write(checkpoint: dict[str, Any], draft: Path) -> Write:
    """Take a copy of a checkpoint that one process has whole; what is returned writes it."""
    taken = snapshot(checkpoint)
    return lambda: save(taken, draft)


class Writer:
    """Writes one checkpoint at a time in a thread of its own.

    Attributes:
        seconds: that the last one took in the thread.
        size: bytes of the last one.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.job: Future[None] | None = None
        self.seconds, self.size = 0.0, 0

    def begin(self, write: Write, draft: Path, path: Path, *, moves: bool) -> None:
        """Write a draft and, in the process that moves it, put it into its place."""
        self.job = self.pool.submit(self._work, write, draft, path, moves)

    def _work(self, write: Write, draft: Path, path: Path, moves: bool) -> None:
        begun = time.monotonic()
        write()
        if moves:
            files = draft.rglob("*") if draft.is_dir() else [draft]
            self.size = sum(file.stat().st_size for file in files)
            into_place(draft, path)
        self.seconds = time.monotonic() - begun

    def wait(self) -> bool:
        """Wait for what is being written; False if nothing was. Raises what has gone wrong."""
        job, self.job = self.job, None
        if job is not None:
            job.result()
        return job is not None
