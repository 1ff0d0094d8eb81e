"""Conversations that share rows, or batches of one length: what `data.packing` asks for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch

from lightning_internvl.choices import IGNORE_INDEX
from lightning_internvl.data.bad_samples import BadSample
from lightning_internvl.data.collate.base import Collator, Prepared, Sample, pad_id, pad_rows, picture_keys
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.packing import (
    PACKED,
    WINDOW_ROWS,
    Grouping,
    choose_alike,
    choose_row,
    is_enough,
)
from lightning_internvl.data.collate.pairs_of_answers import longest_row


class PackedChats(ChatCollator):
    """Conversations to packed rows: one behind the other, and none sees another.

    `pack` makes a batch of rows: what `ChatCollator` gives, with B rows of several samples, and
    `segments`, the lengths of the samples in each row. `keys`, `image_counts`, pictures and videos
    are those of all samples, row by row. The first token of a sample carries no label, because no
    state of its own stands before it. `stack` goes on to make a row of each sample.

    Args:
        row_tokens: tokens of a row; None: `max_length`.
        row_tiles: tiles of all pictures of a row; None: any number. Pictures without tiles count by
            their visual tokens, a square of the processor's size as one.
        settings: of `ChatCollator`.

    Raises:
        ValueError: if a row could not hold a single sample or picture of the largest size.
    """

    def __init__(self, *given: Any, row_tokens: int | None = None, row_tiles: int | None = None, **settings: Any) -> None:
        super().__init__(*given, **settings)
        if row_tokens is not None and row_tokens < self.max_length:
            raise ValueError(
                f"data.packing_tokens={row_tokens} is less than the {self.max_length} tokens that one conversation may have; "
                "raise it, or lower data.chats_collate.max_length (or max_text_tokens)"
            )
        if row_tiles is not None and row_tiles < self.processor.max_tiles:
            fewer = f", or lower data.processor.{self.processor.limit}" if self.processor.limit else ""
            raise ValueError(
                f"data.packing_tiles={row_tiles} is less than the {self.processor.max_tiles} tiles "
                f"that one picture may have; raise it{fewer}"
            )
        self.row_length = row_tokens or self.max_length
        self.quick_check = row_tiles is None
        self.row_tiles, self.blank_tiles = row_tiles, row_tiles or self.row_length

    @property
    def row_visual(self) -> int | None:
        """The visual tokens of a row's pictures; None: any number."""
        return None if self.row_tiles is None else self.row_tiles * self.tokens_per_tile

    def prepare(self, sample: Sample) -> Prepared:
        """A sample that fits into a row. Raises ValueError naming it otherwise."""
        prepared = super().prepare(sample)
        visual = self.visual(prepared)
        if self.row_visual is not None and visual > self.row_visual:
            raise BadSample(
                f"sample {sample['key']}: its pictures have {visual / self.tokens_per_tile:g} "
                f"tiles, more than data.packing_tiles={self.row_tiles}",
                kind="too many tiles",
            )
        return prepared

    def visual(self, prepared: Prepared) -> int:
        """Visual tokens of a sample."""
        return sum(map(sum, self._lengths(prepared["pictures"], prepared["videos"], prepared["sizes"])))

    def pack(self, rows: Sequence[Sequence[Prepared]]) -> dict[str, Any]:
        """A batch of rows of prepared samples."""
        samples = [one for row in rows for one in row]
        # with rejected answers rows have a twin, behind all of them
        found = iter(self.rows(samples))
        parts = [[next(found) for _ in row] for row in (*rows, *(rows if self.preferences else ()))]
        ids = [list(chain.from_iterable(part[0] for part in row)) for row in parts]
        labels = [[x for part in row for x in (IGNORE_INDEX, *part[1][1:])] for row in parts]
        input_ids, mask = pad_rows(ids, pad_id(self.tokenizer))
        return {
            "keys": [one["key"] for one in samples],
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": pad_rows(labels, IGNORE_INDEX)[0],
            "segments": [[len(part[0]) for part in row] for row in parts],
            **self._inputs(samples),
            **picture_keys(samples, self.picture_keys),
            **self._pairs(samples),
            "image_counts": torch.tensor([len(one["pictures"]) for one in samples]),
        }


class PackedRows:
    """Packed rows.

    Args:
        rows: of a batch.
        window: rows' worth of samples that wait.
    """

    def __init__(self, chats: PackedChats, rows: int, window: int = WINDOW_ROWS) -> None:
        self.chats, self.choices, self.window = chats, rows, window

    def size(self, prepared: Prepared) -> tuple[int, int]:
        """Tokens and visual tokens of a sample."""
        return longest_row(prepared), self.chats.visual(prepared)

    def enough(self, sizes_N2: np.ndarray) -> bool:
        """Whether a window full of samples waits."""
        tokens, visual = sizes_N2.sum(axis=0).tolist()
        return is_enough(tokens, visual, self.chats.row_length, self.chats.row_visual, self.window)

    def choose(self, sizes_N2: np.ndarray) -> list[int]:
        """The samples of the next row."""
        return choose_row(sizes_N2[:, 0], sizes_N2[:, 1], self.chats.row_length, self.chats.row_visual)

    def batch(self, groups: Sequence[Sequence[Prepared]]) -> dict[str, Any]:
        """A packed batch."""
        return self.chats.pack(groups)


class LengthBuckets:
    """Batches of samples of nearly one length, each in a row of its own.

    Args:
        samples: of a batch.
        window: batches' worth of samples that wait.
    """

    choices = 1

    def __init__(self, collate: Collator, samples: int, window: int = WINDOW_ROWS) -> None:
        self.collate, self.samples, self.window = collate, samples, window

    def size(self, prepared: Prepared) -> tuple[int, int]:
        """Tokens of a sample; those of its answer too, where an encoder-decoder reads it apart."""
        return longest_row(prepared), 0

    def enough(self, sizes_N2: np.ndarray) -> bool:
        """Whether a window full of samples waits."""
        return len(sizes_N2) >= self.window * self.samples

    def choose(self, sizes_N2: np.ndarray) -> list[int]:
        """The samples of the next batch."""
        return choose_alike(sizes_N2[:, 0], self.samples)

    def batch(self, groups: Sequence[Sequence[Prepared]]) -> dict[str, Any]:
        """A padded batch."""
        return self.collate.stack(groups[0])


def grouping_of(kind: str | None, collate: Collator, size: int, window: int | None = None) -> Grouping | None:
    """What makes a stage's batches; None for those in the order in which samples come.

    Args:
        kind: packed or bucketed.
        size: of a batch, in rows or samples.
        window: rows' or batches' worth of samples that wait.
    """
    if kind is None:
        return None
    window = window or WINDOW_ROWS
    if kind == PACKED:  # a stage that packs has the collator that does
        return PackedRows(cast(PackedChats, collate), size, window)
    return LengthBuckets(collate, size, window)
