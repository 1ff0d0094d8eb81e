"""Rows of words, pictures and videos as Qwen2-VL and its children read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO = 55, 56
P = IMAGE
Row = tuple[list[Any], int]  # pieces, and padding; negative on the left
# A piece is a number of words, or (placeholder, merged t, h, w).
ROWS: dict[str, list[Row]] = {
    "pictures, right padding": [([2, (P, 1, 2, 3), 3, (P, 1, 3, 1), 2], 0), ([9], 1), ([4, (P, 1, 1, 2), 4], 1)],
    "pictures, left padding": [([2, (P, 1, 2, 3), 3, (P, 1, 2, 3), 2], 0), ([9], -1), ([4, (P, 1, 1, 2), 4], -1)],
    "videos": [([2, (VIDEO, 3, 2, 3), 3], 1), ([1, (VIDEO, 1, 2, 2), 2, (VIDEO, 2, 1, 2), 6], 1)],
    "both": [([2, (VIDEO, 2, 2, 3), 3, (P, 1, 2, 2), 2], -1), ([(P, 1, 1, 1), 7], -1)],
    "larger": [([2, (P, 1, 5, 3), 3, (VIDEO, 2, 3, 7), 1], 0), ([(P, 1, 4, 4), 2], -1)],
    "text alone": [([8], 0), ([5], -1)],
}


def rows_of(model: Any, rows: list[Row], shown: Callable[[int, int, int], list[int]]) -> dict[str, Tensor]:
    """A batch of rows.

    Args:
        shown: what stands in the text for a piece, of its placeholder, merged steps and merged patches of a step.
    """
    vision = model.config.vision_config
    merge, values = vision.spatial_merge_size, 3 * vision.temporal_patch_size * vision.patch_size**2
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    texts = []
    for pieces, _ in rows:
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids += torch.randint(3, 50, (piece,)).tolist()
            else:
                token, t, h, w = piece
                grids[token].append([t, merge * h, merge * w])
                ids += shown(token, t, h * w)
        texts.append(ids)
    width = max(len(ids) + abs(padding) for ids, (_, padding) in zip(texts, rows, strict=True))
    ids_BL, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (ids, (_, padding)) in enumerate(zip(texts, rows, strict=True)):
        start = width - len(ids) if padding < 0 else 0
        ids_BL[row, start : start + len(ids)], mask[row, start : start + len(ids)] = torch.tensor(ids), 1
    found = {"input_ids": ids_BL, "attention_mask": mask, "labels": torch.where((mask == 1) & (ids_BL < 50), ids_BL, -100)}
    found["mm_token_type_ids"] = ((ids_BL == IMAGE) + 2 * (ids_BL == VIDEO)).int()
    for token, grid, pixels in ((IMAGE, "image_grid_thw", "pixel_values"), (VIDEO, "video_grid_thw", "pixel_values_videos")):
        if grids[token]:
            found[grid] = torch.tensor(grids[token])
            found[pixels] = torch.randn(int(found[grid].prod(dim=1).sum()), values)
    return found
