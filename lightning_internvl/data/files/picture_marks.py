"""Marks of pictures and videos in text, in every published spelling, and words that look like one.

| spelling | published by |
| --- | --- |
| <image>, <video> | LLaVA, InternVL, and this project |
| Picture 1: <img>PATH</img> | Qwen-VL (`finetune.py`) |
| <Img><ImageHere></Img>, <ImageHere> | MiniGPT-4, InternLM-XComposer |
| <image_placeholder> | DeepSeek-VL |
| <|image_1|>, <image1>, <image 1> | Phi-3-vision, interleaved sets, MMMU |
| <|vision_start|><|image_pad|><|vision_end|> | Qwen2-VL's template |
| <img><IMG_CONTEXT></img> | InternVL's template |
| <im_start><image><im_end> | LLaVA with `mm_use_im_start_end` |
| <start_of_image>, <|image|>, <__media__> | Gemma 3, Llama 3.2, Flamingo and mPLUG-Owl |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from lightning_internvl.data.files.images import IMAGE_SUFFIXES
from lightning_internvl.data.files.picture_sources import Source, looks_like_path, read_pictures
from lightning_internvl.data.templates import IMAGE, VIDEO

MARK = re.compile(
    r"""(?:Picture\ ?\d+:\ ?)?<img>(?P<path>[^<>\n]+)</img>
    | (?:Picture\ ?\d+:\ ?)?<[Ii]mg>\s*(?:<ImageHere>|<image>|(?:<IMG_CONTEXT>)+)?\s*</[Ii]mg>
    | <im_start>\s*<image>\s*<im_end>
    | <\|vision_start\|>(?P<run>(?:<\|(?:image|video)_pad\|>)+)<\|vision_end\|>
    | (?:<IMG_CONTEXT>)+ | (?:<\|image_pad\|>)+ | (?P<pad>(?:<\|video_pad\|>)+)
    | <\|?(?:[Ii]mage|IMAGE|img|picture)[ _-]?(?P<number>\d{1,3})\|?>
    | <\|?(?P<video>[Vv]ideo|VideoHere|video_placeholder)\|?>
    | <\|?[Vv]ideo[ _-]?(?P<video_number>\d{1,3})\|?>
    | <\|?(?:image|Image|IMAGE|ImageHere|image_placeholder|image_token|image_soft_token|start_of_image|__media__)\|?>""",
    re.VERBOSE,
)
# Words in angle brackets or brackets that speak of pictures, and names of picture files
SUSPECT = re.compile(
    r"</?\|?_*(?:[a-z]{1,12}[_-])?(?:image|img|picture|video|audio|vision|media)[^<>\n=]{0,40}>|\[(?:IMG|IMAGE|VIDEO)[ _]?\d*\]",
    re.IGNORECASE,
)
FILE = re.compile(r"\w(?:" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + r")\b", re.IGNORECASE)


class Shown(NamedTuple):
    """What a mark stands for: a source that is written there; else the record lists it, perhaps
    under a number."""

    mark: str
    source: Source | None = None
    number: int | None = None


def read_marks(text: str) -> tuple[str, list[Shown]]:
    """A text with the marks of this project, and what each of them stands for, in order. Raises
    BadSample for a source that is none."""
    if "<" not in text:
        return text, []
    shown: list[Shown] = []

    def replaced(found: re.Match[str]) -> str:
        path, number = found["path"], found["number"] or found["video_number"]
        if path is not None and not looks_like_path(path.strip()):
            return found[0]
        of_video = found["video"] or found["video_number"] or found["pad"] or "video" in (found["run"] or "")
        source = read_pictures(path.strip())[0] if path is not None else None
        shown.append(Shown(VIDEO if of_video else IMAGE, source, None if number is None else int(number)))
        return shown[-1].mark

    return MARK.sub(replaced, text), shown


def suspects(text: str, answer: bool = False) -> Iterator[str]:
    """What looks like a mark and is read as text, and in questions the name of a picture's file."""
    if "<" in text or "[" in text:
        for found in SUSPECT.finditer(text):
            if found[0] not in (IMAGE, VIDEO):
                yield f"mark {found[0]!r}"
    if not answer and "." in text and FILE.search(text):
        yield "name of a picture in a text"
