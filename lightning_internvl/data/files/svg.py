"""Drawings (SVG) as pixels, by resvg."""

from __future__ import annotations

import re

from lightning_internvl.data.bad_samples import BadSample

SIDE = 1024  # pixels of the longer side, whatever size a drawing asks for
BEGINNINGS = (b"<svg", b"<?xml", b"<!--", b"<!doctype svg")
# What a drawing names that is neither in itself nor a link: resvg would read the file.
OTHER_FILE = re.compile(r"""href\s*=\s*["']\s*(?!\#|data:|https?:|mailto:)([^"']+)""", re.IGNORECASE)


def is_svg(head: bytes) -> bool:
    """Whether a file that begins like this is a drawing; a web page may hold one too."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith(BEGINNINGS) and b"svg" in text and b"<html" not in text


def svg_to_png(source: bytes) -> bytes:
    """A drawing as a PNG file whose longer side has `SIDE` pixels.

    Raises:
        ValueError: if it is damaged, or takes in another file.
    """
    import resvg_py

    text = source.decode("utf-8")
    if other := OTHER_FILE.search(text):
        raise BadSample(f"an SVG that takes in another file is not read: {other[1][:80]!r}", "unreadable image")
    return bytes(resvg_py.svg_to_bytes(svg_string=text, width=SIDE, height=SIDE))
