"""The one console of a run: wide enough for tables; of several processes one speaks."""

from __future__ import annotations

import sys

from rich.console import Console

from lightning_internvl.launch import is_helper

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120, quiet=is_helper())
