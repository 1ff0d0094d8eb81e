"""Vision-language alignment: encoder, middleware and decoder, trained in stages."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["load_pretrained"]

PYTHON = (3, 11), (3, 13)  # the oldest and the newest that its requirements have wheels for

if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:  # the commands import this first
    sys.exit(f"lightning_internvl needs Python 3.11 to 3.13; this is {sys.version.split()[0]}, {sys.executable}")


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that commands which need no model start without importing torch.
    if name == "load_pretrained":
        from lightning_internvl.checkpoints.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
