"""What is said about a class so that a picture can be named without training (CLIP, Radford et al. 2021, section 3.1.4).

A prompt has "{}" where the name stands; a class is the mean of its prompts (`evaluation.tasks.ZeroShot`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_PICTURES = (
    "bad photo", "low resolution photo", "cropped photo", "bright photo", "dark photo", "close-up photo", "black and white photo",
    "pixelated photo", "jpeg corrupted photo", "blurry photo", "good photo", "photo", "sculpture", "rendering", "tattoo",
    "drawing", "painting", "doodle", "sketch", "rendition",
)  # fmt: skip
_LOOKS = ("hard to see", "clean", "dirty", "cool", "large", "nice", "weird", "small")
_MADE_OF = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
_OTHER = ("graffiti of {} *", "art of {} *", "itap of {} *", "{} * in a video game")
_PATTERNS = (
    *(f"a {picture} of {{}} *" for picture in _PICTURES),
    *(f"a photo of {{}} {look} *" for look in _LOOKS),
    *(f"{{}} {stuff} *" for stuff in _MADE_OF),
    *_OTHER,
)
# The 80 prompts of CLIP for ImageNet: 38 with "a" and with "the", and four more.
IMAGENET = tuple(
    pattern.replace("*", "{}") + "."
    for pattern in (
        *(pattern.format(article) for pattern in _PATTERNS for article in ("a", "the")),
        "a photo of many *",
        "a photo of my *",
        "a photo of one *",
        "itap of my *",
    )
)
PLAIN = ("a photo of a {}.",)
CHINESE = ("一张{}的照片。", "一张{}的图片。", "{}")
SETS: Mapping[str, Sequence[str]] = {"imagenet": IMAGENET, "plain": PLAIN, "chinese": CHINESE}


def prompts(names: Sequence[str], kind: str = "imagenet") -> list[list[str]]:
    """All prompts of every class.

    Args:
        names: of the classes; underscores, as in names of folders, are read as spaces.
        kind: a name in `SETS`.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in SETS:
        raise ValueError(f"prompts {kind!r} are not known; valid choices: {', '.join(SETS)}")
    return [[pattern.replace("{}", name.replace("_", " ")) for pattern in SETS[kind]] for name in names]
