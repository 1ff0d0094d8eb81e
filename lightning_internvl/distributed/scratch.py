"""Folders for temporary files that go with their process, a killed one's with the next one.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_internvl.distributed.run_lock import has_ended, this_process
from lightning_internvl.files import TEMPORARY, read_json, write_json

OWNER = ".owner.json"  # in such a folder: the process that uses it


@contextmanager
def scratch_folder(what: str) -> Iterator[Path]:
    """An empty folder with a word in its name, removed at the end. Those of processes that were killed
    are removed first; what names no owner is not ours, or its process has just begun."""
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError, ValueError):  # of somebody else, or another process removes it too
            owner = read_json(folder / OWNER)
            if isinstance(owner, dict) and has_ended(owner):
                shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{what}_") as made:
        write_json(Path(made) / OWNER, this_process())
        yield Path(made)
