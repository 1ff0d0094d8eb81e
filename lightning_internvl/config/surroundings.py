"""Errors of the machine around a run, whatever library raises them: a full disk, a folder that is
read-only, too many open files, a data process that was killed. Each is told as one sentence.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator

from lightning_internvl.files import TEMPORARY, UNABLE, errno_of

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
OPEN = (errno.EMFILE, errno.ENFILE)
FEWER = "data.num_workers=0 prepares samples in the training process itself"
FILES = "let more be open (ulimit -n 4096), or take fewer data.num_workers"
# what libraries say without an error of the system, and what it means
SIGNS = (
    (
        r"unable to (?:open|write to|allocate).*shared memory|Unexpected bus error|out of shared memory|signal: Bus error",
        f"shared memory is full (df -h /dev/shm; docker run --shm-size=8g), through which data processes give batches; {FEWER}",
    ),
    (r"received \d+ items of ancdata|Too many open files", f"too many files are open; {FILES}"),
    (
        r"DataLoader worker \(pid.*\) (?:exited unexpectedly|is killed by signal)",
        f"a process that prepares data has ended; what it said itself is the reason (no shared memory: docker run --shm-size=8g; "
        f"too many open files: ulimit -n 4096), without a word it was killed, as by a machine without memory left; {FEWER}",
    ),
    (r"No usable temporary directory", "there is no folder for temporary files; TMPDIR=FOLDER names one with room"),
    (r"(?:Could not|Can't) determine home directory", "there is no home folder; HOME=FOLDER names one"),
    (r"can't start new thread", f"no further thread can be started (ulimit -u); {FEWER}"),
    (
        r"Unable to allocate .* for an array|DefaultCPUAllocator: can't allocate memory|Cannot allocate memory",
        "the machine's memory is full; a smaller batch_size or fewer data.num_workers need less",
    ),
)


def explain_surroundings(error: BaseException) -> str | None:
    """One sentence for an error of the machine, with the thing and what helps; None for another."""
    for one in _chain(error):
        number = errno_of(one)
        if number in UNABLE:
            return _of_system(number or 0, getattr(one, "filename", None), str(one))
        for pattern, sentence in SIGNS:
            if found := re.search(f".*(?:{pattern}).*", str(one)):
                return f"{sentence} ({found[0].strip()[:200]})"
        if isinstance(one, MemoryError):
            return "the machine's memory is full; a smaller batch_size or fewer data.num_workers need less"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__


def _of_system(number: int, name: str | bytes | None, text: str) -> str:
    place = os.fsdecode(name) if isinstance(name, str | bytes) else ""
    fault = f"cannot read or write {place}: {os.strerror(number)}" if place else text
    if number in OPEN:
        return f"{fault}; {FILES}"
    temporary = place.startswith(os.path.join(tempfile.gettempdir(), "")) and TEMPORARY in place
    if number in FULL:
        helps = "TMPDIR=FOLDER names another folder for temporary files" if temporary else "what stood there before is untouched"
        return f"{fault}; make room there (df -h tells); {helps}"
    return f"{fault}; paths.run=FOLDER chooses another folder for the run"
