"""Pictures cross to the device as bytes: a quarter of the size, and the same values bit by bit after normalising there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_internvl.data.collate.labels import LabelCollator
from lightning_internvl.data.module import StageData
from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import CenterCrop, Processor, RandomCrop, Squash, Tiles
from lightning_internvl.data.processors.hf_square import HFSquare
from lightning_internvl.data.processors.padded import PaddedPair, PaddedSquare, PadSquare
from lightning_internvl.data.processors.pixels import as_bytes

PROCESSORS = [
    Squash(28),
    CenterCrop(28),
    RandomCrop(28, flip=True),
    Tiles(28, max_tiles=4),
    PadSquare(28),
    PaddedSquare(28),
    PaddedPair(14, 28),
    HFSquare(28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), zoom=1.2),
    AnyResolution(112),
]


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 70), (90, 33), (28, 28))]


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
@pytest.mark.parametrize("count", [0, 3])
def test_bytes_become_the_same_values_bit_by_bit(processor: Processor, count: int) -> None:
    shown = [processor(picture, [0, i]) for i, picture in enumerate(pictures()[:count])]
    expected = processor.inputs(shown)
    with as_bytes():
        crossing = processor.inputs(shown)
    found = processor.normalised(crossing)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].equal(value)
        if value.dtype == torch.float32:
            assert crossing[name].dtype == torch.uint8
            assert crossing[name].nbytes * 4 == value.nbytes
    assert processor.normalised(expected)["pixel_values"] is expected["pixel_values"]


def test_videos_become_the_same_values_under_their_own_name() -> None:
    processor = AnyResolution(112, frame_pixels=(28 * 28, 56 * 56))
    video = processor.video(np.stack([pictures()[0]] * 5), 2.0)
    with as_bytes():
        crossing = processor.inputs([video])["pixel_values"]
    found = processor.normalised({"pixel_values_videos": crossing})["pixel_values_videos"]
    assert found.equal(processor.inputs([video])["pixel_values"])


class _Labelled(torch.utils.data.Dataset[dict[str, Any]]):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"key": str(index), "image": np.full((448, 448, 3), index, dtype=np.uint8), "label": 0}

    def __len__(self) -> int:
        return 4


def test_a_picture_of_448_pixels_crosses_in_06_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    collate = LabelCollator(Squash(448))
    data = StageData(_Labelled(), collate, batch_size=2, batches=1, endless=False)
    monkeypatch.setattr(data, "trainer", _Trainer())
    batch = next(iter(data.train_dataloader()))
    assert batch["pixel_values"].nbytes == 2 * 448 * 448 * 3
    moved = data.transfer_batch_to_device(data.on_before_batch_transfer(batch, 0), torch.device("cpu"), 0)
    indices = [int(key) for key in moved["keys"]]
    expected = collate.stack([collate.prepare(data.dataset[index]) for index in indices])["pixel_values"]
    assert moved["pixel_values"].equal(expected)


class _Module:
    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        return {}


class _Trainer:
    global_rank, world_size, strategy, lightning_module = 0, 1, None, _Module()
