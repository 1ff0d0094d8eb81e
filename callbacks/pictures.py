"""Pictures with what was said of them, to the loggers that take pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image


def log_pictures(loggers: Iterable[Any], key: str, shown: Mapping[str, Any], step: int) -> None:
    """Log to those with `log_image`, as W&B and MLflow, and to TensorBoard.

    Args:
        key: what they show; a number is added for each.
        shown: `images`, (H, W, 3) uint8 each, and a `caption` for each.
    """
    for logger in loggers if shown["images"] else ():
        if hasattr(logger, "log_image"):
            logger.log_image(key=key, step=step, **shown)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            pairs = zip(shown["images"], shown["caption"], strict=True)
            for number, (picture, text) in enumerate(pairs):
                tag = f"{key}/{number}"
                logger.experiment.add_image(tag, picture, step, dataformats="HWC")
                logger.experiment.add_text(tag, text, step)


def case_pictures(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cases of a journal as `log_pictures` shows them."""
    return _shown((case["png"], _answered(case)) for case in cases)


def sample_pictures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Samples of a stage, see `callbacks.Samples`: what was answered about a picture or written to
    it, or else which caption is the nearest to it."""
    truths = found.get("captions_true")
    if truths is None:  # the user's own pictures, with a list of answers each
        said = [" ".join(map(_answered, answers)) for answers in found["answers"]]
    else:
        words = found.get("captions")
        if words is None:
            nearest = [row.index(max(row)) for row in found["similarity"]]
            words = [f"nearest: {truths[place]}" for place in nearest]
        said = [f"{word} (true: {truth})" for word, truth in zip(words, truths, strict=False)]
    return _shown(zip(found["images"], said, strict=False))


def _answered(case: Mapping[str, Any]) -> str:
    return f"{case['question']} {case['answer']} (true: {case['truth']})"


def _shown(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Base64 PNGs with their texts; a question without a picture is left out."""
    kept = [pair for pair in pairs if pair[0]]
    return {"images": [_decoded(png) for png, _ in kept], "caption": [text for _, text in kept]}


def _decoded(png: str) -> np.ndarray:
    """(H, W, 3) uint8"""
    return np.array(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
