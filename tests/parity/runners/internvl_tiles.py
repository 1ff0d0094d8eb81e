"""InternVL 1.5 before its encoder and behind it: grids and tiles of pictures, and the pixel shuffle."""

from __future__ import annotations

import torch
from golden import Fixture
from torch import Tensor

from lightning_internvl.data.processors.basic import Tiles, choose_grid
from lightning_internvl.middleware.pixel_shuffle import pixel_shuffle

SYSTEM = "InternVL 1.5 preprocessing (dynamic tiles, pixel shuffle)"
ECHOES: frozenset[str] = frozenset()


def knows(fixture: Fixture) -> bool:
    return fixture.config.get("model_type") == "internvl_preprocess"


def run(fixture: Fixture) -> dict[str, Tensor]:
    return _grids(fixture) | _tiles(fixture) | _shuffles(fixture)


def _grids(fixture: Fixture) -> dict[str, Tensor]:
    config, found = fixture.config, {}
    for most in config["max_nums"]:
        sizes = fixture.inputs["sizes_wh"].tolist()
        grids = [choose_grid(w, h, config["image_size"], config["min_num"], most) for w, h in sizes]
        tiles = torch.tensor(grids).prod(dim=1)
        found |= {
            f"grid_wh_max{most}": torch.tensor(grids),
            f"tiles_max{most}": tiles,
            f"tiles_with_thumbnail_max{most}": tiles + (tiles != 1),
        }
    return found


def _tiles(fixture: Fixture) -> dict[str, Tensor]:
    config, found = fixture.config, {}
    for number, most in enumerate(config["small_tile_max_num"]):
        processor = Tiles(config["small_tile_size"], config["min_num"], most)
        image = fixture.inputs[f"image{number}_uint8_hwc"].numpy()
        found[f"image{number}_tiles_uint8_nhwc"] = torch.tensor(processor(image))
    return found


def _shuffles(fixture: Fixture) -> dict[str, Tensor]:
    factor, end = round(1 / fixture.config["scale_factor"]), "_in_nhwc"
    maps = {name.removesuffix(end): x for name, x in fixture.inputs.items() if name.endswith(end)}
    return {f"{name}_{v}": pixel_shuffle(x, factor=factor, version=v) for name, x in maps.items() for v in ("v1", "v2")}
