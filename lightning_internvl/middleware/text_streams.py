"""What a middleware that reads pictures and text together is asked to read."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Task = Literal["itm", "itc", "itg"]  # match, contrast, write


class TextStream(NamedTuple):
    """One text for every image, read under the mask of one task."""

    task: Task
    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L), 1 on text, 0 on padding
