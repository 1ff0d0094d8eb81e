"""The one console of a run: off a terminal wide enough for the tables; of several processes only the first one speaks."""

from __future__ import annotations

import os
import sys

from rich.console import Console

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120, quiet=os.environ.get("LOCAL_RANK", "0") != "0")
