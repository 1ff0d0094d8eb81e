"""Whether parts agree on how pictures and videos are cut up and written, said before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_internvl.choices import Config
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.data.templates import load_template, template_names


def patch_faults(encoder: Config, told: Mapping[str, Any], middleware: Config) -> Iterator[str]:
    """Whether square pictures are whole patches, and these whole blocks of a pixel shuffle.

    Args:
        told: what the encoder's class says of itself; `leaves_margin` where published towers do not
            see what is left of a picture beside its patches.
    """
    size, patch, factor = encoder.get("image_size"), encoder.get("patch_size"), middleware.get("factor")
    if told.get("gives", "rows") != "rows" or not isinstance(size, int) or not isinstance(patch, int) or min(size, patch) < 1:
        return
    step, why = patch, f"encoder.patch_size={patch}"
    if isinstance(factor, int) and factor > 1:
        step, why = patch * factor, f"{why} times middleware.factor={factor}"
    elif told.get("leaves_margin"):
        return
    if size // patch * patch % step if told.get("leaves_margin") else size % step:
        fitting = [step * n for n in (size // step, size // step + 1) if n]
        yield f"encoder.image_size={size} is no multiple of {why}; fitting sizes: {', '.join(map(str, fitting))}"


def block_size_faults(encoder: Config, middleware: Config, decoder: Config, processor: Config) -> Iterator[str]:
    """Whether all parts cut pictures of any size into the same blocks of patches."""
    places = {
        "patches to a side of a block": (
            ("encoder.merge_size", encoder.get("merge_size")), ("middleware.factor", middleware.get("factor")),
            ("decoder.merge_size", decoder.get("merge_size")), ("data.processor.merge_size", processor.get("merge_size")),
        ),
        "pixels to a side of a patch": (
            ("encoder.patch_size", encoder.get("patch_size")), ("data.processor.patch_size", processor.get("patch_size")),
        ),
        "frames of a step": (("encoder.frames", encoder.get("frames")), ("data.processor.frames", processor.get("frames"))),
    }  # fmt: skip
    for what, named in places.items():
        given = {name: value for name, value in named if value is not None}
        if len(set(given.values())) > 1:
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            yield f"{what} differ, so that grids would not divide: {said}; give all of them one number"


def time_faults(settings: StageSettings) -> Iterator[str]:
    """Whether the chat format writes the times that the decoder needs before the steps of a video."""
    name, apart = (
        {**settings.data.chats_collate, **settings.collate}.get("template"),
        (settings.parts.decoder or {}).get("steps_apart"),
    )
    if apart is None or name not in template_names() or not settings.data.video_token:
        return
    if apart != load_template(name).timestamps:
        fitting = "decoder.steps_apart=true with data.chats_collate.template=qwen3_vl, false with one without times"
        yield f"decoder.steps_apart={str(apart).lower()} and template {name} write videos in two ways; give {fitting}"
