"""How pictures and text are prepared, as the files that transformers' processors read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import PreTrainedTokenizerBase

from lightning_internvl.config.targets import OURS
from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import BICUBIC, CenterCrop, Processor, RandomCrop, Squash, Tiles
from lightning_internvl.data.processors.best_grid import BestGrid
from lightning_internvl.data.processors.padded import FILTERS, PaddedPair, PaddedSquare, PadSquare
from lightning_internvl.data.templates import IMAGE
from lightning_internvl.export.official_code import conversation_fields

Fields = dict[str, Any]
# by layout
QWEN = {
    "qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
}  # fmt: skip
GRIDS = {"llava_next": "LlavaNextProcessor", "llava_onevision": "LlavaOnevisionProcessor"}


@dataclass(frozen=True)
class ProcessorFiles:
    """What a processor of transformers needs beside the weights.

    Attributes:
        kind: its class; None where the layout has only a processor of pictures, or none that does
            what ours does.
        image: of `preprocessor_config.json`; None without one.
        settings: of `processor_config.json`.
        tokens: special tokens that the tokenizer answers for under these names.
        renamed: tokens that the tokenizer has under other names.
        picture: what the chat template writes for a picture, which the processor turns into all its
            placeholders.
        film: likewise for a video; None where there are none.
        video: of `video_preprocessor_config.json`, which only classes of videos have.
        instructed: whether the middleware reads text through a tokenizer of its own, in
            `qformer_tokenizer/`.
    """

    kind: str | None
    image: Fields | None
    settings: Fields = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    picture: str = ""
    film: str | None = None
    video: Fields | None = None
    instructed: bool = False


def processor_files(layout: str, config: Mapping[str, Any], view: Any) -> ProcessorFiles:
    """The processor of a layout that prepares what a run's collators prepare.

    Args:
        config: the `config.json` of the export.
        view: the collators of the run (`inference.collators.View`).
    """
    chats, pairs = view.chats, view.pairs
    if chats is None:
        image = image_fields(pairs.processor.whole(), layout) if pairs else None
        kind = {"clip": "CLIPProcessor", "siglip": "SiglipProcessor"}.get(layout)
        return ProcessorFiles(kind if image else None, image)
    names, own = chats.image_tokens, _framed(chats, chats.image_tokens.context)
    film = _framed(chats, names.video) if names.video else None
    image = image_fields(chats.processor, layout)
    fields = _processor_fields(layout, config, chats, view.model)
    if layout == "internvl_chat":  # whose readers (its code, vLLM) put the tokens of a picture there
        own = IMAGE
    if image is None or fields is None:
        return ProcessorFiles(None, image, picture=own, film=film)
    common: Fields = {"image": image, "picture": own, "film": film}
    return ProcessorFiles(**common | fields)


def _processor_fields(layout: str, config: Mapping[str, Any], chats: ChatCollator, model: Any) -> Fields | None:
    """The fields of `ProcessorFiles` for layouts that have a processor; None for the others, or
    where it writes another text."""
    names, tokens = chats.image_tokens, chats.tokens_per_tile
    if layout == "internvl_native" and names.start and names.end:
        special = {"start_image_token": names.start, "end_image_token": names.end, "context_image_token": names.context}
        base = getattr(chats.tokenizer, "video_token", None)
        if (film := names.video or base or _unused_token(chats.tokenizer)) is None:
            return None
        special["video_token"] = film
        size = {"height": chats.processor.image_size, "width": chats.processor.image_size}
        video = {"video_processor_type": "InternVLVideoProcessor", **_pixel_fields(chats.processor), "size": size}
        return {
            "kind": "InternVLProcessor", "settings": {"image_seq_length": tokens},
            "tokens": special, "picture": names.context, "video": video,
        }  # fmt: skip
    if layout == "llava_native":
        settings = {
            "patch_size": config["vision_config"]["patch_size"],
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            "num_additional_image_tokens": int(model.encoder.embeddings.class_embedding is not None),
            "image_token": names.context,
        }
        return {"kind": "LlavaProcessor", "settings": settings, "tokens": {"image_token": names.context}}
    if layout in GRIDS and isinstance(chats.processor, BestGrid):
        return _grid_fields(layout, config, chats, model)
    if layout in QWEN and isinstance(chats.processor, AnyResolution):
        special = {"image_token": names.context, "video_token": names.video or names.context}
        return {"kind": QWEN[layout], "tokens": special, "video": _qwen_video_fields(chats.processor, layout)}
    if layout in ("blip2_hf", "instructblip_hf") and not (names.start or names.end):
        # These classes put the pictures before the text by themselves, and know their placeholder
        # by this name only.
        instructed = layout == "instructblip_hf"
        return {
            "kind": "InstructBlipProcessor" if instructed else "Blip2Processor", "settings": {"num_query_tokens": tokens},
            "renamed": {names.context: IMAGE}, "picture": "", "instructed": instructed,
        }  # fmt: skip
    if layout == "deepseek_vl_hf":
        kind = "DeepseekVLHybridProcessor" if isinstance(chats.processor, PaddedPair) else "DeepseekVLProcessor"
        return {"kind": kind, "settings": {"num_image_tokens": tokens}, "tokens": {"image_token": names.context}}
    return None


def _grid_fields(layout: str, config: Mapping[str, Any], chats: ChatCollator, model: Any) -> Fields:
    """Of LLaVA-NeXT and LLaVA-OneVision."""
    names, size, patch = chats.image_tokens, chats.processor.image_size, config["vision_config"]["patch_size"]
    special = {"image_token": names.context, **({"video_token": names.video} if names.video else {})}
    settings: Fields = {"vision_feature_select_strategy": config["vision_feature_select_strategy"], **special}
    first = int(model.encoder.embeddings.class_embedding is not None)
    if layout == "llava_next":
        settings |= {"patch_size": patch, "num_additional_image_tokens": first}
        return {"kind": GRIDS[layout], "settings": settings, "tokens": special}
    tokens = (size // patch) ** 2 + first
    settings |= {"num_image_tokens": tokens, "vision_aspect_ratio": config["vision_aspect_ratio"]}
    square = {"height": size, "width": size}
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor", **_pixel_fields(chats.processor), "size": square}
    return {"kind": GRIDS[layout], "settings": settings, "tokens": special, "video": video}


def _unused_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token that no text holds, for a class that asks for one of videos."""
    used = (tokenizer.eos_token, tokenizer.bos_token)
    return next((token for token in (tokenizer.pad_token, tokenizer.unk_token) if token and token not in used), None)


def _framed(chats: ChatCollator, token: str) -> str:
    return f"{chats.image_tokens.start or ''}{token}{chats.image_tokens.end or ''}"


def image_fields(processor: Processor, layout: str) -> Fields | None:
    """The `preprocessor_config.json` that does what a processor of ours does without chance; None
    if no class there does, or the processor is from outside this project."""
    side = processor.image_size
    if not f"{type(processor).__module__}.".startswith(OURS):
        return None
    square = {"height": side, "width": side}
    if layout == "internvl_native":  # whose processor counts tiles
        if isinstance(processor, Tiles) and processor.thumbnail:
            low, high = processor.limits
            tiles: Fields | None = {"crop_to_patches": True, "min_patches": low, "max_patches": high}
        else:
            tiles = {"crop_to_patches": False, "min_patches": 1, "max_patches": 1} if _squashes(processor) else None
        return tiles and {"image_processor_type": "GotOcr2ImageProcessor", **_pixel_fields(processor), "size": square, **tiles}
    if isinstance(processor, AnyResolution):
        return {"image_processor_type": "Qwen2VLImageProcessor", **_pixel_fields(processor), **_patch_fields(processor)}
    if isinstance(processor, BestGrid):
        several = layout == "llava_onevision"
        if layout not in GRIDS or processor.alone_with_others != several:
            return None
        kind = GRIDS[layout].replace("Processor", "ImageProcessor")
        points = [[rows * side, columns * side] for rows, columns in processor.grids]
        sizes = {"size": square} if several else {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
        return {"image_processor_type": kind, **_pixel_fields(processor), **sizes, "do_pad": True, "image_grid_pinpoints": points}
    if isinstance(processor, PaddedSquare):
        return _padded_fields(processor)
    if isinstance(processor, PadSquare):
        edges = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True, "do_pad": True}
        fits = processor.colour == tuple(int(255 * mean) for mean in processor.mean)
        return {"image_processor_type": "LlavaImageProcessor", **_pixel_fields(processor), **edges} if fits else None
    if isinstance(processor, CenterCrop):
        edges = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
        return {"image_processor_type": "CLIPImageProcessor", **_pixel_fields(processor), **edges}
    if layout == "internvl_chat" and isinstance(processor, Tiles):  # a tile; how many there are is said in config.json
        edges = {"size": square, "crop_size": square, "do_center_crop": False}
        return {"image_processor_type": "CLIPImageProcessor", **_pixel_fields(processor), **edges}
    if not _squashes(processor):
        return None
    if "blip" in layout:
        return {"image_processor_type": "BlipImageProcessor", **_pixel_fields(processor), "size": square}
    return {
        "image_processor_type": "CLIPImageProcessor", **_pixel_fields(processor),
        "size": square, "crop_size": square, "do_center_crop": False,
    }  # fmt: skip


def _squashes(processor: Processor) -> bool:
    return isinstance(processor, Squash | RandomCrop)


def _pixel_fields(processor: Processor, resample: Image.Resampling = BICUBIC) -> Fields:
    return {
        "do_convert_rgb": True, "do_resize": True, "resample": int(resample), "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(processor.mean), "image_std": list(processor.std),
    }  # fmt: skip


def _patch_fields(processor: AnyResolution) -> Fields:
    # read by releases before `size`
    limits = {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}
    size = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
    sizes = {"patch_size": processor.patch_size, "merge_size": processor.merge_size, "temporal_patch_size": processor.frames}
    return {"size": size, **limits, **sizes}


def _qwen_video_fields(processor: AnyResolution, layout: str) -> Fields:
    low, high = processor.frame_pixels
    sampled = {"fps": processor.fps, "min_frames": processor.min_frames, "max_frames": processor.max_frames}
    sizes = {"size": {"shortest_edge": low, "longest_edge": high}, "min_pixels": low, "max_pixels": high}
    if layout.startswith("qwen3_vl"):  # whose limits are of a whole video
        high = processor.video_tokens * processor.factor**2 * processor.frames
        sizes = {"size": {"shortest_edge": low, "longest_edge": max(low, high)}}
    return {
        "video_processor_type": "Qwen3VLVideoProcessor" if layout.startswith("qwen3_vl") else "Qwen2VLVideoProcessor",
        **_pixel_fields(processor),
        **_patch_fields(processor),
        **sizes,
        **sampled,
    }


def _padded_fields(processor: PaddedSquare) -> Fields | None:
    sizes = {
        "size": {"height": processor.image_size, "width": processor.image_size},
        "min_size": processor.min_side,
        "do_pad": True,
    }
    if not isinstance(processor, PaddedPair):
        return {"image_processor_type": "DeepseekVLImageProcessor", **_pixel_fields(processor), **sizes}
    high = processor.high
    large = {
        "high_res_size": {"height": high.image_size, "width": high.image_size}, "high_res_resample": int(BICUBIC),
        "high_res_image_mean": list(high.mean), "high_res_image_std": list(high.std),
    }  # fmt: skip
    small = _pixel_fields(processor, FILTERS[processor.low_filter])
    return {"image_processor_type": "DeepseekVLHybridImageProcessor", **small, **sizes, **large}


def config_fields(config: Mapping[str, Any], chats: ChatCollator | None) -> Fields:
    """What `config.json` says about pictures: how InternVL's code cuts them
    (`configuration_internvl_chat.py`), and the tokens by which Qwen2-VL's finds them
    (`get_rope_index`)."""
    if chats is None:
        return {}
    if config.get("model_type") in QWEN:
        frame = {"start": chats.image_tokens.start, "end": chats.image_tokens.end}
        ids = {name: chats.tokenizer.convert_tokens_to_ids(token) for name, token in frame.items() if token}
        return {f"vision_{name}_token_id": number for name, number in ids.items()}
    if config.get("model_type") != "internvl_chat":
        return {}
    processor = chats.processor
    low, high = processor.limits if isinstance(processor, Tiles) else (1, 1)
    return {
        **conversation_fields(chats.template), "pad2square": False,
        "force_image_size": processor.image_size,
        "dynamic_image_size": isinstance(processor, Tiles), "min_dynamic_patch": low,
        "max_dynamic_patch": high, "use_thumbnail": getattr(processor, "thumbnail", False),
    }  # fmt: skip
