"""Each picture of the page, held once and as small as it can be."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

from PIL import Image, UnidentifiedImageError

KEPT_AS_IS = 12_000  # bytes of a picture that is not worth making smaller
ROOMY = 2_000_000  # bytes of pictures after which further ones become thumbnails


class Pictures:
    """Holds each picture of the page once; everywhere else it is a reference."""

    def __init__(self) -> None:
        self._ids: dict[str, str | None] = {}
        self._symbols: list[str] = []
        self._sides: dict[str, tuple[int, int]] = {}  # width and height of those that could be read
        self._size = 0

    def use(self, encoded: Any, label: str, placed: str = 'class="picture"') -> str:
        """An svg element that shows a base64 picture; a blank if it cannot be read."""
        if not isinstance(encoded, str):
            encoded = ""
        if encoded not in self._ids:
            self._ids[encoded] = self._add(encoded)
        name = self._ids[encoded]
        start = f'<svg {placed} viewBox="0 0 100 100" role="img" aria-label="{escape(label)}">'
        return start + (f'<use href="#{name}"/></svg>' if name else '<rect class="missing" width="100" height="100"/></svg>')

    def place(self, encoded: Any) -> str:
        """Where a picture that was used lies in its square, which it need not fill, as CSS."""
        width, height = self._sides.get(encoded, (1, 1))
        across, down = (100 * side / max(width, height) for side in (width, height))
        return f"left:{50 - across / 2:.4g}%;top:{50 - down / 2:.4g}%;width:{across:.4g}%;height:{down:.4g}%"

    def _add(self, encoded: str) -> str | None:
        try:
            data, mime, self._sides[encoded] = self._small(base64.b64decode(encoded, validate=True))
        except (ValueError, OSError, UnidentifiedImageError):
            return None
        self._size += len(data)
        name = f"picture-{len(self._symbols)}"
        source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        image = f'<image href="{source}" width="100" height="100"/>'
        self._symbols.append(f'<symbol id="{name}" viewBox="0 0 100 100">{image}</symbol>')
        return name

    def _small(self, data: bytes) -> tuple[bytes, str, tuple[int, int]]:
        with Image.open(io.BytesIO(data)) as image:
            sides = image.size
            if len(data) <= KEPT_AS_IS and self._size < ROOMY:
                return data, Image.MIME[str(image.format)], sides
            side = 192 if self._size < ROOMY else 64
            image.thumbnail((side, side))
            flat = Image.new("RGB", image.size, "white")
            rgba = image.convert("RGBA")
            flat.paste(rgba, mask=rgba)
        smaller = io.BytesIO()
        flat.save(smaller, "JPEG", quality=80)
        return smaller.getvalue(), "image/jpeg", sides

    def symbols(self) -> str:
        return "".join(self._symbols)
