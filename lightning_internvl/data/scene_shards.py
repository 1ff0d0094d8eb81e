"""Tar shards of built-in scenes, some of them spoilt on purpose: to try out streaming and filtering
without a download.

    python -m lightning_internvl.data.scene_shards to=FOLDER pairs=100000
    python -m lightning_internvl.data.scene_shards to=FOLDER pairs=100000 spoilt=0.3 seed=1

Other settings are `per_shard=500` and `image_size=64`.

Each record is as img2dataset writes it: KEY.jpg, KEY.txt, and KEY.json, whose "fault" says how the
pair was spoilt (null: it was not). Equal settings give equal files.
"""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from lightning_internvl.data.scenes import language as say
from lightning_internvl.data.scenes.datasets import ScenePairs
from lightning_internvl.data.shards.tar import Record, TarWriter
from lightning_internvl.messages import check_number, did_you_mean

FAULTS = {
    "mismatched": 0.4,  # the caption of another scene
    "copied": 0.2,  # picture and caption of an earlier pair
    # The picture of an earlier pair at another JPEG quality, with a caption of its own
    "recompressed": 0.1,
    "tiny": 0.1,  # a picture of a few pixels
    "stretched": 0.05,  # a picture of extreme proportions
    "foreign": 0.1,  # a caption in a script that the model has never read
    "file_name": 0.05,  # a caption that says nothing
}
FOREIGN = ("На картинке несколько разных вещей", "Красивая картинка с предметами", "Вещи на цветном фоне")
STREAM = 7  # so that faults are drawn independently of scenes and of what is said about them


class SpoiltScenes:
    """Pairs of scenes as records of a shard.

    Args:
        spoilt: share of pairs with a fault.
        faults: shares of the faults among those.
        format: of the pictures: jpg or png.
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = 64,
        spoilt: float = 0.0,
        faults: Mapping[str, float] = FAULTS,
        format: str = "jpg",  # noqa: A002  # as the user calls it
    ) -> None:
        if not 0 <= spoilt <= 1:
            raise ValueError(f"spoilt={spoilt} must be a share from 0 to 1")
        if unknown := [name for name in faults if name not in FAULTS]:
            raise ValueError(f"there is no fault {unknown[0]!r}; {did_you_mean(unknown[0], FAULTS)}")
        if format not in ("jpg", "png"):
            raise ValueError(f"format={format!r} is not known; valid choices: jpg, png")
        self.pairs = ScenePairs(seed, "train", image_size)
        self.seed, self.spoilt, self.faults, self.format = seed, spoilt, dict(faults), format

    def record(self, index: int) -> Record:
        """Pair number `index`."""
        fault, rng = self.fault(index)
        source = self._earlier(index, rng) if fault in ("copied", "recompressed") else index
        pair = self.pairs[source]
        caption, image, quality = pair["caption"], pair["image"], 90
        if fault == "mismatched":
            caption = self._other(pair, index, rng)
        elif fault == "recompressed":
            caption, quality = say.caption(self.pairs.scene(source), rng, pair["language"]), 60
        elif fault in ("tiny", "stretched"):
            image = _resized(image, (12, 12) if fault == "tiny" else (image.shape[1] * 4, max(16, image.shape[0] // 4)))
        elif fault == "foreign":
            caption = str(rng.choice(FOREIGN)) + f" {int(rng.integers(100))}"
        elif fault == "file_name":
            caption = f"IMG_{int(rng.integers(10**4)):04d}.JPG"
        said = {"key": f"{index:09d}", "language": pair["language"], "fault": fault}
        return {"key": f"{index:09d}", self.format: _encode(image, self.format, quality), "txt": caption, "json": said}

    def fault(self, index: int) -> tuple[str | None, np.random.Generator]:
        """How a pair is spoilt, and where its chance comes from."""
        rng = np.random.default_rng([self.seed, STREAM, index])
        if index == 0 or rng.random() >= self.spoilt:
            return None, rng
        return say.draw(self.faults, rng), rng

    def _earlier(self, index: int, rng: np.random.Generator) -> int:
        """An earlier pair that is not spoilt; the first one never is."""
        source = int(rng.integers(index))
        while self.fault(source)[0] is not None:
            source -= 1
        return source

    def _other(self, pair: Mapping[str, Any], index: int, rng: np.random.Generator) -> str:
        """What is said of another scene, in the same language."""
        scene = self.pairs.scene(index + int(rng.integers(1, 10**6)))
        return say.caption(scene, rng, pair["language"])


def write_scene_shards(
    to: str | Path,
    pairs: int,
    per_shard: int = 1000,
    seed: int = 0,
    image_size: int = 64,
    spoilt: float = 0.0,
    format: str = "jpg",  # noqa: A002
    faults: Mapping[str, float] = FAULTS,
) -> list[Path]:
    """Write shards 00000.tar, 00001.tar, ... into a folder.

    Raises:
        ValueError: for settings that make no sense.
    """
    for name, value in {"pairs": pairs, "per_shard": per_shard}.items():
        check_number(name, value, above=0, whole=True)
    scenes = SpoiltScenes(seed, image_size, spoilt, faults, format)
    files = []
    for shard, start in enumerate(range(0, pairs, per_shard)):
        files.append(Path(to) / f"{shard:05d}.tar")
        with TarWriter(files[-1]) as tar:
            for index in range(start, min(start + per_shard, pairs)):
                tar.write(scenes.record(index))
    return files


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _encode(image: np.ndarray, kind: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    if kind == "jpg":
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    else:
        Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def main(arguments: Sequence[str]) -> None:
    """Write shards as the command line says."""
    names = list(inspect.signature(write_scene_shards).parameters)
    given = dict(one.partition("=")[::2] for one in arguments)
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"there is no setting {unknown[0]!r}; {did_you_mean(unknown[0], names)}")
    if missing := [name for name in ("to", "pairs") if name not in given]:
        raise ValueError(f"give {' and '.join(f'{name}=VALUE' for name in missing)}")
    texts = ("to", "format")
    settings: dict[str, Any] = {name: value if name in texts else yaml.safe_load(value) for name, value in given.items()}
    files = write_scene_shards(**settings)
    print(f"{len(files)} shards in {settings['to']}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
