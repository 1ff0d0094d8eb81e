"""Text in which one placeholder stands for a whole picture, as LLaVA and its descendants write it,
made into text in which one stands for each visual token (official `llava_arch.py`).

Letters: B rows, L text length, T visual tokens of a picture, X length of the longest row when
expanded, N pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_internvl.choices import IGNORE_INDEX

EMPTY = -1  # an id that is no word: its embedding is zero


class Expanded(NamedTuple):
    """Rows after expansion, all (B, X); `pixel_values` are the pictures that the text shows."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    pixel_values: Tensor | None


@dataclass(frozen=True)
class ImagePlaceholders:
    """How rows are expanded.

    Args:
        id: the placeholder of a picture; after expansion it stands T times.
        keep_padding: tokens that the mask hides stay where they are (older LLaVA code,
            InternVL-Chat with QLLaMA); otherwise they are removed first.
        side: where shorter rows are filled up.
        max_length: longer rows are cut, as LLaVA does, even inside a picture; None refuses nothing
            and cuts nothing.
    """

    id: int = -200
    keep_padding: bool = False
    side: str = "right"
    max_length: int | None = None

    def expand(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None, pixel_values: Tensor | None, tokens: int
    ) -> Expanded:
        """Rows with `tokens` placeholders a picture.

        A row without a picture may come with a blank one among `pixel_values`, which is left out.
        """
        targets = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        samples = zip(input_ids, attention_mask, targets, strict=True)
        rows = [self._row(ids, mask, target, tokens) for ids, mask, target in samples]
        ids, mask, target = (self._filled([row[i] for row in rows], value) for i, value in enumerate((EMPTY, 0, IGNORE_INDEX)))
        counts = (input_ids == self.id).sum(dim=1)
        return Expanded(ids, mask, None if labels is None else target, _shown(pixel_values, counts))

    def _row(self, ids: Tensor, mask: Tensor, target: Tensor, tokens: int) -> list[Tensor]:
        if not self.keep_padding:
            ids, mask, target = (t[mask.bool()] for t in (ids, mask, target))
        repeats = torch.where(ids == self.id, tokens, 1)
        target = target.masked_fill(ids == self.id, IGNORE_INDEX)
        return [t.repeat_interleave(repeats)[: self.max_length] for t in (ids, mask, target)]

    def _filled(self, rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.side)


def _shown(pixel_values: Tensor | None, counts_B: Tensor) -> Tensor | None:
    """The pictures without the blank ones of rows that show none."""
    if pixel_values is None or len(pixel_values) == int(counts_B.sum()):
        return pixel_values
    consumed = counts_B.clamp(min=1)
    if len(pixel_values) != int(consumed.sum()):
        raise ValueError(
            f"{len(pixel_values)} pictures for {int(counts_B.sum())} placeholders "
            f"({int((counts_B == 0).sum())} rows without one may bring a blank picture each)"
        )
    return pixel_values[(counts_B > 0).repeat_interleave(consumed)]


def places_of(ids_BL: Tensor, token_id: int | None) -> Tensor:
    """Where a placeholder stands, nowhere for a model without it: bool (B, L)."""
    return torch.zeros_like(ids_BL, dtype=torch.bool) if token_id is None else ids_BL == token_id


def check_places(places_BL: Tensor, tokens: int, images: int, what: str = "image(s)") -> None:
    """Raises ValueError where placeholders and visual tokens differ in number."""
    if places_BL.is_meta:  # shapes only, nothing to count
        return
    message = (
        f"{images} {what} give {tokens} visual tokens, but the text holds another number of placeholders; "
        "the encoder's image size, the middleware or max_length differ from what the text was prepared for"
    )
    if places_BL.is_cuda:
        # an error without a host-device sync
        torch._assert_async(places_BL.sum() == tokens, message)
    elif int(places_BL.sum()) != tokens:
        raise ValueError(f"{message} ({int(places_BL.sum())} placeholders)")
