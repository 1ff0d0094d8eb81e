"""What the files of a vision tower in the layout of Hugging Face say of its pictures, read where a
configuration is composed: the run then holds plain numbers.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_internvl.messages import ConfigError, did_you_mean

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # of Pillow, by number
HALF = [0.5, 0.5, 0.5]
NO_TOWER = "none"  # what conf/processor/hf.yaml says of an encoder without files
FACTS = ("mean", "std", "zoom", "filter")


def picture_size(pretrained: str | None, config: Mapping[str, Any] | None) -> int:
    """Side in pixels of the pictures that a tower is made for.

    Args:
        pretrained: a folder or a hub id that the user names; None for what `config` says.
        config: fields of the tower's configuration, which win.

    Raises:
        ConfigError: if nothing says it.
    """
    known = dict(_read(str(pretrained), "config.json") or {}) if pretrained else {}
    known = {**known, **known.get("vision_config", {}), **(config or {})}
    size = known.get("image_size")
    if size is None and {"num_patches", "patch_size"} <= set(known):
        size = round(known["num_patches"] ** 0.5) * known["patch_size"]  # NaFlex
    if size is None:
        source = f"encoder.pretrained={pretrained} does not say" if pretrained else "nothing says"
        raise ConfigError([f"{source} how large its pictures are; give encoder.image_size=PIXELS"])
    return int(size if isinstance(size, int) else size[0])


def picture_fact(pretrained: str | None, name: str) -> Any:
    """One of `FACTS` of a tower's image processor: mean and deviation of the channels; how many
    times the picture's side its shorter side has before the square in the middle is cut out, None
    where the whole picture is squashed; the filter that resizes.

    Without a file that says it, those of SigLIP.

    Raises:
        ConfigError: for another word, or files that cannot be read.
    """
    if name not in FACTS:
        raise ConfigError([f"{name!r} is no fact of pictures; {did_you_mean(name, FACTS)}"])
    if pretrained == NO_TOWER:
        why = "processor=hf prepares pictures as the tower of encoder=hf was trained to see them"
        raise ConfigError([f"{why}; choose another for this encoder, or encoder=hf"])
    return _facts(str(pretrained) if pretrained else None)[name]


@functools.cache
def _facts(place: str | None) -> dict[str, Any]:
    told = _processor(place) if place else {}
    short, crop = _side(told.get("size")), _side(told.get("crop_size"))
    crops = told.get("do_center_crop", bool(crop)) and "shortest_edge" in _sizes(told.get("size"))
    return {
        "mean": list(told.get("image_mean") or HALF),
        "std": list(told.get("image_std") or HALF),
        "zoom": short / crop if crops and short and crop else None,
        "filter": FILTERS.get(told.get("resample", 3), "bicubic"),
    }


def _processor(place: str) -> dict[str, Any]:
    told = _read(place, "preprocessor_config.json")
    if told is None:
        told = (_read(place, "processor_config.json") or {}).get("image_processor", {})
    return told


def _sizes(size: Any) -> Mapping[str, int]:
    return size if isinstance(size, Mapping) else {}


def _side(size: Any) -> int | None:
    return next(iter(size.values()), None) if isinstance(size, Mapping) else size


def _read(place: str, name: str) -> dict[str, Any] | None:
    """A file of a folder or a hub id; None where there is none.

    Raises:
        ConfigError: if it is damaged, or there is no such place.
    """
    if not Path(place).is_dir() and (Path(place).is_absolute() or place.count("/") > 1):
        raise ConfigError([f"encoder.pretrained={place}: there is no such folder; give one, or a hub id"])
    try:
        path = Path(place, name) if Path(place).is_dir() else _fetched(place, name)
        return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else None
    except (OSError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise ConfigError([f"encoder.pretrained={place}: {name} cannot be read: {text}"]) from error


def _fetched(hub_id: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(hub_id, name))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
