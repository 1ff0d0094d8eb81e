"""One owner of a run's folder: a file in it that says which process trains there.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_internvl.console import console
from lightning_internvl.files import naming, remove_if_empty
from lightning_internvl.messages import ConfigError

LOCK = ".lock"
BEAT = 10.0  # seconds between two signs of life of an owner
SILENCE = 6 * BEAT  # without one, after which an owner on another machine counts as dead
MOVES = 100  # folders that are tried beside one that is taken

Owner = dict[str, Any]


@contextmanager
def owned(run_dir: Path, launches: Mapping[str, str], may_move: bool = False) -> Iterator[Path]:
    """The folder of a run that no other process trains in; another one while this lasts is refused.
    What a process that has ended without a word has left behind is taken over.

    Args:
        launches: what may start this run again, each with its attempt (`launch.launches`): a later
            attempt takes the folder of an earlier one.
        may_move: whether a folder beside it does as well, because its name is only a time.

    Raises:
        ConfigError: naming the process that trains there.
    """
    folders = [run_dir, *(run_dir.with_name(f"{run_dir.name}_{number}") for number in range(2, MOVES))]
    others: list[Owner] = []
    for folder in folders if may_move else folders[:1]:
        if (other := _take(folder, launches)) is None:
            break
        others.append(other)
    else:
        raise ConfigError([_told(run_dir, others[0])])
    done = threading.Event()
    threading.Thread(target=_show_life, args=(folder / LOCK, done), daemon=True).start()
    pid = os.getpid()
    try:
        yield folder
    finally:
        done.set()
        if os.getpid() == pid:  # and no process that was forked inside
            (folder / LOCK).unlink(missing_ok=True)
            remove_if_empty(folder)


def _take(folder: Path, launches: Mapping[str, str]) -> Owner | None:
    """Become the owner of a folder; the one that it has, if that lives."""
    lock = folder / LOCK
    while True:
        try:
            with naming(lock):
                folder.mkdir(parents=True, exist_ok=True)
                _write(lock, launches)
            return None
        except FileExistsError:
            other = _owner(lock)
        if other is None:
            continue  # it has just gone
        if not _is_earlier_attempt(other, launches):
            if _lives(other, lock):
                return other
            before = f"process {other.get('pid', '?')} on {other.get('host', '?')} has ended without a word"
            console.print(f"{before} in {folder}; this one goes on there", soft_wrap=True, markup=False)
        _put_away(lock, other)


def _write(lock: Path, launches: Mapping[str, str]) -> None:
    """Write a lock that is not there yet, whole or not at all."""
    with lock.open("x", encoding="utf-8") as file:
        try:
            json.dump({**this_process(), "launches": dict(launches)}, file)
            file.flush()
        except OSError:
            lock.unlink()
            raise


def this_process() -> Owner:
    """What tells this process from all others, in values that JSON has."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(" ", "seconds"),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """What is the same for two processes that see each other's numbers: one start of a machine, one
    container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()  # no Linux, and no containers either


def _started(pid: int | None) -> str | None:
    """When a process was started, as the kernel counts; None of one that has ended. A number is
    given to another process some time later."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def has_ended(owner: Owner) -> bool:
    """Whether a process of this machine has ended; False of those on others, of which nothing is known."""
    return owner.get("machine") == _machine() and _started(owner.get("pid")) != owner.get("started")


def _owner(lock: Path) -> Owner | None:
    """What a lock says; None if it has gone. One without a word is being written, or its machine
    has died meanwhile."""
    for _ in range(20):
        try:
            return dict(json.loads(lock.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(0.05)
    return {}


def _is_earlier_attempt(other: Owner, launches: Mapping[str, str]) -> bool:
    noted = other.get("launches", {})
    return any(name in noted and noted[name] != attempt for name, attempt in launches.items())


def _lives(other: Owner, lock: Path) -> bool:
    if other.get("machine") == _machine():
        return not has_ended(other)
    console.print(f"{_told(lock.parent, other)}: waits up to {SILENCE:.0f} s for a sign of it", soft_wrap=True, markup=False)
    seen, last = _sign(lock), time.monotonic()
    while time.monotonic() - last < SILENCE:
        time.sleep(BEAT / 10)
        if _sign(lock) != seen:
            return lock.exists()
    return False


def _sign(lock: Path) -> int:
    """Of its own clock: those of two machines differ."""
    return lock.stat().st_mtime_ns if lock.exists() else 0


def _put_away(lock: Path, dead: Owner) -> None:
    """Remove the lock of a dead process, unless another process has just done so and owns it."""
    aside = lock.with_name(f"{LOCK}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        lock.rename(aside)
        if _owner(aside) != dead and not lock.exists():
            aside.rename(lock)
        aside.unlink(missing_ok=True)


def _show_life(lock: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _told(run_dir: Path, other: Owner) -> str:
    who = f"process {other.get('pid', '?')} on {other.get('host', '?')}, since {other.get('since', '?')}"
    return f"{run_dir} is the folder of a run that trains now ({who}); stop that one, or choose another paths.run"
