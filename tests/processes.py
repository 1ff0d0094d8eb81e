"""Processes for tests, forked from one that has imported what they need: each starts in a moment, not in seconds."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.multiprocessing

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ["torch", "torchmetrics", "transformers", "lightning", "lightning_internvl.pipeline", "callbacks"]
METHOD = "forkserver"
LONG = 240  # seconds after which a process that is still there tells where its threads are, in what it prints


def together(work: Callable[..., None], *arguments: Any, count: int) -> None:
    """Run `work(rank, *arguments)` in so many processes; an error of one of them is raised."""
    _context()
    torch.multiprocessing.start_processes(work, arguments, nprocs=count, start_method=METHOD)


class Started:
    """`python SCRIPT ARGUMENTS`, begun in a process of its own; what it prints goes to files.

    Args:
        variables: of the environment, beside those of this process.
        cwd: the folder it runs in.
        before: is called first, as to plant a fault.
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        cwd: Path = ROOT,
        variables: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp())
        environment = dict(os.environ) | dict(variables or {})
        told = (str(ROOT / script), arguments, str(self.folder), environment, str(cwd), before)
        self.process = _context().Process(target=_command, args=told)
        self.process.start()
        self.pid: int = self.process.pid

    def ended(self) -> bool:
        return self.process.exitcode is not None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 600) -> int:
        """Its exit status, as `subprocess` has it."""
        self.process.join(seconds)
        assert self.ended(), f"still there after {seconds} s: {self.err}"
        return self.process.exitcode

    @property
    def out(self) -> str:
        return (self.folder / "1").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "2").read_text()


def _context() -> Any:
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(IMPORTED)  # type: ignore[attr-defined]
    return context


def _command(
    script: str, arguments: tuple[str, ...], folder: str, environment: dict[str, str], cwd: str, before: Callable[[], None] | None
) -> None:
    for number in (1, 2):
        os.dup2(os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(LONG, file=2)
    gc.freeze()  # what was imported before the fork
    # Or its data processes would be started as this one was: anew, and unseen by their parent's end.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the system's own
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if before is not None:
        before()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
