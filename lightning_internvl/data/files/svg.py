"""Drawings (SVG) as pixels, by resvg."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from lightning_internvl.data.bad_samples import BadSample

MOST_SHAPES = 10_000  # that are drawn, those that stand in it once and are drawn often too
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
        ValueError: if it is damaged, takes in another file, or draws too much.
    """
    import resvg_py

    text = source.decode("utf-8")
    if other := OTHER_FILE.search(text):
        raise BadSample(f"an SVG that takes in another file is not read: {other[1][:80]!r}", "unreadable image")
    _check_shapes(ET.fromstring(text.removeprefix("\ufeff")))
    return bytes(resvg_py.svg_to_bytes(svg_string=text, width=SIDE, height=SIDE))


def _check_shapes(drawing: ET.Element) -> None:
    """Raises BadSample for too many shapes, or shapes that draw themselves: `use` draws another
    part again, which may use others, so that a short file can draw for hours."""
    parts = {part.get("id"): part for part in drawing.iter() if part.get("id")}
    drawn, waiting = 0, [drawing]
    while waiting:
        part = waiting.pop()
        drawn += 1
        if drawn > MOST_SHAPES:
            raise BadSample(f"an SVG that draws more than {MOST_SHAPES} shapes is not read", "unreadable image")
        waiting += part
        if part.tag.rpartition("}")[2] == "use":
            name = next((value for key, value in part.items() if key.rpartition("}")[2] == "href"), "")
            waiting += [parts[name[1:]]] if name[:1] == "#" and name[1:] in parts else []
