"""Other libraries resize by the Pillow that is installed; here both sides begin with the direction
that Pillow 13 begins with."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def order_of_pillow_13(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        width, height = size
        saved, spent = image.height - height, image.width - width
        if width != image.width and saved > 0 and saved > 2 * spent:
            image = original(image, (image.width, height), *args, **options)
        return original(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
