"""The one console of a run. Off a terminal, lines are wide enough for the tables."""

from __future__ import annotations

import sys

from rich.console import Console

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
