"""Pictures that are no whole patches, or these no whole blocks of a pixel shuffle, are named with sizes that fit."""

from __future__ import annotations

import pytest

from lightning_internvl.config.fit_videos import patch_faults

SHUFFLE, MARGIN = {"factor": 2}, {"leaves_margin": True}


@pytest.mark.parametrize(("size", "patch", "told", "middleware", "fitting"), [
    (448, 14, {}, {}, None),
    (50, 12, {}, {}, "48, 60"),
    (384, 14, MARGIN, {}, None),           # SigLIP so400m
    (384, 14, MARGIN, SHUFFLE, "364, 392"),  # whose 27 patches are no whole blocks
    (448, 14, {}, SHUFFLE, None),
    (48, 16, {}, SHUFFLE, "32, 64"),
    (10, 16, {}, {}, "16"),
    (50, 12, {"gives": "blocks"}, {}, None),  # any resolution, fitted by the processor
    (None, 12, {}, {}, None),
])  # fmt: skip
def test_sizes(size: int | None, patch: int, told: dict, middleware: dict, fitting: str | None) -> None:
    found = list(patch_faults({"image_size": size, "patch_size": patch}, told, middleware))
    assert len(found) == (fitting is not None)
    assert not found or found[0].endswith(f"fitting sizes: {fitting}")
