"""Vision-language alignment: encoder, middleware and decoder, trained in stages."""

from __future__ import annotations

from typing import Any

__all__ = ["load_pretrained"]


def __getattr__(name: str) -> Any:
    # Looked up on first use, so that commands which need no model start without importing torch.
    if name == "load_pretrained":
        from lightning_internvl.checkpoints.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
