"""Signals that end a run. While a stage trains they are noted, so that the step is finished and
saved; elsewhere they end it at once.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from types import FrameType

# the last but one by batch systems, the last by a terminal that is closed
TOLD = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C", "SIGUSR1": "SIGUSR1", "SIGUSR2": "SIGUSR2", "SIGHUP": "SIGHUP"}
NAMES = {getattr(signal, name): told for name, told in TOLD.items() if hasattr(signal, name)}
# exit status of a run that ends before its last step without a signal, as by trainer.max_time
NOT_FINISHED = 3
# seconds in which a second signal is the same one: `timeout` and torchrun tell a process and its
# group
REPEATED = 1.0
# seconds for which a data worker outlives a SIGTERM, so that the step can be finished
WORKER_GRACE = 60
OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"  # watches the processes that the trainer started


class RunStopped(SystemExit):
    """A run that ends early without a fault; no `Exception`, lest a sample be blamed.

    Args:
        reason: one sentence, or its beginning.
        code: exit status: 128 and the number of a signal, or `NOT_FINISHED`.
        alone: the other processes of the run need not know of it.
    """

    code: int

    def __init__(self, reason: str, code: int, *, alone: bool = False) -> None:
        super().__init__(code)
        self.reason, self.alone = reason, alone

    def __str__(self) -> str:
        return self.reason

    def told(self, reason: str) -> RunStopped:
        """The same stop in other words."""
        return RunStopped(reason, self.code, alone=self.alone)

    @classmethod
    def by(cls, number: int, *, alone: bool = False) -> RunStopped:
        """Stopped by a signal."""
        return cls(f"stopped by {NAMES[signal.Signals(number)]}", 128 + number, alone=alone)


class Watch:
    """The handlers of this process for the signals of `NAMES`.

    Attributes:
        received: the signal that waits for the end of a step; 0 without one.
        finishes_steps: whether a stage trains, which looks at `received` after each step.
    """

    def __init__(self) -> None:
        self.numbers: tuple[signal.Signals, ...] = ()  # those that are handled, while they are
        self.pid, self.received, self.last, self.finishes_steps = 0, 0, 0.0, False

    @contextmanager
    def installed(self, *numbers: signal.Signals) -> Iterator[None]:
        """Handle these signals inside; only the main thread of Python can. Under `nohup` a SIGHUP
        stays ignored."""
        if threading.current_thread() is not threading.main_thread() or self.numbers:
            yield
            return
        before = {number: signal.getsignal(number) for number in numbers}
        for number in [n for n, handler in before.items() if n.name == "SIGHUP" and handler is signal.SIG_IGN]:
            del before[number]
        self.numbers, self.pid, self.received, self.last = tuple(before), os.getpid(), 0, float("-inf")
        self._install()
        try:
            yield
        finally:
            self.numbers, self.finishes_steps = (), False
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def begin(self) -> None:
        """A stage begins to train. The trainer has just put a handler of its own before ours, which
        is taken away again: it would end training with exit status 0, and start a collective inside
        of the handler."""
        self.finishes_steps = bool(self.numbers)
        self._install()

    def end(self) -> None:
        """A stage no longer trains."""
        self.finishes_steps = False

    def _install(self) -> None:
        for number in self.numbers:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a data worker; the process that started it ends it
            return
        now, repeated = time.monotonic(), time.monotonic() - self.last < REPEATED
        self.last = now
        if repeated:
            return
        if self.finishes_steps and not self.received:
            self.received = number
            _say(f"\n{NAMES[signal.Signals(number)]}: finishes the step and saves; once more ends at once\n")
            return
        _say("")
        raise RunStopped.by(number, alone=True)


def _say(text: str) -> None:
    """To the terminal; where that was closed, what is said from now on goes nowhere, and is no
    fault."""
    for output in (1, 2):
        try:
            os.write(output, text.encode() if output == 2 else b"")
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), output)


WATCH = Watch()  # signals belong to a process, so there is one


def tell_of_dead_processes() -> None:
    """Let the trainer say in words of ours that it kills all processes of a run because one has
    ended with a fault, which it tells in its log alone."""
    observer = logging.getLogger(OBSERVER)
    if not observer.filters:
        observer.setLevel(logging.INFO)
        observer.addFilter(_told_of_dead_process)


def _told_of_dead_process(record: logging.LogRecord) -> bool:
    if found := re.search(r"rank: (\d+)\] Child process with PID \d+ terminated with code (-?\d+)", record.getMessage()):
        rank, code = map(int, found.groups())
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        told = f"the process of rank {rank} {how}, and the trainer kills the others, which would wait for it"
        os.write(2, f"\nerror: {told}; go on with resume=RUN\n".encode())
    return False


def _cannot_hand_on(error: BaseException, batch: object) -> None:
    """In the thread of a worker that hands on batches."""
    os.write(2, f"a data process cannot hand on a batch: {error}\n".encode(errors="backslashreplace"))
    os._exit(1)


def shield_worker(worker: int) -> None:
    """For `worker_init_fn` of a data loader: a signal to the whole group does not take the data
    away from the step at work. Without a main process a worker ends by itself, and so does one that
    cannot hand on a batch, as where shared memory is full: the main process would wait for ever."""
    setattr(Queue, "_on_queue_feeder_error", staticmethod(_cannot_hand_on))  # noqa: B010 (of this process alone)
    for number in NAMES:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "SIGALRM"):  # on Windows
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
