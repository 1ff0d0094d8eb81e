"""Processes of `train.py` for `benchmarks/soak.py`, and what is done to them while they train. Linux alone: it reads /proc."""

from __future__ import annotations

import functools
import os
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from processes import Started

LOOK = 0.01  # seconds between two looks at a process
SIZES = (0, 19)  # powers of two between which lies the size in bytes that a file reaches on a disk that is full


class Trained:
    """`python train.py WORDS`. What it and its processes say comes through pipes, which a full disk leaves alone.

    Args:
        variables: of its environment.
    """

    def __init__(self, words: list[str], variables: dict[str, str]) -> None:
        self.said, self.begun = ["", ""], threading.Event()  # stdout and stderr
        self.folder = tempfile.TemporaryDirectory(prefix="soak_pipes_")
        pipes = [Path(self.folder.name, name) for name in ("out", "err")]
        for pipe in pipes:
            os.mkfifo(pipe)
        # A pipe ends with the last process that holds it: a data process or a rank that stays is noticed, too.
        self.readers = [threading.Thread(target=self._read, args=item, daemon=True) for item in enumerate(pipes)]
        for reader in self.readers:
            reader.start()
        self.process = Started("train.py", *words, variables=variables, before=functools.partial(prepare, *map(str, pipes)))
        self.begun.wait(60)

    def _read(self, place: int, pipe: Path) -> None:
        with pipe.open(errors="replace") as stream:  # which waits for the process to be there
            self.begun.set()
            self.said[place] = stream.read()

    def ended(self, limit: float) -> int | None:
        """Its exit status once all its processes are gone; None if they are not within so many seconds, and are killed."""
        until = time.monotonic() + limit
        self.process.process.join(limit)
        for reader in self.readers:
            reader.join(max(until - time.monotonic(), 5))
        hangs = not self.process.ended() or any(reader.is_alive() for reader in self.readers)
        if hangs:
            for pid in [*self.ranks(), *self.workers(), self.process.pid]:
                kill(pid)
        self.process.process.join()
        for reader in self.readers:
            reader.join(5)
        self.folder.cleanup()
        return None if hangs else self.process.wait()

    def lives(self) -> bool:
        """Whether the process that was started is there."""
        return not self.process.ended()

    def ranks(self) -> list[int]:
        """The processes of a run of several but the first one."""
        return [pid for pid in descendants(self.process.pid) if is_rank(pid)]

    def workers(self) -> list[int]:
        """The data processes of all of them: forked, while a rank is a command of its own."""
        owners = [self.process.pid, *self.ranks()]
        children = {child for owner in owners for child in descendants(owner, deep=False)}
        return sorted(children - set(owners))


def prepare(*pipes: str) -> None:
    """In a process that begins: what it prints goes to pipes; a full disk is none for data processes, which write to memory."""
    for number, pipe in enumerate(pipes, 1):
        os.dup2(os.open(pipe, os.O_WRONLY), number)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    os.register_at_fork(after_in_child=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))


def descendants(pid: int, deep: bool = True) -> Iterator[int]:
    """The processes that a process has started, and those of these."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield child
        if deep:
            yield from descendants(child)


def is_rank(pid: int) -> bool:
    """Whether a process is a command that trains, not one forked from it to read data."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        own, its = (Path(f"/proc/{number}/cmdline").read_bytes() for number in (pid, parent))
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"train.py" in own and own != its


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def one_of(trained: Trained, who: Callable[[], list[int]], draw: random.Random) -> int | None:
    """One of the processes that there are, once there are some; None if the run ends before."""
    while trained.lives():
        if found := who():
            return draw.choice(found)
        time.sleep(LOOK)
    return None


# --- faults: each does something to a run, and says whether it has ---------------------------------------------------


def send(number: int, trained: Trained, draw: random.Random) -> bool:
    """A signal to the process that was started."""
    kill(trained.process.pid, number)
    return trained.lives()


def send_rank(number: int, trained: Trained, draw: random.Random) -> bool:
    """A signal to one of the other processes."""
    pid = one_of(trained, trained.ranks, draw)
    kill(pid, number) if pid else None
    return pid is not None


def kill_worker(trained: Trained, draw: random.Random) -> bool:
    """A data process dies, as where memory runs out."""
    pid = one_of(trained, trained.workers, draw)
    kill(pid) if pid else None
    return pid is not None


def fill_disk(trained: Trained, draw: random.Random) -> bool:
    """No file of the first process grows beyond a size from now on: the system refuses it to Python, PyTorch and safetensors."""
    try:
        _, most = resource.prlimit(trained.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(trained.process.pid, resource.RLIMIT_FSIZE, (int(2 ** draw.uniform(*SIZES)) - 1, most))
    except ProcessLookupError:
        return False
    return True


def fill_disk_of_pair(trained: Trained, draw: random.Random) -> bool:
    """The same, after the other one has been started, which would inherit it with its data processes."""
    return one_of(trained, trained.ranks, draw) is not None and fill_disk(trained, draw)


STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # which a run hears
FAULTS: dict[str, Callable[[Trained, random.Random], bool]] = {
    "killed": functools.partial(send, signal.SIGKILL),
    **{name: functools.partial(send, getattr(signal, name)) for name in STOPS},
    "full_disk": fill_disk,
    "dead_worker": kill_worker,
}
OF_PAIRS = FAULTS | {
    "full_disk": fill_disk_of_pair,
    "dead_rank": functools.partial(send_rank, signal.SIGKILL),
    "SIGTERM_to_a_rank": functools.partial(send_rank, signal.SIGTERM),
}


OF_RANK = ("dead_rank", "SIGTERM_to_a_rank")
# What the first process says of the end of another one, and what the trainer says before it kills the first one for it.
RANK_ENDED, ALL_KILLED = "error: another process of this run has ended", "error: the process of rank"


def wrong_end(fault: str, code: int | None, said: str) -> str | None:
    """What is wrong with how a run ended after a fault; None if nothing is. It may have been through before the fault."""
    if code is None:
        return "hangs"
    if fault == "killed":
        return None if code in (-signal.SIGKILL, 0) else f"ended with {code}"
    # at the start of a line: PyTorch's log may hold one, of what it has caught while it looks for packages
    if re.search(r"^Traceback \(most recent call last\)", said, re.MULTILINE):
        return f"a traceback, and {code}"
    others = (code == -signal.SIGKILL and ALL_KILLED in said) or (code > 0 and RANK_ENDED in said)
    if code == 0 or (others and fault in (*OF_RANK, "dead_worker")):
        return None
    number = getattr(signal, fault.removesuffix("_to_a_rank"), None)
    if fault == "dead_rank" or (code < 0 and number is None):
        return f"ended with {code}"
    # A signal that comes early meets no handler of ours; one to another process stops the first one by agreement alone.
    if number is not None and code not in (128 + number, *((-number,) if fault in STOPS else ())):
        return f"ended with {code}"
    if code > 0 and "stopped by" not in said and "error:" not in said:
        return f"ended with {code} and no message"
    return None
