"""The one console of a run: wide enough for tables; of several processes one speaks."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console

from lightning_internvl.launch import is_helper
from lightning_internvl.messages import told

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120, quiet=is_helper())


class Speaker:
    """An output without secrets, in which characters that it cannot show are spelt out instead of
    ending the run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """As of any output."""
        shown = told(text)
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def speaking() -> Iterator[None]:
    """Inside, what is printed and warned of goes through a `Speaker`, and what Python tells of an
    error at the end is without secrets too."""
    before = sys.stdout, sys.stderr
    sys.excepthook = lambda *error: print(told("".join(traceback.format_exception(*error))), file=sys.stderr)
    sys.stdout, sys.stderr = Speaker(before[0]), Speaker(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
