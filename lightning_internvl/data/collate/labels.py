"""Batches of pictures and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_internvl.data.collate.base import Prepared, Sample, SquareReader, picture_keys, pixels_of, tiles_of
from lightning_internvl.data.processors.basic import Processor


class LabelCollator(SquareReader):
    """Samples to `pixel_values` (B, 3, S, S) float32, `labels` (B,) int64 and `keys`."""

    picture_keys = False  # whether batches name their pictures (see `feature_cache`)

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return self.stack([self.prepare(sample) for sample in samples])

    def prepare(self, sample: Sample) -> Prepared:
        """The square of one picture. Raises ValueError naming the sample."""
        tiles = tiles_of(self.processor, sample["image"], sample["key"], sample.get("draw"))
        return {"key": sample["key"], "tiles": tiles, "label": sample["label"]}

    def stack(self, prepared: Sequence[Prepared]) -> dict[str, Any]:
        """A batch of prepared pictures."""
        return {
            "keys": [one["key"] for one in prepared],
            "pixel_values": pixels_of(self.processor, [one["tiles"] for one in prepared]),
            **picture_keys(prepared, self.picture_keys),
            "labels": torch.tensor([one["label"] for one in prepared]),
        }

    def blank(self, batch_size: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """A batch without data: what the memory of a step is measured with."""
        side = self.processor.image_size
        return {
            "pixel_values": torch.zeros(batch_size, 3, side, side, device=device),
            "labels": torch.zeros(batch_size, dtype=torch.int64, device=device),
        }
