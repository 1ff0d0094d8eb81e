"""LLaVA before its encoder: pictures padded to squares (1.5) and cut to squares (v1)."""

from __future__ import annotations

import torch
from golden import Fixture
from torch import Tensor

from lightning_internvl.data.processors.basic import CenterCrop
from lightning_internvl.data.processors.padded import PadSquare
from lightning_internvl.data.processors.pixels import to_pixels

SYSTEM = "LLaVA preprocessing (pad to square, resize and crop)"
ECHOES: frozenset[str] = frozenset()
END = "_uint8_hwc"


def knows(fixture: Fixture) -> bool:
    return fixture.config.get("model_type") == "llava_preprocess"


def run(fixture: Fixture) -> dict[str, Tensor]:
    config, found = fixture.config, {}
    settings = (config["size"], config["image_mean"], config["image_std"])
    pad, crop = PadSquare(*settings), CenterCrop(*settings)
    for name, image in ((n.removesuffix(END), x.numpy()) for n, x in fixture.inputs.items() if n.endswith(END)):
        found[f"{name}.square{END}"] = torch.tensor(pad.square(image))
        found |= {
            f"{name}.{kind}": to_pixels(torch.tensor(make(image)), *settings[1:])[0]
            for kind, make in (("pad", pad), ("crop", crop))
        }
    return found
